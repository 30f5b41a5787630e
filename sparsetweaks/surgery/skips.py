"""Inject skip connections around the units of a network."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsetweaks.copying import Model, copy_model
from sparsetweaks.errors import NoEffectWarning
from sparsetweaks.surgery import sites as s
from sparsetweaks.surgery.dataflow import first_input
from sparsetweaks.surgery.programs import rewrite
from sparsetweaks.surgery.scopes import Scopes
from sparsetweaks.surgery.units import Geometry, geometry_of, units_in

SHORTCUTS = ("pad", "projection", "project-all", "none")
PROJECTION_INIT = 1e-4
"""The constant that the authors' code gives the weights of its 1x1 convolutions."""

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Skip(nn.Module):
    """Adds a unit's input to its output: `output + strength * shortcut(input)`.

    Lives as the child `skip` of the unit's convolution, so its names are predictable (`conv1.skip.strength`) and it
    follows the convolution wherever that goes. Parameter-free unless it projects, normalises or learns its strength.
    """

    added_by_tweak = True
    strength: float | nn.Parameter

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
            self.projection = nn.utils.skip_init(_CONVS[self.rank], *channels, 1, bias=False, **factory)
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
        strength = "learned" if isinstance(self.strength, torch.Tensor) else f"{self.strength:g}"
        return f"{'projection' if self.projection is not None else shortcut}, strength={strength}"


def match_channels(input: torch.Tensor, channels: int, rank: int) -> torch.Tensor:
    """More channels: zeros after the given ones (He et al. 2015, option A). Fewer: averages of neighbours."""
    extra = channels - input.shape[-rank - 1]
    if extra >= 0:
        return F.pad(input, (0, 0) * rank + (0, extra))
    if input.is_contiguous():  # pool where the channels stand, so that gradients keep the memory format too
        space = input.shape[-rank:]
        pooled = F.adaptive_avg_pool2d(
            input.reshape(-1, 1, input.shape[-rank - 1], space.numel()), (channels, None)
        )
        return pooled.reshape(*input.shape[: -rank - 1], channels, *space)
    last = input.movedim(-rank - 1, -1)
    pooled = F.adaptive_avg_pool1d(last.flatten(0, -3) if last.dim() > 3 else last, channels)
    return pooled.view(*last.shape[:-1], channels).movedim(-1, -rank - 1)


def inject_skips(
    model: Model,
    *,
    where: s.Where = None,
    shortcut: str = "pad",
    norm: bool = False,
    strength: float | str = "learned",
) -> Model:
    """Add a skip connection around every convolution and its normalisation (paper, section 3.1 and figure 3).

    Each skip adds the unit's input to the unit's output, before the activation and beside any residual that is
    already there. What `find_skip_sites` lists is what gets one. A unit that a residual already spans exactly is
    left as it is.

    Args:
        model: any module, masked or not, in any mask form.
        where: glob pattern(s) on a site's path, or a predicate on a `Site`; default: every unit.
        shortcut: what a unit that changes the shape gets. "pad": strided subsampling with channels padded by zeros
            or averaged, no parameters (He et al. 2015, option A). "projection": 1x1 convolution and BatchNorm.
            "project-all": the same also where an identity would fit, as in the authors' released code.
            "none": no skip there.
        norm: whether each skip passes through a BatchNorm of its own (2C parameters, as in RepVGG).
        strength: factor of the skip. A number (0 changes nothing at all), or "learned": one scalar per skip that
            starts at 0, so the network is at first exactly what it was (SkipInit, ReZero).

    Returns:
        A new model. Parameters, buffers, masks, hooks, modes, names and classes of all modules are those of `model`,
        which is left untouched. Each skip is a `Skip` module, the child `skip` of its convolution;
        `sparsity` counts what it adds. Only forwards change: a method that computes a part of the network and is
        called directly (`encode`, `forward_features`) still computes what it did.

    Raises:
        ValueError: for an unknown shortcut or strength, or a pattern that matches nothing.

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
    if isinstance(strength, bool) or not (strength == "learned" or isinstance(strength, (int, float))):
        raise ValueError(f"strength must be a number or 'learned', not {strength!r}")
    if not isinstance(strength, str) and not math.isfinite(strength):
        raise ValueError(f"strength must be finite, not {strength!r}")
    if not isinstance(norm, bool):
        raise ValueError(f"norm must be True or False, not {norm!r}")
    result = copy_model(model)
    s.refuse_wrapped(result)
    found = s.skip_sites(result, Scopes())
    chosen = s.select(s.Sites(each.site for each in found), where)
    picked = [each for each in found if each.site in chosen]
    wanted = [each for each in picked if shortcut != "none" or each.site.kind == "kept"]
    done = [each for each in wanted if each.site.left is None]
    if not done:
        first = f"; the first: {wanted[0].site}" if wanted else ""
        text = (
            f"the model has no unit that can get a skip ({len(wanted)} chosen): nothing was injected{first}"
        )
        warnings.warn(text, NoEffectWarning, stacklevel=2)
    scopes: dict[int, list[s.Found]] = {}
    for each in done:
        conv = each.module.get_submodule(each.site.name)
        if not hasattr(conv, "skip"):
            conv.add_module("skip", _skip_for(conv, shortcut, norm, strength))
        scopes.setdefault(id(each.module), []).append(each)
    for group in scopes.values():
        _inject(group)
    rewritten = s.Sites(each.site for each in done)
    s.record_change(result, f"inject_skips, shortcut {shortcut}, strength {strength}", rewritten, chosen.left)
    return result


def _skip_for(conv: nn.Module, shortcut: str, norm: bool, strength: float | str) -> Skip:
    geometry = geometry_of(conv)
    project = shortcut == "project-all" or (shortcut == "projection" and not geometry.keeps_shape)
    weight = next(conv.parameters())
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    skip = Skip(geometry, project=project, norm=norm, strength=strength, **options)
    return skip.train(conv.training)


def _inject(group: list[s.Found]) -> None:
    """Call the skips in one scope's forward."""
    scope, trace = group[0].module, group[0].trace
    assert trace is not None
    names = frozenset(each.site.name for each in group)

    def edit(graph: fx.Graph) -> None:
        for unit in list(units_in(graph, scope)):
            if str(unit.conv.target) not in names or unit.left is not None:
                continue
            with graph.inserting_after(unit.output):
                skip = graph.call_module(f"{unit.conv.target}.skip")
            unit.output.replace_all_uses_with(skip)
            skip.args = (first_input(unit.conv), unit.output)

    rewrite(scope, trace, ("skip", names), edit)
