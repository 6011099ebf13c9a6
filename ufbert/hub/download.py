"""Models by name: those that come with this package (`mini`), and those of the Hugging Face hub: `hf:OWNER/NAME`, or
`hf:OWNER/NAME@REVISION` (a branch, a tag or a commit).

What was downloaded stays in the library's own cache ($HF_HOME), and is read from there where the hub cannot be reached.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ufbert.errors import UserError, first_line
from ufbert.runtime.console import phase
from ufbert.runtime.typed import read_typed

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
"""Files of a model folder of this package."""
CHECKPOINT_FILES = (
    "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "adapter_config.json",
    "tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files of other libraries' checkpoints that are read. PyTorch's own are not."""
SHIPPED = Path(__file__).parents[1] / "models"
"""Model folders that come with this package."""
_NAME = re.compile(r"hf:((?:[\w.-]+/)?[\w.-]+)(?:@([\w./-]+))?", re.ASCII)


def is_hub_name(place: str | Path) -> bool:
    """True for `hf:...`, whatever folder there may be; `./hf:...` is a folder."""
    return str(place).startswith("hf:")


def is_shipped_name(place: str | Path) -> bool:
    """True for the name of a model that comes with this package, whatever folder there may be; `./mini` is a folder."""
    return isinstance(place, str) and place.isidentifier() and (SHIPPED / place / "config.json").is_file()


def other_place(path: Path) -> str:
    """Continue a sentence about a path that does not exist with the hub's name that it may have been meant for."""
    is_like_a_name = len(path.parts) == 2 and not path.parent.exists()
    return f"; hf:{path} is that name on the Hugging Face hub" if is_like_a_name else ""


def model_folder(place: str | Path) -> Path:
    """Return a path as it is, or the folder of a shipped model's name, or that to which a hub name's folder is downloaded.

    Raises UserError if it cannot be had, or if the hub's files are another library's checkpoint.
    """
    if is_shipped_name(place):
        return SHIPPED / place
    if not is_hub_name(place):
        return Path(place)
    folder = _download(str(place), ("config.json",))
    config = folder / "config.json"
    if config.is_file() and "format" not in read_typed(config, dict[str, object]):
        raise UserError(
            f"{place} is a checkpoint of another library; `ufbert import {place} --out FOLDER` makes a model folder of it."
        )
    return _download(str(place), MODEL_FILES, commit=folder.name)


def checkpoint_folder(place: str) -> Path:
    """Return a path as it is, or the folder to which the checkpoint of a hub name is downloaded. Raises UserError."""
    if not is_hub_name(place):
        return Path(place)
    folder = _download(place, CHECKPOINT_FILES)
    if not any(folder.glob("model*.safetensors")):
        folder = _download(place, (*CHECKPOINT_FILES, "*.safetensors"), commit=folder.name)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{place} has no .safetensors file in {folder}. PyTorch's own files are not read, for they can run code; load the "
            "model with the library that wrote it and call save_pretrained."
        )
    return folder


def _download(place: str, files: Sequence[str], commit: str = "") -> Path:
    """Download some of the files of a hub name, at `commit` if that is known. Raises UserError if they cannot be had."""
    import huggingface_hub.utils
    from huggingface_hub import constants

    huggingface_hub.utils.disable_progress_bars()  # a phase says what is under way, in one line
    match = _NAME.fullmatch(place)
    if not match or ".." in place:
        raise UserError(f"{place[:120]!r} names no model of the Hugging Face hub; write hf:OWNER/NAME[@REVISION].")
    name, revision = match[1], match[2] or "main"
    if not constants.HF_HUB_OFFLINE and not commit:
        print(f"getting {place} from the Hugging Face hub", file=sys.stderr, flush=True)
    try:
        with phase(f"finding the files of {place}"):
            folder = huggingface_hub.snapshot_download(
                name, revision=commit or revision, allow_patterns=list(files), ignore_patterns=["*/*"]
            )
        return Path(folder)
    except Exception as error:  # of the many kinds of the libraries below, and of a full disk
        raise UserError(f"{place} cannot be had from the Hugging Face hub: {_why(name, revision, error)}.") from error


def _why(name: str, revision: str, error: Exception) -> str:
    """Say why a download failed and what to do, as a clause without a full stop."""
    from huggingface_hub import constants, errors

    cached = f"the cache {constants.HF_HUB_CACHE} does not hold all of it"
    match error:
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set, and {cached}; unset it, or name a local folder"
        case errors.LocalEntryNotFoundError():
            return (
                f"there is no connection, and {cached}; connect, or run `hf download {name}` where there is one, copy that "
                "cache here and set HF_HUB_OFFLINE=1"
            )
        case errors.GatedRepoError():
            return f"it is gated; accept its terms at {constants.ENDPOINT}/{name} and log in with `hf auth login`"
        case errors.RepositoryNotFoundError():
            return "there is no such model, or it is private; mend the name, or log in with `hf auth login`"
        case errors.RevisionNotFoundError():
            return f"it has no revision {revision!r}"
    return first_line(error)
