"""A matplotlib figure that Jupyter shows as a picture by itself, also where pyplot was never imported."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A `Figure` that draws itself in a notebook; where a backend has taken over the showing, that goes first."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
