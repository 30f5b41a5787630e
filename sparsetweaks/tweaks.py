"""All four tweaks in one call, in the order that is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from sparsetweaks.copying import copy_model
from sparsetweaks.recipe.labels import SMOOTHING, SoftLabelLoss
from sparsetweaks.recipe.layer_scales import learn_layer_scales
from sparsetweaks.surgery.activations import Activation, swap_activations
from sparsetweaks.surgery.skips import inject_skips


class Tweaked(NamedTuple):
    """A tweaked model and the loss to train it with."""

    model: nn.Module
    loss: nn.Module


def tweak(
    model: nn.Module,
    batch: tuple[Any, Any] | Iterable[tuple[Any, Any]] | None = None,
    *,
    skips: bool | Mapping[str, Any] | None = True,
    activation: Activation | None = "swish",
    scales: bool | Mapping[str, Any] | None = True,
    smoothing: float = SMOOTHING,
) -> Tweaked:
    """Apply the architecture tweaks (AT) and the training-recipe tweaks (TRT) to a ticket (paper, section 3).

    The order is skips, activations, layer scales, loss. The scales come last because they are learned for the very
    network that will be trained: skips and activations change what each layer's scale does to the first step.
    Skips come before activations because a unit without normalisation is recognised by the activation after it,
    and a custom activation may hide that.

    Args:
        model: a ticket: masked, at the weights that training starts from.
        batch: what `learn_layer_scales` takes: one (inputs, targets) pair, or an iterable of them. Needed for
            `scales` only.
        skips: whether to inject skips, or a mapping of options for `inject_skips`.
        activation: what `swap_activations` swaps to; None leaves the activations.
        scales: whether to learn layer scales, or a mapping of options for `learn_layer_scales`.
        smoothing: smooth ratio of the loss, in [0, 1); 0 gives plain cross entropy.

    Returns:
        `(model, loss)`: a new model, and a `SoftLabelLoss`.

    Raises:
        ValueError: if `scales` are wanted without a batch, and whatever the parts raise.

    Warns:
        NoEffectWarning: if a part finds nothing to change.

    Example:
        >>> import torch, sparsetweaks as st
        >>> units = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        >>> model = torch.nn.Sequential(*units, torch.nn.Flatten(), torch.nn.LazyLinear(2))
        >>> batch = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 1])
        >>> _ = model(batch[0])
        >>> ticket = st.prune(model, 0.5)
        >>> tweaked, loss = st.tweak(ticket, batch, scales={"iterations": 5})
        >>> loss(tweaked(batch[0]), batch[1]).shape
        torch.Size([])
    """
    if scales not in (None, False) and batch is None:
        raise ValueError("layer scales are learned on data: give a batch (inputs, targets), or scales=False")
    loss, given = SoftLabelLoss(smoothing=smoothing), model
    if skips not in (None, False):
        model = inject_skips(model, **_options(skips))
    if activation is not None:
        model = swap_activations(model, activation)
    if scales not in (None, False) and batch is not None:
        model = learn_layer_scales(model, batch, **_options(scales))
    return Tweaked(copy_model(given) if model is given else model, loss)


def _options(part: bool | Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if part is True else dict(part)  # type: ignore[arg-type]
