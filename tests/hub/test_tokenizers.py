"""Tokenizers of other libraries: every file, key and class is used, without effect, or refused by name."""

import copy
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ufbert.data.encode import encode_texts
from ufbert.data.prepare import Recipe
from ufbert.data.tokenizer import fingerprint, special_ids, special_names, vocabulary_size
from ufbert.errors import UserError
from ufbert.hub import vocabulary
from ufbert.hub.tokenizer_settings import HARMLESS, USED, WITHOUT_EFFECT
from ufbert.hub.vocabulary import find_tokenizer, read_for_training, read_tokenizer, tokenizer_files

FIELDS = json.loads(Path(__file__).with_name("tokenizer_fields.json").read_text())
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *SPECIAL,
    "the",
    "cat",
    "sees",
    "The",
    "Cat",
    "##s",
    "cafe",
    "café",
    "日",
    "本",
    "日本",
    "[",
    "]",
    "e",
    "##1",
    ".",
]
"""Both cases and accents, so that every setting shows in the ids."""
THE, CAT, SEES, UPPER_THE, UPPER_CAT = 5, 6, 7, 8, 9
TEXT = "The Cat sees café 日本 [E1]"
SETTINGS = "tokenizer_config.json"


@pytest.fixture
def folder(tmp_path):
    """Files by name, JSON unless they are texts -> the folder that holds them."""

    def write(**files) -> Path:
        for name, content in files.items():
            path = tmp_path / name.replace("__", ".")
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


def lines(pieces=PIECES) -> str:
    return "".join(f"{piece}\n" for piece in pieces)


def state(**changes) -> dict:
    """A lower-casing BERT's tokenizer.json, with some parts replaced; `model` only changes fields of the model."""
    words = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    words.add_special_tokens(SPECIAL)
    found = json.loads(words.to_str())
    found["model"] |= changes.pop("model", {})
    return found | changes


def ids(tokenizer: Tokenizer, text: str = TEXT) -> list[int]:
    return tokenizer.encode(text).ids


LOWER = ids(Tokenizer.from_str(json.dumps(state())))


def test_every_key_that_the_libraries_know_is_classified_once():
    tables = (USED, HARMLESS, WITHOUT_EFFECT)
    for file in (SETTINGS, "special_tokens_map.json"):
        for version, names in FIELDS[file].items():
            assert not [name for name in names if sum(name in table for table in tables) != 1], (file, version)
    known = FIELDS["tokenizer.json"]
    assert set(known[""]) == set(vocabulary.PARTS)
    assert set(known["added_tokens"]) == set(vocabulary.TOKEN_FIELDS)
    assert {kind: set(known[kind]) for kind in vocabulary.MODEL_FIELDS} == {
        kind: set(names) for kind, names in vocabulary.MODEL_FIELDS.items()
    }


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_settings_without_effect_change_nothing(folder, key, capfd):
    for value in (True, "left", 7, ["a"]):
        assert ids(find_tokenizer(folder(vocab__txt=lines(), tokenizer_config__json={key: value}), "")) == LOWER
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_settings_that_are_not_read_are_refused_by_name_unless_they_are_harmless(folder, key):
    for value in HARMLESS[key]:
        assert ids(find_tokenizer(folder(vocab__txt=lines(), tokenizer_config__json={key: value}), "")) == LOWER
    for odd in ({"odd": 1}, 0):
        with pytest.raises(UserError, match=rf"has {key} .*, which is not read here\. Name .*--tokenizer FILE"):
            find_tokenizer(folder(vocab__txt=lines(), tokenizer_config__json={key: odd}), "")
    assert ids(find_tokenizer(folder(), str(folder() / "vocab.txt"))) == LOWER  # a file that is named is taken


E1 = {"content": "[E1]", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
AT_END = {str(len(PIECES)): E1}
USES = {
    "tokenizer_class": ("BertTokenizerFast", LOWER),
    "do_lower_case": (False, [2, UPPER_THE, UPPER_CAT, SEES, 12, 13, 14, 16, 1, 17, 3]),
    "strip_accents": (False, [2, THE, CAT, SEES, 12, 13, 14, 16, 18, 19, 17, 3]),
    "tokenize_chinese_chars": (False, [2, THE, CAT, SEES, 11, 15, 16, 18, 19, 17, 3]),
    "added_tokens_decoder": (AT_END, [2, THE, CAT, SEES, 11, 13, 14, len(PIECES), 3]),
    **dict.fromkeys(
        ("bos_token", "eos_token"),
        ({"content": "[E1]", "lstrip": True}, [2, THE, CAT, SEES, 11, 13, 14, len(PIECES), 3]),
    ),
    "additional_special_tokens": (["[E1]"], [2, THE, CAT, SEES, 11, 13, 14, len(PIECES), 3]),
    "extra_special_tokens": ([E1], [2, THE, CAT, SEES, 11, 13, 14, len(PIECES), 3]),
    "model_specific_special_tokens": ({"x_token": "[E1]"}, [2, THE, CAT, SEES, 11, 13, 14, len(PIECES), 3]),
    "unk_token": (".", [2, THE, CAT, SEES, 11, 13, 14, 16, 18, 19, 17, 3]),
    "cls_token": ("the", [THE, THE, CAT, SEES, 11, 13, 14, 16, 18, 19, 17, 3]),
    "sep_token": ("sees", [2, THE, CAT, SEES, 11, 13, 14, 16, 18, 19, 17, SEES]),
    "pad_token": ("[PAD]", LOWER),
    "mask_token": ("[MASK]", LOWER),
    "never_split": (["[E1]"], LOWER),
    "truncation_side": ("left", LOWER),
}
"""Every key that is used, a value, and the ids of TEXT."""


@pytest.mark.parametrize("key", list(USED))
def test_settings_that_are_used_change_the_ids_as_transformers_has_them(folder, key, capfd):
    value, wanted = USES[key]
    tokenizer = find_tokenizer(folder(vocab__txt=lines(), tokenizer_config__json={key: value}), "")
    assert ids(tokenizer) == wanted
    if key == "unk_token":
        assert ids(tokenizer, "x") == [2, PIECES.index("."), 3]
    if key in ("never_split", "truncation_side"):
        assert f"{key} of " in capfd.readouterr().err
    wrong = 0.5
    with pytest.raises(UserError, match=rf"tokenizer_config.json: {key} is 0.5; it must be "):
        find_tokenizer(folder(tokenizer_config__json={key: wrong}), "")


def test_unknown_settings_are_named_and_change_nothing(folder, capfd):
    made = folder(vocab__txt=lines(), tokenizer_config__json={"from_next_year": 1})
    assert ids(find_tokenizer(made, "")) == LOWER
    assert "not known here and change nothing: from_next_year" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "with_file", "without"),
    [
        ("BertTokenizer", True, True),
        ("ElectraTokenizerFast", True, True),
        ("PreTrainedTokenizerFast", True, False),
        ("TokenizersBackend", True, False),
        ("FNetTokenizerFast", True, False),
        ("BertJapaneseTokenizer", False, False),
        ("RobertaTokenizerFast", False, False),
        ("MyOwnTokenizer", False, False),
    ],
)
@pytest.mark.parametrize("where", [SETTINGS, "config.json"])
def test_classes_are_run_as_what_they_are_or_refused(folder, kind, with_file, without, where):
    made = folder(vocab__txt=lines(), **{where.replace(".", "__"): {"tokenizer_class": kind}})
    for is_read in (without, with_file):
        if is_read:
            assert ids(find_tokenizer(made, "")) == LOWER
        else:
            with pytest.raises(UserError, match=rf"is '{kind.removesuffix('Fast')}', which .*--tokenizer FILE"):
                find_tokenizer(made, "")
        folder(tokenizer__json=state())
    assert ids(find_tokenizer(made, str(made / "tokenizer.json"))) == LOWER


def test_other_vocabularies_are_named(folder):
    made = folder(spiece__model="x")
    with pytest.raises(UserError, match=r"no vocab\.txt \(spiece\.model cannot be read; .*--tokenizer FILE"):
        find_tokenizer(made, "")


@pytest.mark.parametrize("key", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
def test_what_stands_in_both_files_goes_by_the_settings_of_a_bert(folder, key, capfd):
    value, wanted = USES[key]
    settings = {key: value, "tokenizer_class": "BertTokenizer"}
    made = folder(tokenizer__json=state(), tokenizer_config__json=settings)
    assert ids(find_tokenizer(made, "")) == wanted
    assert (
        f"differs from tokenizer_config.json, which goes before it in transformers, too: {key}"
        in capfd.readouterr().err
    )
    folder(tokenizer_config__json=settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert ids(find_tokenizer(made, "")) == LOWER


def test_added_tokens_of_every_file_count(folder):
    wanted = [2, THE, CAT, SEES, 11, 13, 14, len(PIECES), 3]
    for file in ({"vocab__txt": lines()}, {"tokenizer__json": state()}):
        made = folder(**file)
        for name, content in (
            ("added_tokens__json", {"[E1]": len(PIECES)}),
            ("special_tokens_map__json", {"additional_special_tokens": ["[E1]"]}),
        ):
            folder(**{name: content})
            assert ids(find_tokenizer(made, "")) == wanted, name
            folder(**{name: {}})
    with pytest.raises(UserError, match=r"added_tokens\.json: \[E1\] is \"x\"; it must be a whole number"):
        find_tokenizer(folder(added_tokens__json={"[E1]": "x"}), "")
    with pytest.raises(UserError, match=r"content is '\[E1\]' the id 99, and the tokenizers library 21"):
        find_tokenizer(folder(added_tokens__json={"[E1]": 99}), "")


def test_flags_of_special_tokens_count(folder):
    mask = {"content": "[MASK]", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    made = folder(vocab__txt=lines(), special_tokens_map__json={"mask_token": mask})
    token = find_tokenizer(made, "").get_added_tokens_decoder()[4]
    assert (token.lstrip, token.special) == (True, True)
    with pytest.raises(UserError, match=r"special_tokens_map.json: mask_token.content is missing"):
        find_tokenizer(folder(special_tokens_map__json={"mask_token": {"text": "x"}}), "")


NAMES = {"unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}


def test_a_vocabulary_may_call_its_special_tokens_otherwise(folder, capfd):
    pieces = [{v: NAMES[k] for k, v in zip(NAMES, ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"), strict=True)}.get(p, p)
              for p in PIECES]  # fmt: skip
    made = folder(vocab__txt=lines(pieces), tokenizer_config__json=NAMES)
    tokenizer = find_tokenizer(made, "")
    assert ids(tokenizer, "the x <mask> sees") == [2, THE, 1, 4, SEES, 3]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    lacking = state(model={"vocab": vocab}, added_tokens=[], post_processor=None)
    tokenizer = read_tokenizer(folder(tokenizer__json=lacking) / "tokenizer.json")
    assert ids(tokenizer, "the x <mask> sees") == [2, THE, 1, 4, SEES, 3]
    assert "calls its unknown piece '[UNK]', which its vocabulary lacks; '<unk>' is used" in capfd.readouterr().err


def test_an_unknown_piece_that_no_vocabulary_has_is_one_sentence(folder):
    vocab = {piece: i for i, piece in enumerate(PIECES) if piece != "[UNK]"}
    broken = state(model={"vocab": vocab}, added_tokens=[])
    with pytest.raises(UserError, match=r"calls its unknown piece '\[UNK\]', and its vocabulary has none"):
        read_tokenizer(folder(tokenizer__json=broken) / "tokenizer.json")
    with pytest.raises(UserError, match=r"vocab\.txt has no \[UNK\]"):
        find_tokenizer(folder(vocab__txt=lines(list(vocab))), str(folder() / "vocab.txt"))


def test_a_folder_that_calls_a_special_token_by_two_names_is_refused(folder):
    made = folder(tokenizer__json=state(), tokenizer_config__json={"mask_token": "sees"})
    with pytest.raises(UserError, match=r"token 'sees' \(content of mask_token\), and its tokenizer '\[MASK\]'"):
        find_tokenizer(made, "")


CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PAD = {
    "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "[PAD]",
}  # fmt: skip


@pytest.mark.parametrize(("part", "value"), [("truncation", CUT), ("padding", PAD)])
def test_what_is_no_part_of_tokenising_is_taken_off_and_said(folder, part, value, capfd):
    assert set(FIELDS["tokenizer.json"][part]) == set(value)
    made = folder(tokenizer__json=state(**{part: value}))
    for read in (lambda: read_tokenizer(made / "tokenizer.json"), lambda: find_tokenizer(made, "")):
        tokenizer = read()
        assert ids(tokenizer) == LOWER
        assert ids(tokenizer, "the") == [2, THE, 3]
        assert f"has a stored {part} (" in capfd.readouterr().err
        assert fingerprint(tokenizer) == fingerprint(Tokenizer.from_str(json.dumps(state())))


def test_a_missing_post_processor_is_put_there_and_unmarked_specials_are_marked(folder, capfd):
    empty = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    nothing = json.loads(empty.__getstate__())
    for part in (
        None,
        nothing,
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ):
        tokenizer = read_tokenizer(
            folder(tokenizer__json=state(post_processor=part, added_tokens=[])) / "tokenizer.json"
        )
        row = tokenizer.encode("the [MASK]", "cat")
        assert (row.ids, row.type_ids) == ([2, THE, 4, 3, CAT, 3], [0, 0, 0, 0, 1, 1])
        said = capfd.readouterr().err
        assert "does not put [CLS] and [SEP] around a text; now it does" in said
        assert "does not mark [PAD], [UNK], [CLS], [SEP], [MASK] as special" in said


def test_post_processors_of_another_shape_are_kept_but_for_training(folder, capfd):
    roberta = {"type": "RobertaProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2], "trim_offsets": True,
               "add_prefix_space": True}  # fmt: skip
    tokenizer = read_tokenizer(folder(tokenizer__json=state(post_processor=roberta)) / "tokenizer.json")
    assert tokenizer.encode("the", "cat").ids == [2, THE, 3, 3, CAT, 3]
    crammed = processors.TemplateProcessing(  # as crammedBERT was pretrained
        single="$A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made = folder(tokenizer__json=state(post_processor=json.loads(crammed.__getstate__())))
    capfd.readouterr()
    assert ids(read_tokenizer(made / "tokenizer.json"), "the cat") == [THE, CAT, 3]
    assert capfd.readouterr().err == ""
    assert ids(find_tokenizer(made, ""), "the cat") == [THE, CAT, 3]
    assert "of the text 'a', and not [CLS] a [SEP]; it is kept" in capfd.readouterr().err
    assert ids(read_for_training(made / "tokenizer.json"), "the cat") == [2, THE, CAT, 3]
    cased = folder(vocab__txt=lines(), tokenizer_config__json={"do_lower_case": False})
    assert ids(read_for_training(cased / "vocab.txt"), "The cat") == [2, UPPER_THE, CAT, 3]
    assert "does not put [CLS] and [SEP] around a text; now it does" in capfd.readouterr().err
    others = processors.TemplateProcessing(single="the $A sees", special_tokens=[("the", THE), ("sees", SEES)])
    tokenizer = read_tokenizer(
        folder(tokenizer__json=state(post_processor=json.loads(others.__getstate__()))) / "tokenizer.json"
    )
    assert special_ids(tokenizer)[2:4] == (THE, SEES)  # pretraining wraps documents as the tokenizer wraps texts


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer"),
        (json.dumps(state())[:200], "is not readable JSON"),
        ("[]", r"holds \[\] where an object belongs"),
        ("{}", "tokenizer.json: model is missing"),
        (
            state(model={"type": "Neural"}),
            "model.type is 'Neural'; it must be one of WordPiece, BPE, WordLevel, Unigram",
        ),
        (state(from_next_year=1), "parts that are not known here: from_next_year"),
        (state(model={"odd": 1}), r"parts that are not known here: model\.odd"),
        (state(added_tokens=[{"id": 0, "content": "[PAD]", "odd": 1}]), r"not known here: added_tokens\.odd"),
        (
            state(added_tokens=[{"id": "0", "content": "[PAD]"}]),
            r"added_tokens\[0\]\.id is '0'; it must be a whole number",
        ),
        (state(added_tokens=[{**E1, "id": 99}]), r"content is '\[E1\]' the id 99, and the tokenizers library 21"),
        (state(normalizer={"type": "Odd"}), "is not a readable tokenizer"),
        (
            state(model={"vocab": {**{p: i for i, p in enumerate(PIECES)}, "odd": THE}}),
            "model.vocab gives several pieces the id 5, of which one is kept: ",
        ),
        (state(model={"vocab": {"a": "b"}}), r"model\.vocab"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_read_is_one_sentence(folder, content, sentence):
    with pytest.raises(UserError, match=sentence):
        read_tokenizer(folder(tokenizer__json=content) / "tokenizer.json")


def test_gaps_in_ids_are_kept_in_and_out(folder, tmp_path):
    pieces = [*PIECES[:10], "", "sees", *PIECES[10:]]  # an empty line, and a piece twice: the last counts
    tokenizer = find_tokenizer(folder(vocab__txt=lines(pieces)), "")
    last = len(pieces) - 1
    assert ids(tokenizer, "sees .") == [2, 11, last, 3]
    assert (vocabulary_size(tokenizer), tokenizer.get_vocab_size()) == (last + 1, last - 1)
    files = tokenizer_files(tokenizer, 16)
    written = files["vocab.txt"].split("\n")
    assert (written[11], written[last], written[7], written[10]) == ("sees", ".", "", "")
    (tmp_path / "out").mkdir()
    for name in (SETTINGS, "vocab.txt"):
        (tmp_path / "out" / name).write_text(files[name])
    assert ids(find_tokenizer(tmp_path / "out", ""), "sees .") == [2, 11, last, 3]


def test_a_vocab_txt_that_cannot_hold_the_pieces_is_not_written():
    vocab = {**{piece: i for i, piece in enumerate(PIECES)}, "a\nb": len(PIECES)}
    tokenizer = Tokenizer.from_str(json.dumps(state(model={"vocab": vocab})))
    assert tokenizer_files(tokenizer, 16).keys() == {"tokenizer.json", SETTINGS, "special_tokens_map.json"}


def test_the_same_tokenizer_with_and_without_stored_state_prepares_the_same_rows(folder, corpus_file):
    from ufbert.config import DataConfig, ModelConfig

    plain = read_tokenizer(folder(tokenizer__json=state()) / "tokenizer.json")
    stored = read_tokenizer(folder(tokenizer__json=state(truncation=CUT, padding=PAD)) / "tokenizer.json")
    recipes = [Recipe.of(DataConfig(), 300, tokenizer) for tokenizer in (plain, stored)]
    assert recipes[0] == recipes[1]
    config = ModelConfig(vocab_size=len(PIECES), max_len=12)
    assert encode_texts(stored, ["the cat sees the cat"], None, config).ids == [[2, THE, CAT, SEES, THE, CAT, 3]]
    assert special_names(stored)["[MASK]"] == "[MASK]"
    assert copy.deepcopy(stored).truncation is None
