"""Every notebook runs from top to bottom, in a short setting, and shows what it promises."""

import importlib.util
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest
from compiling import UNOPTIMIZED

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks"
SHORT = {
    "new_mixer.ipynb": "FOLDER = {folder!r}\nSTEPS = 4\nLAWS = 'ema and packing'",
    "passkey.ipynb": "WORKDIR = {folder!r}\nSTEPS = 4\nLENGTHS = (256, 512)\nSAMPLES = 1",
}
PRINTED = {
    "new_mixer.ipynb": ("test_packing PASSED", "2 passed", "step 4: loss"),
    "passkey.ipynb": ("The pass key is", "Mamba's state:"),
}
PICTURES = {"new_mixer.ipynb": 1, "passkey.ipynb": 2}


def test_every_notebook_has_a_short_setting():
    assert {path.name for path in NOTEBOOKS.glob("*.ipynb")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_runs(name, tmp_path, monkeypatch):
    for variable, value in UNOPTIMIZED.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    settings = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(settings) == 1
    settings[0].source = SHORT[name].format(folder=str(tmp_path / "run"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error"]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[name]
    printed = "".join(output.get("text", "") for output in shown)
    for text in PRINTED[name]:
        assert text in printed


def first_cell(folder, monkeypatch):
    """Runs the installing cell of the passkey notebook in `folder` as if lcr were not installed; what it would run."""
    source = next(c.source for c in nbformat.read(NOTEBOOKS / "passkey.ipynb", 4).cells if c.cell_type == "code")
    commands = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    exec(source, {})
    return commands


def test_the_first_cell_installs_a_checkout_above_or_beside_it(tmp_path, monkeypatch):
    """Not as editable: a running kernel would not find that."""
    root = NOTEBOOKS.parent
    install = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert first_cell(NOTEBOOKS, monkeypatch) == [[*install, str(root)]]
    (tmp_path / "lcr").symlink_to(root)
    assert first_cell(tmp_path, monkeypatch) == [[*install, str(tmp_path / "lcr")]]


def test_the_first_cell_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="set SOURCE to a checkout's folder"):
        first_cell(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", SHORT)
def test_is_stored_with_its_outputs(name):
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES[name]
