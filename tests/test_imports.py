"""The house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import ufbert

ROOT = Path(ufbert.__file__).parent
BELOW = {
    "errors": set(),
    "config": {"errors"},
    "runtime": {"config", "errors"},
    "options": {"config", "errors", "runtime"},
    "ops": {"runtime"},
    "nn": {"ops", "config", "errors"},
    "cost": {"config", "errors", "ops", "nn"},
    "data": {"config", "errors", "runtime"},
    "hub": {"config", "errors", "runtime", "options", "ops", "nn", "data"},
    "report": {"config", "errors", "runtime"},
    "pretrain": {"config", "errors", "runtime", "options", "ops", "nn", "cost", "data", "hub", "report"},
    "plan": {"config", "errors", "runtime", "options", "ops", "nn", "cost", "data", "hub", "report", "pretrain"},
    "glue": {"config", "errors", "runtime", "options", "ops", "nn", "data", "hub", "report"},
    "inference": {"config", "errors", "runtime", "options", "ops", "nn", "data", "hub"},
    "bench": {
        "config", "errors", "runtime", "options", "ops", "nn", "cost", "data", "hub", "report", "pretrain", "glue", "inference",
    },
}  # fmt: skip
LAUNCHERS = {"api", "cli", "__main__", "__init__"}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "ufbert":
                found |= {f"ufbert.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_packages_import_downwards_only():
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in LAUNCHERS or room == "configs":
            continue
        inner = {name.split(".")[1] for name in imports_of(path) if name.startswith("ufbert.")}
        assert inner - {room} <= BELOW[room], f"{path.name} imports {inner - {room} - BELOW[room]}"


def test_flax_orbax_and_heavy_libraries_stay_in_their_rooms():
    for path in ROOT.rglob("*.py"):
        names, room = imports_of(path), path.relative_to(ROOT).parts[0]
        assert room == "nn" or not any(name.startswith("flax") for name in names), path
        assert path.name == "checkpoint.py" or not any(name.startswith("orbax") for name in names), path


def test_only_the_stand_alone_peers_import_torch_and_they_import_nothing_of_the_package():
    peers = sorted((ROOT / "bench").glob("*_peer.py"))
    assert len(peers) == 3
    for path in set(ROOT.rglob("*.py")) - set(peers):
        assert not any(name.split(".")[0] == "torch" for name in imports_of(path)), path
        assert not any(name.endswith("_peer") for name in imports_of(path)), path
    allowed = {"torch", "numpy", "torch_peer", "transformers", "onnx", "onnxruntime"} | sys.stdlib_module_names
    for path in peers:
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed, path


def test_help_and_config_need_no_jax():
    code = (
        "import sys, ufbert, ufbert.cli\n"
        "heavy = {'jax', 'flax', 'datasets', 'matplotlib', 'orbax', 'tensorflow_datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
