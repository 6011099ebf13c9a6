"""Names of the Hugging Face hub in a folder's place, from a cache in its layout; and one sentence for each way to lack one."""

import os
import subprocess
import sys
from pathlib import Path

import httpx2
import huggingface_hub.utils
import jax
import numpy as np
import pytest
from conftest import REPO
from huggingface_hub import constants, errors

import ufbert
from ufbert.errors import UserError
from ufbert.hub.convert import export_folder, export_model, import_checkpoint
from ufbert.hub.download import checkpoint_folder, model_folder
from ufbert.hub.folder import flatten, load_model, save_model
from ufbert.inference.predictor import Predictor
from ufbert.options.convert import ExportOptions, ImportOptions
from ufbert.options.train import TrainOptions
from ufbert.pretrain.budget import parse_budget
from ufbert.pretrain.corpus import locate_rows
from ufbert.pretrain.resolve import local_platform, resolve

COMMIT, EARLIER = "a" * 40, "b" * 40


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """The hub's cache for the test, and nothing else in a path of reach."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hf" / "hub"


def put(cache: Path, name: str, folder: Path, revision: str = "main", commit: str = COMMIT) -> Path:
    """A folder's files as a download of the hub leaves them: links to blobs, under the commit of a revision."""
    root = cache / f"models--{name.replace('/', '--')}"
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob = root / "blobs" / f"{commit[:4]}-{path.name}"
        link = root / "snapshots" / commit / path.relative_to(folder)
        for parent in (blob.parent, link.parent, root / "refs"):
            parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs" / revision).write_text(commit)
    return root / "snapshots" / commit


@pytest.fixture
def model(cache, family, tmp_path):
    """A small BERT, in the cache as `me/ours` and, in Hugging Face's layout, as `me/theirs`."""
    model = family("bert", "masked_lm")
    save_model(tmp_path / "ours", model)
    export_model(model, tmp_path / "theirs", "hf")
    put(cache, "me/ours", tmp_path / "ours")
    put(cache, "me/theirs", tmp_path / "theirs")
    return model


def same(one, other) -> bool:
    ours, theirs = flatten(one.params), flatten(other.params)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_hub_name_stands_for_a_folder(model, cache, tmp_path, capsys):
    assert same(ufbert.load("hf:me/ours"), model)
    [guesses] = Predictor.load("hf:me/ours@main").fill_mask(["the [MASK] sees the dog"], top=2)[0]
    assert len(guesses) == 2
    import_checkpoint(ImportOptions("hf:me/theirs", str(tmp_path / "imported")))
    assert same(load_model(tmp_path / "imported"), model)
    export_folder(ExportOptions("hf:me/ours", "hf", str(tmp_path / "exported")))
    assert (tmp_path / "exported" / "vocab.txt").is_file()
    assert "getting" not in capsys.readouterr().err  # nothing is got
    assert huggingface_hub.utils.are_progress_bars_disabled()


def test_a_run_starts_from_a_hub_name_that_is_looked_up_once(model, corpus_file, tmp_path, monkeypatch):
    from ufbert.pretrain import start

    start.local_folder.cache_clear()
    asked, download = [], huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **options: asked.append(args) or download(*args, **options)
    )
    options = TrainOptions(
        init_from="hf:me/ours", budget="5steps", corpus=f"text:{corpus_file}", prepared=str(tmp_path)
    )
    run = resolve(options, {}, parse_budget("5steps"), local_platform("cpu")).run
    assert run.model == model.config
    assert locate_rows(options).tokenizer.get_vocab() == model.tokenizer.get_vocab()
    params = start.start_params("hf:me/ours", start.start_sha256("hf:me/ours"), run.model, jax.random.key(0))
    assert all(np.array_equal(array, flatten(model.params)[path]) for path, array in flatten(params).items())
    assert len(asked) == 2  # the configuration, and all
    with pytest.raises(UserError, match="is a checkpoint of another library; `ufbert import hf:me/theirs"):
        start.read_start("hf:me/theirs")


def test_a_revision_is_a_branch_a_tag_or_a_commit(model, cache, family, tmp_path):
    earlier = family("bert", "masked_lm", init_std=0.1)
    save_model(tmp_path / "earlier", earlier)
    put(cache, "me/ours", tmp_path / "earlier", "v1.0", EARLIER)
    assert same(load_model("hf:me/ours@v1.0"), earlier)
    assert same(load_model(f"hf:me/ours@{EARLIER}"), earlier)
    assert same(load_model(f"hf:me/ours@{COMMIT}"), model)


def test_only_files_that_are_read_are_downloaded(monkeypatch, tmp_path):
    asked = []

    def snapshot(name, **options):
        asked.append((name, options))
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    (tmp_path / COMMIT).mkdir()
    (tmp_path / COMMIT / "config.json").write_text('{"format": "ufbert"}')
    model_folder("hf:me/ours@v2")
    (tmp_path / COMMIT / "odd.safetensors").write_text("")
    checkpoint_folder("hf:me/theirs")
    assert [(name, options["revision"]) for name, options in asked] == [
        ("me/ours", "v2"), ("me/ours", COMMIT), ("me/theirs", "main"), ("me/theirs", COMMIT),
    ]  # fmt: skip
    files = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.txt",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "odd.safetensors",
        "pytorch_model.bin", "tf_model.h5", "onnx/model.safetensors", "README.md",
    ]  # fmt: skip
    taken = [
        list(huggingface_hub.utils.filter_repo_objects(files, **{key: options[key] for key in PATTERNS}))
        for _, options in asked
    ]
    assert taken == [files[:1], ["config.json", "model.safetensors", "tokenizer.json"], files[:9], files[:10]]


PATTERNS = ("allow_patterns", "ignore_patterns")


@pytest.mark.parametrize(
    "name",
    ["hf:", "hf:a/b/c", "hf:../secret", "hf:me/ours@../../x", "hf://me/ours", "hf:me/ours@", "hf:me/o urs", "hf:a--b"],
)
@pytest.mark.parametrize("read", [model_folder, checkpoint_folder])
def test_a_malformed_name_is_one_sentence(name, read, cache):
    with pytest.raises(
        UserError, match=r"names no model of the Hugging Face hub; write|hub: Cannot have -- or \.\. in"
    ):
        read(name)


@pytest.mark.parametrize("name", ["hf:me/none", "hf:me/ours@v9"])
def test_offline_a_model_that_is_not_cached_is_one_sentence(name, model, cache):
    for read in (load_model, checkpoint_folder):
        with pytest.raises(UserError) as caught:
            read(name)
        assert str(caught.value) == (
            f"{name} cannot be had from the Hugging Face hub: HF_HUB_OFFLINE is set, and the cache {cache} does not hold all "
            "of it; unset it, or name a local folder."
        )


def answer(kind: type[Exception]) -> Exception:
    """An error as the library raises it on an answer of the hub."""
    return kind("No.", response=httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co")))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            answer(errors.RepositoryNotFoundError),
            "there is no such model, or it is private; mend the name, or log in with `hf",
        ),
        (answer(errors.GatedRepoError), "it is gated; accept its terms at https://huggingface.co/me/ours and log in"),
        (answer(errors.RevisionNotFoundError), "it has no revision 'v2'"),
        (errors.LocalEntryNotFoundError("No."), "there is no connection, and the cache "),
        (httpx2.ProxyError("the proxy says no"), "the proxy says no"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(error, words, cache, monkeypatch, capsys):
    def refuse(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError) as caught:
        model_folder("hf:me/ours@v2")
    assert str(caught.value).startswith(f"hf:me/ours@v2 cannot be had from the Hugging Face hub: {words}")
    assert capsys.readouterr().err == "getting hf:me/ours@v2 from the Hugging Face hub\n"


def test_another_library_s_model_is_to_be_imported_first(model):
    with pytest.raises(
        UserError, match=r"another library; `ufbert import hf:me/theirs --out FOLDER` makes a model folder"
    ):
        load_model("hf:me/theirs")


def test_a_checkpoint_without_safetensors_is_one_sentence(cache, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    put(cache, "me/old", tmp_path / "old")
    with pytest.raises(UserError, match=r"hf:me/old has no \.safetensors file in .*PyTorch's own files are not read"):
        checkpoint_folder("hf:me/old")


def test_a_name_without_its_prefix_is_pointed_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"There is no model folder at me/ours; hf:me/ours is that name on the"):
        load_model("me/ours")
    (tmp_path / "me").mkdir()
    with pytest.raises(UserError, match=r"There is no model folder at me/ours\."):
        load_model("me/ours")


def test_the_environment_names_the_cache(cache, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text('{"format": "ufbert"}')
    place = put(cache, "me/ours", tmp_path / "old")
    code = "from ufbert.hub.download import model_folder; print(model_folder('hf:me/ours'))"
    env = {**os.environ, "HF_HOME": str(cache.parent), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == f"{place}\n", done.stderr
