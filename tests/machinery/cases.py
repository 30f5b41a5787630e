"""The models and surgeries of the matrix, and what it means for two models to be the same.

Each model holds what machinery trips over: functional, method and in-place module activations, BatchNorm, residuals
that do and do not fit, dropout by `self.training`, and a mask. Learned strengths are moved off zero, where a lost skip
would show nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsetweaks as st

SPARSITY = 0.6
STRENGTH = 0.3
CLASSES = 3
BATCH = 4


class Block(nn.Module):
    """A residual block with an activation of either kind and dropout by mode."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.act(self.norm1(self.conv1(input)))
        hidden = F.dropout(hidden, 0.2, training=self.training)
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(input))


class Convolutional(nn.Module):
    """A small residual network for images of 3 x 10 x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)  # more channels: its skip pads
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Block(6, 6, 1), Block(6, 4, 2))  # fewer: its skip averages
        self.head = nn.Linear(4, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.blocks(self.norm(self.conv(input)).relu())
        return self.head(hidden.mean((2, 3)))


class Layer(nn.Module):
    """A pre-norm Transformer layer, its MLP activated by a function."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, input: Tensor) -> Tensor:
        query, key, value = self.project_in(self.norm1(input)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        hidden = input + self.project_out(attended.transpose(1, 2).flatten(2))
        inner = F.dropout(F.relu(self.up(self.norm2(hidden))), 0.2, training=self.training)
        return hidden + self.down(inner)


class Transformer(nn.Module):
    """Two Transformer layers over a convolutional stem, for sequences of 5 features and 12 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(5, 8, 3, stride=2, padding=1), nn.BatchNorm1d(8), nn.ReLU())
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.blocks = nn.Sequential(Layer(8, 2), Layer(8, 2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        tokens = torch.relu(self.conv(self.stem(input)))
        return self.head(self.blocks(tokens.transpose(1, 2)).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"convolutional": Convolutional, "transformer": Transformer}
SHAPES = {"convolutional": (3, 10, 10), "transformer": (5, 12)}


def batch_for(name: str, seed: int = 0, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """A batch for the model of that name."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, *SHAPES[name], generator=generator)
    return inputs, torch.randint(CLASSES, (size,), generator=generator)


def ticket_of(name: str, seed: int = 1) -> nn.Module:
    """The masked model of that name, with statistics that are not those of a new one; the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = st.prune(MODELS[name](), SPARSITY, layers=("conv", "linear"))
        with torch.no_grad():
            model(batch_for(name, seed=9)[0])
    return model


def inject(model: nn.Module, strength: float | str) -> nn.Module:
    return with_strengths(st.inject_skips(model, strength=strength))


def with_strengths(model: nn.Module) -> nn.Module:
    """Learned strengths moved off zero, in place."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("skip.strength"):
                parameter.fill_(STRENGTH)
    return model


def tweak(model: nn.Module, name: str) -> nn.Module:
    return with_strengths(st.tweak(model, batch_for(name, seed=8), scales={"iterations": 3}).model)


SURGERIES: dict[str, Callable[[nn.Module, str], nn.Module]] = {
    "none": lambda model, name: st.copy_model(model),
    "learned skips": lambda model, name: inject(model, "learned"),
    "fixed skips": lambda model, name: inject(model, STRENGTH),
    "swap": lambda model, name: st.swap_activations(model, "swish"),
    "scale": lambda model, name: st.learn_layer_scales(model, batch_for(name, seed=8), iterations=3),
    "all": tweak,
}
"""What is done to a ticket. Nothing at all is the control: a cell that it fails says nothing about surgery."""

ONE_MODEL = [*(f"convolutional, {surgery}" for surgery in SURGERIES), "transformer, all"]
"""The fast cells of rows that take long: every surgery of one model, and all of them of the other."""

NEUTRAL: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": st.copy_model,
    "learned skips": lambda model: st.inject_skips(model),
    "fixed skips": lambda model: st.inject_skips(model, strength=0.0),
    "swap": lambda model: st.swap_activations(model, "relu"),
    "scale": lambda model: st.scale_layers(model, dict.fromkeys(st.find_masks(model), 1.0)),
    "all": lambda model: st.swap_activations(st.inject_skips(model), "relu"),
}
"""The same surgeries at the setting that changes nothing."""

OF_THE_VALUES = ("scale", "all")
"""Surgeries that depend on the values of the weights, so that they do not commute with a change of dtype."""


class Run(NamedTuple):
    """What one forward and backward pass of a model gives."""

    output: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def run(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    *,
    training: bool = True,
    call: Callable[[Tensor], Tensor] | None = None,
) -> Run:
    """Output, gradients and buffers after one pass from a fixed random state; buffers and mode are put back."""
    call = model if call is None else call  # a compiled model has a length, which may be refused
    before = {name: value.clone() for name, value in model.named_buffers()}
    mode = model.training
    model.train(training)
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        output = call(batch[0])
    F.cross_entropy(output.float(), batch[1]).backward()
    gradients = {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    after = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(before[name])
    model.zero_grad()
    model.train(mode)
    return Run(output.detach(), gradients, after)


def assert_same_runs(actual: Run, expected: Run, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal outputs, gradients and buffers: by default to the bit."""
    options = {"rtol": rtol, "atol": atol, "check_dtype": False}
    torch.testing.assert_close(actual.output, expected.output, **options)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        found = actual.gradients[name]
        assert (found is None) == (gradient is None), name
        if found is not None:
            torch.testing.assert_close(
                found, gradient, **options, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert actual.buffers.keys() == expected.buffers.keys()
    for name, value in expected.buffers.items():
        torch.testing.assert_close(
            actual.buffers[name], value, **options, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(
    actual: nn.Module, expected: nn.Module, name: str, *, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Two models that cannot be told apart: names, masks, changes, and runs in both modes."""
    assert [key for key, _ in actual.named_modules()] == [key for key, _ in expected.named_modules()]
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert_same_masks(actual, expected)
    assert st.changes(actual) == st.changes(expected)
    for training in (True, False):
        runs = (run(model, batch_for(name), training=training) for model in (actual, expected))
        assert_same_runs(*runs, rtol=rtol, atol=atol)


def assert_same_masks(actual: nn.Module, expected: nn.Module) -> None:
    """Equal masks, and zeros wherever they prune."""
    masks = st.find_masks(expected)
    assert masks
    assert actual is not None
    found = st.find_masks(actual)
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(found[name], mask), name
    assert_held(actual)


def assert_held(model: nn.Module) -> None:
    """Every pruned weight is exactly zero, and not all that survive are."""
    for name, mask in st.find_masks(model).items():
        weight = model.get_parameter(name).detach()
        assert not weight[~mask].any(), name
        assert weight[mask].any(), name


def parameters_equal(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, name: str, seeds: Iterator[int] | range
) -> nn.Module:
    """Train in place with the masks held, one batch per seed; dropout draws from the seed too."""
    model.train()
    with torch.random.fork_rng(devices=[]), st.keep_masks(model, optimizer):
        for seed in seeds:
            torch.manual_seed(seed)
            inputs, targets = batch_for(name, seed)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model
