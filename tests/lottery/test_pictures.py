"""Pictures of looks: every axis named, every variant in the legend, one scale for what is to be compared."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.figure import Figure

from sparsetweaks.lottery import pictures
from sparsetweaks.lottery.contrasts import readings
from sparsetweaks.lottery.pictures import picture_of
from sparsetweaks.lottery.smoothness import ALL, KEPT, Look

NAMES = ("vanilla", "swish")


def looks(measure: str) -> list[Look]:
    """Two variants and seeds, made up."""
    numbers = {"eigenvalue": 3.0, "gradient flow": 0.1, "rise": 2.0, "median rise": 1.0, "loss": 0.5}
    line = {"x": (-0.5, 0.0, 0.5), "y": (1.0, 0.5, 1.5)}
    plane = {"x": (-1.0, 0.0, 1.0), "y": (-1.0, 0.0, 1.0), "names": ("first", "second")}
    plane |= {"losses": ((3.0, 2.0, float("inf")), (2.0, 0.5, 2.0), (3.0, 2.0, 3.0))}
    found = []
    for seed in (0, 1):
        for place, name in enumerate(NAMES):
            value = {quantity: number + 0.1 * seed + place for quantity, number in numbers.items()}
            spaces: dict[str, Any] = {KEPT: value, ALL: value}
            drawn: dict[str, Any] = {KEPT: line, ALL: line}
            if measure in ("plane", "inputs"):
                spaces = {"inputs": value} if measure == "inputs" else spaces
                drawn = dict.fromkeys(spaces, plane)
            if measure == "activations":
                share = {"near zeros": 40.0 + place, "exact zeros": 30.0 + seed}
                spaces = dict.fromkeys(("stem", "stage 1", "stage 2", "all stages"), share)
            for sparsity, epoch in (
                ((0.0, 0), (0.9, 0)) if measure in ("curvature", "activations") else ((0.9, 0),)
            ):
                found.append(Look(sparsity, name, seed, epoch, spaces, drawn))
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, before they become bytes."""
    figures: list[Figure] = []
    png = pictures.png_of
    monkeypatch.setattr(pictures, "png_of", lambda figure: figures.append(figure) or png(figure))
    return figures


@pytest.mark.parametrize(
    ("measure", "panels"), [("curvature", 2), ("line", 2), ("activations", 2), ("plane", 4), ("inputs", 2)]
)
def test_axes_are_named_and_variants_told_apart(measure: str, panels: int, drawn: list[Figure]) -> None:
    seen = looks(measure)
    content = picture_of(measure, seen, readings(seen), "a title")
    assert content.startswith(b"\x89PNG") and len(content) < 100_000
    (figure,) = drawn
    axes = [each for each in figure.axes if each.get_title() and each.get_visible()]
    assert len(axes) == panels
    contours = measure in ("plane", "inputs")
    for place, each in enumerate(axes):
        if contours:
            assert any(each.get_title().startswith(name) for name in NAMES)
            assert each.get_xlabel() or place < panels - 2
        else:
            assert each.get_xlabel() and each.get_ylabel()
    if contours:
        assert axes[0].get_ylabel()
        assert "loss, nats" in figure.axes[-1].get_ylabel()
    else:
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == list(NAMES)
        assert "over 2 seeds" in legend.get_title().get_text()
        limits = {each.get_ylim() for each in axes}
        assert len(limits) == 1
        lines = [line for line in axes[0].lines if line.get_marker() not in ("None", "", "_", "|")]
        assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 2
    assert figure.get_suptitle() == "a title"


def test_a_training_is_drawn_over_its_epochs(drawn: list[Figure]) -> None:
    seen = [look._replace(epoch=epoch, sparsity=0.9) for epoch in (1, 5) for look in looks("curvature")]
    picture_of("curvature", seen, readings(seen), "")
    titles = [each.get_xlabel() for each in drawn[0].axes]
    assert titles == ["epochs of training"] * 3
    assert drawn[0].axes[2].get_ylabel() == "effective gradient flow"
