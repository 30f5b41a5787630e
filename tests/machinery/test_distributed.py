"""Two processes over gloo: DistributedDataParallel and FSDP2 train what one process trains, and keep the masks."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from machinery.cases import MODELS, SURGERIES, assert_held, batch_for, ticket_of
from machinery.processes import in_world
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparsetweaks as st

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")

RANKS, STEPS = 2, 3
CLIP = 0.5


class Trained(NamedTuple):
    """What one process has at the end."""

    state: dict[str, Tensor]
    masks: dict[str, Tensor]
    norms: list[float]
    pruned_gradients: bool
    """Whether a pruned weight had a gradient after the backward pass of any step."""


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def gradient_step(model: nn.Module, name: str, rank: int, step: int) -> None:
    """One rank's forward and backward pass, with batch and dropout of its own."""
    inputs, targets = batch_for(name, seed=RANKS * step + rank)
    torch.manual_seed(RANKS * step + rank)
    F.cross_entropy(model(inputs), targets).backward()


@torch.no_grad()
def drift(optimizer: torch.optim.Optimizer) -> None:
    """Move every weight, as an optimizer might that knows no masks: only what follows its step can undo it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.add_(1e-3)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(model: nn.Module, name: str, rank: int, wrapped: nn.Module) -> Trained:
    optimizer = optimizer_for(model)
    masks = st.find_masks(model)
    norms, pruned_gradients = [], False
    with torch.no_grad():
        wrapped(batch_for(name, seed=9)[0])  # as an evaluation before the training would
    with st.keep_masks(wrapped, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            gradient_step(wrapped, name, rank, step)
            for key, mask in masks.items():
                pruned_gradients |= bool(whole(model.get_parameter(key).grad)[~mask].any())
            norms.append(float(whole(nn.utils.clip_grad_norm_(model.parameters(), CLIP))))
            drift(optimizer)
            optimizer.step()
    state = {key: whole(value).clone() for key, value in model.state_dict().items()}
    return Trained(state, masks, norms, pruned_gradients)


def train_all(rank: int, name: str) -> dict[tuple[str, str], Trained]:
    """Every surgery of one model, wrapped either way."""
    results, mesh = {}, init_device_mesh("cpu", (RANKS,))
    for surgery, operate in SURGERIES.items():
        model = operate(ticket_of(name), name)
        sharded = st.copy_model(model)
        results["ddp", surgery] = train(model, name, rank, DistributedDataParallel(model))
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        results["fsdp", surgery] = train(sharded, name, rank, sharded)
    return results


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def world(name: str) -> list[dict[tuple[str, str], Trained]]:
    """The results of each rank."""
    return in_world(train_all, RANKS, name)


def train_alone(model: nn.Module, name: str) -> list[float]:
    """The same training in one process, in place: each rank's gradient in turn, and their mean; the norms."""
    optimizer, norms = optimizer_for(model), []
    with torch.random.fork_rng(devices=[]), st.keep_masks(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            for rank in range(RANKS):
                gradient_step(model, name, rank, step)
            for parameter in model.parameters():
                parameter.grad /= RANKS
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            drift(optimizer)
            optimizer.step()
    return norms


def check(model: nn.Module, name: str, ranks: list[Trained]) -> None:
    masks = st.find_masks(model)
    norms = train_alone(model, name)
    assert len(ranks) == RANKS
    for each in ranks:
        assert not each.pruned_gradients
        assert each.norms == pytest.approx(norms, rel=1e-4)
        assert each.masks.keys() == masks.keys()
        for key, mask in masks.items():
            assert torch.equal(each.masks[key], mask)
            assert not each.state[key][~mask].any()
            assert each.state[key][mask].any()
        for key, value in model.named_parameters():
            assert torch.equal(each.state[key], ranks[0].state[key]), key
            torch.testing.assert_close(each.state[key], value.detach(), rtol=1e-3, atol=1e-5)
    assert_held(model)


FAST = [f"convolutional, {surgery}" for surgery in SURGERIES]


@pytest.mark.machinery("DistributedDataParallel, two processes", fast=FAST)
def test_distributed_data_parallel(model, name, surgery, world):
    check(model, name, [results["ddp", surgery] for results in world])


@pytest.mark.machinery("FSDP2 fully_shard, two processes", fast=FAST)
def test_fully_shard(model, name, surgery, world):
    check(model, name, [results["fsdp", surgery] for results in world])
    assert list(world[0]["fsdp", surgery].state) == list(model.state_dict())
