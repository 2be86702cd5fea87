"""Every notebook runs from top to bottom, in a short setting, and shows what it promises."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"
SHORT = {
    "passkey.ipynb": "WORKDIR = {folder!r}\nSTEPS = 4\nLENGTHS = (256, 512)\nSAMPLES = 1",
}


def test_every_notebook_has_a_short_setting():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_runs(name, tmp_path):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    settings = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(settings) == 1
    settings[0].source = SHORT[name].format(folder=str(tmp_path / "run"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error"]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == 2, "a learning curve and a heat-map"
    printed = "".join(output.get("text", "") for output in shown)
    assert "The pass key is" in printed and "Mamba's state:" in printed


@pytest.mark.parametrize("name", SHORT)
def test_is_stored_with_its_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
