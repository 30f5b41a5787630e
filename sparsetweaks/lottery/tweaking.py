"""A ticket with its tweaks: the network that is to be trained, at the ticket's own number of non-zero weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsetweaks.cost import cost
from sparsetweaks.lottery.config import Recipe, RunError, Tweaks
from sparsetweaks.lottery.data import Data, batches
from sparsetweaks.lottery.files import State
from sparsetweaks.lottery.store import Ticket
from sparsetweaks.lottery.train import SEED_STRIDE
from sparsetweaks.masks import apply_masks, find_masks
from sparsetweaks.prunable import added_modules, prunable_weights
from sparsetweaks.pruning import prune
from sparsetweaks.recipe.labels import SoftLabelLoss
from sparsetweaks.recipe.layer_scales import learn_layer_scales
from sparsetweaks.selection import keep_highest_globally
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.skips import inject_skips

SCORED_PER_CLASS = 10  # images that SNIP, GraSP and SynFlow see: as in GraSP's code
Loss = Callable[[Tensor, Tensor], Tensor]


def tweaked(
    ticket: Ticket, tweaks: Tweaks, data: Data, recipe: Recipe, *, seed: int
) -> tuple[nn.Module, Loss, dict[str, int]]:
    """The masked network with its tweaks, and the loss to train it with, at the ticket's own number of non-zeros.

    What a tweak adds, it pays for: for every non-zero that the skips bring, one more of the ticket's least important
    weights is pruned, by what chose its masks. So a variant and the vanilla ticket have the same budget, and a gain is
    one of the tweak, not of its size. Tweaks that are not `matched` pay nothing.

    Args:
        ticket: with its masks; a dense one (level 0) pays nothing.
        tweaks: to make.
        data: to learn the layer scales on.
        recipe: for the size of the batches that the layer scales are learned on, in float32 whatever its precision.
        seed: of those batches.

    Returns:
        The model, on the device of `data`; the loss; and `nonzeros` (surviving weights, of those that are pruned among),
        `added` (what tweaks brought), `budget` (their sum), `parameters` (all there are, normalisation and classifier
        too), `nonzero_parameters` (those that no mask removes), `flops` (of one image), `effective_flops` (the same),
        `peak_activation_bytes` (of one image) and `sparse_file_bytes` (that `export(format="sparse")` would write of it).

    Raises:
        RunError: when the tweaks add as much as survives, or more.
    """
    device = data.mean.device
    model, masks = ticket.unmasked(tweaks.start), ticket.masks
    if tweaks.skips is not None:
        model = inject_skips(model, **tweaks.skips)
        if masks and tweaks.matched and (extra := _added(model)):
            masks = _paying(ticket, extra, data)
    if tweaks.activation is not None:
        model = swap_activations(model, tweaks.activation)
    model.to(device).to(memory_format=torch.channels_last)
    loss: Loss = nn.CrossEntropyLoss()
    if tweaks.smoothing:
        loss = SoftLabelLoss(tweaks.smoothing, tweaks.smoothing_form)

    def scale(model: nn.Module) -> nn.Module:
        """In float32 whatever the training computes in: bfloat16 moves the scales by half of what is learned."""
        return learn_layer_scales(model, _endless(data, recipe, seed), loss=loss, **(tweaks.scales or {}))

    if tweaks.scales is not None and tweaks.scales_on == "dense":
        model = scale(model)
    if masks:
        model = apply_masks(model, masks)
    if tweaks.scales is not None and tweaks.scales_on == "ticket":
        model = scale(model)  # last, as the scales depend on the network that is trained
    return model, loss, _counts(model, data)


def narrowed(ticket: Ticket, data: Data, fraction: float) -> State:
    """A ticket's masks without a fraction of what they keep: the least important, by what chose them.

    Each layer gives as the ticket's scope says: with "layer" the same fraction of its own, rounded.

    Args:
        ticket: whose masks; without any, all its prunable weights.
        data: for methods that score on data.
        fraction: of the remaining weights, in [0, 1).

    Returns:
        The masks.
    """
    if ticket.method in ("none", "imp", "omp", "file"):
        scored = ticket.model("trained" if ticket.trained else "ticket")
        if ticket.masks and ticket.scope == "global":
            return largest(scored, ticket.masks, ticket.nonzeros - round(fraction * ticket.nonzeros))
        masked = list(ticket.masks) or None
        return find_masks(prune(scored, fraction, of="remaining", include=masked, scope=ticket.scope))  # type: ignore[arg-type]
    return pruned_untrained(
        ticket.model(), ticket, data, ticket.method, fraction, of="remaining", scope=ticket.scope
    )


def largest(model: nn.Module, masks: State, kept: int) -> State:
    """Masks of the `kept` largest weights of all that the given masks keep, which may be of any parameters.

    `prune` chooses among convolutions and linear layers alone; masks from elsewhere may be of normalisation too.

    Args:
        model: whose weights are ranked, with or without these masks.
        masks: by the names of the model's parameters.
        kept: how many to keep.

    Returns:
        The masks.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in masks]
    weights = {name: model.get_parameter(name).detach() for name in names}
    return keep_highest_globally(weights, {name: masks[name] for name in names}, kept, absolute=True)


def pruned_untrained(
    model: nn.Module, ticket: Ticket, data: Data, method: str, sparsity: float, **options: Any
) -> State:
    """Masks by one of `prune`'s methods that need no training, on ten training images per class.

    Args:
        model: to prune.
        ticket: for the seed of the choice.
        data: to choose the images from.
        method, sparsity, options: as in `prune`.

    Returns:
        The masks.
    """
    generator = torch.Generator().manual_seed(ticket.seed)
    labels = data.train.labels.cpu()
    order = torch.randperm(len(labels), generator=generator)
    index = torch.cat([order[labels[order] == label][:SCORED_PER_CLASS] for label in labels.unique()])
    part = data.train[index.to(data.train.labels.device)]
    batch = data.normalise(part.images).cpu(), part.labels.cpu()
    pruned = prune(model, sparsity, method=method, batch=batch, generator=generator, **options)  # type: ignore[arg-type]
    return find_masks(pruned)


def _counts(model: nn.Module, data: Data) -> dict[str, int]:
    masks, added = find_masks(model), _added(model)
    weights = (
        masks.values() or prunable_weights(model).values()
    )  # of a dense network, all that pruning would take
    survivors = sum(int(each.count_nonzero()) if masks else each.numel() for each in weights)
    count = cost(model, data.normalise(data.test.images[:1]))
    assert count.sparse_disk_bytes is not None  # as no network here is on the meta device
    return {
        "nonzeros": survivors,
        "added": added,
        "budget": survivors + added,
        "parameters": count.parameters,
        "nonzero_parameters": count.nonzeros,
        "flops": count.flops,
        "effective_flops": count.effective_flops,
        "peak_activation_bytes": count.peak_activation_bytes,
        "sparse_file_bytes": count.sparse_disk_bytes,
    }


def _paying(ticket: Ticket, count: int, data: Data) -> State:
    """The ticket's masks without its `count` least important weights."""
    if count >= ticket.nonzeros:
        raise RunError(
            f"the skips add {count} parameters, and only {ticket.nonzeros} weights survive to pay for them: "
            'choose skips that add fewer, such as shortcut="pad", or compare without matching (+unmatched)'
        )
    if ticket.scope != "layer":
        return narrowed(ticket, data, count / ticket.nonzeros)
    share = _share_of_each([int(mask.sum()) for mask in ticket.masks.values()], count)
    paid = replace(ticket, masks=narrowed(ticket, data, share))
    rest = count - (ticket.nonzeros - paid.nonzeros)  # fewer than layers: what rounding leaves to pay
    if not rest:
        return paid.masks
    return narrowed(replace(paid, scope="global"), data, rest / paid.nonzeros)


def _share_of_each(sizes: Sequence[int], count: int) -> float:
    """The largest fraction of each size, each rounded, that takes no more than `count` in all.

    Example:
        >>> share = _share_of_each([100, 10], 20)
        >>> round(100 * share), round(10 * share)
        (18, 2)
    """
    low, high = 0.0, 1.0
    for _ in range(50):  # of halving: to the last bit that matters
        middle = (low + high) / 2
        taken = sum(round(middle * size) for size in sizes)
        low, high = (middle, high) if taken <= count else (low, middle)
    return low


def _added(model: nn.Module) -> int:
    """How many parameters the tweaks brought, all of them non-zero once trained."""
    found = {parameter for module in added_modules(model) for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in found)


def _endless(data: Data, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Unaugmented batches for as long as they are asked for, of half the size, as two of them make a training step."""
    for epoch in itertools.count():
        generator = torch.Generator(data.mean.device).manual_seed(seed * SEED_STRIDE + epoch)
        yield from batches(data.train, data, size=recipe.batch_size // 2, padding=0, generator=generator)
