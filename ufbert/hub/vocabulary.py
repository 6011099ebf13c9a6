"""Tokenizers of other libraries, in and out."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ufbert.data.tokenizer import SPECIAL_TOKENS, known_name, made_fit, note, special_names, wrap, wrapping
from ufbert.errors import UserError
from ufbert.hub.tensors import read_json, refuse_pointer
from ufbert.hub.tokenizer_settings import BERT_CLASSES, FILE_CLASSES, Settings, check_read, read_settings

STATE = ("truncation", "padding")
"""Parts of a `tokenizer.json` that are about the call during which it was saved; they are taken off."""
PARTS = ("version", *STATE, "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
TOKEN_FIELDS = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
MODEL_FIELDS = {
    "WordPiece": ("type", "vocab", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word"),
    "BPE": (
        "type", "vocab", "merges", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
        "byte_fallback", "ignore_merges", "dropout",
    ),
    "WordLevel": ("type", "vocab", "unk_token"),
    "Unigram": ("type", "vocab", "unk_id", "byte_fallback"),
}  # fmt: skip
"""Fields of each kind of model; all count but BPE's `dropout`, which is taken off."""
NOT_READ = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "merges.txt", "vocab.json")
"""Vocabularies of other libraries that a folder may have instead."""


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, fit for use here (`made_fit`).

    Raises UserError if it cannot be read, has parts that are not known, or lacks a special token.
    """
    return made_fit(_parsed(Path(path)), str(path))


def read_for_training(path: str | Path) -> Tokenizer:
    """As `read_tokenizer`, and a text is `[CLS] text [SEP]`, since pretraining puts both around every document. A `vocab.txt`
    is read with the settings beside it."""
    is_vocabulary = Path(path).suffix == ".txt"
    tokenizer = find_tokenizer(Path(path).parent, str(path)) if is_vocabulary else read_tokenizer(path)
    wrap(tokenizer, str(path))
    return tokenizer


def find_tokenizer(folder: Path, given: str) -> Tokenizer:
    """The tokenizer of a checkpoint: the file given, as it stands, or the folder's `tokenizer.json` or `vocab.txt` with the
    settings that transformers would use.

    Raises UserError if there is none, if it is of a kind that is not read, or if it lacks a special token.
    """
    if given:
        path = Path(given)
        if not path.is_file():
            raise UserError(f"The tokenizer {given} is not a file. Name one with --tokenizer FILE.")
        if path.suffix != ".txt":
            return _told(read_tokenizer(path), path)
        beside = path.parent / "tokenizer_config.json"
        settings = read_settings(path.parent if beside.is_file() else folder)
        return _of_vocabulary(path, settings)
    settings = read_settings(folder)
    path = folder / "tokenizer.json"
    check_read(settings, folder)
    if path.is_file():
        return _told(_of_file(path, settings), path)
    if not (folder / "vocab.txt").is_file():
        others = [name for name in NOT_READ if (folder / name).is_file()]
        also = f" ({', '.join(others)} cannot be read; have transformers save a tokenizer.json)" if others else ""
        raise UserError(f"{folder} has no tokenizer.json and no vocab.txt{also}. Name one with --tokenizer FILE.")
    return _of_vocabulary(folder / "vocab.txt", settings)


def _told(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """The tokenizer; a line tells if its texts are not as this package makes them."""
    if not wrapping(tokenizer):
        row = " ".join(tokenizer.encode("a").tokens)
        note(
            f"{path} makes {row!r} of the text 'a', and not [CLS] a [SEP]; it is kept, for the model may know no other"
        )
    return tokenizer


def _parsed(path: Path) -> Tokenizer:
    """The tokenizer of a file, without what is no part of tokenising; a line says what was taken off."""
    state = read_json(path)
    _check_parts(state, path)
    for name in STATE:
        if state.get(name) is not None:
            note(f"{path} has a stored {name} ({_shown(state[name])}), which is taken off")
            state[name] = None
    if state["model"].get("dropout"):
        note(f"{path} leaves out merges at random (dropout {state['model']['dropout']}), which is taken off")
        state["model"]["dropout"] = None
    try:
        tokenizer = Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a readable tokenizer: {error}. Save it anew, or name another file.") from error
    for token in state.get("added_tokens") or ():
        _check_id(tokenizer, token["content"], token["id"], path)
    return tokenizer


def _shown(state: Any) -> str:
    facts = state.items() if isinstance(state, dict) else ()
    return ", ".join(f"{name} {value}" for name, value in facts if name in ("max_length", "strategy")) or str(state)


def _check_parts(state: dict[str, Any], path: Path) -> None:
    """Raises UserError for a part that no known version of the library has, for it may change the tokens."""
    model, tokens = state.get("model"), state.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(tokens, list):
        raise UserError(
            f"{path} is not a tokenizer.json: it has no `model`, or `added_tokens` is no list. Save it anew."
        )
    kind = model.get("type")
    if kind is not None and kind not in MODEL_FIELDS:
        raise UserError(f"{path} has a model of type {kind!r}; there are {', '.join(MODEL_FIELDS)}. Take another one.")
    known = MODEL_FIELDS[kind] if kind else {name for names in MODEL_FIELDS.values() for name in names}
    odd = [name for name in state if name not in PARTS] + [f"model.{name}" for name in model if name not in known]
    for token in tokens:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise UserError(f"{path}: the added token {token!r} needs a text `content` and a whole `id`; mend it.")
        odd += [f"added_tokens.{name}" for name in token if name not in TOKEN_FIELDS]
    vocab = model.get("vocab")
    if isinstance(vocab, dict) and len(set(map(repr, vocab.values()))) < len(vocab):
        number, times = Counter(map(repr, vocab.values())).most_common(1)[0]
        raise UserError(
            f"{path} gives {times} pieces the id {number}, of which the library keeps one. Number them anew."
        )
    if odd:
        raise UserError(f"{path} has parts that are not known here: {', '.join(dict.fromkeys(odd))}. Remove them.")


def _check_id(tokenizer: Tokenizer, content: str, wanted: int, where: Path) -> None:
    """The library numbers an added token itself; raises UserError if that is not the number its file says."""
    number = tokenizer.token_to_id(content)
    if number != wanted:
        raise UserError(
            f"{where} gives the added token {content!r} the id {wanted}, and the tokenizers library {number}; "
            "add it to the vocabulary itself."
        )


def _of_file(path: Path, settings: Settings) -> Tokenizer:
    """A folder's `tokenizer.json`; the settings of BERT's classes go before what it says of the same."""
    tokenizer = _parsed(path)
    normalizer = (json.loads(tokenizer.to_str()).get("normalizer")) or {}
    if normalizer.get("type") == "BertNormalizer" and settings.kind not in FILE_CLASSES:
        theirs = _bert_normalizer(settings.values)
        named = {"lowercase": "do_lower_case", "strip_accents": "strip_accents"}
        named["handle_chinese_chars"] = "tokenize_chinese_chars"
        changed = {named[name]: value for name, value in theirs.items() if normalizer[name] != value}
        if changed and (path.parent / "tokenizer_config.json").is_file():
            tokenizer.normalizer = normalizers.BertNormalizer(clean_text=normalizer["clean_text"], **theirs)
            shown = ", ".join(f"{name} {value}" for name, value in changed.items())
            note(f"{path} differs from tokenizer_config.json, which goes before it in transformers, too: {shown}")
        elif changed:
            note(f"{path} is read as it stands; transformers would lower-case, for lack of a tokenizer_config.json")
    _add(tokenizer, settings, path.parent)
    tokenizer = made_fit(tokenizer, str(path), settings.names)
    if settings.kind in BERT_CLASSES and not _is_berts(tokenizer, json.loads(tokenizer.to_str())):
        note(f"{path} is not the {settings.kind} that tokenizer_config.json says; it is read as it stands")
    return tokenizer


def _bert_normalizer(values: Mapping[str, Any]) -> dict[str, Any]:
    """BertNormalizer's arguments by `tokenizer_config.json`, or the defaults of BERT's classes."""
    return {
        "lowercase": values.get("do_lower_case", True),
        "strip_accents": values.get("strip_accents"),
        "handle_chinese_chars": values.get("tokenize_chinese_chars", True),
    }


def _of_vocabulary(path: Path, settings: Settings) -> Tokenizer:
    tokenizer = wordpiece(path, settings.values, settings.names)
    _add(tokenizer, settings, path.parent, flags_count=True)
    return made_fit(tokenizer, str(path), settings.names)


def wordpiece(path: Path, values: dict[str, Any], names: Mapping[str, str] = MappingProxyType({})) -> Tokenizer:
    """BERT's WordPiece tokenizer from a `vocab.txt`, one piece a line, with the values of `tokenizer_config.json` and its names
    of some of the special tokens. An empty line has no piece; of two equal ones the last counts."""
    try:
        refuse_pointer(path)
        pieces = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from error
    if pieces[0].startswith("version https://git-lfs"):
        raise UserError(f"{path} is a pointer of Git LFS and not the file itself; fetch that with `git lfs pull`.")
    vocabulary = {piece: number for number, piece in enumerate(pieces) if piece}
    unknown = next((name for name in (names.get("[UNK]"), "[UNK]", "<unk>") if name in vocabulary), None)
    if unknown is None:
        raise UserError(
            f"{path} has no {names.get('[UNK]', '[UNK]')}; add it, or name another file with --tokenizer FILE."
        )
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, **_bert_normalizer(values))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    own = {token: names.get(token) or known_name(tokenizer, token) for token in SPECIAL_TOKENS}
    tokenizer.add_special_tokens([name for name in own.values() if name in vocabulary])
    cls, sep = own["[CLS]"], own["[SEP]"]
    if cls in vocabulary and sep in vocabulary:
        tokenizer.post_processor = processors.BertProcessing((sep, vocabulary[sep]), (cls, vocabulary[cls]))
    return tokenizer


def _add(tokenizer: Tokenizer, settings: Settings, folder: Path, *, flags_count: bool = False) -> None:
    """Add the tokens of a folder's settings, those with an id first; if `flags_count`, theirs go before those of tokens that
    are there. Raises UserError if one gets another id than it says."""
    for number, token in sorted(settings.numbered.items()):
        _add_token(tokenizer, token)
        _check_id(tokenizer, token.content, number, folder)
    there = settings.numbered if flags_count else tokenizer.get_added_tokens_decoder()
    added = {token.content for token in there.values()}
    for token in settings.special:
        if token.content not in added:
            before = tokenizer.token_to_id(token.content)
            _add_token(tokenizer, token)
            if before is None:
                note(f"{folder} adds {token.content!r} to the vocabulary, as {tokenizer.token_to_id(token.content)}")


def _add_token(tokenizer: Tokenizer, token: AddedToken) -> None:
    if repr(token) not in {repr(known) for known in tokenizer.get_added_tokens_decoder().values()}:
        tokenizer.add_tokens([token])


def tokenizer_files(tokenizer: Tokenizer, max_len: int) -> dict[str, str]:
    """What Hugging Face expects beside a model: `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, and for
    BERT's own WordPiece `vocab.txt`, with an empty line for an id without a piece."""
    names = special_names(tokenizer)
    special = {f"{part}_token": names[f"[{part.upper()}]"] for part in ("pad", "unk", "cls", "sep", "mask")}
    state = json.loads(tokenizer.to_str(pretty=False))
    is_bert = _is_berts(tokenizer, state)
    settings: dict[str, Any] = {
        "tokenizer_class": "BertTokenizerFast" if is_bert else "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        **special,
        "added_tokens_decoder": {
            str(token["id"]): {name: token[name] for name in TOKEN_FIELDS if name != "id"}
            for token in state["added_tokens"]
        },
    }
    if is_bert:
        settings["do_lower_case"] = state["normalizer"]["lowercase"]
        settings["strip_accents"] = state["normalizer"]["strip_accents"]
        settings["tokenize_chinese_chars"] = state["normalizer"]["handle_chinese_chars"]
    elif "add_prefix_space" in (state.get("pre_tokenizer") or {}):
        settings["add_prefix_space"] = state["pre_tokenizer"]["add_prefix_space"]
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    pieces = {number: piece for piece, number in state["model"]["vocab"].items()} if is_bert else {}
    if (
        is_bert
        and len(pieces) == len(state["model"]["vocab"])
        and not any(set("\r\n") & set(p) for p in pieces.values())
    ):
        files["vocab.txt"] = "".join(f"{pieces.get(number, '')}\n" for number in range(max(pieces) + 1))
    return files


def _is_berts(tokenizer: Tokenizer, state: dict[str, Any]) -> bool:
    """Whether transformers' BertTokenizer, which builds the tokenizer anew from vocabulary and settings, gives the same."""
    model, normalizer = state["model"], state.get("normalizer") or {}
    if model["type"] != "WordPiece" or normalizer.get("type") != "BertNormalizer" or not normalizer["clean_text"]:
        return False
    if (model["continuing_subword_prefix"], model["max_input_chars_per_word"]) != ("##", 100):
        return False
    names = special_names(tokenizer)
    cls, sep = (tokenizer.token_to_id(names[token]) for token in ("[CLS]", "[SEP]"))
    a, b = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", "b"))
    pair = tokenizer.encode("a", "b")
    wrapped = pair.ids == [cls, *a, sep, *b, sep] and pair.type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    return wrapped and state["pre_tokenizer"] == {"type": "BertPreTokenizer"}
