"""Flat vectors over the weights that training can move: where a sparse network's curvature lives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparsetweaks.analysis.evaluation import warn
from sparsetweaks.errors import UnmaskedZerosWarning
from sparsetweaks.masks import masks_by_parameter
from sparsetweaks.prunable import about_zeros, close_names, plain_zeros, select_weights

Where = str | Iterable[str] | None
KEEP_ALL = "a mask that keeps them"


@dataclass(frozen=True, eq=False)
class Subspace:
    """Some entries of some parameters, as one flat vector."""

    parameters: dict[str, nn.Parameter]
    """By the weight's own name, whatever form its mask has."""
    kept: dict[str, Tensor]
    """For each parameter that is not whole: the places of its entries that belong, in its flattened form."""

    @property
    def dimension(self) -> int:
        """How many entries there are."""
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        return [
            len(self.kept[name]) if name in self.kept else parameter.numel()
            for name, parameter in self.parameters.items()
        ]

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """The entries that belong, of one tensor per parameter, on the first one's device."""
        parts = [
            tensor.reshape(-1)[self.kept[name]] if name in self.kept else tensor.reshape(-1)
            for name, tensor in zip(self.parameters, tensors, strict=True)
        ]
        return torch.cat([part.to(device=parts[0].device, dtype=parts[0].dtype) for part in parts])

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """One tensor per parameter, exactly zero at every entry that does not belong."""
        parts = []
        for (name, parameter), part in zip(self.parameters.items(), flat.split(self._sizes()), strict=True):
            part = part.to(device=parameter.device, dtype=parameter.dtype)
            if name in self.kept:
                part = torch.zeros_like(parameter.detach()).reshape(-1).index_copy(0, self.kept[name], part)
            parts.append(part.reshape(parameter.shape))
        return parts

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """`tensors` by name."""
        return dict(zip(self.parameters, self.tensors(flat), strict=True))

    def random(self, draw: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> Tensor:
        """A flat random vector in which each parameter is drawn whole, by itself: from `seed` and its name alone.

        So two networks get the same in what they share, whatever else they hold and however they are masked.
        """
        return self.flat(
            [
                draw(parameter.detach().reshape(-1), _generator_of(seed, name))
                for name, parameter in self.parameters.items()
            ]
        )


def new_seed(generator: torch.Generator) -> int:
    """A seed for `Subspace.random`: one number of `generator`, however large the space."""
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


def _generator_of(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def subspace(
    model: nn.Module, masks: Mapping[nn.Parameter, Tensor], *, over: str = "kept", where: Where = None
) -> Subspace:
    """The trainable weights of `model`, BatchNorm's and biases too: those kept by `masks`, or all of them.

    Args:
        masks: True = kept, by parameter of this model.
        over: `"kept"` or `"all"`.
        where: glob pattern(s) on the names of parameters, or of the modules that hold them.

    Raises:
        ValueError: nothing is trainable, chosen or kept; or some that are chosen are complex, and are named.
    """
    if over == "kept":
        check_zeros(model, masks)
    trainable = {name: p for name, p in named_weights(model).items() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: all are frozen, or there is none")
    chosen = _select(trainable, where)
    complex_ones = [name for name, parameter in chosen.items() if parameter.is_complex()]
    if complex_ones:
        raise ValueError(
            f"trainable parameters are complex ({', '.join(map(repr, complex_ones))}), and this analysis is of real ones: "
            "freeze them, which leaves them out, or choose others with where="
        )
    kept = {
        name: masks[parameter].reshape(-1).nonzero().squeeze(1)
        for name, parameter in chosen.items()
        if over == "kept" and parameter in masks and not masks[parameter].all()
    }
    found = Subspace(chosen, kept)
    if found.dimension == 0:
        raise ValueError("every weight that was chosen is pruned: there is nothing left to move")
    return found


def check_zeros(
    model: nn.Module, masks: Mapping[nn.Parameter, Tensor], *, unless: str = "over='all' says so"
) -> None:
    """Warn of weights that are zero without a mask: the space of a ticket in that form is that of all its weights.

    Args:
        unless: how to say that they are not pruned.
    """
    zeros = plain_zeros(select_weights(model), masks)
    if zeros:
        text = f"{about_zeros(zeros)}; if not, {unless}. Here they count as kept, and are free to move"
        warn(text, UnmaskedZerosWarning)


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The real and complex parameters by the weight's own name, as in `find_masks`; a tied one once.

    In alphabetical order, whatever form the masks have.
    """
    masked = masks_by_parameter(model)
    named = {}
    for name, parameter in model.named_parameters():
        if parameter in masked:
            name = name.removesuffix("_orig")
        if name.endswith(".original"):
            name = name.removesuffix(".original").replace("parametrizations.", "")
        if parameter.is_floating_point() or parameter.is_complex():
            named[name] = parameter
    return dict(sorted(named.items()))


def _select(parameters: dict[str, nn.Parameter], where: Where) -> dict[str, nn.Parameter]:
    if where is None:
        return parameters
    patterns = [where] if isinstance(where, str) else where
    if not (isinstance(patterns, Iterable) and (patterns := list(patterns))) or not all(
        isinstance(pattern, str) for pattern in patterns
    ):
        raise ValueError(f"where must be a glob pattern on names, a list of such, or None, got {where!r}")
    chosen = set()
    for pattern in patterns:
        names = {name for name in parameters if is_chosen(name, pattern)}
        if not names:
            raise ValueError(
                f"where={pattern!r} matches no trainable parameter; close: {close_names(pattern, parameters)}"
            )
        chosen |= names
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def is_chosen(name: str, where: Where) -> bool:
    """Whether one of these patterns matches a weight's name, or that of a module around it."""
    patterns = [where] if isinstance(where, str) else where
    return patterns is None or any(fnmatchcase(part, each) for each in patterns for part in _around(name))


def _around(name: str) -> list[str]:
    """A parameter's name and those of the modules that hold it."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]
