"""Kinds of tokenizers beside BERT's: as they are, in and out."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ufbert.data.tokenizer import SPECIAL_TOKENS, made_fit, train_wordpiece
from ufbert.errors import UserError
from ufbert.hub.vocabulary import find_tokenizer, read_tokenizer, tokenizer_files


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def read(folder, state: dict) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    return read_tokenizer(folder / "tokenizer.json")


def _bpe() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the cat sees the café"] * 9, trainer)
    return made_fit(made, "here")


def test_merges_are_never_left_out_at_random(tmp_path, capfd):
    made = _bpe()
    stored = json.loads(made.to_str())
    stored["model"]["dropout"] = 0.9
    tokenizer = read(tmp_path, stored)
    assert {tuple(ids(tokenizer, "the cat sees")) for _ in range(20)} == {tuple(ids(made, "the cat sees"))}
    assert "dropout 0.9" in capfd.readouterr().err


def test_other_kinds_of_models_are_run_as_they_are(tmp_path):
    assert ids(_bpe(), "café")[1:-1]
    words = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate([*SPECIAL_TOKENS, "the"])}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    unigram = Tokenizer(models.Unigram([(piece, -1.0) for piece in (*SPECIAL_TOKENS, "the")], unk_id=1))
    for made in (words, unigram):
        assert ids(read(tmp_path, json.loads(made.to_str())), "the[MASK]x") == [2, 5, 4, 1, 3]
    lacking = json.loads(unigram.to_str())
    lacking["model"]["unk_id"] = None
    with pytest.raises(UserError, match="has no unknown piece"):
        read(tmp_path, lacking)


def _exported(name: str) -> Tokenizer:
    trained = train_wordpiece(["the cat sees the café 日本 foo food foobar"] * 9, 90)
    if name == "cased":
        trained.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    if name == "added":
        trained.add_tokens([AddedToken("foo", single_word=True), AddedToken("Cat", normalized=True)])
        trained.add_special_tokens([AddedToken("[E1]", lstrip=True)])
    if name == "no BERT normaliser":
        trained.normalizer = normalizers.Lowercase()
    if name == "another pre-tokenizer":
        trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if name == "another pair":
        pair = "[CLS] $A [SEP] [SEP] $B [SEP]"
        special = list(zip(SPECIAL_TOKENS[2:4], (2, 3), strict=True))
        trained.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair=pair, special_tokens=special
        )
    return _bpe() if name == "byte level" else trained


@pytest.mark.parametrize(
    ("name", "is_berts"),
    [
        ("own", True), ("cased", True), ("added", True), ("no BERT normaliser", False), ("another pre-tokenizer", False),
        ("another pair", False), ("byte level", False),
    ],
)  # fmt: skip
def test_what_is_exported_reads_back_to_the_same_ids_under_the_class_that_it_is(name, is_berts, tmp_path):
    tokenizer = _exported(name)
    files = tokenizer_files(tokenizer, 16)
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["tokenizer_class"] == ("BertTokenizerFast" if is_berts else "PreTrainedTokenizerFast")
    assert ("vocab.txt" in files) == is_berts
    texts = ["The Cat sees café.", "[E1] foo food Cats", "日本 [MASK]x", "the, cat-sees"]
    for left_out in ((), ("tokenizer.json",)) if is_berts else ((),):
        out = tmp_path / f"out{len(left_out)}"
        out.mkdir()
        for file, content in files.items():
            if file not in left_out:
                (out / file).write_text(content, encoding="utf-8")
        back = find_tokenizer(out, "")
        for text in texts:
            assert ids(back, text) == ids(tokenizer, text)
            assert back.encode(text, "the cat").type_ids == tokenizer.encode(text, "the cat").type_ids
