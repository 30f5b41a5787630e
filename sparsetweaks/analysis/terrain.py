"""A network that is put at other weights: what of it can lie between two networks, and its mean loss there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsetweaks.analysis.evaluation import (
    Batches,
    Data,
    Loss,
    check_cut,
    check_loss,
    check_numbers,
    mean_loss,
    reestimate_statistics,
    undisturbed,
    working_copy,
)
from sparsetweaks.analysis.lanczos import random_vector
from sparsetweaks.analysis.options import Progress, check_choice
from sparsetweaks.analysis.subspace import Where, named_weights, subspace
from sparsetweaks.forms import masked_places
from sparsetweaks.masks import lift_masks

Weights = dict[str, Tensor]


class Terrain:
    """A copy of the network that is put at other weights, and its mean loss there."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        loss: Loss,
        batch_norm: str,
        dtype: torch.dtype | None,
        chunk_size: int | None,
    ) -> None:
        check_choice("batch_norm", batch_norm, ("eval", "train", "reestimate"))
        check_statistics(batch_norm, chunk_size)
        self.reestimates = batch_norm == "reestimate"
        self.network = working_copy(model, batch_norm="eval" if self.reestimates else batch_norm, dtype=dtype)
        self.masks = lift_masks(self.network)
        self.weights = {name: p.detach().clone() for name, p in named_weights(self.network).items()}
        self._data, self._loss, self._chunk_size = data, loss, chunk_size

    def losses(self, states: Iterable[Weights], count: int, progress: Progress | None) -> list[float]:
        """The mean loss at each state, after checking that of the given network."""
        found: list[float] = []
        with undisturbed(self.network):
            batches = Batches(self._data, self.network, chunk_size=self._chunk_size)
            check_cut(self.network, batches, self._loss)
            check_loss(mean_loss(self.network, batches, self._loss))
            held = tensors_of(self.network)
            for state in states:
                with torch.no_grad():
                    for name, value in state.items():
                        held[name].copy_(value)
                if self.reestimates:
                    reestimate_statistics(self.network, batches)
                found.append(mean_loss(self.network, batches, self._loss))
                if progress:
                    progress(len(found), count)
        return found

    def random_directions(
        self, over: str, where: Where, one_dimensional: bool, seeds: Sequence[int]
    ) -> list[Weights]:
        space = subspace(self.network, self.masks, over=over, where=where)
        if not one_dimensional and all(p.ndim <= 1 for p in space.parameters.values()):
            raise ValueError("only biases and the like were chosen: say one_dimensional=True to move them")
        drawn = [space.named(space.random(random_vector, seed)) for seed in seeds]
        return [
            {name: part for name, part in each.items() if one_dimensional or part.ndim > 1} for each in drawn
        ]


def masks_by_name(network: nn.Module, masks: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    return {name: masks[p] for name, p in named_weights(network).items() if p in masks}


def tensors_of(network: nn.Module) -> Weights:
    """All that is interpolated: real and complex parameters, and buffers such as running statistics."""
    return {**named_weights(network), **{n: b for n, b in buffers_of(network).items() if has_between(b)}}


def fixed_of(network: nn.Module) -> Weights:
    """All that cannot be interpolated, but for counts of batches, which compute nothing here."""
    tensors = {**dict(network.named_parameters()), **buffers_of(network)}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (has_between(tensor) or name.endswith("num_batches_tracked"))
    }


def has_between(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def buffers_of(network: nn.Module) -> Weights:
    """All but the masks of weights, in whatever form."""
    masks = {id(mask) for place in masked_places(network) for mask in place.stored_masks()}
    return {name: buffer for name, buffer in network.named_buffers() if id(buffer) not in masks}


def state_of(network: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(network).items()}


def check_same(first: Weights, second: Weights) -> None:
    apart = sorted(set(first) ^ set(second))
    if apart:
        raise ValueError(f"the two networks are of different architectures: only one has {apart[0]!r}")
    check_numbers(first)
    check_numbers(second)
    for name, tensor in first.items():
        if tensor.is_complex() != second[name].is_complex():
            raise ValueError(
                f"{name!r} is {tensor.dtype} in one network and {second[name].dtype} in the other: give both alike"
            )
        if tensor.shape != second[name].shape:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)} in one network and {tuple(second[name].shape)} in the other"
            )
        other = second[name] = second[name].to(device=tensor.device, dtype=tensor.dtype)
        if ((tensor != other) & ~(tensor.isfinite() & other.isfinite())).any():
            raise ValueError(
                f"{name!r} is infinite in one network where the other differs: nothing lies between them. Give both "
                "the same"
            )


def check_fixed(first: nn.Module, second: nn.Module) -> None:
    """Refuse what cannot be interpolated and differs."""
    ours, others = fixed_of(first), fixed_of(second)
    for name, tensor in {**ours, **others}.items():
        if name not in ours or name not in others or not _equal(ours[name], others[name]):
            raise ValueError(
                f"{name!r} ({tensor.dtype}) differs between the two networks, and there is nothing between its values: "
                "give both the same"
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.device))


def check_statistics(batch_norm: str, chunk_size: int | None) -> None:
    if chunk_size is not None and batch_norm != "eval":
        raise ValueError(
            f"chunk_size cuts batches, which changes the statistics that batch_norm={batch_norm!r} uses: pass the "
            "data in smaller batches instead"
        )
