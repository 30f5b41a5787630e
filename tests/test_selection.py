"""The selection is a stable sort, in number and in place, whatever the values, layouts, precisions and luck."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsetweaks import selection
from sparsetweaks.selection import keep_highest_globally, keep_highest_per_layer

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INFINITY = math.inf


def by_sorting(
    scores: dict[str, Tensor], masks: dict[str, Tensor], kept: int, absolute: bool
) -> dict[str, Tensor]:
    """The same by a plain stable sort of Python numbers."""
    left = []
    for name, mask in masks.items():
        values = (scores[name].abs() if absolute else scores[name]).double().flatten().tolist()
        left += [(values[i], name, i) for i in mask.flatten().nonzero().flatten().tolist()]
    gone = sorted(left, key=lambda entry: entry[0])[: len(left) - kept]
    wanted = {name: mask.clone().contiguous() for name, mask in masks.items()}
    for _, name, index in gone:
        wanted[name].view(-1)[index] = False
    return wanted


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, mask in wanted.items():
        assert found[name].dtype == torch.bool
        assert torch.equal(found[name], mask), name


@st.composite
def layers(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Scores full of ties, zeros of both signs and infinities, in any layout and precision, partly masked."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores, masks = {}, {}
    for index in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        values = torch.randint(-draw(st.integers(0, 4)), 5, shape, generator=generator).double() / 4
        values *= torch.randint(0, 2, shape, generator=generator).double() * 2 - 1  # -0.0 too
        if draw(st.booleans()) and values.numel():
            values.view(-1)[0] = draw(st.sampled_from([-INFINITY, INFINITY, 1e-300, 0.1]))
        layout = draw(st.sampled_from(["plain", "channels_last", "transposed", "sliced"]))
        if layout == "channels_last" and values.ndim == 4:
            values = values.to(memory_format=torch.channels_last)
        elif layout == "transposed":
            values = values.mT.contiguous().mT if values.ndim >= 2 else values
        elif layout == "sliced" and values.ndim:
            values = torch.cat([values, values], dim=-1)[..., : values.shape[-1]]
        scores[str(index)] = values.to(draw(st.sampled_from(DTYPES)))
        density = draw(st.sampled_from([1.0, 1.0, 0.5, 0.0]))
        masks[str(index)] = torch.rand(shape, generator=generator) < density
    left = sum(int(mask.sum()) for mask in masks.values())
    return scores, masks, draw(st.integers(0, left))


@settings(max_examples=300, deadline=None)
@given(layers(), st.booleans())
def test_it_is_a_stable_sort(drawn, absolute):
    scores, masks, kept = drawn
    before = {name: (scores[name].clone(), masks[name].clone()) for name in masks}
    found = keep_highest_globally(scores, masks, kept, absolute=absolute)
    assert_equal(found, by_sorting(scores, masks, kept, absolute))
    for name, (score, mask) in before.items():
        assert torch.equal(scores[name], score) and torch.equal(masks[name], mask)
        assert found[name].data_ptr() != masks[name].data_ptr() or not mask.numel()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_ways_of_millions_on_hundreds(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_PIECE", data.draw(st.sampled_from([8, 24, 25, 1000])))
        patch.setattr(selection, "_SAMPLE", data.draw(st.integers(1, 40)))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        distinct = data.draw(st.sampled_from([1, 2, 5, 1000]))
        sizes = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))
        scores = {
            str(i): torch.randint(-distinct, distinct + 1, (size,), generator=generator).float()
            for i, size in enumerate(sizes)
        }
        masks = {
            name: torch.rand(score.shape, generator=generator) < data.draw(st.sampled_from([0.1, 0.7, 2.0]))
            for name, score in scores.items()
        }
        kept = data.draw(st.integers(0, sum(int(mask.sum()) for mask in masks.values())))
        absolute = data.draw(st.booleans())
        found = keep_highest_globally(scores, masks, kept, absolute=absolute)
        assert_equal(found, by_sorting(scores, masks, kept, absolute))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_sample_that_misleads_costs_time_only(data):
    values = [data.draw(st.integers(-3, 3)) for _ in range(data.draw(st.integers(2, 40)))]
    ends = st.sampled_from([-INFINITY, -4.0, *(x / 2 for x in range(-7, 8)), 4.0, INFINITY])
    tried = iter([sorted([data.draw(ends), data.draw(ends)]) for _ in range(3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_bracket", lambda *_: tuple(next(tried, (-INFINITY, INFINITY))))
        scores = {"a": torch.tensor(values, dtype=torch.float32)}
        masks = {"a": torch.ones(len(values), dtype=torch.bool)}
        kept = data.draw(st.integers(0, len(values)))
        found = keep_highest_globally(scores, masks, kept)
    assert_equal(found, by_sorting(scores, masks, kept, absolute=False))


def test_a_bracket_that_is_one_value_below_the_cut(monkeypatch):
    brackets = iter([(1.0, 1.0), (-INFINITY, INFINITY)])
    monkeypatch.setattr(selection, "_bracket", lambda *_: next(brackets))
    scores = {"a": torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])}
    found = keep_highest_globally(scores, {"a": torch.ones(5, dtype=torch.bool)}, 1)
    assert found["a"].tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.95])
def test_half_a_million_weights_against_a_sort(dtype, sparsity):
    generator = torch.Generator().manual_seed(1)
    scores = {
        "conv": torch.randn(256, 128, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "linear": torch.randn(500, 400, generator=generator) * 0.3,
    }
    scores = {name: score.to(dtype) for name, score in scores.items()}
    masks = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    masks["linear"][:100] = False
    left = sum(int(mask.sum()) for mask in masks.values())
    kept = left - round(sparsity * left)
    flat = torch.cat([scores[name].abs()[mask] for name, mask in masks.items()])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.sort(stable=True).indices[: left - kept]] = False
    wanted = {name: mask.clone() for name, mask in masks.items()}
    for (name, mask), part in zip(masks.items(), keep.split([int(m.sum()) for m in masks.values()])):
        wanted[name][mask] = part
    found = keep_highest_globally(scores, masks, kept, absolute=True)
    assert_equal(found, wanted)
    assert found["conv"].stride() == scores["conv"].stride()


def test_the_sample_brackets_and_few_are_collected(monkeypatch):
    """On plain values the first bracket holds, and what it collects is a percent, not a copy."""
    collected = []
    between = selection._Part.between

    def counted(self, low, high):
        found = between(self, low, high)
        collected.append(len(found[1]))
        return found

    monkeypatch.setattr(selection._Part, "between", counted)
    scores = {"a": torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))}
    masks = {"a": torch.ones(1_000_000, dtype=torch.bool)}
    keep_highest_globally(scores, masks, 50_000, absolute=True)
    assert len(collected) == 1 and 0 < collected[0] < 20_000


def test_global_randomness_is_left_alone():
    state = torch.get_rng_state()
    scores = {"a": torch.ones(200_000)}
    keep_highest_globally(scores, {"a": torch.ones(200_000, dtype=torch.bool)}, 1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("size", [10, 200_000])
@pytest.mark.parametrize("kept", [0, 4])
def test_nan_is_named_where_it_is_ranked_and_only_there(size, kept):
    scores = {"a": torch.arange(float(size)), "b": torch.tensor([1.0, math.nan, INFINITY, -INFINITY])}
    masks = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    with pytest.raises(ValueError, match="'b' has scores that are NaN"):
        keep_highest_globally(scores, masks, kept)
    masks["b"][1] = False
    found = keep_highest_globally(scores, masks, kept)
    assert sum(int(mask.sum()) for mask in found.values()) == kept
    assert bool(found["b"][2]) == (kept > 0)


def test_nothing_to_remove_still_refuses_nan():
    scores = {"a": torch.tensor([math.nan])}
    with pytest.raises(ValueError, match="NaN"):
        keep_highest_globally(scores, {"a": torch.tensor([True])}, 1)


def test_each_layer_by_its_own_budget():
    scores = {"a": torch.tensor([1.0, -3.0, 2.0]), "b": torch.tensor([9.0, 8.0])}
    masks = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    found = keep_highest_per_layer(scores, masks, {"a": 1, "b": 0}, absolute=True)
    assert found["a"].tolist() == [False, True, False] and not found["b"].any()
    found = keep_highest_per_layer(scores, masks, {"a": 1, "b": 2})
    assert found["a"].tolist() == [False, False, True] and found["b"].all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_weights_are_ranked_by_their_magnitude(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.01 + 5j, 0.1 + 0j, -3 + 4j, 0j], dtype=dtype)
    kept = torch.ones(4, dtype=torch.bool)
    found = keep_highest_globally({"w": weight}, {"w": kept}, 2, absolute=True)
    assert found["w"].tolist() == [True, False, True, False]
