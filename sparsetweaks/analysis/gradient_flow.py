"""How much gradient reaches the weights that training can move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsetweaks.analysis.curvature import Curvature
from sparsetweaks.analysis.evaluation import Batches, Data, Loss, table_text, undisturbed, working_copy
from sparsetweaks.analysis.figures import COLORS, label, new_figure
from sparsetweaks.analysis.left_out import about_left, left_out
from sparsetweaks.analysis.subspace import KEEP_ALL, Where, check_zeros, is_chosen, named_weights, subspace
from sparsetweaks.masks import lift_masks
from sparsetweaks.prunable import select_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER = 2.0
_NAMED_AT_MOST = 40


@dataclass(frozen=True)
class LayerGradient:
    """The gradient of the loss with respect to one weight tensor.

    Attributes:
        name: the weight's.
        weights: how many there are.
        kept: how many of them no mask removes.
        norm: of the gradient over the kept weights.
        norm_of_all: over all of them, the pruned ones at zero included.
    """

    name: str
    weights: int
    kept: int
    norm: float
    norm_of_all: float


@dataclass(frozen=True)
class GradientFlow:
    """What `gradient_flow` found; `print` it, `plot()` it, or take its `table()`.

    Attributes:
        layers: one for each weight of a convolution or linear layer, and whatever else has a mask.
        order: of the norms, 1 or 2.
        loss: the mean loss.
        masked: whether the model has masks; without any, all its weights are kept.
        left: the chosen weights of convolutions and linear layers that are not among `layers` (frozen ones, what
            weight_norm computes), each with the reason.
    """

    layers: tuple[LayerGradient, ...]
    order: float
    loss: float
    masked: bool
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def effective(self) -> float:
        """The effective gradient flow: the mean over layers of the norms over kept weights (Tessera et al. 2021)."""
        return sum(layer.norm for layer in self.layers) / len(self.layers)

    @property
    def total(self) -> float:
        """The norm over the kept weights of all layers together."""
        return sum(layer.norm**self.order for layer in self.layers) ** (1 / self.order)

    @property
    def total_of_all(self) -> float:
        """The norm over all weights of all layers together, the pruned ones at zero included."""
        return sum(layer.norm_of_all**self.order for layer in self.layers) ** (1 / self.order)

    def table(self) -> list[dict[str, Any]]:
        """A row for each layer: `layer`, `weights`, `kept`, `norm` over the kept, `norm_of_all`."""
        return [
            {
                "layer": layer.name,
                "weights": layer.weights,
                "kept": layer.kept,
                "norm": layer.norm,
                "norm_of_all": layer.norm_of_all,
            }
            for layer in self.layers
        ]

    def __str__(self) -> str:
        note = "" if self.masked else " (the model has no masks)"
        head = (
            f"gradient flow at loss {self.loss:.6g}{note}: effective {self.effective:.4g} (mean over layers), "
            f"total {self.total:.4g} over kept weights, {self.total_of_all:.4g} over all"
        )
        return "\n".join([head, *about_left(self.left), table_text(self.table())])

    def plot(self) -> Figure:
        """The norm for each layer, from input to output, over the kept weights and over all."""
        figure, axes = new_figure(
            size=(max(6.0, 0.22 * min(len(self.layers), 2 * _NAMED_AT_MOST) + 1.5), 4.0)
        )
        places = list(range(len(self.layers)))
        if self.masked:
            axes.plot(
                places, [x.norm_of_all for x in self.layers], "s--", color=COLORS[1], label="all weights"
            )
        axes.plot(places, [x.norm for x in self.layers], "o-", color=COLORS[0], label="kept weights")
        axes.set_ylim(bottom=0)
        if len(places) <= _NAMED_AT_MOST:
            axes.set_xticks(
                places, [x.name.removesuffix(".weight") for x in self.layers], rotation=90, fontsize=8
            )
        axes.legend()
        label(axes, x="layer, in order of registration", y=f"L{self.order:g} norm of the loss's gradient")
        return figure


def gradient_flow(
    model: nn.Module,
    data: Data,
    loss: Loss,
    *,
    order: float = ORDER,
    where: Where = None,
    batch_norm: str = "eval",
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
) -> GradientFlow:
    """Measure how much gradient reaches each layer's kept weights (paper, section 4; Tessera et al. 2021).

    The gradient is that of the mean loss over all the data. Gradients of pruned weights, which training never
    uses, are left out; the norms with them are given beside. The *effective gradient flow* is the mean over layers
    of the norms over kept weights: unlike the norm of everything it is not ruled by the largest layer. A layer that
    is pruned completely counts, with a norm of 0.

    Args:
        model: any module, masked in any form or not. It is not changed, and runs as a copy with dropout off. Without a
            mask a weight is kept whatever its value, and an `UnmaskedZerosWarning` tells of zeros.
        data: one pair (inputs, targets), or an iterable of them.
        loss: maps (outputs, targets) to the mean loss of a batch, a scalar.
        order: of the norms: 1 or 2. Default: 2.
        where: glob pattern(s) on the names of the weights or of modules around them; default: every weight of a
            convolution or linear layer, the classifier's included, and whatever else has a mask.
        batch_norm: `"eval"` for the running statistics or `"train"` for the batch's, as in training.
        dtype: to compute in, such as `torch.float64`; default: the model's own, at least float32.
        chunk_size: how many examples of a batch to run at once; None for all.

    Returns:
        Norms for each layer and overall.

    Raises:
        ValueError: the loss is no scalar; the data hold no batch or do not fit; a parameter is not finite; nothing
            is chosen.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = nn.init.ones_(model[0].weight)
        >>> batch = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 1)
        >>> gradient_flow(model, batch, lambda outputs, targets: outputs.mean()).effective
        5.0
    """
    if isinstance(order, bool) or order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    network = working_copy(model, batch_norm=batch_norm, dtype=dtype)
    with undisturbed(network):
        masks = lift_masks(network)
        check_zeros(network, masks, unless=KEEP_ALL)
        weights, left = _weights(network, masks, where)
        batches = Batches(data, network, chunk_size=chunk_size)
        found = Curvature(network, list(weights.values()), batches, loss, keep_graph=False)
    layers = []
    for (name, weight), gradient in zip(weights.items(), found.gradient, strict=True):
        mask = masks.get(weight)
        kept = gradient if mask is None else gradient[mask]
        norms = [float(torch.linalg.vector_norm(each.double(), order)) for each in (kept, gradient)]
        layers.append(LayerGradient(name, weight.numel(), kept.numel(), *norms))
    return GradientFlow(tuple(layers), float(order), found.loss, bool(masks), left)


def _weights(
    network: nn.Module, masks: dict[nn.Parameter, Tensor], where: Where
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """The weights to look at by name, in the order of registration; and why others are left out."""
    chosen = set(subspace(network, {}, over="all", where=where).parameters.values())
    everything = lambda name, module: True
    layers = {weight.parameter: weight.name for weight in select_weights(network, include=everything)}
    names = {parameter: name for name, parameter in named_weights(network).items()}
    found = {
        layers.get(parameter, names[parameter]): parameter
        for parameter in network.parameters()
        if parameter in chosen and (parameter in layers or parameter in masks)
    }
    left = {
        name: reason for name, reason in left_out(network, found.values()).items() if is_chosen(name, where)
    }
    if not found:
        text = "no trainable weight of a convolution or linear layer is chosen"
        raise ValueError("; ".join([text if where is None else f"{text}: see where=", *about_left(left)]))
    return found, left
