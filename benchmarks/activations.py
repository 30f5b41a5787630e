"""What tweaks cost in time: steps of ResNet-20 with Swish, its ghost, Mish and AT, and inference with AT, against ReLU.

    python benchmarks/activations.py

Batch 128 of 32x32 images, channels last, at 95 % sparsity; steps in float32, and in bfloat16 by autocast. The ghost is
measured at full strength, and at strength 0, where nothing but the original activation is computed any more. Inference is
in float32: AT is skips and Swish, and once folded it differs from the folded network without tweaks in Swish alone.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

import paired
import torch
import torch.nn.functional as F
from paired import Row
from torch import nn

import sparsetweaks as st
from sparsetweaks.lottery.config import Network
from sparsetweaks.lottery.models import build

SPARSITY = 0.95
BATCH = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def faded(model: nn.Module) -> nn.Module:
    model = st.swap_activations(model, "swish", ghost=True)
    st.anneal_ghosts(model, 1.0)
    return model


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "relu": lambda model: model,
    "swish": lambda model: st.swap_activations(model, "swish"),
    "ghost swish": lambda model: st.swap_activations(model, "swish", ghost=True),
    "ghost swish at strength 0": faded,
    "mish": lambda model: st.swap_activations(model, "mish"),
}


def step_of(
    model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last
) -> Callable[[], None]:
    model = st.copy_model(model).to(memory_format=memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=memory_format)
    labels = torch.randint(10, (BATCH,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = model(images)
        optimizer.zero_grad()
        F.cross_entropy(outputs.float(), labels).backward()
        optimizer.step()

    return step


def inference_of(model: nn.Module) -> Callable[[], object]:
    model = model.to(memory_format=torch.channels_last).eval()
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    return torch.no_grad()(functools.partial(model, images))


def inference(network: str, options: argparse.Namespace) -> Iterator[Row]:
    torch.manual_seed(0)
    plain = st.prune(build(Network(network), channels=3, classes=10, seed=0), SPARSITY).eval()
    tweaked = st.swap_activations(st.inject_skips(plain, strength=0.3), "swish")
    models = {"as it is": plain, "folded": st.fold(plain), "AT": tweaked, "AT, folded": st.fold(tweaked)}
    runs = {name: inference_of(model) for name, model in models.items()}
    times = paired.interleaved(runs, options.repeats, warm_up=2)
    for name, peer in (("AT", "as it is"), ("AT, folded", "folded"), ("AT, folded", "as it is")):
        found = paired.ratios(times, name, peer)
        yield paired.spread(f"inference of {network} in float32", f"time, {name} / {peer}", found)


def measure(name: str, options: argparse.Namespace) -> Iterator[Row]:
    torch.manual_seed(0)
    ticket = st.prune(build(Network("resnet20"), channels=3, classes=10, seed=0), SPARSITY)
    runs = {variant: step_of(change(ticket), DTYPES[name]) for variant, change in VARIANTS.items()}
    times = paired.interleaved(runs, options.repeats, warm_up=2)
    for variant in list(VARIANTS)[1:]:
        found = paired.ratios(times, variant, "relu")
        yield paired.spread(f"a step of ResNet-20 in {name}", f"time, {variant} / relu", found)


def formats(options: argparse.Namespace) -> Iterator[Row]:
    """Why the lottery trains networks with skips with the channels first: a skip's gradients are so."""
    torch.manual_seed(0)
    plain = st.prune(build(Network("resnet20"), channels=3, classes=10, seed=0), SPARSITY)
    tweaked = st.swap_activations(st.inject_skips(plain), "swish")
    orders = {"last": torch.channels_last, "first": torch.contiguous_format}
    runs = {
        f"{name}, channels {order}": step_of(model, torch.float32, memory_format)
        for name, model in (("relu", plain), ("AT", tweaked))
        for order, memory_format in orders.items()
    }
    times = paired.interleaved(runs, options.repeats, warm_up=2)
    for name in list(runs)[1:]:
        found = paired.ratios(times, name, "relu, channels last")
        yield paired.spread("a step of ResNet-20 in float32", f"time, {name} / relu, channels last", found)


CASES = {
    **{name: functools.partial(measure, name) for name in DTYPES},
    "memory format": formats,
    **{f"inference, {name}": functools.partial(inference, name) for name in ("resnet20", "vgg16")},
}

if __name__ == "__main__":
    paired.main(__doc__, "activations", CASES, repeats=9)
