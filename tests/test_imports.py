"""The house: who may import whom."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ufbert

ROOT = Path(ufbert.__file__).parent
BELOW = {
    "errors": set(),
    "config": {"errors"},
    "runtime": {"config", "errors"},
    "options": {"config", "errors", "runtime"},
    "ops": {"runtime"},
    "nn": {"ops", "config", "errors"},
    "cost": {"config", "errors", "runtime", "ops", "nn"},
    "data": {"config", "errors", "runtime"},
    "hub": {"config", "errors", "runtime", "options", "ops", "nn", "data"},
    "report": {"config", "errors", "runtime"},
    "pretrain": {"config", "errors", "runtime", "options", "ops", "nn", "cost", "data", "hub", "report"},
    "plan": {"config", "errors", "runtime", "options", "ops", "nn", "cost", "data", "hub", "report", "pretrain"},
    "glue": {"config", "errors", "runtime", "options", "ops", "nn", "data", "hub", "report"},
    "inference": {"config", "errors", "runtime", "options", "ops", "nn", "data", "hub"},
    "study": {
        "config", "errors", "runtime", "options", "cost", "glue", "report", "pretrain", "bench",
    },
    "compare": {
        "config", "errors", "runtime", "options", "ops", "nn", "cost", "report", "pretrain", "plan", "glue", "bench", "study",
        "compress",
    },
    "bench": {
        "config", "errors", "runtime", "options", "ops", "nn", "cost", "data", "hub", "report", "pretrain", "glue", "inference",
    },
    "compress": {
        "config", "errors", "runtime", "options", "ops", "nn", "cost", "data", "hub", "report", "pretrain", "glue", "inference",
        "bench",
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


def test_only_the_command_line_and_the_python_interface_import_late():
    late = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        if path.name not in ("cli.py", "api.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ufbert"
    ]
    assert late == []


@pytest.mark.parametrize("name", ["plan", "pretrain"])
def test_a_function_of_the_interface_outlives_the_import_of_the_package_of_its_name(name):
    importlib.import_module(f"ufbert.{name}.run")
    assert callable(getattr(ufbert, name))


def test_few_modules_lie_loose_and_no_two_import_each_other():
    assert len(list(ROOT.glob("*.py"))) <= 6
    names = {".".join(("ufbert", *path.relative_to(ROOT).with_suffix("").parts)): path for path in ROOT.rglob("*.py")}
    imports = {name: {other for other in imports_of(path) if other in names} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"{' -> '.join(above)} -> {name}"
        if name not in done:
            for other in imports[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in imports:
        visit(name, ())


def test_flax_orbax_and_heavy_libraries_stay_in_their_rooms():
    for path in ROOT.rglob("*.py"):
        names, room = imports_of(path), path.relative_to(ROOT).parts[0]
        assert room == "nn" or not any(name.startswith("flax") for name in names), path
        assert path.name == "checkpoint.py" or not any(name.startswith("orbax") for name in names), path


def test_only_the_stand_alone_peers_import_torch_and_they_import_nothing_of_the_package():
    peers = sorted((ROOT / "bench").rglob("*_peer.py"))
    assert len(peers) == 3
    for path in set(ROOT.rglob("*.py")) - set(peers):
        assert not any(name.split(".")[0] == "torch" for name in imports_of(path)), path
        assert not any(name.endswith("_peer") for name in imports_of(path)), path
    allowed = {
        "torch",
        "numpy",
        "worker",
        "transformers",
        "onnx",
        "onnxruntime",
        "openvino",
        "nncf",
    } | sys.stdlib_module_names
    for path in peers:
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed, path
    assert imports_of(ROOT / "bench" / "worker.py") <= {"numpy", *sys.stdlib_module_names, "collections.abc"}


def test_help_and_config_need_no_jax():
    code = (
        "import sys, ufbert, ufbert.cli\n"
        "heavy = {'jax', 'flax', 'rich', 'datasets', 'matplotlib', 'orbax', 'tensorflow_datasets', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
