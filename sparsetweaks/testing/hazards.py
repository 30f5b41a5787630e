"""What is in a network: to measure what a test has covered."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from sparsetweaks.testing.activations import ACTIVATIONS
from sparsetweaks.testing.blocks import BLOCKS
from sparsetweaks.testing.extras import EXTRAS
from sparsetweaks.testing.layers import LAYERS, NORMS, PARAMETRIZED
from sparsetweaks.testing.networks import NETWORKS, RETURNS, ROOTS
from sparsetweaks.testing.specs import Spec

HAZARDS: frozenset[str] = frozenset(
    [f"form: {name}" for name in BLOCKS]
    + [f"layer: {name}" for name in LAYERS]
    + [f"norm: {name}" for name in NORMS]
    + [f"activation: {name}" for name in ACTIVATIONS]
    + [f"root: {name}" for name in ROOTS]
    + [f"returns: {name}" for name in RETURNS]
    + [f"extra: {name}" for name in EXTRAS]
    + [f"network: {name}" for name in NETWORKS]
    + ["called with options"]
)


def hazards(model: nn.Module | Spec) -> set[str]:
    """Name what a drawn network contains, as members of `HAZARDS`: to measure what a test has covered.

    Args:
        model: a network made by `build`, or its specification.

    Raises:
        ValueError: the model was not made by `build`.

    Example:
        >>> from sparsetweaks.testing import Spec, hazards
        >>> sorted(hazards(Spec()))[:3]
        ['activation: ReLU', 'form: plain', 'layer: plain']
    """
    spec = model if isinstance(model, Spec) else getattr(model, "spec", None)
    if not isinstance(spec, Spec):
        raise ValueError("hazards() knows only networks made by sparsetweaks.testing.build")
    found = {f"network: {spec.network}", f"root: {spec.root}", f"returns: {spec.returns}"}
    found |= {f"extra: {extra}" for extra in spec.extras}
    for block in spec.blocks:
        found |= {f"form: {block.form}", f"layer: {block.layer}", f"norm: {block.norm}"}
        found |= {f"activation: {block.activation}"} | ({"called with options"} if block.options else set())
    return found


def picklable(model: nn.Module | Spec) -> bool:
    """Whether torch can pickle the network whole: it refuses modules with parametrizations.

    Example:
        >>> from sparsetweaks.testing import BlockSpec, Spec, picklable
        >>> picklable(Spec(blocks=(BlockSpec(layer="spectral_norm"),)))
        False
    """
    if isinstance(model, nn.Module) and any(parametrize.is_parametrized(each) for each in model.modules()):
        return False
    return not hazards(model) & {f"layer: {name}" for name in PARAMETRIZED}
