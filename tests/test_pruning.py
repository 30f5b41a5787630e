"""Pruning removes exactly as many weights as asked, the least important ones, and never brings one back."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsetweaks.counting import sparsity
from sparsetweaks.masks import find_masks
from sparsetweaks.prunable import prunable_weights
from sparsetweaks.pruning import erk_budgets, prune

SCOPES = ["global", "layer", "erk"]
METHODS = ["magnitude", "random"]

fractions = st.floats(0, 1, exclude_max=True)
seeds = st.integers(0, 2**31)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def models(draw: st.DrawFn) -> nn.Sequential:
    """Small networks whose weights are full of ties, zeros, and signs that must not matter."""
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    kernel = draw(st.integers(1, 3))
    layers: list[nn.Module] = [nn.Conv2d(a, b, kernel) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1], 2))
    values = draw(st.integers(1, 4))
    generator = seeded(draw(seeds))
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(
                torch.randint(-values, values + 1, layer.weight.shape, generator=generator) / 4
            )
    if draw(st.booleans()):
        model = model.to(draw(st.sampled_from([torch.float64, torch.bfloat16])))
    return model


def counts(masks: dict[str, Tensor]) -> tuple[int, int]:
    return sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())


def shrunk(old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
    return all(not (new[name] & ~old[name]).any() for name in old)


# ---------------------------------------------------------------------------------------------------------
# Properties


@settings(max_examples=60, deadline=None)
@given(models(), fractions, st.sampled_from(SCOPES), st.sampled_from(METHODS), seeds)
def test_the_count_is_exact_under_ties(model, fraction, scope, method, seed):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = prune(model, fraction, scope=scope, method=method, generator=seeded(seed))
    masks = find_masks(pruned)
    assert list(masks) == list(prunable_weights(model))
    kept, total = counts(masks)
    if scope == "layer":
        assert all(int((~m).sum()) == round(fraction * m.numel()) for m in masks.values())
    else:
        assert total - kept == round(fraction * total)
    for name, mask in masks.items():
        assert torch.equal(pruned.get_parameter(name), torch.where(mask, before[name], 0))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@settings(max_examples=40, deadline=None)
@given(models(), fractions, st.sampled_from(["global", "layer"]))
def test_magnitude_keeps_the_largest(model, fraction, scope):
    masks = find_masks(prune(model, fraction, scope=scope))
    groups = [list(masks)] if scope == "global" else [[name] for name in masks]
    for names in groups:
        kept = torch.cat([model.get_parameter(n).detach().abs()[masks[n]] for n in names])
        gone = torch.cat([model.get_parameter(n).detach().abs()[~masks[n]] for n in names])
        if len(kept) and len(gone):
            assert kept.min() >= gone.max()


@settings(max_examples=40, deadline=None)
@given(
    models(),
    st.lists(fractions, min_size=2, max_size=4),
    st.sampled_from(SCOPES),
    st.sampled_from(METHODS),
    seeds,
)
def test_masks_only_shrink_and_each_level_takes_its_fraction_of_what_remains(
    model, levels, scope, method, seed
):
    generator = seeded(seed)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable_weights(model).items()}
    for fraction in levels:
        model = prune(model, fraction, scope=scope, method=method, of="remaining", generator=generator)
        new = find_masks(model)
        assert shrunk(masks, new)
        if scope == "layer":
            for name in masks:
                left = int(masks[name].sum())
                assert int(new[name].sum()) == left - round(fraction * left)
        else:
            left = counts(masks)[0]
            assert counts(new)[0] == left - round(fraction * left)
        masks = new


@settings(max_examples=40, deadline=None)
@given(models(), fractions, fractions, st.sampled_from(["global", "erk"]))
def test_a_higher_total_goes_on_from_a_lower_one(model, one, other, scope):
    low, high = sorted((one, other))
    first = prune(model, low)
    second = prune(first, high, scope=scope)
    assert shrunk(find_masks(first), find_masks(second))
    kept, total = counts(find_masks(second))
    assert total - kept == round(high * total)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.floats(0, 1)),
        min_size=1,
        max_size=6,
    ),
    st.floats(0, 1),
)
def test_erk_budgets_sum_and_fit_and_are_in_proportion(layers, fraction):
    masks = {
        str(i): torch.rand(shape, generator=seeded(i)) < density for i, (shape, density) in enumerate(layers)
    }
    left = {name: int(mask.sum()) for name, mask in masks.items()}
    kept = int(fraction * sum(left.values()))
    budgets = erk_budgets(masks, kept)
    assert list(budgets) == list(masks)
    assert sum(budgets.values()) == kept
    assert all(0 <= budgets[name] <= left[name] for name in masks)
    # One rate per dimension for all that are not full, no lower than any full one's, but for the rounding.
    steps = {name: 1 / sum(mask.shape) for name, mask in masks.items()}
    rates = {name: budgets[name] * steps[name] for name in masks}
    open_names = [name for name in masks if budgets[name] < left[name]]
    for name in open_names:
        assert all(rates[other] - steps[other] <= rates[name] + steps[name] for other in masks)


# ---------------------------------------------------------------------------------------------------------
# Examples


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Conv2d(2, 4, 2), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 9).view(2, 1, 2, 2))
        model[1].weight.copy_(-torch.arange(1.0, 33).view(4, 2, 2, 2) / 8)
    return model


def test_twenty_percent_of_what_remains_per_level_is_the_papers_series():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3), nn.Linear(32, 2))
    reached = []
    for _ in range(15):
        model = prune(model, 0.2, of="remaining")
        reached.append(sparsity(model).overall)
    assert reached == pytest.approx([1 - 0.8**level for level in range(1, 16)], abs=1e-4)


def test_scopes_differ_as_they_should():
    kept = {
        scope: [int(m.sum()) for m in find_masks(prune(two_layers(), 0.75, scope=scope)).values()]
        for scope in SCOPES
    }
    assert kept["layer"] == [2, 8]
    assert kept["erk"] == [4, 6]  # 10 weights in proportion to 1+2+2+2 = 7 and 2+4+2+2 = 10: 4.1 and 5.9
    assert kept["global"] == [5, 5]  # 8, 7, 6, 5, 4 of the one; 4, 3.875, 3.75, 3.625, 3.5 of the other


def test_erk_fills_small_layers_first():
    """Evci et al.'s rule: a density above 1 is capped, and the rest is shared out again."""
    masks = {"small": torch.ones(2, 1, dtype=torch.bool), "large": torch.ones(30, 30, dtype=torch.bool)}
    assert erk_budgets(masks, 100) == {"small": 2, "large": 98}


def test_random_follows_its_generator_and_nothing_else():
    model = two_layers()
    state = torch.get_rng_state()
    one, two, other = (find_masks(prune(model, 0.5, method="random", generator=seeded(s))) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["1.weight"], find_masks(prune(model, 0.5))["1.weight"])


def test_random_pruning_is_uniform():
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3), nn.Linear(64, 2))
    masks = find_masks(prune(model, 0.9, method="random", generator=seeded()))
    for mask in masks.values():
        assert abs(float(mask.double().mean()) - 0.1) < 5 * math.sqrt(0.09 / mask.numel())


def test_the_result_does_not_depend_on_the_memory_format():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    nn.init.ones_(model[0].weight)
    plain, other = (
        find_masks(prune(model, 0.5)),
        find_masks(prune(model.to(memory_format=torch.channels_last), 0.5)),
    )
    assert torch.equal(plain["0.weight"], other["0.weight"])


def test_selection_is_passed_on():
    assert list(find_masks(prune(two_layers(), 0.5, layers=("conv", "linear"), exclude="0"))) == ["1.weight"]
    assert list(find_masks(prune(two_layers(), 0.5, include="2"))) == ["2.weight"]


def test_masks_outside_the_selection_stay():
    first = prune(two_layers(), 0.5, include="0")
    second = prune(first, 0.5, include="1")
    assert torch.equal(find_masks(second)["0.weight"], find_masks(first)["0.weight"])


def test_zero_sparsity_masks_nothing_and_a_collapsed_layer_shows():
    report = sparsity(prune(two_layers(), 0.0))
    assert report.overall == 0.0
    assert all(layer.masked for layer in report.layers)
    model = two_layers()
    model[1].weight.data.mul_(1e-3)
    assert [layer.sparsity for layer in sparsity(prune(model, 0.8)).layers] == [0.0, 1.0]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_lies_between_0_and_1(fraction):
    with pytest.raises(ValueError, match=r"in \[0, 1\); got"):
        prune(two_layers(), fraction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "snap"}, "unknown method 'snap': choose from 'magnitude', 'random'"),
        ({"scope": "local"}, "unknown scope 'local': choose from 'global', 'layer', 'erk'"),
        ({"of": "rest"}, "unknown of 'rest': choose from 'all', 'remaining'"),
        ({"method": "random"}, r"needs generator=torch.Generator\(\)"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        prune(two_layers(), 0.5, **options)


def test_less_than_is_pruned_already_is_refused():
    pruned = prune(two_layers(), 0.8)
    with pytest.raises(ValueError, match=r'pruned of the model already, 0\.8000.*of="remaining"'):
        prune(pruned, 0.5)
    with pytest.raises(ValueError, match=r"pruned of '1\.weight' already"):
        prune(prune(two_layers(), 0.5), 0.5, scope="layer")
    assert sparsity(prune(pruned, 0.8)).overall == sparsity(pruned).overall


def test_nan_weights_are_named():
    model = two_layers()
    model[1].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'1\.weight' has scores that are NaN"):
        prune(model, 0.5)


@pytest.mark.parametrize(
    "sparsity", ["0.9", "half", None, 95, math.nan, torch.ones(2), [0.5], 1.0, -0.1], ids=repr
)
def test_what_is_no_fraction_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"the fraction to remove, a number in \[0, 1\); got"):
        prune(nn.Linear(4, 4), sparsity)


def test_a_fraction_may_be_a_tensor_of_one_number():
    model = nn.Linear(4, 4)
    assert torch.equal(prune(model, torch.tensor(0.5)).weight_mask, prune(model, 0.5).weight_mask)


def test_a_seed_is_no_generator():
    with pytest.raises(ValueError, match=r"needs generator=torch\.Generator\(\)\.manual_seed.*got 0"):
        prune(nn.Linear(4, 4), 0.5, method="random", generator=0)
