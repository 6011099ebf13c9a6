"""The house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import ufbert

ROOT = Path(ufbert.__file__).parent
BELOW = {
    "config": {"errors", "kinds"},
    "errors": set(),
    "kinds": {"errors"},
    "exits": set(),
    "device": {"errors", "places", "processes"},
    "processes": {"errors"},
    "places": set(),
    "devices": {"errors"},
    "presets": {"config", "errors"},
    "ops": {"places"},
    "nn": {"ops", "config", "errors"},
    "listing": {"nn", "presets", "config", "cost"},
    "cost": {"config", "devices", "presets"},
    "writers": {"errors"},
    "claim": {"errors"},
    "report": {"config", "errors", "writers"},
    "checkpoint": {"errors", "processes", "writers"},
    "data": {"config", "errors", "places"},
    "hub": {"nn", "ops", "data", "config", "errors", "kinds"},
    "pretrain": {
        "config", "errors", "device", "devices", "presets", "ops", "nn", "cost", "data", "hub", "writers", "checkpoint",
        "processes", "report", "claim", "exits",
    },
    "glue": {"claim", "config", "errors", "device", "ops", "nn", "data", "hub", "writers", "report"},
    "inference": {"config", "errors", "device", "ops", "nn", "data", "hub"},
    "options": {"config", "errors"},
    "bench": {
        "config", "options", "errors", "device", "presets", "ops", "nn", "cost", "data", "hub", "pretrain", "inference",
        "report",
    },
}  # fmt: skip
LAUNCHERS = {"api", "__main__", "__init__"}


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
        assert room == "checkpoint.py" or not any(name.startswith("orbax") for name in names), path


def test_only_the_stand_alone_peers_import_torch_and_they_import_nothing_of_the_package():
    peers = sorted((ROOT / "bench").glob("*_peer.py"))
    assert len(peers) == 3
    for path in set(ROOT.rglob("*.py")) - set(peers):
        assert not any(name.split(".")[0] == "torch" for name in imports_of(path)), path
        assert not any(name.endswith("_peer") for name in imports_of(path)), path
    allowed = {"torch", "numpy", "worker", "transformers", "onnx", "onnxruntime"} | sys.stdlib_module_names
    for path in peers:
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed, path
    assert imports_of(ROOT / "bench" / "worker.py") <= {"numpy", *sys.stdlib_module_names, "collections.abc"}


def test_help_and_config_need_no_jax():
    code = (
        "import sys, ufbert.config, ufbert.pretrain.command, ufbert.pretrain.run, ufbert.glue.command\n"
        "import ufbert.inference.command, ufbert.pretrain.plan_command, ufbert.bench.command\n"
        "import ufbert.glue.table_command, ufbert.options.bench\n"
        "heavy = {'jax', 'flax', 'datasets', 'matplotlib', 'orbax', 'tensorflow_datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
