"""Directions among weights and among inputs: drawn, given, checked and scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsetweaks.analysis.evaluation import Chunk, Loss, chunk_loss
from sparsetweaks.analysis.hessian import TopEigenvalues
from sparsetweaks.analysis.lanczos import random_signs, random_vector
from sparsetweaks.analysis.terrain import Weights

Direction = Mapping[str, Tensor] | TopEigenvalues


def fitting(direction: Direction, weights: Weights) -> Weights:
    """A direction by parameter name, checked against the network's weights."""
    if isinstance(direction, TopEigenvalues):
        direction = direction.vectors[0]
    if not isinstance(direction, Mapping) or not direction:
        raise ValueError(
            "a direction is a dict of parameter name to tensor, or a result of hessian_top_eigenvalues"
        )
    for name, part in direction.items():
        if name not in weights:
            raise ValueError(f"the direction moves {name!r}, which is no parameter of the network")
        if not isinstance(part, Tensor):
            raise ValueError(f"the direction holds a {type(part).__name__} at {name!r}: give a tensor")
        if part.is_complex() or weights[name].is_complex():
            raise ValueError(
                f"the direction is complex at {name!r}, or its weight is: give one of real weights"
            )
        if part.shape != weights[name].shape:
            raise ValueError(
                f"the direction has shape {tuple(part.shape)} at {name!r}, but its weight {tuple(weights[name].shape)}"
            )
        if not part.isfinite().all():
            raise ValueError(f"the direction is not finite at {name!r}")
    return {
        name: part.detach().to(device=weights[name].device, dtype=weights[name].dtype)
        for name, part in direction.items()
    }


def fitting_pair(directions: object, weights: Weights) -> list[Weights]:
    if not isinstance(directions, (tuple, list)) or len(directions) != 2:
        raise ValueError(
            "directions are a pair, such as hessian_top_eigenvalues(..., k=2).vectors; or leave them out for random ones"
        )
    return [fitting(each, weights) for each in directions]


def rescale(direction: Weights, weights: Weights, scale: str) -> Weights:
    """Of unit length, or each filter of the length of the weights' filter; a filter that is zero stays zero."""
    length = math.sqrt(sum(part.double().square().sum().item() for part in direction.values()))
    if length == 0:
        raise ValueError("the direction is zero everywhere")
    if scale == "plain":
        return {name: part / length for name, part in direction.items()}
    scaled = {}
    for name, part in direction.items():
        own, wanted = _filter_norms(part), _filter_norms(weights[name])
        scaled[name] = part * torch.where(own > 0, wanted / torch.where(own > 0, own, 1), 0)
    if not any(part.any() for part in scaled.values()):
        raise ValueError(
            "every filter along the direction is zero, so that nothing would move: use scale='plain'"
        )
    return scaled


def _filter_norms(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 1:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)


def move(weights: Weights, *steps: tuple[float, Weights]) -> Weights:
    moved = {}
    for name, weight in weights.items():
        for distance, direction in steps:
            if name in direction:
                weight = weight + distance * direction[name]
        moved[name] = weight
    return moved


def cosine_of(first: Weights, second: Weights) -> float:
    lengths = [sum(part.double().square().sum().item() for part in each.values()) for each in (first, second)]
    common = [(first[name].double() * second[name].double()).sum().item() for name in first if name in second]
    return sum(common) / math.sqrt(lengths[0] * lengths[1]) if all(lengths) else 0.0


def input_directions(
    network: nn.Module, chunks: list[Chunk], loss: Loss, directions: str, draw: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Two directions for each chunk's inputs: the random ones are drawn for the whole batch, however it is cut."""
    whole = torch.cat([chunk.inputs for chunk in chunks])
    counts = [chunk.examples for chunk in chunks]
    if directions == "gradient":
        firsts = [_gradient_sign(network, chunk, loss) for chunk in chunks]
        seconds = random_signs(whole.reshape(-1), draw).reshape(whole.shape).split(counts)
        return list(zip(firsts, seconds, strict=True))
    first, second = (random_vector(whole.reshape(-1), draw).reshape(len(whole), -1) for _ in range(2))
    first = _root_mean_square_of_one(first)
    second = _root_mean_square_of_one(second - (first * second).mean(dim=1, keepdim=True) * first)
    return list(
        zip(first.reshape(whole.shape).split(counts), second.reshape(whole.shape).split(counts), strict=True)
    )


def _gradient_sign(network: nn.Module, chunk: Chunk, loss: Loss) -> Tensor:
    inputs = chunk.inputs.clone().requires_grad_()
    value = chunk_loss(network, chunk._replace(inputs=inputs * 1), loss)  # * 1: it may work in place
    if not value.requires_grad:
        raise ValueError("the loss has no gradient with respect to the inputs: use directions='random'")
    (gradient,) = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    return gradient.sign()


def _root_mean_square_of_one(rows: Tensor) -> Tensor:
    return rows / rows.square().mean(dim=1, keepdim=True).sqrt()
