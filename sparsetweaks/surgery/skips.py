"""Inject skip connections around the units of a network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsetweaks.copying import Model, copy_model
from sparsetweaks.errors import NoEffectWarning
from sparsetweaks.surgery import ghosts as g
from sparsetweaks.surgery import sites as s
from sparsetweaks.surgery.dataflow import first_input
from sparsetweaks.surgery.programs import rewrite
from sparsetweaks.surgery.scopes import Scopes
from sparsetweaks.surgery.units import Geometry, geometry_of, layer_types, units_in

SHORTCUTS = ("pad", "projection", "project-all", "none")
PROJECTION_INIT = 1e-4
"""The constant that the authors' code gives the weights of its 1x1 convolutions."""

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {0: nn.LayerNorm, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Skip(nn.Module):
    """Adds a unit's input to its output: `output + strength * shortcut(input)`.

    Lives as the child `skip` of the unit's layer, so its names are predictable (`conv1.skip.strength`) and it
    follows the layer wherever that goes. Parameter-free unless it projects, normalises or learns its strength.
    """

    added_by_tweak = True
    strength: float | torch.Tensor

    def __init__(
        self,
        geometry: Geometry,
        *,
        project: bool = False,
        norm: bool = False,
        strength: float | str = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.geometry = geometry
        self.rank = len(geometry.stride)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if project:
            channels = (geometry.in_channels, geometry.out_channels)
            layer = (_CONVS[self.rank], *channels, 1) if self.rank else (nn.Linear, *channels)
            self.projection = nn.utils.skip_init(*layer, bias=False, **factory)
            nn.init.constant_(self.projection.weight, PROJECTION_INIT)
        else:
            self.projection = None
        self.norm = _NORMS[self.rank](geometry.out_channels, **factory) if norm or project else None
        self.strength = nn.Parameter(torch.zeros(1, **factory)) if strength == "learned" else float(strength)

    def forward(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.strength, torch.Tensor) and self.strength == 0.0:
            return output
        shortcut = self.align(input, output)
        if self.projection is not None:
            shortcut = self.projection(shortcut)
        elif not self.geometry.keeps_channels:
            # not the geometry's: a pruner of channels may cut them after the surgery
            channels = output.shape[-self.rank - 1]
            shortcut = match_channels(shortcut, channels, self.rank)
        if self.norm is not None:
            shortcut = self.norm(shortcut)
        shortcut = shortcut.to(output.dtype)
        if isinstance(self.strength, torch.Tensor):
            return torch.addcmul(output, shortcut, self.strength.to(output.dtype))
        return torch.add(output, shortcut, alpha=self.strength)

    def align(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The input at the positions on which the convolution's outputs are centred."""
        if self.geometry.keeps_size:
            return input
        spans = zip(self.geometry.offset, self.geometry.stride, output.shape[-self.rank :])
        index: Any = (
            ...,
            *(slice(start, start + step * (size - 1) + 1, step) for start, step, size in spans),
        )
        return input[index]

    def extra_repr(self) -> str:
        geometry = self.geometry
        shortcut = "identity" if geometry.keeps_shape else "pad"
        kind = "projection" if self.projection is not None else shortcut
        return f"{kind}, strength={self.strength_in_words()}"

    def strength_in_words(self) -> str:
        return "learned" if isinstance(self.strength, torch.Tensor) else f"{self.strength:g}"


class GhostSkip(g.Ghost, Skip):
    """A skip for the early part of training: its strength is a buffer that `anneal_ghosts` lets fall to 0."""

    def __init__(self, geometry: Geometry, *, strength: float = 1.0, like: torch.Tensor, **options: Any):
        super().__init__(geometry, strength=0.0, **options)
        del self.strength
        self.set_start(strength, (1,), like)

    def stand_in(self, graph: fx.Graph, node: fx.Node) -> fx.Node | None:
        _, output = node.args
        assert isinstance(output, fx.Node)
        return output


def match_channels(input: torch.Tensor, channels: int, rank: int) -> torch.Tensor:
    """More channels: zeros after the given ones (He et al. 2015, option A). Fewer: averages of neighbours."""
    extra = channels - input.shape[-rank - 1]
    if extra >= 0:
        return F.pad(input, (0, 0) * rank + (0, extra))
    if rank and input.is_contiguous():
        # pool where the channels stand, so that gradients keep the memory format too
        space = input.shape[-rank:]
        pooled = F.adaptive_avg_pool2d(
            input.reshape(-1, 1, input.shape[-rank - 1], space.numel()), (channels, None)
        )
        return pooled.reshape(*input.shape[: -rank - 1], channels, *space)
    last = input.movedim(-rank - 1, -1)
    flat = last.flatten(0, -3) if last.dim() > 3 else last if last.dim() > 1 else last.unsqueeze(0)
    pooled = F.adaptive_avg_pool1d(flat, channels)
    return pooled.view(*last.shape[:-1], channels).movedim(-1, -rank - 1)


def inject_skips(
    model: Model,
    *,
    layers: str | Sequence[str] = ("conv",),
    where: s.Where = None,
    shortcut: str = "pad",
    norm: bool = False,
    strength: float | str | None = None,
    ghost: bool = False,
) -> Model:
    """Add a skip connection around every convolution and its normalisation (paper, section 3.1 and figure 3).

    Each skip adds the unit's input to the unit's output, before the activation and beside any residual that is
    already there. What `find_skip_sites` lists is what gets one. A unit that a residual already spans exactly is
    left as it is. `layers="linear"` does the same around the linear layers of MLPs and Transformers.

    Args:
        model: any module, masked or not, in any mask form.
        layers: around which layers, of "conv" and "linear"; default: convolutions, as in the paper.
        where: glob pattern(s) on a site's path, or a predicate on a `Site`; default: every unit.
        shortcut: what a unit that changes the shape gets. "pad": strided subsampling with channels padded by zeros
            or averaged, no parameters (He et al. 2015, option A). "projection": 1x1 convolution and BatchNorm (around
            linear layers a linear map and LayerNorm). "project-all": the same also where an identity would fit, as in
            the authors' released code. "none": no skip there.
        norm: whether each skip passes through a BatchNorm of its own (2C parameters, as in RepVGG); a LayerNorm
            around linear layers.
        strength: factor of the skip. A number (0 changes nothing at all), or "learned": one scalar per skip that
            starts at 0, so the network is at first exactly what it was (SkipInit, ReZero). Default: "learned", or 1.0
            for ghosts.
        ghost: whether the skips are there for the early part of training only (ToST, ICML 2022, whose strength falls
            from 1 to 0). The strength is then a buffer that starts at the number given; `anneal_ghosts` lets it fall,
            and `remove_ghosts` gives the original model back. At strength 0 the network computes what it did before,
            forward and backward, as long as the skip's own values are finite (0 times infinity is not 0; zeros may
            differ in sign, and a gradient in its memory format, which may round what is computed from it otherwise).

    Returns:
        A new model. Parameters, buffers, masks, hooks, modes, names and classes of all modules are those of `model`,
        which is left untouched. Each skip is a `Skip` module, the child `skip` of its layer;
        `sparsity` counts what it adds. Only forwards change: a method that computes a part of the network and is
        called directly (`encode`, `forward_features`) still computes what it did.

    Raises:
        ValueError: for an unknown layer, shortcut or strength, or a pattern that matches nothing.

    Warns:
        NoEffectWarning: if there is no unit that can get a skip.

    Example:
        >>> import sparsetweaks as st
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8))
        >>> [name for name, _ in st.inject_skips(model).named_parameters() if "skip" in name]
        ['0.skip.strength']
    """
    if shortcut not in SHORTCUTS:
        raise ValueError(f"unknown shortcut {shortcut!r}; known: {', '.join(SHORTCUTS)}")
    if strength is None:
        strength = 1.0 if ghost else "learned"
    if isinstance(strength, bool) or not (strength == "learned" or isinstance(strength, (int, float))):
        raise ValueError(f"strength must be a number or 'learned', not {strength!r}")
    if ghost and isinstance(strength, str):
        raise ValueError("a ghost's strength is annealed, not learned: give the number that it starts from")
    if not isinstance(strength, str) and not math.isfinite(strength):
        raise ValueError(f"strength must be finite, not {strength!r}")
    if not isinstance(norm, bool):
        raise ValueError(f"norm must be True or False, not {norm!r}")
    types = layer_types(layers)
    result = copy_model(model)
    s.refuse_wrapped(result)
    found = s.skip_sites(result, types, Scopes())
    chosen = s.select(s.Sites(each.site for each in found), where)
    within = frozenset(chosen)
    picked = [each for each in found if each.site in within]
    wanted = [each for each in picked if shortcut != "none" or each.site.kind == "kept"]
    done = [each for each in wanted if each.site.left is None]
    if not done:
        hint = f"the first: {wanted[0].site}" if wanted else "see find_skip_sites and layers="
        text = (
            f"the model has no unit that can get a skip ({len(wanted)} chosen): nothing was injected; {hint}"
        )
        warnings.warn(text, NoEffectWarning, stacklevel=2)
    scopes: dict[int, list[s.Found]] = {}
    for each in done:
        layer = each.module.get_submodule(each.site.name)
        if not hasattr(layer, "skip"):
            layer.add_module("skip", _skip_for(layer, shortcut, norm, strength, ghost))
        scopes.setdefault(id(each.module), []).append(each)
    for group in scopes.values():
        _inject(group, types, g.SKIP_EDIT if ghost else "skip")
    rewritten = s.Sites(each.site for each in done)
    words = f"inject_skips, shortcut {shortcut}, strength {strength}{', ghost' if ghost else ''}"
    s.record_change(result, words, rewritten, chosen.left)
    return result


def _skip_for(layer: nn.Module, shortcut: str, norm: bool, strength: float | str, ghost: bool) -> Skip:
    geometry = geometry_of(layer)
    project = shortcut == "project-all" or (shortcut == "projection" and not geometry.keeps_shape)
    weight = next(layer.parameters())
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    skip: Skip
    if ghost:
        skip = GhostSkip(
            geometry, project=project, norm=norm, strength=float(strength), like=weight, **options
        )
    else:
        skip = Skip(geometry, project=project, norm=norm, strength=strength, **options)
    return skip.train(layer.training)


def _inject(group: list[s.Found], types: tuple[type[nn.Module], ...], kind: str) -> None:
    """Call the skips in one scope's forward."""
    scope, trace = group[0].module, group[0].trace
    assert trace is not None
    names = frozenset(each.site.name for each in group)

    def edit(graph: fx.Graph) -> None:
        for unit in list(units_in(graph, scope, types)):
            if str(unit.layer.target) not in names or unit.left is not None:
                continue
            with graph.inserting_after(unit.output):
                skip = graph.call_module(f"{unit.layer.target}.skip")
            unit.output.replace_all_uses_with(skip)
            skip.args = (first_input(unit.layer), unit.output)

    rewrite(scope, trace, (kind, names), edit)
