"""Tokenizers of other libraries, in and out."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ufbert.config.checks import shown
from ufbert.data.tokenizer import known_name, library_errors, made_fit, note, special_names, wrap, wrapping
from ufbert.errors import UserError
from ufbert.hub.tensors import first_few
from ufbert.hub.tokenizer_settings import (
    BERT_CLASSES,
    DEFAULTS,
    FILE_CLASSES,
    SPECIAL,
    Settings,
    TokenizerConfig,
    check_read,
    read_settings,
)
from ufbert.runtime.typed import convert, read_typed, read_whole

STATE = ("truncation", "padding")
"""Parts of a `tokenizer.json` about the call during which it was saved; they are taken off."""
PARTS = ("version", *STATE, "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
NORMALIZER = {
    "lowercase": "do_lower_case", "strip_accents": "strip_accents", "handle_chinese_chars": "tokenize_chinese_chars",
}  # fmt: skip
"""Arguments of BERT's normalizer, and their names in `tokenizer_config.json`."""
TOKEN_FIELDS = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
Id = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
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


@dataclass(frozen=True)
class _Token:
    id: Id
    content: str


@dataclass(frozen=True)
class _Model:
    type: Literal["WordPiece", "BPE", "WordLevel", "Unigram"] | msgspec.UnsetType = msgspec.UNSET
    vocab: dict[str, Id] | list[tuple[str, float]] = field(default_factory=dict)
    max_input_chars_per_word: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    """Longest word that WordPiece cuts; the time that takes grows with the cube of its length."""
    dropout: float | None = None


@dataclass(frozen=True)
class _TokenizerFile:
    """The parts of a `tokenizer.json` that are looked at here; the library reads them all."""

    model: _Model
    added_tokens: list[_Token] = field(default_factory=list)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, and make it fit for use here (`made_fit`). Raises UserError if it cannot be used."""
    with library_errors(str(path)):
        return made_fit(_parsed(Path(path)), str(path))


def read_for_training(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`, or a `vocab.txt` with the settings beside it, and have it make `[CLS] text [SEP]` of a text,
    since pretraining puts both around every document."""
    is_vocabulary = Path(path).suffix == ".txt"
    tokenizer = find_tokenizer(Path(path).parent, str(path)) if is_vocabulary else read_tokenizer(path)
    wrap(tokenizer, str(path))
    return tokenizer


def find_tokenizer(folder: Path, given: str) -> Tokenizer:
    """Read the tokenizer of a checkpoint: the file given, as it stands, or the folder's file with transformers' settings.

    Raises UserError if there is none, if it is of a kind that is not read, or if it lacks a special token.
    """
    with library_errors(given or str(folder)):
        return _given(folder, Path(given)) if given else _of_folder(folder)


def _given(folder: Path, path: Path) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"The tokenizer {path} is not a file. Name one with --tokenizer FILE.")
    if path.suffix != ".txt":
        return _told(read_tokenizer(path), path)
    has_settings = (path.parent / "tokenizer_config.json").is_file()
    return _of_vocabulary(path, read_settings(path.parent if has_settings else folder))


def _of_folder(folder: Path) -> Tokenizer:
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
    """Return the tokenizer; a line tells if its texts are not as this package makes them."""
    if not wrapping(tokenizer):
        row = " ".join(tokenizer.encode("a").tokens)
        note(f"{path} makes {row!r} of the text 'a', and not [CLS] a [SEP]; it is kept, as the model may know no other")
    return tokenizer


def _parsed(path: Path) -> Tokenizer:
    """Read the tokenizer of a file without the parts that are not about tokens; a line names each that is taken off."""
    state = read_typed(path, dict[str, Any])
    known = convert(state, _TokenizerFile, str(path))
    _check_parts(state, known.model, path)
    for name in STATE:
        if state.get(name) is not None:
            note(f"{path} has a stored {name} ({_shown(state[name])}), which is taken off")
            state[name] = None
    if known.model.dropout:
        note(f"{path} leaves out merges at random (dropout {known.model.dropout}), which is taken off")
        state["model"]["dropout"] = None
    with library_errors(f"{path} is not a readable tokenizer", "Save it anew, or name another file."):
        tokenizer = Tokenizer.from_str(json.dumps(state))
    if max(_growth(state.get(part)) for part in PARTS) > MOST_GROWTH:
        raise UserError(f"{path} can make a text more than {MOST_GROWTH} times longer; take another tokenizer.")
    for character in "aA1 .\n" if '"Regex"' in json.dumps(state) else "":  # a pattern that explodes does so here
        tokenizer.encode(2000 * character + "!")
    for token in known.added_tokens:
        _check_id(tokenizer, token.content, token.id, path)
    return tokenizer


MOST_GROWTH = 100
"""Times that a tokenizer may lengthen a text before it cuts it into pieces; those that people use stay below 40."""


def _shown(state: Any) -> str:
    facts = state.items() if isinstance(state, dict) else ()
    return ", ".join(f"{name} {value}" for name, value in facts if name in ("max_length", "strategy")) or shown(state)


def _growth(part: Any) -> int:
    """Bound the times that a normalizer, pre-tokenizer, post-processor or decoder lengthens a text; sequences multiply."""
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    times = math.prod(_growth(value) for value in inner if isinstance(value, (dict, list)))
    match part:
        case {"type": "Replace", "content": str(content), "pattern": {"String": str(pattern)}}:
            return times * max(1, math.ceil(len(content) / max(1, len(pattern))))
        case {"type": "Replace", "content": str(content)}:  # a pattern that may match nothing, before every character
            return times * (len(content) + 1)
        case {"type": "ByteLevel"}:
            return times * 2
        case {"type": "Precompiled"}:
            return times * 18  # the longest that Unicode's compatibility forms make of a character
        case {"type": "TemplateProcessing", "single": [*single], "pair": [*pair]}:
            return times * max(1, *(json.dumps(pieces).count('"Sequence"') for pieces in (single, pair)))
    return times


def _check_parts(state: dict[str, Any], model: _Model, path: Path) -> None:
    """Raise UserError for a part that no known version of the library has, for it may change the tokens."""
    fields = (
        MODEL_FIELDS[model.type]
        if isinstance(model.type, str)
        else {name for names in MODEL_FIELDS.values() for name in names}
    )
    flags = {name for token in state.get("added_tokens", ()) for name in token}
    odd = [name for name in state if name not in PARTS]
    odd += [f"model.{name}" for name in state["model"] if name not in fields]
    odd += [f"added_tokens.{name}" for name in sorted(flags) if name not in TOKEN_FIELDS]
    if odd:
        raise UserError(f"{path} has parts that are not known here: {first_few(odd)}. Remove them.")
    if isinstance(model.vocab, dict) and len(set(model.vocab.values())) < len(model.vocab):
        number, _ = Counter(model.vocab.values()).most_common(1)[0]
        pieces = first_few([piece for piece, id in model.vocab.items() if id == number])
        raise UserError(
            f"{path}: model.vocab gives several pieces the id {number}, of which one is kept: {pieces}. Mend it."
        )


def _check_id(tokenizer: Tokenizer, content: str, wanted: int, where: Path) -> None:
    """Raise UserError if an added token, which the library numbers itself, has another number than its file says."""
    number = tokenizer.token_to_id(content)
    if number != wanted:
        raise UserError(
            f"{where} gives the added token whose content is {shown(content)} the id {wanted}, and the tokenizers library "
            f"{number}; add it to the vocabulary itself."
        )


def _of_file(path: Path, settings: Settings) -> Tokenizer:
    """Read a folder's `tokenizer.json`; the settings of BERT's classes go before its own."""
    tokenizer = _parsed(path)
    normalizer = json.loads(tokenizer.to_str()).get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer" and settings.kind not in FILE_CLASSES:
        theirs = _bert_normalizer(settings.config)
        changed = {NORMALIZER[name]: value for name, value in theirs.items() if normalizer[name] != value}
        if changed and (path.parent / "tokenizer_config.json").is_file():
            tokenizer.normalizer = normalizers.BertNormalizer(clean_text=normalizer["clean_text"], **theirs)
            names = ", ".join(f"{name} {value}" for name, value in changed.items())
            note(f"{path} differs from tokenizer_config.json, which goes before it in transformers, too: {names}")
        elif changed:
            note(f"{path} is read as it stands; transformers would lower-case, for lack of a tokenizer_config.json")
    _add(tokenizer, settings, path.parent)
    tokenizer = made_fit(tokenizer, str(path), settings.names)
    if settings.kind in BERT_CLASSES and not _is_berts(tokenizer, json.loads(tokenizer.to_str())):
        note(f"{path} is not the {settings.kind} that tokenizer_config.json says; it is read as it stands")
    return tokenizer


def _bert_normalizer(config: TokenizerConfig) -> dict[str, Any]:
    """Take BertNormalizer's arguments from `tokenizer_config.json`, or the defaults of BERT's classes."""
    return {name: getattr(config, setting) for name, setting in NORMALIZER.items()}


def _of_vocabulary(path: Path, settings: Settings) -> Tokenizer:
    tokenizer = wordpiece(path, settings.config, settings.names)
    _add(tokenizer, settings, path.parent, flags_count=True)
    return made_fit(tokenizer, str(path), settings.names)


def wordpiece(
    path: Path, config: TokenizerConfig = DEFAULTS, names: Mapping[str, str] = MappingProxyType({})
) -> Tokenizer:
    """Make BERT's WordPiece tokenizer of a `vocab.txt`, one piece a line, with a folder's settings and its names of some of the
    special tokens. An empty line has no piece; of two equal ones the last counts."""
    try:
        pieces = read_whole(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"Cannot read {path}: {error}.") from error
    vocabulary = {piece: number for number, piece in enumerate(pieces) if piece}
    unknown = next((name for name in (names.get("[UNK]"), "[UNK]", "<unk>") if name in vocabulary), None)
    if unknown is None:
        wanted = names.get("[UNK]", "[UNK]")[:100]
        raise UserError(f"{path} has no {wanted}; add it, or name another file with --tokenizer FILE.")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, **_bert_normalizer(config))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    own = {token: names.get(token) or known_name(tokenizer, token) for token in SPECIAL.values()}
    tokenizer.add_special_tokens([name for name in own.values() if name in vocabulary])
    cls, sep = own["[CLS]"], own["[SEP]"]
    if cls in vocabulary and sep in vocabulary:
        tokenizer.post_processor = processors.BertProcessing((sep, vocabulary[sep]), (cls, vocabulary[cls]))
    return tokenizer


def _add(tokenizer: Tokenizer, settings: Settings, folder: Path, *, flags_count: bool = False) -> None:
    """Add the tokens of a folder's settings, those with an id first. Raises UserError if one gets another id than it says.

    With `flags_count`, their flags go before those of tokens that the tokenizer has.
    """
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
    """Make the files of a tokenizer in Hugging Face's layout: `tokenizer.json`, `tokenizer_config.json`,
    `special_tokens_map.json`, and for BERT's own WordPiece `vocab.txt`, with an empty line for an id without a piece."""
    names = special_names(tokenizer)
    special = {key: names[token] for key, token in SPECIAL.items()}
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
        settings |= {setting: state["normalizer"][name] for name, setting in NORMALIZER.items()}
    elif "add_prefix_space" in (state.get("pre_tokenizer") or {}):
        settings["add_prefix_space"] = state["pre_tokenizer"]["add_prefix_space"]
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    vocabulary = state["model"]["vocab"] if is_bert else {}
    pieces = {number: piece for piece, number in vocabulary.items()}
    ends_lines = any("\r" in piece or "\n" in piece for piece in vocabulary)
    if is_bert and len(pieces) == len(vocabulary) and not ends_lines:
        files["vocab.txt"] = "".join(f"{pieces.get(number, '')}\n" for number in range(max(pieces) + 1))
    return files


def _is_berts(tokenizer: Tokenizer, state: dict[str, Any]) -> bool:
    """True if transformers' BertTokenizer, which builds the tokenizer anew from vocabulary and settings, gives the same."""
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
