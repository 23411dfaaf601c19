"""The notebook runs from its first cell to its last, as a reader of a checkout would run it."""

import re

import nbformat
import pytest
from ipykernel import kernelspec
from nbclient import NotebookClient

from tiny_runs import ROOT, TINY

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
NUM_STEPS = 4


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of this very interpreter; nothing outside tmp_path is read or written for it."""
    kernelspec.write_kernel_spec(tmp_path / "kernels" / "here")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return "here"


def test_every_cell_runs_and_the_accuracies_are_numbers(kernel, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    overrides = {name: value for name, value in TINY.items() if name not in ("num_steps", "log.every")}
    assert cells["parameters"].metadata.tags == ["parameters"]
    cells["parameters"].source = "\n".join([
        f"num_steps = {NUM_STEPS}",
        "seeds = (0,)",
        f"workdir = {str(tmp_path / 'run')!r}",
        f"overrides = {overrides!r}",
    ])  # fmt: skip

    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name=kernel, resources=folder).execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)

    def printed(name):
        return "".join(output.text for output in cells[name].outputs if output.output_type == "stream")

    assert "1 x CPU" in printed("setup") or "8 x CPU" in printed("setup")
    assert "preset 'quickstart'" in printed("setup")
    assert "[MASK]" in printed("masking")
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in printed("train")
    for objective in ("ntp", "meap"):
        assert re.search(rf"{objective} +seed 0: clean loss \d\.\d{{4}}, retrieval \d+\.\d% \[", printed("accuracy"))
        assert re.search(rf"{objective} +depth 0\.0 to 0\.2: \d+\.\d%", printed("depth"))
        assert f"{objective} seed 0:" in printed("generate")
    for name in ("loss", "depth"):
        assert any("image/png" in output.get("data", {}) for output in cells[name].outputs)


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)
