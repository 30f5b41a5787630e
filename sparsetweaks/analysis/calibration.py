"""Whether a network is right as often as it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsetweaks.analysis.evaluation import Batches, Data, run, table_text, undisturbed, working_copy
from sparsetweaks.analysis.figures import COLORS, label, new_figure
from sparsetweaks.analysis.options import check_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15  # Guo et al. (2017)
MOST_BINS = 10_000


@dataclass(frozen=True)
class Bin:
    """The examples whose confidence is above `low` and at most `high`."""

    low: float
    high: float
    examples: int
    confidence: float
    """Their mean confidence; nan where there are none."""
    accuracy: float
    """The fraction of them that is right; nan where there are none."""


@dataclass(frozen=True)
class Calibration:
    """What `calibration` found; `print` it, `plot()` it for the reliability diagram, or take its `table()`.

    Attributes:
        bins: of confidence, in ascending order.
        accuracy: the fraction of all examples that is right.
        confidence: the mean over all examples.
    """

    bins: tuple[Bin, ...]
    accuracy: float
    confidence: float

    @property
    def examples(self) -> int:
        """How many there are."""
        return sum(each.examples for each in self.bins)

    @property
    def error(self) -> float:
        """The expected calibration error: the mean gap of accuracy and confidence, bins weighted by their examples."""
        gaps = (each.examples * abs(each.accuracy - each.confidence) for each in self.bins if each.examples)
        return sum(gaps) / self.examples

    @property
    def largest_error(self) -> float:
        """The largest gap of any bin."""
        return max(abs(each.accuracy - each.confidence) for each in self.bins if each.examples)

    def table(self) -> list[dict[str, Any]]:
        """A row for each bin: `above`, `up_to`, `examples`, `confidence`, `accuracy`."""
        return [
            {
                "above": each.low,
                "up_to": each.high,
                "examples": each.examples,
                "confidence": each.confidence,
                "accuracy": each.accuracy,
            }
            for each in self.bins
        ]

    def __str__(self) -> str:
        head = (
            f"calibration on {self.examples:,} examples: expected error {100 * self.error:.2f} %, "
            f"largest {100 * self.largest_error:.2f} %; accuracy {100 * self.accuracy:.2f} %, "
            f"mean confidence {100 * self.confidence:.2f} %"
        )
        return f"{head}\n{table_text(self.table())}"

    def plot(self) -> Figure:
        """The reliability diagram: accuracy against confidence, and below it how the examples are spread."""
        figure, (above, below) = new_figure(rows=2, size=(5.0, 5.5))
        width = self.bins[0].high - self.bins[0].low
        filled = [each for each in self.bins if each.examples]
        middles = [(each.low + each.high) / 2 for each in filled]
        above.bar(
            middles, [each.accuracy for each in filled], 0.94 * width, color=COLORS[0], label="accuracy"
        )
        above.plot(
            [each.confidence for each in filled],
            [each.accuracy for each in filled],
            "o",
            color=COLORS[1],
            label="mean confidence",
        )
        above.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="right as often as it says")
        above.set(xlim=(0, 1), ylim=(0, 1))
        above.legend(loc="upper left")
        label(above, x="", y="accuracy", title=f"expected calibration error {100 * self.error:.2f} %")
        below.bar(
            middles, [100 * each.examples / self.examples for each in filled], 0.94 * width, color=COLORS[4]
        )
        below.set_xlim(0, 1)
        label(below, x="confidence", y="examples, %")
        return figure


def calibration(
    model: nn.Module,
    data: Data,
    *,
    bins: int = BINS,
    batch_norm: str = "eval",
    chunk_size: int | None = None,
) -> Calibration:
    """Compare how sure a classifier is with how often it is right (Guo et al. 2017).

    Confidence is the largest probability of the softmax over the model's outputs. Soft labels (`SoftLabelLoss`)
    change it more than they change accuracy.

    Args:
        model: a classifier: it maps inputs to scores of shape (examples, classes), or (examples, classes, positions...)
            as in segmentation, where each position counts as an example. It is not changed, and runs as a copy with
            dropout off, in its own precision.
        data: one pair (inputs, targets), or an iterable of them; targets are class numbers of shape (examples,) or
            (examples, positions...), or probabilities of the scores' shape, of which the largest counts. Every one must
            be a class: positions that a loss ignores are not left out here.
        bins: equal widths of confidence, at most 10,000. Default: 15, as in the paper.
        batch_norm: `"eval"` for the running statistics or `"train"` for the batch's.
        chunk_size: how many examples of a batch to run at once; None for all.

    Returns:
        The bins, and the expected calibration error in [0, 1].

    Raises:
        ValueError: the outputs are no real scores of classes, none at all or not finite; targets do not fit; the data
            hold no batch or do not fit; a parameter is not finite.

    Example:
        >>> found = calibration(nn.Identity(), (torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([1, 1])))
        >>> round(found.error, 3), found.accuracy
        (0.5, 0.5)
    """
    check_whole("bins", bins, most=MOST_BINS)
    network = working_copy(model, batch_norm=batch_norm, widen=False)
    confidences, rights = [], []
    with undisturbed(network), torch.no_grad():
        for chunk in Batches(data, network, chunk_size=chunk_size):
            confidence, right = _judge(run(network, chunk), chunk.targets)
            confidences.append(confidence)
            rights.append(right)
    confidence, right = torch.cat(confidences), torch.cat(rights)
    number = (confidence * bins).ceil().long().clamp(
        1, bins
    ) - 1  # above the lower bound, up to the upper one
    counts = torch.bincount(number, minlength=bins)
    sums = [torch.bincount(number, weights=each, minlength=bins) / counts for each in (confidence, right)]
    found = [
        Bin(
            index / bins, (index + 1) / bins, int(counts[index]), float(sums[0][index]), float(sums[1][index])
        )
        for index in range(bins)
    ]
    return Calibration(tuple(found), float(right.mean()), float(confidence.mean()))


def _judge(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """For each example the confidence, and 1 where the model is right."""
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2 or outputs.is_complex():
        got = (
            f"a {outputs.dtype} tensor of shape {tuple(outputs.shape)}"
            if isinstance(outputs, Tensor)
            else type(outputs).__name__
        )
        raise ValueError(
            "the model must put out scores of shape (examples, classes) or (examples, classes, positions...), "
            f"at least 2 classes and real numbers; got {got}"
        )
    if outputs.numel() == 0:
        raise ValueError(
            f"the model's scores, of shape {tuple(outputs.shape)}, hold no position: nothing to compare"
        )
    if not outputs.isfinite().all():
        raise ValueError("the model's outputs are not finite: nothing to compare")
    classes, wanted = outputs.shape[1], (outputs.shape[0], *outputs.shape[2:])
    if isinstance(targets, Tensor) and targets.shape == outputs.shape and not targets.is_complex():
        if not targets.isfinite().all():
            raise ValueError("the targets are probabilities that are not finite: nothing to compare with")
        targets = targets.argmax(1)
    fits = (
        isinstance(targets, Tensor)
        and targets.shape == wanted
        and not (targets.is_floating_point() or targets.is_complex())
    )
    if not fits or targets.min() < 0 or targets.max() >= classes:
        ignored = "; leave out what a loss ignores" if fits and targets.min() < 0 else ""
        raise ValueError(
            f"the targets must be class numbers from 0 to {classes - 1} of shape {wanted}, or probabilities of "
            f"shape {tuple(outputs.shape)}{ignored}"
        )
    confidence, chosen = outputs.double().softmax(1).max(1)
    return confidence.flatten().cpu(), (chosen == targets).double().flatten().cpu()
