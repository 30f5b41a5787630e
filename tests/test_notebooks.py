"""Each notebook runs from top to bottom in a real Jupyter kernel, on a small setting, and is committed without outputs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SMALL = {
    "01-tweak-your-own-model": {"TRAINING_IMAGES": 64, "EPOCHS": 1, "SEEDS": 1},
    "02-which-tweak-helps-my-ticket": {
        "TRAINING_IMAGES": 100,
        "EPOCHS": 2,
        "SEEDS": 2,
        "SCALE_ITERATIONS": 2,
    },
    "03-looking-at-smoothness": {
        "TRAINING_IMAGES": 60,
        "EPOCHS": 2,
        "EARLY": 1,
        "SEEDS": 1,
        "SPARSITIES": (0.5, 0.91),
        "POINTS": 3,
    },
    "04-reproducing-the-paper": {"PRESET": "glance"},
}
"""What a test sets in place of the values of the cell that is tagged `parameters`."""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param.stem, nbformat.read(request.param, 4)


def code_of(content):
    return [cell for cell in content.cells if cell.cell_type == "code"]


def test_it_is_committed_without_outputs_and_is_a_valid_notebook(notebook):
    _, content = notebook
    nbformat.validate(content)
    assert not any(cell.outputs or cell.execution_count for cell in code_of(content))


def test_it_says_what_it_is_and_calls_the_public_names_alone(notebook):
    _, content = notebook
    first = content.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    text = "\n".join(cell.source for cell in code_of(content))
    assert not re.findall(r"\b(?:st|analysis|sparsetweaks)(?:\.\w+)*\._\w+", text)
    assert "pretrained=" not in text and "weights=" not in text and "download=True" not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's own machinery
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_it_runs_in_a_kernel_and_shows_its_pictures(notebook, monkeypatch):
    name, content = notebook
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (parameters,) = (cell for cell in code_of(content) if "parameters" in cell.metadata.get("tags", ()))
    named = set(re.findall(r"^(\w+) = ", parameters.source, flags=re.MULTILINE))
    assert set(SMALL[name]) <= named, "a small setting of what is not there changes nothing"
    parameters.source += "".join(f"\n{key} = {value!r}" for key, value in SMALL[name].items())
    content.cells.insert(
        0, nbformat.v4.new_code_cell("import warnings\n\nwarnings.simplefilter('error')  # as in all tests")
    )

    nbclient.NotebookClient(content, kernel_name="python3", timeout=300).execute()

    outputs = [output for cell in code_of(content) for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/png" in shown
    texts = [output.data["text/plain"] for output in outputs if "data" in output and len(output.data) == 1]
    assert not [text for text in texts if text.startswith("<")], "an object without a picture of its own"
