"""Files and folders have the mode that the umask says, so that those may read them whom the user lets."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax.numpy as jnp
import pytest

from ufbert.config import DataConfig
from ufbert.data.corpora import Corpus
from ufbert.data.prepare import Recipe, prepare
from ufbert.hub.convert import export_model
from ufbert.hub.folder import save_model
from ufbert.hub.leaf_layer import save_layer
from ufbert.ops.leaf_fff import LeafTree
from ufbert.runtime.claim import new_folder
from ufbert.runtime.files import write_json


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mask(request):
    """A umask, in force during the test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    """The mode of a folder and of all that lies in it, by name."""
    return {str(path.relative_to(root.parent)): path.stat().st_mode & 0o777 for path in (root, *root.rglob("*"))}


def asked(root: Path, mask: int) -> dict[str, int]:
    """The modes that the mask says."""
    paths = (root, *root.rglob("*"))
    return {str(path.relative_to(root.parent)): (0o777 if path.is_dir() else 0o666) & ~mask for path in paths}


def texts(*documents: str) -> Corpus:
    return Corpus("x", "none", lambda: iter(documents))


def test_what_is_written_has_the_mode_of_the_mask(mask, family, tmp_path):
    root = tmp_path / "root"
    model = family("bert", "masked_lm")
    save_model(root / "model", model)
    save_model(root / "model", model)  # over the first
    export_model(model, root / "exported", "hf")
    layer = LeafTree(*map(jnp.ones, ((1, 4), (1,), (2, 4, 3), (2, 3), (2, 3, 4), (2, 4))))
    save_layer(root / "layer", layer, "relu")
    write_json(root / "reports" / "summary.json", {})
    documents = [f"the cat number {number} sees the dog in the garden" for number in range(200)]
    data = DataConfig(seq_len=32, tokenizer_chars=10**4, drop_near=False, filter_worst=0.0)
    prepare(texts(*documents), root / "prepared" / "text", Recipe.of(data, 60, None))
    new_folder(root / "runs", "run")
    names = {path.name for path in root.rglob("*")}
    assert names >= {"model.safetensors", "vocab.txt", "manifest.json", "heldout-00000.bin", "summary.json"}, names
    assert modes(root) == asked(root, mask)


def test_a_whole_run_has_the_mode_of_the_mask(run_folder, tmp_path):
    (tmp_path / "probe").write_text("")
    mask = 0o666 & ~(tmp_path / "probe").stat().st_mode
    assert modes(run_folder) == asked(run_folder, mask)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may act as another user; the modes are compared in its stead")
def test_another_user_reads_a_model_folder(family):
    place = Path(tempfile.mkdtemp(prefix="ufbert-tests-"))  # pytest's own folders are closed to others
    before = os.umask(0o022)
    try:
        place.chmod(0o755)
        save_model(place / "model", family("bert", "masked_lm"))
        read = ["cat", *map(str, sorted((place / "model").iterdir()))]
        done = subprocess.run(read, capture_output=True, user=65534, group=65534, extra_groups=[])
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) == sum(path.stat().st_size for path in (place / "model").iterdir())
    finally:
        os.umask(before)
        shutil.rmtree(place)
