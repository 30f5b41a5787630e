"""Networks, batches and masks as hypothesis draws them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsetweaks.testing.activations import ACTIVATIONS
from sparsetweaks.testing.blocks import BLOCKS, OPTIONS
from sparsetweaks.testing.extras import EXTRAS
from sparsetweaks.testing.hazards import hazards
from sparsetweaks.testing.layers import FLAT_LAYERS, FLAT_NORMS, LAYERS, NORMS, RESHAPING
from sparsetweaks.testing.masking import FORMS, Masked, mask_model, maskable_weights
from sparsetweaks.testing.networks import RETURNS, ROOTS, Batch, build, example_batch
from sparsetweaks.testing.specs import BlockSpec, Spec

T = TypeVar("T")


class _Choices:
    """Bytes read as choices, one each; zero is the first option, so that shrinking leads to plain ones."""

    def __init__(self, drawn: bytes) -> None:
        self._bytes = iter(drawn)

    def among(self, options: Sequence[T]) -> T:
        return options[next(self._bytes) % len(options)]


_BYTES_PER_BLOCK, _BYTES_BESIDES = 7, 16


def specs(*, max_blocks: int = 4) -> st.SearchStrategy[Spec]:
    """Strategy for network specifications; failing ones shrink towards one plain convolution block.

    All choices are drawn as one string of bytes. Drawn one by one, hypothesis would mutate each example by
    copying parts of it around, which makes clusters of like networks and misses hazards for long.

    Args:
        max_blocks: most blocks in a network, at least 1.

    Example:
        >>> from sparsetweaks.testing import hazards, specs
        >>> from hypothesis import find
        >>> spec = find(specs(), lambda spec: "form: alias" in hazards(spec))
        >>> "alias" in [block.form for block in spec.blocks]
        True
    """
    size = _BYTES_BESIDES + _BYTES_PER_BLOCK * max_blocks
    return st.binary(min_size=size, max_size=size).map(lambda drawn: _read_spec(drawn, max_blocks))


def draw_spec(drawn: random.Random, *, max_blocks: int = 4) -> Spec:
    """One random network specification without hypothesis, as `specs()` draws them: for sweeps of thousands.

    Args:
        drawn: where the choices come from, e.g. `random.Random(7)`.
        max_blocks: most blocks in a network, at least 1.

    Example:
        >>> from sparsetweaks.testing import draw_spec
        >>> draw_spec(random.Random(7)) == draw_spec(random.Random(7))
        True
    """
    return _read_spec(drawn.randbytes(_BYTES_BESIDES + _BYTES_PER_BLOCK * max_blocks), max_blocks)


def _read_spec(drawn: bytes, max_blocks: int) -> Spec:
    choices = _Choices(drawn[:_BYTES_BESIDES])
    network = choices.among(("conv", "conv", "conv", "mlp", "conv", "conv1d", "conv", "conv3d"))
    root = choices.among(("tower", *ROOTS))
    blocks: list[BlockSpec] = []
    for number in range(choices.among(range(1, max_blocks + 1))):
        start = _BYTES_BESIDES + _BYTES_PER_BLOCK * number
        block_choices = _Choices(drawn[start : start + _BYTES_PER_BLOCK])
        may_reshape = all(block.layer not in RESHAPING for block in blocks)
        blocks.append(_read_block(block_choices, network, may_reshape, root == "tower"))
    names = [choices.among(tuple(EXTRAS)) for _ in range(choices.among((0, 1, 1, 2, 3)))]
    extras = tuple(dict.fromkeys(names))
    if blocks[0].layer in RESHAPING:
        extras = tuple(extra for extra in extras if extra != "shared_block")
    return Spec(
        blocks=tuple(blocks),
        network=network,
        width=choices.among((4, 8)),
        size=choices.among((6, 7, 8)),
        batch=choices.among((2, 3, 4)),
        root=root,
        returns=choices.among(RETURNS) if root == "tower" else "tensor",
        extras=extras,
        seed=256 * choices.among(range(256)) + choices.among(range(256)),
    )


def _read_block(choices: _Choices, network: str, may_reshape: bool, may_call: bool) -> BlockSpec:
    form = choices.among(tuple(BLOCKS))
    layers = FLAT_LAYERS if network == "mlp" else tuple(LAYERS)
    if BLOCKS[form].adds_input or not may_reshape:
        layers = tuple(layer for layer in layers if layer not in RESHAPING)
    layer = choices.among(layers)
    norm = choices.among(FLAT_NORMS if network == "mlp" else NORMS)
    activation = choices.among(tuple(ACTIVATIONS))
    options: tuple[tuple[str, Any], ...] = ()
    if may_call and form in OPTIONS:
        first, second = choices.among(OPTIONS[form]), choices.among(OPTIONS[form])
        options = tuple({first[0]: first, second[0]: second}.values())
        options = choices.among(((), options, options))
    return BlockSpec(form, layer, norm, activation, options)


def models(*, max_blocks: int = 4) -> st.SearchStrategy[nn.Module]:
    """Strategy for small random networks that contain hazards; each has its specification as `model.spec`.

    Args:
        max_blocks: most blocks in a network, at least 1.

    Example:
        >>> from sparsetweaks.testing import example_batch, hazards, models
        >>> from hypothesis import find
        >>> model = find(models(), lambda model: "form: basic" in hazards(model))
        >>> model(example_batch(model.spec)[0]).shape
        torch.Size([2, 3])
    """
    return specs(max_blocks=max_blocks).map(build)


def batches(model: nn.Module | Spec) -> st.SearchStrategy[Batch]:
    """Strategy for (inputs, targets) that the drawn network takes.

    Args:
        model: a network made by `build`, or its specification.

    Example:
        >>> from sparsetweaks.testing import Spec, batches
        >>> from hypothesis import find
        >>> inputs, targets = find(batches(Spec(batch=4)), lambda batch: True)
        >>> inputs.shape, targets.shape
        (torch.Size([4, 3, 6, 6]), torch.Size([4]))
    """
    hazards(model)  # says so where the model is not ours
    spec: Spec = model if isinstance(model, Spec) else model.spec  # type: ignore[assignment]
    return st.integers(0, 2**16).map(lambda seed: example_batch(spec, seed=seed))


@st.composite
def masks(draw: st.DrawFn, model: nn.Module) -> dict[str, Tensor]:
    """Strategy for masks of some or all weights: True is kept; all kept, all zero, and random ones.

    Args:
        model: any module; only its weights' names and shapes are read.

    Example:
        >>> from sparsetweaks.testing import Spec, build, masks
        >>> from hypothesis import find
        >>> drawn = find(masks(build(Spec())), lambda drawn: "stem.weight" in drawn)
        >>> drawn["stem.weight"].dtype, bool(drawn["stem.weight"].all())
        (torch.bool, True)
    """
    weights = maskable_weights(model)
    chosen = draw(st.lists(st.sampled_from(sorted(weights)), unique=True)) if weights else []
    drawn: dict[str, Tensor] = {}
    for name in sorted(chosen):
        density = draw(st.sampled_from((1.0, 0.5, 0.1, 0.0)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        drawn[name] = torch.rand(weights[name].shape, generator=generator) < density
    return drawn


@st.composite
def masked_models(draw: st.DrawFn, *, max_blocks: int = 4, forms: tuple[str, ...] = FORMS) -> Masked:
    """Strategy for masked networks, in every form that pruners leave behind.

    Args:
        max_blocks: most blocks in a network, at least 1.
        forms: which of `FORMS` to draw from.

    Example:
        >>> from sparsetweaks.testing import masked_models
        >>> from hypothesis import find
        >>> masked = find(masked_models(forms=("torch_prune",)), lambda masked: "stem.weight" in masked.masks)
        >>> masked.model.get_submodule("stem").weight.is_leaf
        False
    """
    model = build(draw(specs(max_blocks=max_blocks)))
    drawn, form = draw(masks(model)), draw(st.sampled_from(forms))
    return Masked(mask_model(model, drawn, form), drawn, form)
