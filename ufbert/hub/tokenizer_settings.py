"""What Hugging Face keeps beside a vocabulary: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`.

Each key is used, without effect, or refused unless it has a value that changes nothing. All is read as transformers reads it.
"""

from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from tokenizers import AddedToken

from ufbert.data.tokenizer import note
from ufbert.errors import UserError
from ufbert.hub.tensors import read_json

BERT_CLASSES = (
    "BertTokenizer", "ConvBertTokenizer", "DistilBertTokenizer", "DPRContextEncoderTokenizer",
    "DPRQuestionEncoderTokenizer", "DPRReaderTokenizer", "ElectraTokenizer", "LayoutLMTokenizer", "LxmertTokenizer",
    "MobileBertTokenizer", "RealmTokenizer", "RetriBertTokenizer", "SqueezeBertTokenizer",
)  # fmt: skip
"""Values of `tokenizer_class`, but for an ending `Fast`, that are BERT's WordPiece: a `vocab.txt` and settings describe it."""
FILE_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "FNetTokenizer")
"""Those that are what `tokenizer.json` says, and nothing without it."""
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
"""Keys that name special tokens, and those that they are here."""
MORE_SPECIAL = ("bos_token", "eos_token")
"""Keys of special tokens that nothing here asks for; they are found in texts."""

KINDS: dict[type, str] = {bool: "true or false", str: "a text", NoneType: "null", dict: "an object", list: "a list"}
TOKEN = (str, dict, NoneType)
USED: dict[str, tuple[type, ...]] = {
    "tokenizer_class": (str, NoneType),
    "do_lower_case": (bool,),
    "strip_accents": (bool, NoneType),
    "tokenize_chinese_chars": (bool,),
    "added_tokens_decoder": (dict,),
    **dict.fromkeys((*SPECIAL, *MORE_SPECIAL), TOKEN),
    "additional_special_tokens": (list, NoneType),
    "extra_special_tokens": (list, dict, NoneType),
    "model_specific_special_tokens": (dict, NoneType),
    "never_split": (list, NoneType),
    "truncation_side": (str,),
}
"""Keys that count, and the kinds of JSON value they may have. The last two are without effect, but a line says so."""
HARMLESS: dict[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True,),
    "word_tokenizer_type": ("basic", None),
    "subword_tokenizer_type": ("wordpiece", None),
    "wordpieces_prefix": ("##",),
    "split_special_tokens": (False,),
    "from_slow": (False,),
    "gguf_file": (None,),
    "init_inputs": ([],),
    "auto_map": (None,),
    **dict.fromkeys(("merges", "post_processor", "tokenizer", "tokenizer_object", "vocab"), (None,)),
    **dict.fromkeys(("tokenizer_padding", "tokenizer_truncation", "unk_id"), (None,)),
}
"""Keys that would change the tokenizer in a way that is not read here, and the values with which they do not."""
WITHOUT_EFFECT = frozenset({
    "fix_mistral_regex",
    "add_bos_token", "add_eos_token", "add_prefix_space", "backend", "chat_control_tokens", "chat_template", "clean_text",
    "clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "device_map", "errors", "files_loaded", "is_local", "keep_accents", "local_files_only", "max_len", "max_length",
    "mecab_kwargs", "model_input_names", "model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id",
    "padding_side", "processor_class", "remove_space", "response_schema", "response_template", "sp_model_kwargs",
    "special_tokens_map_file", "stride", "tokenizer_file", "transformers_version", "trim_offsets", "truncation",
    "truncation_strategy", "padding", "verbose", "vocab_file",
})  # fmt: skip
"""Keys about calls, chats, files and decoding; what the fast classes of BERT read over; and what `tokenizer.json` says for the
classes that have it."""


class Settings(NamedTuple):
    """What a folder says about its tokenizer."""

    kind: str
    """`tokenizer_class` without an ending `Fast`; empty where no file names one."""
    values: dict[str, Any]
    """Of `tokenizer_config.json` with `special_tokens_map.json` on top; the five special tokens are under `names`."""
    names: dict[str, str]
    """What the folder calls some of SPECIAL_TOKENS."""
    numbered: dict[int, AddedToken]
    """Tokens added to the vocabulary, by id."""
    special: list[AddedToken]
    """Special tokens, in the order in which those that lack an id get one."""


def read_settings(folder: Path) -> Settings:
    """The settings of a folder, as far as it has any.

    Raises UserError, naming file and key, for a value of the wrong kind.
    """
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    _check(values, path)
    if "added_tokens_decoder" in values:
        numbered = {
            _number(number, path): _token(token, path, number)
            for number, token in values["added_tokens_decoder"].items()
        }
        special = _special(values, path)
    else:
        values = values | _special_map(folder / "special_tokens_map.json", values)
        special = _special(values, path)
        marked = {token.content for token in special}
        numbered = _added(folder / "added_tokens.json", marked)
    names = {SPECIAL[key]: _token(values[key], path, key).content for key in SPECIAL if values.get(key) is not None}
    return Settings(_class(folder, values), values, names, numbered, special)


def check_read(settings: Settings, folder: Path) -> None:
    """Raises UserError, naming it, for a class of tokenizers or a setting that is not read here."""
    kind, has_file = settings.kind, (folder / "tokenizer.json").is_file()
    way_out = "Name a tokenizer.json or vocab.txt to use instead with --tokenizer FILE"
    if has_file:
        way_out += f" ({folder / 'tokenizer.json'} would be taken as it stands)"
    if kind and kind not in BERT_CLASSES and not (kind in FILE_CLASSES and has_file):
        why = "which only a tokenizer.json describes" if kind in FILE_CLASSES else "which is not read here"
        raise UserError(f"The tokenizer of {folder} is a {kind}, {why}. {way_out}.")
    for key, harmless in HARMLESS.items():
        value = settings.values.get(key, harmless[0])
        if not any(value == good and type(value) is type(good) for good in harmless):
            raise UserError(f"The tokenizer of {folder} has {key} {value!r}, which is not read here. {way_out}.")


def _class(folder: Path, values: dict[str, Any]) -> str:
    """The class's name, which an early folder keeps in `config.json`."""
    config = folder / "config.json"
    name = values.get("tokenizer_class") or (read_json(config).get("tokenizer_class") if config.is_file() else None)
    return str(name or "").removesuffix("Fast")


def _check(values: dict[str, Any], path: Path) -> None:
    """Refuse values of the wrong kind, and name what is read over."""
    for key, value in values.items():
        if key in USED and not isinstance(value, USED[key]):
            kinds = " or ".join(KINDS[kind] for kind in USED[key])
            raise UserError(f"{path}: {key} is {value!r}, and should be {kinds}; mend it or leave it out.")
    if values.get("never_split"):
        note(f"never_split of {path} changes nothing, as in the fast classes of transformers")
    if values.get("truncation_side", "right") != "right":
        note(f"truncation_side of {path} changes nothing: what is cut here is the end of a text")
    unknown = [key for key in values if key not in USED and key not in HARMLESS and key not in WITHOUT_EFFECT]
    if unknown:
        note(f"{path} has settings that are not known here and change nothing: {', '.join(unknown)}")


def _special_map(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """`special_tokens_map.json`, whose lists join those of `values`."""
    table = read_json(path) if path.is_file() else {}
    _check(table, path)
    _special(table, path)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(table.get(key), list):
            earlier = values.get(key) or []
            table[key] = [*earlier, *(token for token in table[key] if token not in earlier)]
    return table


def _special(values: dict[str, Any], path: Path) -> list[AddedToken]:
    """The special tokens that the values name, in the order in which transformers adds them."""
    keys = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    tokens = [_token(values[key], path, key, special=True) for key in keys if values.get(key) is not None]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        group = values.get(key) or []
        for token in group.values() if isinstance(group, dict) else group:
            tokens.append(_token(token, path, key, special=True))
    return tokens


def _added(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """`added_tokens.json`: {"[E1]": 114, ...}."""
    table = read_json(path) if path.is_file() else {}
    return {
        _number(number, path): AddedToken(content, normalized=content not in special, special=content in special)
        for content, number in table.items()
    }


def _number(value: Any, path: Path) -> int:
    try:
        if isinstance(value, (int, str)) and not isinstance(value, bool) and int(value) >= 0:
            return int(value)
    except ValueError:
        pass
    raise UserError(f"{path}: the id of an added token is {value!r}, and should be a whole number; mend it.")


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _token(value: Any, path: Path, key: str, special: bool = False) -> AddedToken:
    """A token as a text or as an object with flags."""
    if isinstance(value, str) and value:
        return AddedToken(value, normalized=not special, special=special)
    flags = {name: flag for name, flag in value.items() if name in FLAGS} if isinstance(value, dict) else {}
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not content or not all(isinstance(flag, bool) for flag in flags.values()):
        raise UserError(f"{path}: {key} has {value!r} for a token; write its text, or an object with `content`.")
    return AddedToken(content, **(flags | ({"special": True} if special else {})))
