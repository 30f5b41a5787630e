"""What `diff` says of two networks whose modules and counts are the same."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsetweaks as st
from sparsetweaks.display import diff
from sparsetweaks.display.parts import walk

NOTHING = "no module, mask, parameter or buffer differs"


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)
    )


def said(before, after):
    """The words of the overview, which text and HTML must share."""
    shown = diff(before, after)
    text = " ".join(str(shown).split())
    html = " ".join(re.sub("<[^>]*>", " ", shown._repr_html_()).split())
    notes = [" ".join(note.split()) for note in shown.facts.notes]
    for note in notes:
        assert note in text and note in html
    return notes


def marks(before, after):
    return {
        part.path: [str(mark) for mark in part.marks]
        for part in walk(diff(before, after).facts.part)
        if part.marks
    }


def halves():
    """Two masks of one weight that have nothing in common, and keep as much."""
    mask = torch.arange(3 * 4 * 9).view(4, 3, 3, 3) % 2 == 0
    return {"0.weight": mask}, {"0.weight": ~mask}


def test_masks_of_equal_counts_are_compared_themselves():
    before, after = (st.apply_masks(network(), masks) for masks in halves())
    notes = said(before, after)
    assert "the masks of 1 weight tensor differ: 54 weights are kept only before, 54 only after" in notes
    assert NOTHING not in notes
    assert marks(before, after)["0"] == ["weight mask differs"]


def test_masks_are_compared_whatever_their_form():
    first, second = (st.apply_masks(network(), masks) for masks in halves())
    other = network()
    torch_prune.custom_from_mask(other[0], "weight", halves()[0]["0.weight"])
    assert said(first, other) == [
        "the names in the state_dict of 1 parameter tensor differ",
        *said(first, first)[1:],
    ]
    assert "the masks of 1 weight tensor differ: 54 weights are kept only before, 54 only after" in said(
        second, other
    )


def test_a_mask_that_only_grew_shows_in_the_counts_alone():
    before = st.prune(network(), 0.3)
    notes = said(before, st.prune(before, 0.6))
    assert NOTHING not in notes and not [note for note in notes if "differ" in note]


def test_plain_weights_are_compared():
    model = network()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[3].weight[0, 0, 0, 0] += 1
        changed[4].bias += 1
    assert "the kept values of 2 of 8 parameter tensors differ" in said(model, changed)
    assert NOTHING not in said(model, changed)


def test_a_mask_that_only_one_has_is_told():
    masked = st.prune(network(), 0.5)
    plain = st.convert_masks(masked, to="zeros")
    kept = st.apply_masks(network(), {"0.weight": torch.ones(4, 3, 3, 3, dtype=torch.bool)})
    assert "2 masks are only before" in said(masked, plain)
    assert "2 masks are only after" in said(plain, masked)
    assert "1 mask is only after" in said(network(), kept)


def test_a_small_difference_is_no_scale_and_no_nothing():
    model = network()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        changed[0].bias.copy_(torch.tensor([1.0, 1e-6, 0, 0]))
        changed[3].weight.add_(1e-7 * torch.randn_like(changed[3].weight))
    assert "the kept values of 2 of 8 parameter tensors differ" in said(model, changed)
    assert not marks(model, changed)


def test_a_parameter_of_another_name_is_told():
    first, second = nn.Module(), nn.Module()
    first.w, second.v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    notes = said(first, second)
    assert "1 parameter tensor is only before" in notes and "1 parameter tensor is only after" in notes


def test_buffers_are_compared():
    model = network()
    changed = copy.deepcopy(model)
    changed[1].running_mean += 1
    notes = said(model, changed)
    assert "the values of 1 of 3 buffers differ" in notes and NOTHING not in notes
    wide = copy.deepcopy(model)
    wide[1].running_mean = wide[1].running_mean.double()
    assert "the dtypes of 1 buffer differ" in said(model, wide)


def test_masks_are_no_buffers_of_this_kind():
    before, after = (st.apply_masks(network(), masks) for masks in halves())
    assert not [note for note in said(before, after) if "buffer" in note]


def test_buffers_that_only_one_has_are_counted():
    model = network()
    changed = copy.deepcopy(model)
    changed[0].register_buffer("steps", torch.zeros(()))
    assert "1 buffer is only after" in said(model, changed)
    assert "1 buffer is only before" in said(changed, model)


def test_frozen_parameters_are_told():
    model = network()
    changed = copy.deepcopy(model)
    model[4].requires_grad_(False)
    changed[1].weight.requires_grad_(False)
    notes = said(model, changed)
    assert "requires_grad differs: 2 parameter tensors are frozen only before, 1 only after" in notes
    assert NOTHING not in notes


def test_other_dtypes_are_told_and_their_values_still_compared():
    model = network()
    notes = said(model, copy.deepcopy(model).double())
    assert "the dtypes of 8 parameter tensors differ" in notes
    assert NOTHING not in notes and not [note for note in notes if "values" in note]
    changed = copy.deepcopy(model).double()
    with torch.no_grad():
        changed[0].bias += 1
    assert "the kept values of 1 of 8 parameter tensors differ" in said(model, changed)


def test_other_shapes_of_equal_size_are_told():
    first, second = nn.Module(), nn.Module()
    first.table, second.table = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))
    assert "the shapes of 1 parameter tensor differ" in said(first, second)
    assert NOTHING not in said(first, second)


def test_what_is_not_a_number_in_both_is_no_difference():
    model = network()
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    assert NOTHING in said(model, copy.deepcopy(model))


def test_a_model_without_values_is_not_compared_silently():
    notes = said(network(), copy.deepcopy(network()).to("meta"))
    assert "8 parameter tensors are on the meta device: their values are not compared" in notes
    assert NOTHING not in notes


def test_settings_that_are_not_shown_otherwise_are_told():
    model, changed = network(), network()
    changed[3] = nn.Conv2d(4, 4, 3, padding=1)
    changed[3].load_state_dict(model[3].state_dict())
    changed[1].momentum = 0.3
    assert marks(model, changed) == {"1": ["momentum=0.1 → momentum=0.3"], "3": ["default → padding=(1, 1)"]}


def test_what_became_of_a_skip_is_told_at_its_convolution():
    ticket = st.inject_skips(network(), shortcut="projection")
    changed = copy.deepcopy(ticket)
    with torch.no_grad():
        changed[0].skip.projection.weight.mul_(2) if hasattr(changed[0].skip, "projection") else None
    name = next(name for name, each in ticket.named_parameters() if "skip" in name and each.ndim == 4)
    with torch.no_grad():
        changed.get_parameter(name).copy_(2 * ticket.get_parameter(name))
    assert marks(ticket, changed) == {"0": [f"{name.removeprefix('0.')} scaled ×2"]}


@pytest.mark.parametrize(
    "build", [network, lambda: st.prune(network(), 0.5), lambda: st.inject_skips(network())]
)
def test_two_that_are_alike_are_told_to_be(build):
    model = build()
    assert NOTHING in said(model, copy.deepcopy(model))


def test_what_is_on_the_meta_device_hides_nothing_of_the_rest():
    before = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    after = copy.deepcopy(before)
    after[0].weight.data *= 2
    after[1].weight.data = torch.randn(3, 3)
    before[2].to("meta")
    after[2].to("meta")
    text = " ".join(str(diff(before, after)).split())
    assert "weight ×2" in text
    assert (
        "the kept values of 1 of 4 parameter tensors differ; 2 parameter tensors are on the meta device"
        in text
    )


def test_a_learned_skip_on_the_meta_device_has_no_strength_to_tell():
    model = st.inject_skips(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
    assert "now 0" in st.summary(model)._repr_html_()
    assert "now 0" not in st.summary(model.to("meta"))._repr_html_()


def test_sparse_buffers_are_compared():
    before = nn.Linear(3, 3)
    before.register_buffer("adjacency", torch.eye(3).to_sparse())
    after = st.prune(before, 0.5, layers=("linear",), include="*")
    assert "of 1 buffer" not in str(diff(before, after))
    after.adjacency = (2 * torch.eye(3)).to_sparse()
    assert "the values of 1 of 1 buffer differ" in str(diff(before, after))
