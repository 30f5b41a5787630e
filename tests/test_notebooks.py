"""Each notebook runs from top to bottom and is committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, capsys):
    cells = [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    assert not any(cell["outputs"] for cell in cells)
    scope: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), path.name, "exec"), scope)
    assert capsys.readouterr().out
