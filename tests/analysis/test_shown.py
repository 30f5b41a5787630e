"""Figures of the analyses in Jupyter: they show themselves, though pyplot was never imported."""

from __future__ import annotations

import pickle
import subprocess
import sys

from sparsetweaks.analysis.figures import new_figure

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_figure_is_a_picture_in_jupyter_without_pyplot():
    code = (
        "import sys; from IPython.core.formatters import DisplayFormatter; "
        "from sparsetweaks.analysis.figures import new_figure; figure, axes = new_figure(); axes.plot([1, 2]); "
        "shown, _ = DisplayFormatter().format(figure); assert 'matplotlib.pyplot' not in sys.modules; "
        "print(*shown, shown['image/png'][:4])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["text/plain", "image/png", r"b'\x89PNG'"]


def test_a_figure_can_be_kept():
    figure, axes = new_figure()
    axes.plot([1, 2])
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(PNG)
