"""Gradient flow against gradients taken another way, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils import prune as torch_prune

import sparsetweaks as st
from sparsetweaks.analysis.gradient_flow import gradient_flow

GENERATOR = torch.Generator().manual_seed(1)
INPUTS = torch.randn(9, 4, generator=GENERATOR).double()
TARGETS = torch.randint(3, (9,), generator=GENERATOR)


def network():
    generator = torch.Generator().manual_seed(2)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
    ).double()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double()
    return model.eval()


MASKS = {
    "0.weight": torch.rand(6, 4, generator=GENERATOR) < 0.5,
    "2.weight": torch.rand(6, 6, generator=GENERATOR) < 0.5,
}


def gradients(model):
    """By `torch.func`, over all the data at once."""
    state = {name: value.detach() for name, value in model.named_parameters()}
    return grad(lambda p: F.cross_entropy(functional_call(model, p, (INPUTS,)), TARGETS))(state)


@pytest.mark.parametrize("form", ["buffers", "torch"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("batches", [None, 2])
def test_norms_over_kept_weights_and_over_all(form, order, batches):
    plain = st.apply_masks(network(), MASKS)
    model = plain
    if form == "torch":
        model = network()
        for name, mask in MASKS.items():
            torch_prune.custom_from_mask(model.get_submodule(name[0]), "weight", mask)
    data = (INPUTS, TARGETS) if batches is None else [(INPUTS[:5], TARGETS[:5]), (INPUTS[5:], TARGETS[5:])]
    found = gradient_flow(model, data, F.cross_entropy, order=order)
    known = gradients(plain)
    norms = []
    for layer, name in zip(found.layers, ("0.weight", "2.weight", "4.weight"), strict=True):
        full = known[name].flatten()
        mask = MASKS[name].flatten() if name in MASKS else torch.ones_like(full, dtype=torch.bool)
        norms.append(float((full[mask].abs() ** order).sum() ** (1 / order)))
        assert layer.norm == pytest.approx(norms[-1], rel=1e-9)
        assert layer.norm_of_all == pytest.approx(float((full.abs() ** order).sum() ** (1 / order)), rel=1e-9)
        assert (layer.name, layer.weights, layer.kept) == (name, full.numel(), int(mask.sum()))
    assert found.effective == pytest.approx(sum(norms) / 3, rel=1e-9)
    assert found.total == pytest.approx(sum(n**order for n in norms) ** (1 / order), rel=1e-9)
    assert found.total_of_all > found.total and found.masked


def test_a_layer_without_a_weight_left_flows_nothing_and_counts():
    model = st.apply_masks(network(), {"2.weight": torch.zeros(6, 6, dtype=torch.bool)})
    found = gradient_flow(model, (INPUTS, TARGETS), F.cross_entropy)
    assert [layer.kept for layer in found.layers] == [24, 0, 18]
    assert found.layers[1].norm == 0 and found.layers[0].norm == 0  # nothing passes to the first either
    assert found.effective == pytest.approx(found.layers[2].norm / 3)


def test_where_and_models_without_masks():
    found = gradient_flow(network(), (INPUTS, TARGETS), F.cross_entropy, where="2")
    assert [layer.name for layer in found.layers] == ["2.weight"] and not found.masked
    assert "the model has no masks" in str(found)
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        gradient_flow(network(), (INPUTS, TARGETS), F.cross_entropy, where="9")
    with pytest.raises(ValueError, match="no trainable weight of a convolution or linear"):
        gradient_flow(network(), (INPUTS, TARGETS), F.cross_entropy, where="3")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_is_left_out_is_named():
    model = network()
    model[0].weight.requires_grad_(False)
    nn.utils.weight_norm(model[2])
    found = gradient_flow(model, (INPUTS, TARGETS), F.cross_entropy)
    computed = "no parameter, but computed: weight_norm, spectral_norm, ..."
    assert found.left == {"0.weight": "frozen", "2.weight": computed}
    assert f"left out (frozen): '0.weight'\nleft out ({computed}): '2.weight'\n" in str(found)
    chosen = gradient_flow(model, (INPUTS, TARGETS), F.cross_entropy, where=["2", "4"])
    assert list(chosen.left) == ["2.weight"] and [layer.name for layer in chosen.layers] == ["4.weight"]
    assert not gradient_flow(network(), (INPUTS, TARGETS), F.cross_entropy, where="4").left
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))).double()
    with pytest.raises(ValueError, match=r"is chosen; left out \(no parameter, but computed: .*'0.weight'"):
        gradient_flow(model, (INPUTS, TARGETS), F.cross_entropy)


def test_the_model_is_only_read_and_the_figure_has_units():
    model = st.apply_masks(network(), MASKS).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradient_flow(model, (INPUTS, TARGETS), F.cross_entropy, batch_norm="train")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert found.plot().axes[0].get_ylabel() == "L2 norm of the loss's gradient"


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="the loss must be a scalar"):
        gradient_flow(network(), (INPUTS, TARGETS), lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        gradient_flow(network(), (INPUTS, TARGETS), F.cross_entropy, order=3)
    with pytest.raises(ValueError, match="order must be 1 or 2, got True"):
        gradient_flow(network(), (INPUTS, TARGETS), F.cross_entropy, order=True)
    with pytest.raises(ValueError, match="no batch"):
        gradient_flow(network(), [], F.cross_entropy)
    with pytest.raises(ValueError, match="fails on these inputs"):
        gradient_flow(network(), (INPUTS[:, :2], TARGETS), F.cross_entropy)
    broken = network()
    nn.init.constant_(broken[0].weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        gradient_flow(broken, (INPUTS, TARGETS), F.cross_entropy)
