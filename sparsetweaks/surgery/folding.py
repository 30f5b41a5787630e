"""Fold normalisation and skips into the convolutions they belong to: an inference network without extra layers.

In eval mode a convolution, the BatchNorm after it and a skip around both are linear maps of one input. The skip reads
the input where the kernel is centred, so its matrix belongs at the kernel's central tap; the BatchNorm scales the
filters; what is constant goes to the bias.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils import _pytree as pytree

from sparsetweaks.calling import call
from sparsetweaks.copying import Model, copy_model
from sparsetweaks.errors import NoEffectWarning, SurgeryError
from sparsetweaks.masks import find_masks
from sparsetweaks.probing import rng_restored
from sparsetweaks.prunable import added_modules
from sparsetweaks.surgery import sites as s
from sparsetweaks.surgery.activations import become
from sparsetweaks.surgery.dataflow import called, first_input, mutates
from sparsetweaks.surgery.ghosts import SKIP_EDIT
from sparsetweaks.surgery.mentions import LOOPS, SLICES
from sparsetweaks.surgery.programs import Rewritten, Trace, Untraceable, edits_of, original_class, rewrite
from sparsetweaks.surgery.scopes import Scopes, is_scope
from sparsetweaks.surgery.skips import Skip

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far outputs may be apart, relative to the largest: some thousand roundings, in every dtype."""

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_FORWARDS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward}
_NORM_FORWARDS = {nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward}


@dataclass(frozen=True)
class FoldedLayer:
    """Non-zero weights of one folded layer: its own and its skip's before, and those of the one layer that is left."""

    name: str
    own: int
    skip: int
    after: int


@dataclass(frozen=True)
class Folding(s.Change):
    """What `fold` did: a `Change` with the non-zeros of each folded layer and of all parameters.

    Attributes:
        layers: per folded layer, in the order of the model.
        before, after: non-zeros of all the model's parameters.
        error: the largest difference of an output relative to the largest output, or None without `inputs`.
    """

    layers: tuple[FoldedLayer, ...] = ()
    before: int = 0
    after: int = 0
    error: float | None = None

    def __str__(self) -> str:
        head = ("layer", "own weights", "its skip's", "folded")
        rows = [(each.name, f"{each.own:,}", f"{each.skip:,}", f"{each.after:,}") for each in self.layers]
        rows.append(("all parameters", f"{self.before:,}", "", f"{self.after:,}"))
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        table = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in (head, *rows)
        ]
        return "\n".join([super().__str__(), "non-zeros:", *(f"  {line}" for line in table)])


def fold(model: Model, *, inputs: Any = None, where: s.Where = None, tolerance: float | None = None) -> Model:
    """Merge each convolution with its BatchNorm and its skip into one convolution, for inference.

    Skips of every kind are merged at the strength that they have: identity, subsampling with padded or averaged
    channels, 1x1 projections, with a BatchNorm of their own or not; 1d, 2d and 3d, any stride, dilation, padding and
    kernel, groups as long as the skip stays within them; and parameter-free skips around linear layers. BatchNorms are
    merged where there is no skip too.

    What a skip costs in non-zeros: an identity fills the diagonal of the kernel's central tap, 1 of 9C weights of a
    3x3 kernel with C channels; a dense projection fills the whole central tap, 1 of 9. Folding adds that to a sparse
    kernel: see the report, and prune back to your budget if that is too much.

    Args:
        model: any module, with skips or not, masked or not, in any mask form. Its statistics should be trained.
        inputs: what one call of the model takes, without labels: a tensor, a tuple of positional or a mapping of keyword
            arguments, to check that the folded model agrees; None checks nothing.
        where: glob pattern(s) on the path of a convolution, or a predicate on a `Site`; default: everything.
        tolerance: largest difference of an output relative to the largest output that agrees. Default: by the
            outputs' dtype, 1e-10 in float64, 1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16.

    Returns:
        A new model in eval mode, which computes what `model` computes in eval mode; `model` is left untouched. Folded
        convolutions have the class and names that they had, with a bias; their BatchNorms are `nn.Identity`; their
        skips are gone, and with them the rewritten forwards. Masks are ordinary weights and bool buffers
        `<parameter>_mask`, which now keep what the skip filled too. `changes(result)[-1]` names what was
        folded, with its non-zeros before and after, and what was left and why.

    Raises:
        ValueError: for a pattern that matches nothing.
        SurgeryError: if the outputs for `inputs` do not agree, or the model fails on them.

    Warns:
        NoEffectWarning: if there is nothing to fold.

    Example:
        >>> import sparsetweaks as st
        >>> layers = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        >>> ticket = st.prune(torch.nn.Sequential(*layers), 0.9)
        >>> folded = st.fold(st.inject_skips(ticket, strength=1.0), inputs=torch.randn(1, 8, 4, 4))
        >>> folded
        Sequential(
          (0): Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> report = st.changes(folded)[-1]
        >>> report.layers[0].own, report.layers[0].after <= 58 + 8
        (58, True)
    """
    result = copy_model(model)
    s.refuse_wrapped(result)
    result.eval()
    before = nonzeros(result.parameters())
    calls = _read_calls(result)
    units = _find_units(result, calls)
    chosen = s.select(s.Sites(unit.site() for unit in units), where)
    units = [unit for unit in units if unit.site() in chosen]
    _settle(units, calls)
    folded = [unit for unit in units if unit.left is None]
    sites = s.Sites(site for unit in units for site in unit.sites())
    if not folded:
        first = f"; the first: {sites.left[0]}" if sites.left else ""
        text = f"the model has nothing that can be folded ({len(units)} chosen): nothing was merged{first}"
        warnings.warn(text, NoEffectWarning, stacklevel=2)
    layers = tuple(_merge(unit) for unit in folded)
    _take_out(folded, calls)
    error = None if inputs is None else _check(model, result, inputs, tolerance)
    report = Folding("fold", sites.possible, sites.left, layers, before, nonzeros(result.parameters()), error)
    vars(result)["_changes"] = (*s.changes(result), report)
    return result


def nonzeros(tensors: Iterable[torch.Tensor]) -> int:
    """How many numbers in these tensors are not zero; of those that have values (lazy and meta tensors have none)."""
    return sum(
        int(torch.count_nonzero(tensor)) for tensor in tensors if not (is_lazy(tensor) or tensor.is_meta)
    )


# ---------------------------------------------------------------------------------------------------- what to fold


@dataclass
class _Unit:
    """A layer with the normalisation and the skip that follow it wherever it is called.

    `left` says why nothing of it is folded, `skip_left` why its skip stays although its normalisation is folded.
    """

    scope: str
    name: str
    layer: Any
    norm: Any = None
    skip: Any = None
    left: str | None = None
    skip_left: str | None = None

    @property
    def merges_skip(self) -> bool:
        return self.skip is not None and self.skip_left is None

    def site(self) -> s.Site:
        return s.Site(
            self.scope, self.name, "folded" if self.left is None else "kept", "unit", left=self.left
        )

    def sites(self) -> Iterator[s.Site]:
        yield self.site()
        if self.left is None and self.skip_left is not None:
            yield s.Site(self.scope, f"{self.name}.skip", "kept", "unit", left=self.skip_left)


@dataclass
class _Calls:
    """Every call in the forwards that can be read, what they read without calling, and what others may call."""

    of: dict[int, list[tuple[nn.Module, fx.Node]]] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)
    unread: dict[int, str] = field(default_factory=dict)
    traces: list[tuple[nn.Module, Trace]] = field(default_factory=list)


def _read_calls(model: nn.Module) -> _Calls:
    calls, scopes = _Calls(), Scopes()
    for module in model.modules():
        if (
            isinstance(module, Skip)
            or not is_scope(module)
            or not any(isinstance(child, _LAYERS) for child in module.modules())
        ):
            continue
        try:
            trace = scopes.trace(module)
        except Untraceable as reason:
            for child in _within_reach(module, scopes.names(module)):
                calls.unread[id(child)] = str(reason)
            continue
        calls.traces.append((module, trace))
        for node in (node for case in trace.cases for node in case.graph.nodes):
            if node.op == "call_module":
                calls.of.setdefault(id(called(node, module)), []).append((module, node))
            elif node.op == "get_attr":
                owner, _, _ = str(node.target).rpartition(".")
                calls.read.add(id(module.get_submodule(owner)))
    return calls


def _within_reach(module: nn.Module, names: Set[str]) -> Iterator[nn.Module]:
    """What a forward that cannot be read may call: its children, and the layers of containers that it takes apart."""
    for child in module.children():
        yield child
        listed = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if listed or (isinstance(child, nn.Sequential) and {SLICES, LOOPS} & names):
            yield from _within_reach(child, names)


def _find_units(model: nn.Module, calls: _Calls) -> list[_Unit]:
    """Convolutions that a normalisation or a skip follows, or that a forward which cannot be read may call; and linear
    layers that a skip follows."""
    units = []
    added = set(added_modules(model))
    for path, module in model.named_modules():
        if not isinstance(module, _LAYERS) or module in added:
            continue
        scope, _, name = path.rpartition(".")
        unit = _Unit(scope, name, module)
        _follow(unit, calls)
        is_conv = isinstance(module, nn.modules.conv._ConvNd)
        if unit.skip is not None or (is_conv and (unit.norm is not None or id(module) in calls.unread)):
            units.append(unit)
    return units


def _follow(unit: _Unit, calls: _Calls) -> None:
    """Fill in what follows the layer, or the reason why nothing of it can be folded."""
    found = [_followers(module, node) for module, node in calls.of.get(id(unit.layer), [])]
    for norm, skip, _ in found:
        unit.norm, unit.skip = unit.norm or norm, unit.skip or skip
    if any(each[:2] != (unit.norm, unit.skip) for each in found):
        unit.left = "it is called in several places, and not followed by the same layers"
    elif any(overwritten for _, _, overwritten in found):
        unit.left = "a tensor is overwritten between its layers"
    else:
        unit.left = _why_not(unit, calls)
    if unit.skip is not None:
        unit.skip_left = _why_not_skip(unit.layer, unit.skip)
        if unit.norm is None:
            unit.left = unit.left or unit.skip_left


def _followers(module: nn.Module, node: fx.Node) -> tuple[nn.Module | None, Skip | None, bool]:
    """The normalisation and the skip after one call, and whether a tensor is overwritten on the way."""
    norm, skip, last = None, None, node
    after = _only_user(last, module)
    if after is not None and _is_norm(after[1]) and len(after[0].args) == 1:
        last, norm = after
        after = _only_user(last, module)
    if after is not None and isinstance(after[1], Skip) and after[0].args == (first_input(node), last):
        last, skip = after
    overwritten, step = False, node
    while step is not last:
        step = step.next
        overwritten = overwritten or (step is not last and mutates(step, module))
    return norm, skip, overwritten


def _only_user(node: fx.Node, module: nn.Module) -> tuple[fx.Node, Any] | None:
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return (user, called(user, module)) if user.op == "call_module" else None


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) or "Norm" in type(module).__name__


def _why_not(unit: _Unit, calls: _Calls) -> str | None:
    layer, norm = unit.layer, unit.norm
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: run a batch through the model first"
    if type(layer).forward not in _FORWARDS:
        transposed = getattr(layer, "transposed", False)
        return (
            "it is a transposed convolution"
            if transposed
            else f"{type(layer).__name__} has a forward of its own"
        )
    if layer.weight.is_meta:
        return "it is on the meta device and has no values"
    if any(not isinstance(hook, torch_prune.BasePruningMethod) for hook in _hooks(layer)):
        return "it has hooks, which may change what it computes"
    for each in filter(None, (layer, norm)):
        if id(each) in calls.unread:
            return calls.unread[id(each)]
        if id(each) in calls.read:
            return f"a forward reads what its {type(each).__name__} holds"
    if norm is None:
        return None
    if any(_hooks(norm)):
        return "its normalisation has hooks, which may change what it computes"
    if isinstance(layer, nn.Linear):
        return "normalisation after a linear layer is not folded"
    return _why_no_affine(norm)


def _why_no_affine(norm: nn.Module) -> str | None:
    """Why a normalisation is no affine map of each channel, the same for every input."""
    if type(norm).forward not in _NORM_FORWARDS:
        return f"{type(norm).__name__} is no BatchNorm, whose statistics do not depend on the input"
    if norm.running_mean is None:
        return f"its {type(norm).__name__} keeps no running statistics"
    return None


def _why_not_skip(layer: Any, skip: Skip) -> str | None:
    if any(hook for each in skip.modules() for hook in _hooks(each)):
        return "its skip has hooks, which may change what it computes"
    if _strength(skip) == 0:
        return None
    if skip.norm is not None and (reason := _why_no_affine(skip.norm)):
        return f"in its skip, {reason}"
    if _central_tap(layer) is None:
        return "its kernel has no tap at the position that its skip reads"
    if _within_groups(_matrix(skip), getattr(layer, "groups", 1)) is None:
        return "its skip crosses the groups of its convolution"
    return None


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _settle(units: list[_Unit], calls: _Calls) -> None:
    """Leave units whose normalisation or skip is also called where it is not folded, until none is left to leave."""
    while True:
        going = [unit for unit in units if unit.left is None]
        places: dict[int, int] = {}
        for unit in going:
            for part in filter(None, (unit.norm, unit.skip)):
                places[id(part)] = places.get(id(part), 0) + len(calls.of[id(unit.layer)])
        shared = [
            unit
            for unit in going
            if any(
                len(calls.of[id(part)]) != places[id(part)] for part in filter(None, (unit.norm, unit.skip))
            )
        ]
        if not shared:
            return
        for unit in shared:
            unit.left = "its normalisation or its skip is also called elsewhere"


# ----------------------------------------------------------------------------------------------------- the algebra


def _affine(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm in eval mode as a scale and a shift per channel."""
    mean, variance = _exact(norm.running_mean), _exact(norm.running_var)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * _exact(norm.weight)
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + _exact(norm.bias)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _strength(skip: Skip) -> float:
    return skip.strength.item() if isinstance(skip.strength, torch.Tensor) else skip.strength


def _matrix(skip: Skip) -> torch.Tensor:
    """What a skip does to the channels, before its BatchNorm, as outputs by inputs."""
    if skip.projection is not None:
        return _exact(skip.projection.weight).flatten(1)
    inputs, outputs = skip.geometry.in_channels, skip.geometry.out_channels
    if outputs >= inputs:
        return torch.eye(outputs, inputs, dtype=torch.float64)
    return F.adaptive_avg_pool1d(torch.eye(inputs, dtype=torch.float64), outputs).T


def _within_groups(matrix: torch.Tensor, groups: int) -> torch.Tensor | None:
    """A matrix of channels in the form of a grouped convolution's weight; None if it crosses the groups."""
    outputs, inputs = matrix.shape
    blocks = matrix.reshape(groups, outputs // groups, groups, inputs // groups)
    own = torch.stack([blocks[group, :, group] for group in range(groups)])
    if torch.count_nonzero(own) != torch.count_nonzero(matrix):
        return None
    return own.reshape(outputs, inputs // groups)


def _central_tap(layer: Any) -> tuple[int, ...] | None:
    """The index of the kernel's tap on the position that the skip reads, in every spatial dimension."""
    if isinstance(layer, nn.Linear):
        return ()
    tap = []
    for dilation, kernel in zip(layer.dilation, layer.kernel_size):
        centre = dilation * (kernel - 1) // 2
        if centre % dilation:
            return None
        tap.append(centre // dilation)
    return tuple(tap)


@torch.no_grad()
def _merge(unit: _Unit) -> FoldedLayer:
    """Give the layer the weights and the bias of the whole unit."""
    layer = unit.layer
    mask = _unwrap(layer)
    weight, bias = _exact(layer.weight), None if layer.bias is None else _exact(layer.bias)
    own, of_skip = nonzeros([weight]), 0
    if unit.norm is not None:
        scale, shift = _affine(unit.norm)
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        bias = shift if bias is None else bias * scale + shift
    if unit.merges_skip and _strength(unit.skip) != 0:
        skip, strength = unit.skip, _strength(unit.skip)
        of_skip = 0 if skip.projection is None else nonzeros([skip.projection.weight])
        matrix = strength * _matrix(skip)
        if skip.norm is not None:
            scale, shift = _affine(skip.norm)
            matrix = scale[:, None] * matrix
            bias = strength * shift + (0 if bias is None else bias)
        filled = _within_groups(matrix, getattr(layer, "groups", 1))
        tap: Any = (slice(None), slice(None), *(_central_tap(layer) or ()))
        assert filled is not None
        weight = weight.clone(memory_format=torch.preserve_format)
        weight[tap] += filled
        if mask is not None:
            mask[tap] |= (filled != 0).to(mask.device)
    layer.weight = _like(layer.weight, weight)
    if bias is not None:
        layer.bias = _like(layer.weight if layer.bias is None else layer.bias, bias)
    first = {name: layer._parameters.pop(name) for name in ("weight", "bias")}
    layer._parameters.update(first | {name: layer._parameters.pop(name) for name in list(layer._parameters)})
    if mask is not None:
        layer.register_buffer("weight_mask", mask)
    return FoldedLayer(unit.site().path, own, of_skip, nonzeros([layer.weight]))


def _like(old: torch.Tensor, values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(old.device, old.dtype), requires_grad=old.requires_grad)


def _unwrap(layer: Any) -> torch.Tensor | None:
    """Make the layer's weights ordinary ones, whatever computes them; its mask, True = kept, if it has one."""
    mask = find_masks(layer).get("weight")
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, torch_prune.BasePruningMethod):
            torch_prune.remove(layer, hook._tensor_name)
    if parametrize.is_parametrized(layer):
        _unparametrize(layer)
    for name in ("weight_mask", "bias_mask"):
        layer._buffers.pop(name, None)  # folded biases are dense
    return mask


def _unparametrize(layer: Any) -> None:
    """Keep the values and drop what computes them.

    Torch's own `remove_parametrizations` takes the properties off the layer's class, which the given model shares.
    """
    values = {name: getattr(layer, name).detach() for name in layer.parametrizations}
    trained = any(parameter.requires_grad for parameter in layer.parametrizations.parameters())
    layer.__class__ = type(layer).__bases__[0]
    del layer._modules["parametrizations"]
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value.clone(), requires_grad=trained))


# ------------------------------------------------------------------------------------------------------ the surgery


def _take_out(folded: list[_Unit], calls: _Calls) -> None:
    """Remove what was merged: normalisations become identities, skips and the calls of them go."""
    gone = {id(unit.skip) for unit in folded if unit.merges_skip}
    for module, trace in calls.traces:
        skips = {
            str(node.target): id(called(node, module)) in gone
            for case in trace.cases
            for node in case.graph.nodes
            if node.op == "call_module" and isinstance(called(node, module), Skip)
        }
        if any(skips.values()):
            _stop_calling(
                module, trace, frozenset(name for name, folds in skips.items() if folds), all(skips.values())
            )
    for unit in folded:
        if unit.merges_skip:
            unit.layer._modules.pop("skip", None)
        if isinstance(unit.norm, nn.modules.batchnorm._NormBase):
            become(unit.norm, nn.Identity())


def _stop_calling(module: nn.Module, trace: Trace, names: frozenset[str], all_of_them: bool) -> None:
    others = tuple(each for each in edits_of(module) if not (all_of_them and each in ("skip", SKIP_EDIT)))
    if isinstance(module, Rewritten) and not others:
        module.__class__ = original_class(module)  # type: ignore[assignment]
        return

    def edit(graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "call_module" and str(node.target) in names:
                node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
                graph.erase_node(node)

    rewrite(module, trace, ("fold", names), edit, edits=others)


# -------------------------------------------------------------------------------------------------------- the check


def _check(model: nn.Module, folded: nn.Module, inputs: Any, tolerance: float | None) -> float:
    """The largest difference of an output, relative to the largest output of the model in eval mode.

    Raises:
        SurgeryError: if that is more than the tolerance.
    """
    largest = 0.0
    for expected, found in zip(_outputs(model, inputs), _outputs(folded, inputs), strict=True):
        error = _distance(expected, found)
        allowed = TOLERANCES.get(expected.dtype, 0.0) if tolerance is None else tolerance
        if not error <= allowed:
            raise SurgeryError(
                f"the folded model differs from the model by {error:.2g} of its largest output, more than {allowed:g}: "
                "leave out with where= what computes differently when it is called otherwise than in a forward"
            )
        largest = max(largest, error)
    return largest


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """All tensors that a copy of the model gives in eval mode."""
    runner = copy_model(model).eval()
    with torch.no_grad(), rng_restored(model):  # so that both models draw the same numbers, if they draw any
        outputs = call(runner, inputs)
    return [each for each in pytree.tree_leaves(outputs) if isinstance(each, torch.Tensor)]


def _distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    if expected.shape != found.shape or expected.numel() == 0:
        return 0.0 if expected.shape == found.shape else float("inf")
    a, b = _exact(expected), _exact(found)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[a.isfinite()], b[b.isfinite()]
    gap = float((a - b).abs().max()) if a.numel() else 0.0
    return gap / (float(a.abs().max()) or 1.0) if a.numel() else 0.0
