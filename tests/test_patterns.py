"""A 2:4 mask is told from others, along the right dimension."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.pruning import WeightNormSparsifier

from sparsetweaks.converting import convert_masks
from sparsetweaks.masks import find_masks
from sparsetweaks.patterns import is_semi_structured


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    shape=st.sampled_from([(4, 8), (6, 8, 3, 3), (8, 4, 1)]),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_two_highest_of_four_follow_the_pattern_until_a_third_is_kept(shape, dim, seed, data):
    if shape[dim] % 4:
        dim = 1 - dim
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    groups = scores.movedim(dim, -1).unflatten(-1, (-1, 4))
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, -1).indices, True)
    mask = kept.flatten(-2).movedim(-1, dim)
    assert is_semi_structured(mask, dim=dim)
    assert is_semi_structured(mask, dim=dim - len(shape))
    pruned = (~mask).nonzero()
    mask[tuple(pruned[data.draw(st.integers(0, len(pruned) - 1))])] = True
    assert not is_semi_structured(mask, dim=dim)
    assert is_semi_structured(mask, kept=3, dim=dim)


def test_the_mask_of_torchs_own_sparsifier_follows_it_in_every_form():
    model = nn.Sequential(nn.Linear(16, 8))
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    assert not is_semi_structured(find_masks(model)["0.weight"])
    sparsifier.step()
    for form in ("parametrization", "buffers", "torch_prune"):
        mask = find_masks(convert_masks(model, to=form))["0.weight"]
        assert is_semi_structured(mask)
        assert int(mask.sum()) == mask.numel() // 2


def test_groups_are_whole():
    assert not is_semi_structured(torch.zeros(4, 3, 3, 3, dtype=torch.bool))
    assert is_semi_structured(torch.zeros(4, 0, dtype=torch.bool))


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (torch.ones(4, 4), {}, "as a bool tensor"),
        ({"weight": torch.ones(4, 4).bool()}, {}, "as a bool tensor"),
        (torch.ones(4, 4).bool(), {"kept": 5}, "5 of 4"),
        (torch.ones(4, 4).bool(), {"of": 1, "kept": 1}, "1 of 1"),
        (torch.ones(4).bool(), {}, "no dimension 1"),
    ],
)
def test_mistakes_are_told(mask, options, message):
    with pytest.raises(ValueError, match=message):
        is_semi_structured(mask, **options)
