"""Pruning: scores say which weights matter, budgets say how many each layer keeps, a selection keeps the best.

The three are separate on purpose. A new criterion is a new function to scores, a new allocation a new
function to budgets, and every pair of them goes together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from sparsetweaks.copying import check_model
from sparsetweaks.masks import apply_masks, masks_by_parameter
from sparsetweaks.probing import Loss, Pair
from sparsetweaks.prunable import Selection, prunable_weights
from sparsetweaks.scores import SYNFLOW_STEPS, SynFlow, grasp_scores, snip_scores
from sparsetweaks.selection import count_kept, keep_highest_globally, keep_highest_per_layer

Model = TypeVar("Model", bound=nn.Module)

Method = Literal["magnitude", "random", "snip", "grasp", "synflow"]
Scope = Literal["global", "layer", "erk"]
Of = Literal["all", "remaining"]


def prune(
    model: Model,
    sparsity: float,
    *,
    method: Method = "magnitude",
    scope: Scope = "global",
    of: Of = "all",
    layers: Iterable[str] | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    generator: torch.Generator | None = None,
    batch: Pair | Iterable[Pair] | None = None,
    loss: Loss | None = None,
) -> Model:
    """Return a copy of `model` with its least important weights pruned (paper, section 3).

    What is pruned already stays pruned: masks only shrink. The count is exact, also where scores are equal:
    then the weight that comes first goes first. Nothing keeps a layer from being pruned completely (layer
    collapse, the nearer the sparsity is to 1); `sparsity(model)` shows it.

    One level of iterative magnitude pruning is `prune(trained, 0.2, of="remaining")` and `rewind`.

    Args:
        model: any module, masked or not. It is not changed.
        sparsity: the fraction to remove, in [0, 1): of all prunable weights or, with `of="remaining"`, of
            those that are left. The number removed is rounded to the nearest whole weight.
        method: what makes a weight unimportant: `"magnitude"`, a small absolute value (the default, the
            paper's); `"random"`, a draw from `generator`; or, of an untrained network and a `batch`, `"snip"`,
            little effect on the loss, `"grasp"`, little gain for the gradient's flow, and `"synflow"`, little
            flow from input to output, in 100 steps (`snip_scores`, `grasp_scores` and `SynFlow` in
            `sparsetweaks.scores` say which papers and how).
        scope: how many weights each layer keeps: `"global"`, as the scores of all layers together decide (the
            default, the paper's); `"layer"`, the same fraction in each; `"erk"`, densities proportional to
            the sum of a weight's dimensions over their product (Erdos-Renyi-Kernel: Evci et al., RigL, arXiv
            1911.11134), but no more than a layer has left.
        of: what `sparsity` is a fraction of, `"all"` (the default) or `"remaining"` (20 % per level in the
            paper).
        layers, include, exclude: which weights are prunable, as in `prunable_weights`; by default
            convolutions.
        generator: for `method="random"`, which needs one. Other methods make no use of it.
        batch: for `"snip"`, `"grasp"` and `"synflow"`, which need it: one pair (inputs, targets), or an iterable
            of them that ends, over all of which the scores are summed. `"synflow"` takes the inputs' shape alone.
        loss: for `"snip"` and `"grasp"`: maps (what the model returned, targets) to a scalar, a mean over the
            samples; cross entropy if None.

    Returns:
        A new model with a bool buffer `<parameter>_mask` beside each prunable weight. Masks that were there
        in another form (`torch.nn.utils.prune`, a mask parametrization) are kept in it.

    Raises:
        TypeError: what is given is no module.
        ValueError: sparsity outside [0, 1) or no number, or less than is pruned already; an unknown method, scope or `of`;
            random without a generator, snip, grasp or synflow without a batch, or with one that does not fit; a
            score that is NaN; nothing to prune, or a wrong selection.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
        >>> half = prune(layer, 0.5)
        >>> half.weight.data
        tensor([[ 3., 0., 0., -4.]])
        >>> prune(half, 0.5, of="remaining").weight_mask
        tensor([[False, False, False, True]])
    """
    check_model(model)
    _check_choice("method", method, get_args(Method))
    _check_choice("scope", scope, get_args(Scope))
    _check_choice("of", of, get_args(Of))
    sparsity = _fraction(sparsity)
    weights = prunable_weights(model, layers=layers, include=include, exclude=exclude)
    already = masks_by_parameter(model)
    masks = {name: already.get(w, torch.ones_like(w, dtype=torch.bool)) for name, w in weights.items()}

    left = {name: count_kept(mask) for name, mask in masks.items()}
    sizes = {name: mask.numel() for name, mask in masks.items()}
    if scope == "layer":
        budgets = {name: _after_removal(sizes[name], left[name], sparsity, of, repr(name)) for name in masks}
    else:
        kept = _after_removal(sum(sizes.values()), sum(left.values()), sparsity, of, "the model")
        budgets = erk_budgets(masks, kept) if scope == "erk" else {}

    absolute = method == "magnitude"  # ranked by absolute value, without a copy of them
    score = _scorer(method, model, weights, batch, loss, generator)
    steps = SYNFLOW_STEPS if method == "synflow" else 1
    for step in range(1, steps + 1):
        scores = score(masks)
        if scope == "global":
            count = _after(step / steps, sum(left.values()), kept)
            masks = keep_highest_globally(scores, masks, count, absolute=absolute)
        else:
            counts = {name: _after(step / steps, left[name], budget) for name, budget in budgets.items()}
            masks = keep_highest_per_layer(scores, masks, counts, absolute=absolute)
    return apply_masks(model, masks)


def _scorer(
    method: Method,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batch: Pair | Iterable[Pair] | None,
    loss: Loss | None,
    generator: torch.Generator | None,
) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function that scores the weights beneath the masks of a step; what needs no steps is not asked twice."""
    if method == "magnitude":
        return lambda _: {name: weight.detach() for name, weight in weights.items()}
    if method == "random":
        return lambda _: random_scores(weights, generator)
    if batch is None:
        raise ValueError(f"method={method!r} scores on data: give batch=(inputs, targets)")
    if method == "snip":
        return lambda _: snip_scores(model, weights, batch, loss)
    if method == "grasp":
        return lambda _: grasp_scores(model, weights, batch, loss)
    return SynFlow(model, weights, batch).scores


def _after(share: float, start: int, end: int) -> int:
    """How many are left of `start` after a share of the way to `end`, each step by the same ratio."""
    return end if share == 1 else round(start * (end / start) ** share) if start else 0


# ------------------------------------------------------------------------------------------------------------
# Scores: a tensor per weight, higher = more important


def random_scores(weights: Mapping[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
    """Score each weight by a uniform draw, in float64 so that equal draws are all but impossible."""
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            "method='random' needs generator=torch.Generator().manual_seed(a seed of yours), "
            f"got {generator!r:.80}"
        )
    return {
        name: torch.rand(weight.shape, generator=generator, device=generator.device, dtype=torch.float64)
        for name, weight in weights.items()
    }


# ------------------------------------------------------------------------------------------------------------
# Budgets: how many weights to keep


def _after_removal(total: int, left: int, sparsity: float, of: Of, where: str) -> int:
    """How many weights a fraction leaves, of `total` of which `left` are left."""
    if of == "remaining":
        return left - round(sparsity * left)
    kept = total - round(sparsity * total)
    if kept > left:
        raise ValueError(
            f"sparsity {sparsity} is less than what is pruned of {where} already, {1 - left / total:.4f}: "
            'ask for more, or for a fraction of what remains with of="remaining"'
        )
    return kept


def erk_budgets(masks: Mapping[str, Tensor], kept: int) -> dict[str, int]:
    """Share out `kept` weights in proportion to the sum of dimensions, to none more than its mask keeps.

    A density of (sum of dimensions) / (product of dimensions) times the number of weights is the sum of the
    dimensions. Layers that would get more than they have are filled, and the rest is shared out again.
    Fractions are rounded by largest remainders, so that the budgets sum to `kept`.
    """
    left = {name: count_kept(mask) for name, mask in masks.items()}
    dimensions = {name: sum(mask.shape) for name, mask in masks.items()}
    assert 0 <= kept <= sum(left.values())
    budgets: dict[str, int] = {}
    open_names = list(masks)
    while True:
        rest = kept - sum(budgets.values())
        unit = sum(dimensions[name] for name in open_names)
        full = [name for name in open_names if rest * dimensions[name] >= left[name] * unit]
        if not full:
            break
        budgets |= {name: left[name] for name in full}
        open_names = [name for name in open_names if name not in budgets]
    shares = {name: divmod(rest * dimensions[name], unit) for name in open_names}
    budgets |= {name: share for name, (share, _) in shares.items()}
    short = kept - sum(budgets.values())
    for name in sorted(open_names, key=lambda name: -shares[name][1])[:short]:
        budgets[name] += 1
    return {name: budgets[name] for name in masks}


def _fraction(sparsity: Any) -> float:
    """The sparsity as a number, also of a tensor that holds a single one."""
    try:
        fraction = math.nan if isinstance(sparsity, str) else float(sparsity)
    except (TypeError, ValueError, RuntimeError):
        fraction = math.nan
    if not 0 <= fraction < 1:
        raise ValueError(f"sparsity is the fraction to remove, a number in [0, 1); got {sparsity!r:.80}")
    return fraction


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {argument} {value!r}: choose from {', '.join(map(repr, choices))}")
