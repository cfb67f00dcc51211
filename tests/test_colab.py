"""The notebook runs from top to bottom, on the toy instead of a hub model, and holds no code of its own."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "colab" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells():
    return nbformat.read(NOTEBOOK, as_version=4).cells


def test_it_is_short_and_only_imports(cells):
    assert len(cells) < 20
    for cell in cells:
        if cell.cell_type == "code" and not cell.source.startswith("%"):
            defined = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Lambda)
            found = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, defined)]
            assert all(ast.unparse(n) == "lambda x: x.shape" for n in found), cell.source


def test_it_runs(cells, toy, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [c for c in notebook.cells if not c.source.startswith("%pip")]
    here = next(c for c in notebook.cells if c.source.startswith("MODEL"))
    here.source = f"MODEL = {str(toy.base)!r}\nDATA = {str(toy.data)!r}\nSTEPS = 4\nLENGTH = 128"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "mine" / "model.safetensors").is_file()
    assert (tmp_path / "mine-adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "runs" / "colab" / "report.html").is_file()
