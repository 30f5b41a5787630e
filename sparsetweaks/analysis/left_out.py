"""Which convolutions and linear layers an analysis leaves out, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd

from sparsetweaks.forms import parameter_behind
from sparsetweaks.masks import listed
from sparsetweaks.prunable import select_weights


def left_out(network: nn.Module, looked_at: Iterable[nn.Parameter]) -> dict[str, str]:
    """By the name of its weight why each convolution and linear layer is left out of an analysis of these parameters.

    Those for which there is no reason but the caller's choice are not named.
    """
    taken = set(looked_at)
    found = {w.name: w.parameter for w in select_weights(network, include=lambda name, module: True)}
    reasons = {name: _reason(parameter) for name, parameter in found.items() if parameter not in taken}
    tied = dict.fromkeys(_tied_to_embeddings(network, taken), "tied to an embedding")
    return {name: reason for name, reason in reasons.items() if reason} | tied


def about_left(left: Mapping[str, str]) -> list[str]:
    """What to tell of it: a line for each reason."""
    return [
        f"left out ({reason}): {listed([name for name, other in left.items() if other == reason])}"
        for reason in dict.fromkeys(left.values())
    ]


def _reason(parameter: nn.Parameter | None) -> str:
    if parameter is None:
        return "no parameter, but computed: weight_norm, spectral_norm, ..."
    if parameter.numel() == 0:
        return "empty"
    if not parameter.is_floating_point():
        return f"of {parameter.dtype}"
    return "" if parameter.requires_grad else "frozen"


def _tied_to_embeddings(network: nn.Module, taken: set[nn.Parameter]) -> list[str]:
    modules = dict(network.named_modules())
    embeddings = {
        each.weight for each in modules.values() if isinstance(each, (nn.Embedding, nn.EmbeddingBag))
    }
    layers = {
        f"{name}.weight".lstrip("."): parameter_behind(module, "weight")
        for name, module in modules.items()
        if isinstance(module, (_ConvNd, nn.Linear))
    }
    return [name for name, weight in layers.items() if weight in embeddings and weight not in taken]
