"""All four tweaks in one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsetweaks as st


@pytest.fixture
def ticket() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)]
    head = [nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    return st.prune(nn.Sequential(*layers, *head), 0.5)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 3, 6, 6), torch.arange(8) % 3


def test_tweak_is_its_parts_in_order(ticket, batch):
    model, loss = st.tweak(ticket, batch, scales={"iterations": 3})
    by_hand = st.swap_activations(st.inject_skips(ticket), "swish")
    by_hand = st.learn_layer_scales(by_hand, batch, iterations=3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), by_hand.state_dict().values()))
    assert torch.equal(model(batch[0]), by_hand(batch[0]))
    assert loss(model(batch[0]), batch[1]) == st.SoftLabelLoss(smoothing=0.1)(model(batch[0]), batch[1])
    assert [change.tweak.split()[0] for change in st.changes(model)] == ["inject_skips,", "swap_activations"]


def test_every_part_can_be_switched_off(ticket, batch):
    model, loss = st.tweak(ticket, skips=False, activation=None, scales=False, smoothing=0.0)
    assert model is not ticket
    assert torch.equal(model(batch[0]), ticket(batch[0]))
    assert not st.changes(model)
    expected = nn.functional.cross_entropy(model(batch[0]), batch[1])
    assert torch.equal(loss(model(batch[0]), batch[1]), expected)


def test_options_reach_the_parts(ticket, batch):
    model, _ = st.tweak(ticket, skips={"where": "0"}, activation="mish", scales=False)
    assert [name for name, _ in model.named_parameters() if "skip" in name] == ["0.skip.strength"]
    assert sum(isinstance(m, nn.Mish) for m in model.modules()) == 2
    scaled, _ = st.tweak(ticket, batch, skips=False, activation=None, scales={"iterations": 2})
    assert not torch.equal(scaled[0].weight, ticket[0].weight)


def test_scales_need_data(ticket):
    with pytest.raises(ValueError, match="give a batch"):
        st.tweak(ticket)


def test_the_ticket_is_untouched_and_masks_are_kept(ticket, batch):
    before = {name: value.clone() for name, value in ticket.state_dict().items()}
    model, _ = st.tweak(ticket, batch, scales={"iterations": 2})
    assert all(torch.equal(value, before[name]) for name, value in ticket.state_dict().items())
    for name, mask in st.find_masks(ticket).items():
        assert torch.equal(mask, st.find_masks(model)[name])
        assert not model.get_parameter(name)[~mask].any()
