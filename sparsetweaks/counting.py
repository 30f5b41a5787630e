"""Count what masks leave of a model, layer by layer and overall, with what tweaks added."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from sparsetweaks.copying import check_model
from sparsetweaks.forms import Place, masked_parameters, places
from sparsetweaks.prunable import (
    Selection,
    added_modules,
    check_dense,
    check_values,
    plain_zeros,
    select_weights,
    warn_of_zeros,
)


@dataclass(frozen=True)
class LayerSparsity:
    """What is left of one weight."""

    name: str
    shape: tuple[int, ...]
    weights: int
    """How many weights there are."""
    kept: int
    """How many the mask keeps; where there is none, all that are no plain zeros."""
    masked: bool
    zeros: int
    """How many are exactly zero just now, pruned or not."""

    @property
    def sparsity(self) -> float:
        """The fraction removed, in [0, 1]."""
        return _removed(self.kept, self.weights)


@dataclass(frozen=True)
class SparsityReport:
    """What is left of a model, layer by layer and overall; `print` it for a table."""

    layers: tuple[LayerSparsity, ...]
    """The prunable weights, and whatever else carries a mask."""
    parameters: int
    """All parameters of the model, without those that a tweak added."""
    parameters_kept: int
    """Those of them that no mask removes and that are no plain zeros."""
    added_parameters: int
    """Parameters that tweaks added (projections, normalisation, learned strengths)."""
    added_kept: int
    """Those of them that no mask removes."""

    @property
    def weights(self) -> int:
        """How many prunable weights there are."""
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        """How many of the prunable weights are kept."""
        return sum(layer.kept for layer in self.layers)

    @property
    def overall(self) -> float:
        """The fraction removed of the prunable weights: what papers call the sparsity."""
        return _removed(self.kept, self.weights)

    @property
    def of_all_parameters(self) -> float:
        """The fraction removed of all parameters of the model, without what tweaks added."""
        return _removed(self.parameters_kept, self.parameters)

    @property
    def overall_with_added(self) -> float:
        """`overall` with what tweaks added counted as kept: compare with a plain ticket of this sparsity."""
        return _removed(self.kept + self.added_kept, self.weights)

    @property
    def of_all_parameters_with_added(self) -> float:
        """`of_all_parameters` with what tweaks added counted as kept; below 0 if they add more."""
        return _removed(self.parameters_kept + self.added_kept, self.parameters)

    def __str__(self) -> str:
        kept, parameters_kept = self.kept, self.parameters_kept
        layers = [
            _row(
                x.name,
                x.weights,
                x.kept,
                "x".join(map(str, x.shape)),
                x.zeros,
                x.masked or x.kept < x.weights,
            )
            for x in self.layers
        ]
        totals = [
            _row("prunable weights", self.weights, kept),
            _row("all parameters", self.parameters, parameters_kept),
        ]
        if self.added_parameters:
            totals += [
                ("added by tweaks", "", f"{self.added_parameters:,}", f"{self.added_kept:,}", "", ""),
                _row("prunable, added counted", self.weights, kept + self.added_kept),
                _row("all, added counted", self.parameters, parameters_kept + self.added_kept),
            ]
        head = ("prunable weight", "shape", "weights", "kept", "sparsity", "exact zeros")
        columns = list(zip(*[head, *layers, *totals], strict=True))
        widths = [max(map(len, column)) for column in columns]
        rule = tuple("-" * width for width in widths)
        rows = [head, rule, *layers, rule, *totals]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        )


def sparsity(
    model: nn.Module,
    *,
    layers: Iterable[str] | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
) -> SparsityReport:
    """Count what is left of a model: per layer, overall, and with what tweaks added (paper, section 3).

    A masked layer is counted by its mask, whatever it holds; its exact zeros are shown beside it. A layer that was
    pruned completely shows as 100 %. A tweak's parameters are counted apart, as kept: the released code of the paper
    adds a dense projection per skip, several times what survives at 97 %.

    *Plain zeros*, those of layers without a mask, count as removed, where there are more than may be so by chance (one
    in 10,000). An `UnmaskedZerosWarning` says so, as only you know whether a pruner left them or they are to be trained; a
    mask, of either kind, settles it.

    Args:
        model: any module, masked or not. It is only read.
        layers, include, exclude: which weights count as prunable, as in `prunable_weights`. Masked ones
            always do.

    Returns:
        A `SparsityReport`: `print` it for a table, or ask its `overall` sparsity, in [0, 1], of the prunable weights,
        and `overall_with_added`, which counts what tweaks added as kept.

    Raises:
        TypeError: what is given is no module.
        ValueError: as `prunable_weights` for a wrong selection.
        SurgeryError: a parameter or a mask has no values (lazy, meta device), or is stored in another way than number by
            number (sparse layouts, quantized).

    Example:
        >>> import torch, sparsetweaks as st
        >>> layer = torch.nn.Linear(4, 1)
        >>> ticket = st.apply_masks(layer, {"weight": torch.tensor([[True, False, False, False]])})
        >>> report = sparsity(ticket)
        >>> report.overall, report.of_all_parameters
        (0.75, 0.6)
        >>> print(report)
        prunable weight   shape  weights  kept  sparsity  exact zeros
        ----------------  -----  -------  ----  --------  -----------
        weight              1x4        4     1   75.00 %            3
        ----------------  -----  -------  ----  --------  -----------
        prunable weights               4     1   75.00 %
        all parameters                 5     2   60.00 %
    """
    check_model(model)
    check_values(dict(model.named_parameters()))
    check_dense(dict(model.named_parameters()))
    added = set(added_modules(model))
    masked = masked_parameters(model)
    check_values({place.name: place.mask() for place in masked.values()})
    by_parameter: dict[nn.Parameter, Place] = {}
    for place in places(model):  # a tied weight counts once, by its mask
        by_parameter.setdefault(place.parameter, masked.get(place.parameter, place))
    chosen = select_weights(model, layers=layers, include=include, exclude=exclude)
    zeros = plain_zeros(chosen, masked)
    warn_of_zeros(zeros)
    masks = {parameter: place.mask() for parameter, place in masked.items()} | zeros
    kept = {each: int(masks[each].sum()) if each in masks else each.numel() for each in by_parameter}
    everything = dict.fromkeys(model.parameters())
    of_tweaks = {parameter for module in added for parameter in module.parameters()}
    of_model = [parameter for parameter in everything if parameter not in of_tweaks]
    shown = {weight.parameter for weight in chosen} | set(masked)
    return SparsityReport(
        layers=tuple(
            _count_layer(place, kept[parameter])
            for parameter, place in by_parameter.items()
            if parameter not in of_tweaks and parameter in shown
        ),
        parameters=sum(parameter.numel() for parameter in of_model),
        parameters_kept=sum(kept.get(parameter, parameter.numel()) for parameter in of_model),
        added_parameters=sum(parameter.numel() for parameter in of_tweaks),
        added_kept=sum(kept.get(parameter, parameter.numel()) for parameter in of_tweaks),
    )


def _count_layer(place: Place, kept: int) -> LayerSparsity:
    weight = place.parameter.detach()
    zeros = weight == 0
    if place.masked:
        zeros |= ~place.mask()  # in other forms than ours the parameter keeps its value beneath the mask
    return LayerSparsity(
        place.name, tuple(weight.shape), weight.numel(), kept, place.masked, int(zeros.sum())
    )


def _removed(kept: int, total: int) -> float:
    return 1 - kept / total if total else 0.0


def _row(
    label: str, total: int, kept: int, shape: str = "", zeros: int | None = None, masked: bool = True
) -> tuple[str, ...]:
    removed = f"{100 * _removed(kept, total):.2f} %" if masked else "no mask"
    return label, shape, f"{total:,}", f"{kept:,}", removed, "" if zeros is None else f"{zeros:,}"
