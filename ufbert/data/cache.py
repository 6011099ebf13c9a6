"""The places of prepared folders, so that the next run with an equal corpus and equal options finds its data ready."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from ufbert.config import DataConfig
from ufbert.data.corpora import Corpus, Source, open_corpus, source_of
from ufbert.data.prepare import prepare
from ufbert.data.prepared import DATA_FORMAT, Manifest, PreparedData, Recipe, open_prepared, read_manifest
from ufbert.errors import UserError
from ufbert.runtime.files import user_cache

Say = Callable[[str], None]


def cache_folder(given: str = "") -> Path:
    """The folder that holds prepared folders: the one given, or `prepared` under $UFBERT_CACHE or the user's cache."""
    return Path(given) if given else user_cache() / "prepared"


def prepared_name(source: Source, recipe: Recipe) -> str:
    """The name of the folder for a corpus and a recipe."""
    facts = json.dumps([DATA_FORMAT, dict(source), asdict(recipe)], sort_keys=True)
    return f"{source['kind']}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


class Located(NamedTuple):
    """The data of a run: ready, or else the corpus to prepare it from."""

    ready: PreparedData | None
    corpus: Corpus | None
    folder: Path
    """Folder of the data, now or once it is prepared."""
    recipe: Recipe
    tokenizer: Tokenizer | None
    """The one to use; None has one trained."""


def locate(
    spec: str,
    data: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    prepared: str,
    say: Say,
    heldout: str = "",
) -> Located:
    """Data that is ready for a corpus and its options, or else the corpus, opened. `prepared` is as for `cache_folder`, and
    `heldout` names a held-out text of its own.

    A ready folder serves if its options are equal and its corpus has not changed since, or is gone, or was called the same on
    another machine and has never been here. One that is damaged is
    removed where the corpus is still there; one whose manifest makes no sense, or is of another version, is passed over with a
    word to `say`. Raises UserError if there is neither data nor corpus.
    """
    source, recipe, root = source_of(spec, heldout), Recipe.of(data, vocab_size, tokenizer), cache_folder(prepared)
    gone = source["files"] is None
    for folder in _fitting(root, spec, source, recipe, say):
        try:
            found = open_prepared(folder)
        except UserError as error:
            say(f"not used: {error}")
            if not gone:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        elsewhere = _from_elsewhere(spec, source, found.manifest)
        where = "not here; text that was prepared elsewhere" if elsewhere else "gone; its prepared text"
        say(f"the corpus {spec} is {where} is used: {folder}" if gone else f"prepared before: {folder}")
        return Located(found, None, folder, recipe, tokenizer)
    corpus, folder = open_corpus(spec, heldout), root / prepared_name(source, recipe)
    if folder.exists() and _manifest(folder, lambda _: None) is None:  # it would be in the way of its successor
        try:
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        except OSError as error:
            raise UserError(
                f"{folder} is damaged and cannot be removed: {error.strerror}; remove it yourself."
            ) from error
    return Located(None, corpus, folder, recipe, tokenizer)


def finish(located: Located, progress: Say, say: Say) -> PreparedData:
    """The data, prepared now if it was not ready. Raises UserError as `prepare` does."""
    if located.ready is not None:
        return located.ready
    assert located.corpus is not None
    return prepare(
        located.corpus,
        located.folder,
        located.recipe,
        tokenizer=located.tokenizer,
        progress=progress,
        say=say,
    )


def reopen(folder: str, fingerprint: str, say: Say) -> PreparedData | None:
    """The very data that a run was started with, or None, with a word on why, if it is gone or damaged.

    Raises UserError if the folder now holds other rows.
    """
    try:
        data = open_prepared(Path(folder))
    except UserError as error:
        say(f"preparing the text again: {error}")
        return None
    if data.manifest.fingerprint != fingerprint:
        raise UserError(f"{folder} no longer holds the rows this run was started with; start a new run.")
    return data


def _fitting(root: Path, spec: str, source: Source, recipe: Recipe, say: Say) -> Iterator[Path]:
    """Folders under `root` that hold what the recipe would make of the source."""
    for path in sorted(root.glob("*/manifest.json")):
        manifest = _manifest(path.parent, say)
        if manifest is None or manifest.format_version != DATA_FORMAT:
            continue
        same = _same_source(source, manifest.source) or _from_elsewhere(spec, source, manifest)
        if same and _same_rows(recipe, manifest):
            yield path.parent


def _manifest(folder: Path, say: Say) -> Manifest | None:
    """A folder's manifest, or None, with a word to `say`, where there is none of this version."""
    try:
        return read_manifest(folder)
    except UserError as error:
        say(f"passed over: {error}")
        return None


def _same_source(now: Source, then: Source) -> bool:
    """Equal in place, and in size and time unless the files cannot be seen any more. So is the held-out text."""
    apart = ("files", "heldout") if now["files"] is None else ("heldout",)
    if {k: v for k, v in now.items() if k not in apart} != {k: v for k, v in then.items() if k not in apart}:
        return False
    ours, theirs = now.get("heldout"), then.get("heldout")
    return ours == theirs or (isinstance(ours, dict) and isinstance(theirs, dict) and _same_source(ours, theirs))


def _from_elsewhere(spec: str, now: Source, manifest: Manifest) -> bool:
    """Tell if text files that go by the same `--corpus` were read on another machine: neither these nor those are here."""
    paths = manifest.source.get("paths")
    return (
        now["files"] is None
        and manifest.corpus == spec
        and _heldout_name(now) == _heldout_name(manifest.source)
        and isinstance(paths, list)
        and paths != now["paths"]
        and not any(Path(str(path)).exists() for path in paths)
    )


def _heldout_name(source: Source) -> str:
    heldout = source.get("heldout")
    return str(heldout.get("spec")) if isinstance(heldout, dict) else ""


def _same_rows(recipe: Recipe, manifest: Manifest) -> bool:
    """Equal in every option, but that a corpus read to its end serves every bound that it stays below."""
    wanted, had = asdict(recipe), asdict(manifest.recipe)
    bound, had_bound = wanted.pop("max_tokens"), had.pop("max_tokens")
    read_whole = manifest.exhausted and (bound == 0 or bound > manifest.tokens_read)
    return wanted == had and (bound == had_bound or read_whole)
