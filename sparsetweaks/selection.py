"""Keep the best: from scores to masks, exact in number, fast and lean, on any device.

The score that parts the kept from the pruned is a quantile of all scores together. A sort, or the k-th value of all,
would take many times the memory of the weights and most of the time. Here a random sample brackets the quantile between
two values that are close (Floyd and Rivest, Expected time bounds for selection, 1975). One pass over the scores marks
and counts those above the bracket, and collects the one or two in a hundred within it. Among these the exact one is
found, and those below it lose their marks. Should the sample mislead, the bracket is widened and the pass made again:
luck decides the time, never the result. The pass goes piece by piece, each small enough for a CPU's cache, and no copy
of the scores is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

_PIECE = 1 << 18  # a megabyte of float32: it and what is computed of it stay in the cache, and calls are few
_ACCELERATOR_PIECE = 1 << 21  # fills a GPU; and as many ones add up exactly in float32
_SAMPLE = 1 << 15
_SAMPLED = (
    1 << 24
)  # so many scores are sampled by `_SAMPLE`; more by a sample that grows with their power of 2/3
_WORD = 8  # bools that are looked at together
_ALL_KEPT = 0x0101010101010101  # a word of eight True
_MARGINS = (3.5, 14.0, 56.0, math.inf)  # of the bracket, in standard deviations of a rank in the sample


def keep_highest_globally(
    scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], kept: int, *, absolute: bool = False
) -> dict[str, Tensor]:
    """Keep the `kept` highest scores of all layers together, among what the masks keep.

    Args:
        scores: a tensor per weight, of any floating dtype (with `absolute` also complex) and on any device; higher is
            better. They are compared by value, also where their precisions differ.
        masks: a bool mask per weight, True = kept so far, on the device where the new mask is wanted.
        kept: how many to keep, no more than are kept so far.
        absolute: rank by absolute value, without a copy of the scores unless they are complex.

    Returns:
        New masks that keep `kept` in all. Of equal scores the earlier go first: by the order of the layers, then by
        the weight's indices, whatever its memory format.

    Raises:
        ValueError: a score that is to be ranked is NaN.
    """
    if absolute:  # of complex weights the magnitudes, which only their absolute value orders
        scores = {name: score.abs() if score.is_complex() else score for name, score in scores.items()}
    exact = torch.float64 if any(s.dtype == torch.float64 for s in scores.values()) else torch.float32
    rooms = _Rooms(exact)
    parts = {name: _Part(name, scores[name], mask, absolute, rooms) for name, mask in masks.items()}
    count = sum(part.left for part in parts.values()) - kept
    assert kept >= 0 and count >= 0
    if count == 0:
        for part in parts.values():
            part.check_order()
        return {name: mask.clone() for name, mask in masks.items()}
    value, drop, ties = _cut(list(parts.values()), count)
    narrowed = {}
    for name, part in parts.items():
        narrowed[name] = part.above(value, ties_too=drop < ties)
        if 0 < drop < ties:
            here = part.drop_first_ties(narrowed[name], value, drop)
            drop, ties = max(drop - here, 0), ties - here
    return narrowed


def keep_highest_per_layer(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    budgets: Mapping[str, int],
    *,
    absolute: bool = False,
) -> dict[str, Tensor]:
    """Keep the `budgets[name]` highest scores of each layer; all else is as in `keep_highest_globally`."""
    narrowed: dict[str, Tensor] = {}
    for name, mask in masks.items():
        narrowed |= keep_highest_globally(
            {name: scores[name]}, {name: mask}, budgets[name], absolute=absolute
        )
    return narrowed


def _cut(parts: Sequence[_Part], count: int) -> tuple[float, int, int]:
    """The `count`-th lowest value; how many of those that equal it are among the `count` lowest; and how many do."""
    total = sum(part.left for part in parts)
    if total <= _SAMPLE:
        sample = torch.empty(0)
    else:
        size = _SAMPLE * max(total / _SAMPLED, 1) ** (
            2 / 3
        )  # drawing it and sifting its bracket cost the same
        sample = torch.cat([part.sample(math.ceil(size * part.left / total)) for part in parts])
    for margin in _MARGINS:
        low, high = _bracket(sample, count / total, margin)
        counts, found = zip(*(part.between(low, high) for part in parts), strict=True)
        above, between = sum(counts), torch.cat(found)
        rank = count - (total - above)  # among those above the low end
        if 1 <= rank <= len(between):
            value = between.kthvalue(rank).values.item()
            return value, rank - int((between < value).sum()), int((between == value).sum())
        if rank < 1:  # the low end itself, or below it
            value, ties = low, sum(part.count_ties(low) for part in parts)
            rank += ties
        else:  # the high end itself, or above it
            value, ties = high, sum(part.count_ties(high) for part in parts) if high > low else 0
            rank -= len(between)
        if 1 <= rank <= ties:
            return value, rank, ties
    raise AssertionError("the widest bracket holds every score")


def _bracket(sample: Tensor, quantile: float, margin: float) -> tuple[float, float]:
    """Values of the sample on both sides of a quantile, `margin` standard deviations of its rank away."""
    size = len(sample)
    reach = margin * math.sqrt(size * quantile * (1 - quantile)) + 1 if size else math.inf
    first, last = quantile * size - reach, quantile * size + reach
    low = sample.kthvalue(math.floor(first)).values.item() if first >= 1 else -math.inf
    high = sample.kthvalue(math.ceil(last)).values.item() if last <= size else math.inf
    return low, high


def _places(where: Tensor) -> Tensor:
    """`where.nonzero()`, in a fraction of its time where few are True: words of eight bools are searched first."""
    end = len(where) // _WORD * _WORD
    words = where[:end].view(torch.int64).nonzero().view(-1)
    rows, columns = where[:end].view(-1, _WORD)[words].nonzero(as_tuple=True)
    places = words[rows] * _WORD + columns
    return places if end == len(where) else torch.cat([places, where[end:].nonzero().view(-1) + end])


def count_kept(mask: Tensor) -> int:
    """`mask.sum()`, in a fraction of its time; and of half of that where all is kept, as words of eight bools tell."""
    if mask.is_contiguous() and mask.numel() and mask.numel() % _WORD == 0:
        words = mask.view(-1).view(torch.int64)
        if int(words.amin()) == _ALL_KEPT:
            return mask.numel()
    return int(torch.count_nonzero(mask))


class _Rooms:
    """Memory for three pieces per device, which all parts take in turn: fresh memory costs as much as a pass over it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._rooms: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device, size: int) -> Tensor:
        room = self._rooms.get(device)
        if room is None or room.shape[1] < size:
            room = self._rooms[device] = torch.empty(3, size, dtype=self.dtype, device=device)
        return room


class _Part:
    """The scores of one weight, to be ranked where its mask keeps them.

    They are passed over in the order in which they lie in memory, which matters to nothing but ties. Comparisons
    give ones and zeros of the values' own type, which takes a fraction of the time of bools.
    """

    def __init__(self, name: str, scores: Tensor, mask: Tensor, absolute: bool, rooms: _Rooms) -> None:
        self._name, self._scores, self._mask = name, scores.detach().to(mask.device), mask
        self._absolute, self._exact = absolute, rooms.dtype
        piece = _PIECE if mask.device.type == "cpu" else _ACCELERATOR_PIECE
        self._piece = min(piece, max(mask.numel(), 1))
        self._rooms = rooms.on(mask.device, self._piece)
        self._order = sorted(range(mask.ndim), key=self._scores.stride, reverse=True)
        self._flat = self._scores.permute(self._order).reshape(-1)
        self.left = count_kept(mask)
        self._above = torch.empty(mask.numel(), dtype=torch.bool, device=mask.device)
        self._flat_mask = None if self.left == mask.numel() else mask.permute(self._order).reshape(-1)

    def check_order(self) -> None:
        """Raise if anything that is ranked is NaN."""
        ranked = (values if kept is None else values[kept] for _, values, kept in self._pieces())
        if any(bool(values.isnan().any()) for values in ranked):
            raise ValueError(
                f"{self._name!r} has scores that are NaN (diverged weights?): there is no order to prune by"
            )

    def sample(self, count: int) -> Tensor:
        """About `count` of what is ranked, drawn at random with repeats, on the CPU."""
        if not self.left:
            return torch.empty(0, dtype=self._exact)
        size = self._flat.numel()
        draws = math.ceil(count * size / self.left)
        places = torch.randint(size, (draws,), generator=torch.Generator().manual_seed(0))
        places = places.to(self._flat.device)
        return self._ranked_at(places if self._flat_mask is None else places[self._flat_mask[places]])

    def between(self, low: float, high: float) -> tuple[int, Tensor]:
        """How many of what is ranked are above `low`, and those of them that are below `high`, on the CPU."""
        count = torch.zeros((), dtype=torch.int64, device=self._mask.device)
        total = torch.zeros((), dtype=self._exact, device=self._mask.device)
        found, places = [], []
        for start, values, kept in self._pieces():
            total += values.sum()
            above = torch.gt(values, low, out=self._rooms[1, : len(values)])
            if kept is not None:
                above.mul_(kept)
            count += above.sum().long()
            marked = self._above[start : start + len(values)].copy_(above)
            below = torch.lt(values, high, out=self._rooms[2, : len(values)])
            here = _places(below.bool().bitwise_and_(marked))
            found.append(values[here])
            places.append(here + start)
        if total.isnan():  # or it adds up infinities of both signs, or adds what the mask prunes
            self.check_order()
        self._bracket, self._found, self._found_at = (low, high), torch.cat(found), torch.cat(places)
        return int(count), self._found.cpu()

    def above(self, value: float, *, ties_too: bool) -> Tensor:
        """The mask of what is ranked and above a value, or at it."""
        if self._bracket[0] < value < self._bracket[1]:  # then it is there already, but for what was between
            below = self._found < value if ties_too else self._found <= value
            self._above[self._found_at[below]] = False
        else:
            for start, values, kept in self._pieces():
                above = values.ge_(value) if ties_too else values.gt_(value)
                self._above[start : start + len(values)].copy_(above if kept is None else above.mul_(kept))
        inverse = sorted(range(self._mask.ndim), key=self._order.__getitem__)
        return self._above.view([self._mask.shape[d] for d in self._order]).permute(inverse)

    def count_ties(self, value: float) -> int:
        """How many of what is ranked equal a value."""
        count = 0
        for _, values, kept in self._pieces():
            ties = values.eq_(value)
            count += int((ties if kept is None else ties.mul_(kept)).sum())
        return count

    def drop_first_ties(self, above: Tensor, value: float, drop: int) -> int:
        """Take from a mask the first `drop` that equal a value, by their indices; how many equal it here."""
        if self._bracket[0] < value < self._bracket[1]:  # then they were found already
            places = self._found_at[self._found == value]
            first = self._indices(places).argsort()[:drop]
            self._above[places[first]] = False
            return len(places)
        found = 0
        dropped = torch.zeros(self._mask.numel(), dtype=torch.bool, device=self._mask.device)
        pieces = (x.reshape(-1).split(self._piece) for x in (self._scores, self._mask, dropped))
        for scores, mask, drops in zip(*pieces, strict=True):
            places = (self._ranked(scores, self._rooms[0]).eq_(value).bool() & mask).nonzero().view(-1)
            drops[places[: max(drop - found, 0)]] = True
            found += len(places)
        above &= ~dropped.view(above.shape)
        return found

    def _indices(self, places: Tensor) -> Tensor:
        """The weight's flat indices of places in memory."""
        shape = [self._mask.shape[dimension] for dimension in self._order]
        steps = [math.prod(self._mask.shape[dimension + 1 :]) for dimension in self._order]
        coordinates = torch.unravel_index(places, shape)
        return sum((c * step for c, step in zip(coordinates, steps, strict=True)), torch.zeros_like(places))

    def _pieces(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Piece by piece: its start; values, in room that the next ones take; the mask, unless it keeps all."""
        masks = itertools.repeat(None) if self._flat_mask is None else self._flat_mask.split(self._piece)
        starts = itertools.count(0, self._piece)
        for start, scores, mask in zip(starts, self._flat.split(self._piece), masks):
            yield start, self._ranked(scores, self._rooms[0]), mask

    def _ranked(self, scores: Tensor, room: Tensor) -> Tensor:
        """Scores as they compare, in the precision of all of them."""
        values = room[: len(scores)]
        if self._absolute and scores.dtype == values.dtype:
            return torch.abs(scores, out=values)
        values.copy_(scores)
        return values.abs_() if self._absolute else values

    def _ranked_at(self, places: Tensor) -> Tensor:
        scores = self._flat[places]
        return self._ranked(scores, torch.empty_like(scores, dtype=self._exact)).cpu()
