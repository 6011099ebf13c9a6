"""Settings that Hugging Face keeps beside a vocabulary: `{tokenizer_config,special_tokens_map,added_tokens}.json`.

Each key is used, without effect, or refused unless it has a value that changes nothing. All is read as transformers reads it.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from tokenizers import AddedToken

from ufbert.config.checks import shown
from ufbert.data.tokenizer import SPECIAL_TOKENS, note
from ufbert.errors import UserError
from ufbert.hub.tensors import first_few
from ufbert.runtime.typed import Count, decode, read_typed, read_whole

BERT_CLASSES = (
    "BertTokenizer", "ConvBertTokenizer", "DistilBertTokenizer", "DPRContextEncoderTokenizer",
    "DPRQuestionEncoderTokenizer", "DPRReaderTokenizer", "ElectraTokenizer", "LayoutLMTokenizer", "LxmertTokenizer",
    "MobileBertTokenizer", "RealmTokenizer", "RetriBertTokenizer", "SqueezeBertTokenizer",
)  # fmt: skip
"""Values of `tokenizer_class`, but for an ending `Fast`, that are BERT's WordPiece: a `vocab.txt` and settings describe it."""
FILE_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "FNetTokenizer")
"""Those that are what `tokenizer.json` says, and nothing without it."""
SPECIAL = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
"""Keys that name special tokens (`pad_token`), and those that they are here."""
Text = Annotated[str, msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class FlaggedToken:
    """A token as an object with flags."""

    content: Text
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


Token = Text | FlaggedToken


@dataclass(frozen=True)
class TokenizerConfig:
    """Keys of `tokenizer_config.json` and `special_tokens_map.json` that count. `never_split` and `truncation_side` are without
    effect, but a line says so."""

    tokenizer_class: str | None = None
    do_lower_case: bool = True
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True
    added_tokens_decoder: dict[Count, Token] | None = None
    pad_token: Token | None = None
    unk_token: Token | None = None
    cls_token: Token | None = None
    sep_token: Token | None = None
    mask_token: Token | None = None
    bos_token: Token | None = None
    eos_token: Token | None = None
    additional_special_tokens: list[Token] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    model_specific_special_tokens: dict[str, Token] | None = None
    never_split: list[Any] | None = None
    truncation_side: str = "right"


@dataclass(frozen=True)
class _EarlyClass:
    tokenizer_class: str | None = None


DEFAULTS = TokenizerConfig()
USED = tuple(field.name for field in fields(TokenizerConfig))
HARMLESS: dict[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True,), "word_tokenizer_type": ("basic", None), "subword_tokenizer_type": ("wordpiece", None),
    "wordpieces_prefix": ("##",), "split_special_tokens": (False,), "from_slow": (False,), "init_inputs": ([],),
    "auto_map": (None,), "gguf_file": (None,), "merges": (None,), "post_processor": (None,), "tokenizer": (None,),
    "tokenizer_object": (None,), "tokenizer_padding": (None,), "tokenizer_truncation": (None,), "unk_id": (None,),
    "vocab": (None,),
}  # fmt: skip
"""Keys that would change the tokenizer in a way that is not read here, and the values with which they do not."""
WITHOUT_EFFECT = frozenset({
    "add_bos_token", "add_eos_token", "add_prefix_space", "backend", "chat_control_tokens", "chat_template", "clean_text",
    "clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "device_map", "errors", "files_loaded", "is_local", "keep_accents", "local_files_only", "max_len", "max_length",
    "mecab_kwargs", "model_input_names", "model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id",
    "padding_side", "processor_class", "remove_space", "response_schema", "response_template", "sp_model_kwargs",
    "special_tokens_map_file", "stride", "tokenizer_file", "transformers_version", "trim_offsets", "truncation",
    "truncation_strategy", "padding", "verbose", "vocab_file", "fix_mistral_regex",
})  # fmt: skip
"""Keys about calls, chats, files and decoding; what the fast classes of BERT read over; and what `tokenizer.json` says for the
classes that have it."""


class Settings(NamedTuple):
    """The settings of a folder's tokenizer."""

    kind: str
    """`tokenizer_class` without an ending `Fast`; empty where no file names one."""
    config: TokenizerConfig
    """`tokenizer_config.json` with `special_tokens_map.json` on top; the five special tokens are under `names`."""
    harmless: dict[str, Any]
    """Values of the keys of HARMLESS."""
    names: dict[str, str]
    """The folder's own names of some of SPECIAL_TOKENS."""
    numbered: dict[int, AddedToken]
    """Tokens added to the vocabulary, by id."""
    special: list[AddedToken]
    """Special tokens, in the order in which those that lack an id get one."""


def read_settings(folder: Path) -> Settings:
    """Read the settings of a folder, if it has any. Raises UserError, naming file and key, for a value of the wrong kind."""
    path, added = folder / "tokenizer_config.json", folder / "added_tokens.json"
    values = _read(path)
    if "added_tokens_decoder" not in values:
        table = _read(folder / "special_tokens_map.json")
        for key in ("additional_special_tokens", "extra_special_tokens"):  # lists join those of the configuration
            if isinstance(table.get(key), list):
                earlier = values.get(key) or []
                table[key] = [*earlier, *(token for token in table[key] if token not in earlier)]
        values |= table
    used = {key: value for key, value in values.items() if key in USED}
    config = decode(msgspec.json.encode(used), TokenizerConfig, str(path))
    special = _special(config)
    if config.added_tokens_decoder is not None:
        numbered = {number: _added(token) for number, token in config.added_tokens_decoder.items()}
    else:
        marked = {token.content for token in special}
        numbered = {
            number: AddedToken(content, normalized=content not in marked, special=content in marked)
            for content, number in (read_typed(added, dict[str, Count]) if added.is_file() else {}).items()
        }
    tokens = {SPECIAL[key]: getattr(config, key) for key in SPECIAL}
    names = {name: _added(token).content for name, token in tokens.items() if token is not None}
    kind, early = config.tokenizer_class or "", folder / "config.json"
    if not kind and early.is_file():  # where early folders keep it
        kind = read_typed(early, _EarlyClass).tokenizer_class or ""
    harmless = {key: value for key, value in values.items() if key in HARMLESS}
    return Settings(kind.removesuffix("Fast"), config, harmless, names, numbered, special)


def check_read(settings: Settings, folder: Path) -> None:
    """Raise UserError, naming it, for a class of tokenizers or a setting that is not read here."""
    kind, has_file = settings.kind, (folder / "tokenizer.json").is_file()
    way_out = "Name a tokenizer.json or vocab.txt to use instead with --tokenizer FILE"
    if has_file:
        way_out += f" ({folder / 'tokenizer.json'} would be taken as it stands)"
    if kind and kind not in BERT_CLASSES and not (kind in FILE_CLASSES and has_file):
        why = "which only a tokenizer.json describes" if kind in FILE_CLASSES else "which is not read here"
        raise UserError(f"The tokenizer_class of {folder} is {shown(kind)}, {why}. {way_out}.")
    for key, harmless in HARMLESS.items():
        value = settings.harmless.get(key, harmless[0])
        if not any(value == good and type(value) is type(good) for good in harmless):
            raise UserError(f"The tokenizer of {folder} has {key} {shown(value)}, which is not read here. {way_out}.")


def _read(path: Path) -> dict[str, Any]:
    """Read the values of a file, those that count of the right kind; a line names each that is read over."""
    if not path.is_file():
        return {}
    data = read_whole(path)
    config = decode(data, TokenizerConfig, str(path))
    values = decode(data, dict[str, Any], str(path))
    if config.never_split:
        note(f"never_split of {path} changes nothing, as in the fast classes of transformers")
    if config.truncation_side != "right":
        note(f"truncation_side of {path} changes nothing: what is cut here is the end of a text")
    unknown = [key for key in values if key not in USED and key not in HARMLESS and key not in WITHOUT_EFFECT]
    if unknown:
        note(f"{path} has settings that are not known here and change nothing: {first_few(unknown, 20)}")
    return values


def _special(config: TokenizerConfig) -> list[AddedToken]:
    """List the special tokens that the settings name, in the order in which transformers adds them."""
    keys = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    tokens = [token for key in keys if (token := getattr(config, key)) is not None]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        group = getattr(config, key) or []
        tokens += group.values() if isinstance(group, dict) else group
    return [_added(token, special=True) for token in tokens]


def _added(token: Token, *, special: bool = False) -> AddedToken:
    """Make a token of the tokenizers library."""
    if isinstance(token, str):
        return AddedToken(token, normalized=not special, special=special)
    flags = {name: flag for name, flag in vars(token).items() if flag is not None and name != "content"}
    return AddedToken(token.content, **flags | ({"special": True} if special else {}))
