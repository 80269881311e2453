"""The notebooks: their stored outputs are whole, and each runs from a clean checkout.

    python tests/test_notebooks.py notebooks/1_*.ipynb      runs them where they lie and stores what they show
"""
import base64
import io
import re
import shutil
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from conftest import ROOT               # first: it puts the repository on the path
import data

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]_*.ipynb"))
each = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def execute(path):
    """Run a notebook in its own folder, top to bottom; returns it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}).execute()
    return notebook


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is committed and the built-in speakers, made once; no checkpoints, so the notebooks train small."""
    folder = tmp_path_factory.mktemp("checkout")
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "official.pt", folder / "tests")
    data.build_speakers(folder / data.BUILT_IN)
    return folder


@each
def test_stored_outputs(notebook):
    """Executed once, in order, to the end; no errors, no warnings; small; nothing of the machine that ran it."""
    assert notebook.stat().st_size < 300_000
    stored = nbformat.read(notebook, as_version=4)
    nbformat.validate(stored)
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert len(cell.source.splitlines()) <= 10, cell.source
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in cell.outputs)
        says = "\n".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
                         for output in cell.outputs)
        assert not re.search(r"Warning|Traceback|0x[0-9a-f]{6}|Text\(|/home/|/tmp/|/root/", says), says
        draws = re.search(r"plt\.(show|subplots|figure)\(", cell.source)
        shows = any("image/png" in output.get("data", {}) for output in cell.outputs)
        assert shows or not draws, f"a picture is missing behind:\n{cell.source}"
        says_something = re.search(r"^(print|HTML)\(", cell.source, re.MULTILINE)
        assert cell.outputs or not says_something, f"an output is missing behind:\n{cell.source}"


@each
def test_runs(notebook, checkout):
    for cell in execute(checkout / "notebooks" / notebook.name).cells:
        for output in cell.get("outputs", ()):
            assert "Warning" not in output.get("text", ""), output.text


def store(path):
    """Run a notebook and keep its outputs: pictures in 48 colours, no times, no name of this machine's Python."""
    notebook = execute(path)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                image = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
                small = io.BytesIO()
                image.quantize(48, dither=Image.Dither.NONE).save(small, "png", optimize=True)
                output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        store(ROOT / argument)
