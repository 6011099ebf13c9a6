"""Tokenizers of other libraries, in and out."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ufbert.data.tokenizer import special_ids, special_names
from ufbert.errors import UserError
from ufbert.hub.files import read_json, refuse_pointer


def read_tokenizer(path: str | Path) -> Tokenizer:
    """A `tokenizer.json`. Raises UserError if it cannot be parsed."""
    refuse_pointer(Path(path))
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} is not a readable tokenizer: {error}.") from error


def find_tokenizer(folder: Path, given: str) -> Tokenizer:
    """The tokenizer of a checkpoint: the file given, or the folder's `tokenizer.json` or `vocab.txt`.

    Raises UserError if there is none, or it lacks a special token.
    """
    candidates = [Path(given)] if given else [folder / "tokenizer.json", folder / "vocab.txt"]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        what = (
            f"The tokenizer {given} does not exist." if given else f"{folder} has no tokenizer.json and no vocab.txt."
        )
        raise UserError(f"{what} Name one with --tokenizer FILE.")
    if path.suffix == ".txt":
        settings = folder / "tokenizer_config.json"
        return wordpiece(path, read_json(settings) if settings.is_file() else {})
    tokenizer = read_tokenizer(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special_ids(tokenizer)
    return tokenizer


def wordpiece(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """BERT's WordPiece tokenizer from a `vocab.txt`, one piece a line, with the settings of `tokenizer_config.json`."""
    refuse_pointer(path)
    try:
        pieces = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from error
    vocabulary = {piece.rstrip("\r"): number for number, piece in enumerate(pieces) if piece.rstrip("\r")}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    lower = settings.get("do_lower_case", True)
    strip = settings.get("strip_accents")
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lower,
        strip_accents=lower if strip is None else strip,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = special_names(tokenizer)
    tokenizer.add_special_tokens(list(names.values()))
    ids = special_ids(tokenizer)
    tokenizer.post_processor = processors.BertProcessing((names["[SEP]"], ids.sep), (names["[CLS]"], ids.cls))
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer, max_len: int, kind: str) -> dict[str, str]:
    """What Hugging Face expects beside a model: `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, and
    `vocab.txt` for a WordPiece vocabulary."""
    names = special_names(tokenizer)
    special = {f"{part}_token": names[f"[{part.upper()}]"] for part in ("pad", "unk", "cls", "sep", "mask")}
    state = json.loads(tokenizer.to_str(pretty=False))
    classes = {"bert": "BertTokenizerFast", "fnet": "FNetTokenizerFast"}
    settings: dict[str, Any] = {
        "tokenizer_class": classes.get(kind, "PreTrainedTokenizerFast"),
        "model_max_length": max_len,
        **special,
    }
    normalizer = state.get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer":
        settings["do_lower_case"] = normalizer["lowercase"]
        settings["strip_accents"] = normalizer["strip_accents"]
        settings["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    if state["model"]["type"] == "WordPiece":
        pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
        files["vocab.txt"] = "".join(f"{piece}\n" for piece in pieces)
    return files
