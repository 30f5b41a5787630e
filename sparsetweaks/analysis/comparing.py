"""Several networks side by side: what the analyses say of each, in one table and one figure."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetweaks.analysis.activations import THRESHOLD, ActivationSparsity, activation_sparsity
from sparsetweaks.analysis.calibration import Calibration, calibration
from sparsetweaks.analysis.collapse import LayerPathsReport, layer_collapse
from sparsetweaks.analysis.evaluation import Batches, Data, Loss, check_values, table_text, undisturbed
from sparsetweaks.analysis.figures import COLORS, new_figure
from sparsetweaks.analysis.flatness import Flatness, flatness
from sparsetweaks.analysis.gradient_flow import GradientFlow, gradient_flow
from sparsetweaks.analysis.left_out import about_left
from sparsetweaks.analysis.options import Progress, check_progress
from sparsetweaks.analysis.subspace import KEEP_ALL, check_zeros
from sparsetweaks.copying import check_model
from sparsetweaks.counting import sparsity
from sparsetweaks.errors import UnmaskedZerosWarning
from sparsetweaks.masks import masks_by_parameter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANALYSES = ("paths", "activations", "gradient", "calibration")
"""What is looked at by default; "flatness", the dearest, when it is asked for."""

_UNITS = {
    "sparsity": "weights removed, %",
    "effective_sparsity": "weights on no path, %",
    "zeros": "activations, exact zeros, %",
    "near_zeros": "activations, near zeros, %",
    "loss": "mean loss",
    "effective_gradient_flow": "effective gradient flow",
    "accuracy": "accuracy, %",
    "calibration_error": "calibration error, %",
    "largest_eigenvalue": "largest Hessian eigenvalue",
    "trace": "trace of the Hessian",
}
_BY_MASKS = {"paths", "gradient", "flatness"}  # to which a zero without a mask is a weight that can move
_SHARES = ("sparsity", "effective_sparsity", "zeros", "near_zeros", "accuracy", "calibration_error")


@dataclass(frozen=True, eq=False)
class Looked:
    """What the analyses found of one network; None where one was not asked for."""

    nonzeros: int
    sparsity: float
    paths: LayerPathsReport | None = None
    activations: ActivationSparsity | None = None
    gradient: GradientFlow | None = None
    calibration: Calibration | None = None
    flatness: Flatness | None = None

    def row(self) -> dict[str, Any]:
        """The numbers in short."""
        row: dict[str, Any] = {"non-zeros": self.nonzeros, "sparsity": self.sparsity}
        if self.paths is not None:
            row |= {
                "effective_sparsity": self.paths.effective_sparsity,
                "collapsed": len(self.paths.collapsed),
            }
        if self.activations is not None:
            row |= {
                "zeros": self.activations.zeros,
                "near_zeros": self.activations.near_zeros,
                "dead": self.activations.dead,
            }
        if self.gradient is not None:
            row |= {"loss": self.gradient.loss, "effective_gradient_flow": self.gradient.effective}
        if self.calibration is not None:
            row |= {"accuracy": self.calibration.accuracy, "calibration_error": self.calibration.error}
        if self.flatness is not None:
            row |= {"largest_eigenvalue": self.flatness.top.values[0], "trace": self.flatness.trace.value}
        return row


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found; `print` it, `plot()` it, or take its `table()`.

    Attributes:
        networks: by name what was found, each analysis whole.
    """

    networks: Mapping[str, Looked]

    def table(self) -> list[dict[str, Any]]:
        """A row for each network; fractions in [0, 1]."""
        return [{"network": name, **looked.row()} for name, looked in self.networks.items()]

    def __str__(self) -> str:
        names = list(self.networks)
        rows = [looked.row() for looked in self.networks.values()]
        lines = [{"": key, **{name: _cell(row[key]) for name, row in zip(names, rows)}} for key in rows[0]]
        return "\n".join([table_text(lines), *self._notes()])

    def _notes(self) -> Iterable[str]:
        """Where a number is a bound only, and which layers it leaves out."""
        for name, looked in self.networks.items():
            of_numbers = {"effective_sparsity": looked.paths, "effective_gradient_flow": looked.gradient}
            for number, found in of_numbers.items():
                if found is not None:
                    yield from (f"{number} of {name!r}: {line}" for line in about_left(found.left))
            if looked.paths is not None and looked.paths.opened:
                operations = ", ".join(looked.paths.opened)
                yield f"effective_sparsity of {name!r} is at least this: what passes {operations} is not known"

    def plot(self) -> Figure:
        """A panel for each number, a bar in it for each network."""
        table = self.table()
        shown = [key for key in table[0] if key in _UNITS]
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        figure, axes = new_figure(columns=columns, rows=rows, size=(3.4 * columns, 2.6 * rows + 0.3))
        panels = list(axes.flat) if len(shown) > 1 else [axes]
        for panel, key in zip(panels, shown):
            values = [row[key] * (100 if key in _SHARES else 1) for row in table]
            colors = [COLORS[i % len(COLORS)] for i in range(len(table))]
            panel.bar(range(len(table)), values, color=colors)
            panel.set_xticks(
                range(len(table)), [str(row["network"]) for row in table], rotation=20, ha="right"
            )
            panel.set_ylabel(_UNITS[key])
        for panel in panels[len(shown) :]:
            panel.set_visible(False)
        return figure


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def compare(
    models: Mapping[str, nn.Module],
    data: Data,
    loss: Loss,
    *,
    analyses: tuple[str, ...] = ANALYSES,
    threshold: float = THRESHOLD,
    batch_norm: str = "eval",
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Look at two or more networks in the same way, on the same data (paper, sections 3 and 4).

    Compare networks of equal numbers of non-zeros: that number stands first.

    Args:
        models: by a name of yours, such as `{"vanilla": ticket, "tweaked": tweaked}`, each a network of its own. None is
            changed.
        data: one pair (inputs, targets), or an iterable of them.
        loss: maps (outputs, targets) to the mean loss of a batch, a scalar.
        analyses: which: `"paths"` (`layer_collapse`), `"activations"` (`activation_sparsity`), `"gradient"`
            (`gradient_flow`), `"calibration"`, and `"flatness"`, which takes as long as all others many times over and
            is left out by default.
        threshold: of `activation_sparsity`.
        batch_norm: `"eval"` for the running statistics or `"train"` for the batch's.
        chunk_size: how many examples of a batch to run at once; None for all.
        progress: called after each analysis of each network with (analyses so far, all).

    Returns:
        The results of each network, whole and as rows of one table.

    Raises:
        ValueError: no model, one model under two names, or an unknown analysis; and whatever an analysis raises, with
            the network's name before it and how to leave that analysis out behind it.

    Example:
        >>> import torch, sparsetweaks as st
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = torch.randn(16, 4), torch.randint(2, (16,))
        >>> networks = {"relu": model, "swish": st.swap_activations(model, "swish")}
        >>> found = compare(networks, batch, nn.functional.cross_entropy)
        >>> [row["zeros"] > 0.1 for row in found.table()]
        [True, False]
    """
    if not isinstance(models, Mapping) or not models:
        raise ValueError(
            'models must be a mapping of names to models, such as {"before": model, "after": tweaked}'
        )
    _check_apart(models)
    known = (*ANALYSES, "flatness")
    wanted = (
        (analyses,) if isinstance(analyses, str) or not isinstance(analyses, Iterable) else tuple(analyses)
    )
    if unknown := [each for each in wanted if each not in known]:
        raise ValueError(f"unknown analyses {unknown}: choose from {list(known)}")
    check_progress(progress)
    options: dict[str, Any] = {"batch_norm": batch_norm, "chunk_size": chunk_size}
    taken = itertools.count(1)

    def on_analysis() -> None:
        if progress:
            progress(next(taken), len(models) * len(set(wanted)))

    networks = {}
    for name, model in models.items():
        try:
            networks[name] = _look(model, data, loss, wanted, threshold, options, on_analysis)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    return Comparison(networks)


def _check_apart(models: Mapping[str, nn.Module]) -> None:
    """Refuse two names for one network, which training in place makes of a before and an after."""
    names: dict[nn.Module, str] = {}
    for name, model in models.items():
        check_model(model)
        if not isinstance(name, str):
            raise ValueError(f"the names of networks must be text, got {name!r}")
        if model in names:
            raise ValueError(
                f"{names[model]!r} and {name!r} are one and the same network: compare copies, taken before what is to "
                "make the difference (sparsetweaks.copy_model)"
            )
        names[model] = name


def _look(
    model: nn.Module,
    data: Data,
    loss: Loss,
    wanted: tuple[str, ...],
    threshold: float,
    options: dict[str, Any],
    on_analysis: Callable[[], None],
) -> Looked:
    check_values(model)
    if _BY_MASKS & {*wanted}:
        check_zeros(model, masks_by_parameter(model), unless=KEEP_ALL)
    found: dict[str, Any] = {}
    example = _one_example(model, data)  # what is wrong with the data is no single analysis's
    analyses: dict[str, Callable[[], Any]] = {
        "paths": lambda: layer_collapse(model, example),
        "activations": lambda: activation_sparsity(model, data, threshold=threshold, **options),
        "gradient": lambda: gradient_flow(model, data, loss, **options),
        "calibration": lambda: calibration(model, data, **options),
        "flatness": lambda: flatness(model, data, loss, **options),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmaskedZerosWarning)  # told above, once, where it matters
        report = sparsity(model)
        for name in filter({*wanted}.__contains__, analyses):
            try:
                found[name] = analyses[name]()
            except ValueError as error:
                others = tuple(each for each in wanted if each != name)
                hint = f" (by {name!r}, which analyses={others} leaves out)" if others else ""
                raise ValueError(f"{error}{hint}") from error
            on_analysis()
    return Looked(report.parameters_kept + report.added_kept, report.overall, **found)


def _one_example(model: nn.Module, data: Data) -> Any:
    """The inputs of the first example."""
    with undisturbed(model):
        chunk = next(iter(Batches(data, model)))
    return pytree.tree_map_only(
        Tensor, lambda t: t[:1] if t.ndim and len(t) == chunk.examples else t, chunk.inputs
    )
