"""Fold normalisation and skips into the layers they belong to: an inference network without extra layers.

`foldable` says what may be merged into what, `affine` what comes of it; here it is done, and checked.
"""

from __future__ import annotations

import collections
import numbers
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils import _pytree as pytree

from sparsetweaks.calling import call, tensors
from sparsetweaks.copying import Model, copy_model
from sparsetweaks.errors import NoEffectWarning, SurgeryError
from sparsetweaks.masks import find_masks, masks_by_parameter
from sparsetweaks.probing import rng_restored
from sparsetweaks.surgery import sites as s
from sparsetweaks.surgery.activations import become
from sparsetweaks.surgery.affine import exact, merged, value_of
from sparsetweaks.surgery.dataflow import called
from sparsetweaks.surgery.foldable import Calls, Unit, find_units, read_calls, settle
from sparsetweaks.surgery.ghosts import SKIP_EDIT
from sparsetweaks.surgery.programs import Rewritten, Trace, edits_of, original_class, rewrite
from sparsetweaks.surgery.skips import Skip

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""How far outputs may be apart, relative to the largest number in them: some thousand roundings, in half precision some
ten, twice as far as those of a ResNet-152 without training are in bfloat16."""


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
    """Merge each convolution or linear layer with its BatchNorm and its skip into one layer, for inference.

    Skips of every kind are merged at the strength that they have: identity, subsampling with padded or averaged
    channels, 1x1 projections, with a BatchNorm of their own or not; 1d, 2d and 3d, any stride, dilation, padding and
    kernel, groups as long as the skip stays within them; and parameter-free skips around linear layers. BatchNorms are
    merged where there is no skip too, also into transposed convolutions, and through dropout and `nn.Identity`. Of a
    BatchNorm that does more, such as timm's `BatchNormAct2d`, the normalisation is merged.

    What a skip costs in non-zeros: an identity fills the diagonal of the kernel's central tap, 1 of 9C weights of a
    3x3 kernel with C channels; a dense projection fills the whole central tap, 1 of 9. Folding adds that to a sparse
    kernel: see the report, and prune back to your budget if that is too much.

    Args:
        model: any module, with skips or not, masked or not, in any mask form. Its statistics should be trained. Its
            layers are taken to work on batches, and a linear layer before a BatchNorm on inputs of shape (N, C): on
            (N, L, C) that BatchNorm would normalise positions, which is seen where L is not C, or with `inputs`.
        inputs: what one call of the model takes, without labels: a tensor, a tuple of positional or a mapping of keyword
            arguments, to check that the folded model agrees; None checks nothing.
        where: glob pattern(s) on the path of a layer (or of a BatchNorm that follows none), or a predicate on a
            `Site`; default: everything.
        tolerance: largest difference of an output relative to the largest number in it that agrees, at least 0; only
            with `inputs`. Default: by the coarsest dtype of the output and the parameters, 1e-10 in float64, 1e-4 in
            float32, 1e-2 in float16, 1e-1 in bfloat16. Outputs of whole numbers must be equal.

    Returns:
        A new model in eval mode, which computes what `model` computes in eval mode; `model` is left untouched. Folded
        layers have the class, names, dtype and `requires_grad` that they had, with a bias; their BatchNorms are
        `nn.Identity`, or an `nn.Sequential` of the children that they called after normalising; their skips are gone, and
        with them the rewritten forwards. Masks are ordinary weights and bool buffers `<parameter>_mask`, which now keep
        what the skip filled too. `changes(result)[-1]` names the layers that took something in, with their non-zeros
        before and after, and every BatchNorm and skip that stays and why: among the reasons is that the folded numbers
        would not be finite in the layer's dtype.

    Raises:
        ValueError: for a pattern that matches nothing, or a tolerance below 0 or without inputs.
        SurgeryError: if the outputs for `inputs` do not agree, or the model fails on them; or if the model is wrapped in
            DistributedDataParallel: give `model.module`.

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
    number = isinstance(tolerance, numbers.Real) and float(tolerance) >= 0
    if tolerance is not None and (inputs is None or not number):
        raise ValueError(f"tolerance is at least 0 and for the check with inputs=; got {tolerance!r}")
    result = copy_model(model)
    s.refuse_wrapped(result)
    result.eval()
    before = _nonzeros_of(result)
    calls = read_calls(result)
    units = find_units(result, calls)
    chosen = frozenset(s.select(s.Sites(unit.site() for unit in units), where))
    units = [unit for unit in units if unit.site() in chosen]
    settle(units, calls)
    folded = [unit for unit in units if unit.merged]
    left = s.Sites({site.path: site for unit in units for site in unit.left_sites()}.values())
    if not folded:
        first = f"; the first: {left[0]}" if left else ""
        text = f"the model has nothing that can be folded ({len(units)} chosen): nothing was merged{first}"
        warnings.warn(text, NoEffectWarning, stacklevel=2)
    layers = tuple(_merge(unit) for unit in folded)
    _take_out(result, folded, calls)
    error = None if inputs is None else _check(model, result, inputs, tolerance)
    done = s.Sites(unit.site() for unit in folded)
    report = Folding("fold", done, left, layers, before, _nonzeros_of(result), error)
    vars(result)["_changes"] = (*s.changes(result), report)
    return result


def _nonzeros_of(model: nn.Module) -> int:
    """Of all parameters, without what masks remove."""
    masks = masks_by_parameter(model)
    return nonzeros(p[masks[p]] if p in masks and not p.is_meta else p for p in model.parameters())


def nonzeros(tensors: Iterable[torch.Tensor]) -> int:
    """How many numbers in these tensors are not zero; of those that have values (lazy and meta tensors have none)."""
    return sum(
        int(torch.count_nonzero(tensor)) for tensor in tensors if not (is_lazy(tensor) or tensor.is_meta)
    )


# ------------------------------------------------------------------------------------------------------ the surgery


@torch.no_grad()
def _merge(unit: Unit) -> FoldedLayer:
    """Give the layer the weights and the bias of the whole unit."""
    layer = unit.layer
    whole = merged(layer, unit.modules())
    skips = [part for part in unit.modules() if isinstance(part, Skip) and part.projection is not None]
    mask = _unwrap(layer)
    own = nonzeros([layer.weight])
    layer.weight = _like(layer.weight, whole.weight)
    if whole.bias is not None:
        layer.bias = _like(layer.weight if layer.bias is None else layer.bias, whole.bias)
    first = {name: layer._parameters.pop(name) for name in ("weight", "bias")}
    layer._parameters.update(first | {name: layer._parameters.pop(name) for name in list(layer._parameters)})
    if mask is not None:
        layer.register_buffer("weight_mask", mask | whole.filled.to(mask.device))
    of_skips = nonzeros(value_of(skip.projection, "weight") for skip in skips)
    return FoldedLayer(unit.path, own, of_skips, nonzeros([layer.weight]))


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


def _take_out(model: nn.Module, folded: list[Unit], calls: Calls) -> None:
    """Remove what was merged: normalisations become identities, skips and the calls of them go."""
    merged = {id(part): part for unit in folded for part in unit.modules()}
    for module, trace in calls.traces:
        skips = {
            str(node.target): id(called(node, module)) in merged
            for case in trace.cases
            for node in case.graph.nodes
            if node.op == "call_module" and isinstance(called(node, module), Skip)
        }
        if any(skips.values()):
            _stop_calling(
                module, trace, frozenset(name for name, folds in skips.items() if folds), all(skips.values())
            )
    for owner in list(model.modules()):
        for name, child in list(owner._modules.items()):
            if isinstance(child, Skip) and id(child) in merged:
                del owner._modules[name]
    for part in merged.values():
        if not isinstance(part, Skip):
            after = calls.after.get(id(part))
            become(part, nn.Sequential(collections.OrderedDict(after)) if after else nn.Identity())


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
    """The largest difference of an output, relative to the largest number in it in eval mode.

    Raises:
        SurgeryError: if that is more than the tolerance.
    """
    expected, found = _outputs(model, inputs), _outputs(folded, inputs)
    if [each.shape for each in expected] != [each.shape for each in found]:
        raise SurgeryError(f"the outputs of the folded model have other shapes or another number. {_ADVICE}")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    errors = [0.0]
    for number, (one, other) in enumerate(zip(expected, found)):
        error = _distance(one, other)
        allowed = _allowed(one.dtype, dtypes) if tolerance is None else tolerance
        if not error <= allowed:
            what = f"by {error:.2g} of its largest number, more than {allowed:g}"
            if error == float("inf"):
                what = "in where it is finite"
            raise SurgeryError(f"output {number} of the folded model, {one.dtype}, differs {what}. {_ADVICE}")
        errors.append(error)
    return max(errors)


_ADVICE = (
    "Leave out with where= what computes differently when it is called otherwise than in a forward; if rounding alone may "
    "be the cause, give tolerance=, or fold a copy of the model in float32 and convert the result"
)


def _allowed(output: torch.dtype, parameters: set[torch.dtype]) -> float:
    """The tolerance of the coarsest dtype that an output has gone through; whole numbers have none."""
    if not (output.is_floating_point or output.is_complex):
        return 0.0
    real = [dtype.to_real() if dtype.is_complex else dtype for dtype in (output, *parameters)]
    return max(TOLERANCES.get(dtype, 0.0) for dtype in real)


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """All tensors that a copy of the model gives in eval mode."""
    runner = copy_model(model).eval()
    with torch.no_grad(), rng_restored(model):  # so that both models draw the same numbers, if they draw any
        outputs = call(runner, inputs)
    found = [each for leaf in pytree.tree_leaves(outputs) for each in tensors(leaf)]
    if not found:
        kind = type(outputs).__name__
        raise SurgeryError(f"the model puts out no tensor to compare, but a {kind}: leave out inputs=")
    return found


def _distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Relative to the largest finite number; infinite if others are finite in the one than in the other."""
    a, b = exact(expected), exact(found)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = a[finite], b[finite]
    return float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)
