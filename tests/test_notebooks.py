"""Each notebook is generated from its percent-format source and holds what it showed; nbmake executes them."""

import ast
import re
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SHOWS = {"print", "ufbert.pretrain", "ufbert.plan", "ufbert.finetune", "ufbert.study"}
"""Calls after which a reader expects to see something."""
MACHINE = re.compile(r"(?<![\w.])/(?:work|tmp|root|home|Users|usr|opt|private|var|mnt)\b")
"""The beginning of a path that only one machine has."""

each_notebook = pytest.mark.parametrize("source", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.stem)


def calls(code: str) -> set[str]:
    """The functions that a cell calls itself, by the names it uses; not those that only its own functions call."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            names.add(ast.unparse(node.func))
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(code))
    return names


@each_notebook
def test_the_notebook_is_its_source(source):
    script, notebook = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ], f"run `uv run .ci/notebooks {source.stem}`"


@each_notebook
def test_every_cell_that_prints_or_draws_shows_it(source):
    cells = [cell for cell in jupytext.read(source.with_suffix(".ipynb")).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom"
    for cell in cells:
        called = calls(cell.source)
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert cell.outputs or not called & SHOWS, cell.source
        assert pictures or "plt.show" not in called, cell.source


@each_notebook
def test_outputs_are_small_and_name_no_machine(source):
    notebook = source.with_suffix(".ipynb")
    assert notebook.stat().st_size < 1.5e6
    for cell in jupytext.read(notebook).cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            data = output.get("data", {})
            for text in (output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")):
                assert not MACHINE.search(text), text
