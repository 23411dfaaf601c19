"""The notebook runs from its first cell to its last, as a reader of a checkout would run it."""

import re

import nbformat
import pytest
from ipykernel import kernelspec
from nbclient import NotebookClient

from tiny_runs import ROOT, TINY

NOTEBOOK = ROOT / "notebooks" / "attention.ipynb"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of this very interpreter; nothing outside tmp_path is read or written for it."""
    kernelspec.write_kernel_spec(tmp_path / "kernels" / "here")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return "here"


def test_every_cell_runs_and_shows_its_figures(kernel, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    overrides = {name: value for name, value in TINY.items() if name not in ("num_steps", "seq_len", "eval.every")}
    (tmp_path / "text.txt").write_text("The sky is wide and the sea is deep. " * 300)
    assert cells["parameters"].metadata.tags == ["parameters"]
    cells["parameters"].source = "\n".join([
        "ntp, meap = None, None",
        "num_steps, seq_len, num_sequences = 2, 384, 3",
        f"text = {str(tmp_path / 'text.txt')!r}",
        f"workdir = {str(tmp_path / 'run')!r}",
        f"overrides = {overrides!r}",
    ])  # fmt: skip

    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name=kernel, resources=folder).execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)

    def printed(name):
        return "".join(output.text for output in cells[name].outputs if output.output_type == "stream")

    assert "step 2/2" in printed("train")
    assert len(re.findall(r"decay +-?\d+\.\d % \[ *-?\d+\.\d, +-?\d+\.\d\], t +-?\d", printed("masked"))) == 12
    assert len(re.findall(r"(ntp |meap): before \d\.\d\d, answer \d\.\d\d", printed("segments"))) == 10
    for name, number in (("masked-figures", 3), ("segments-figures", 1)):
        assert sum("image/png" in output.get("data", {}) for output in cells[name].outputs) == number


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)
