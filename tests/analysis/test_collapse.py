"""Collapse and effective sparsity against networks with known dead paths, and paths found by search."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparsetweaks as st
from sparsetweaks.analysis.collapse import effective_sparsity, layer_collapse


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def on_path(report):
    return {layer.name: layer.on_path for layer in report.layers}


def searched(masks):
    """For a chain of linear layers: how many kept weights are on a path, by going through all paths."""
    found = [set() for _ in masks]
    sizes = [masks[0].shape[1], *(each.shape[0] for each in masks)]
    for path in itertools.product(*map(range, sizes)):
        if all(bool(each[path[i + 1], path[i]]) for i, each in enumerate(masks)):
            for i, places in enumerate(found):
                places.add((path[i + 1], path[i]))
    return [len(places) for places in found]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("form", ["buffers", "torch"])
def test_chains_agree_with_a_search_of_all_paths(seed, form):
    generator = torch.Generator().manual_seed(seed)
    sizes = (4, 6, 5, 6, 3)
    masks = [torch.rand(b, a, generator=generator) < 0.3 for a, b in itertools.pairwise(sizes)]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(
        *(m for layer in layers for m in (layer, nn.LayerNorm(layer.out_features), nn.Tanh()))
    )
    if form == "torch":
        for layer, each in zip(layers, masks, strict=True):
            torch_prune.custom_from_mask(layer, "weight", each)
    else:
        model = st.apply_masks(model, {f"{3 * i}.weight": each for i, each in enumerate(masks)})
    report = layer_collapse(model, torch.zeros(2, 4))
    assert [layer.on_path for layer in report.layers] == searched(masks)
    assert [layer.kept for layer in report.layers] == [int(each.sum()) for each in masks]
    assert report.connected == (sum(searched(masks)) > 0)
    whole = sum(each.numel() for each in masks)
    assert effective_sparsity(model, torch.zeros(1, 4)).effective_sparsity == pytest.approx(
        1 - sum(searched(masks)) / whole
    )


class Residual(nn.Module):
    """x + conv(x), then a head."""

    def __init__(self, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)), inplace=True)
        y += x
        return self.head(F.max_pool2d(y, 2).flatten(2).mean(2))


def test_a_residual_keeps_a_network_connected_around_a_collapsed_layer():
    model = st.apply_masks(Residual(), {"conv.weight": torch.zeros(2, 2, 3, 3, dtype=torch.bool)})
    report = layer_collapse(model, torch.zeros(1, 2, 4, 4))
    assert report.connected
    assert [layer.collapsed for layer in report.layers] == ["no weight is kept", ""]


def test_without_it_nothing_passes_and_a_skip_mends_it():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    dead = st.apply_masks(model, {"0.weight": torch.zeros(2, 2, 3, 3, dtype=torch.bool)})
    report = layer_collapse(dead, torch.zeros(1, 2, 4, 4))
    assert not report.connected and report.inputs == {"the input": False}
    assert [layer.collapsed for layer in report.layers] == ["no weight is kept", "no path"]
    assert report.effective_sparsity == 1
    mended = layer_collapse(st.inject_skips(dead, where="0"), torch.zeros(1, 2, 4, 4))
    assert mended.connected and on_path(mended) == {"0.weight": 0, "3.weight": 4}


def test_taps_that_meet_only_padding_are_on_no_path():
    assert on_path(layer_collapse(nn.Conv2d(1, 1, 3, padding=1), torch.zeros(1, 1, 1, 1))) == {"weight": 1}
    assert on_path(layer_collapse(nn.Conv2d(1, 1, 3, padding=1), torch.zeros(1, 1, 2, 2))) == {"weight": 9}


class Pooled(nn.Module):
    """The largest of what a layer puts out, in one of several spellings."""

    def __init__(self, largest):
        super().__init__()
        self.layer, self.largest = nn.Linear(3, 4), largest

    def forward(self, x):
        return self.largest(self.layer(x))


LARGEST = {
    "max_pool": lambda y: F.max_pool1d(y, 4),
    "adaptive": lambda y: F.adaptive_max_pool1d(y, 1),
    "amax": lambda y: y.amax(-1),
    "max of a dimension": lambda y: y.max(-1).values,
    "max of two": lambda y: torch.max(y[..., :2], y[..., 2:]),
    "maximum": lambda y: torch.maximum(y[..., :2], y[..., 2:]),
    "max of all": lambda y: y.max(),
    "max_pool 2d": lambda y: F.max_pool2d(y.view(1, 1, 2, 2), 2, stride=2),
}


@pytest.mark.parametrize("spelling", LARGEST)
def test_the_largest_of_several_is_every_one_of_them(spelling):
    report = layer_collapse(Pooled(LARGEST[spelling]), torch.zeros(1, 1, 3))
    assert on_path(report) == {"layer.weight": 12}


def test_pooling_with_dilation_is_refused():
    with pytest.raises(ValueError, match="max pooling with dilation"):
        layer_collapse(Pooled(lambda y: F.max_pool1d(y, 2, dilation=2)), torch.zeros(1, 1, 3))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(2, 2), nn.Linear(3, 2), nn.Linear(2, 1)

    def forward(self, left, right):
        return self.head(self.left(left) - self.right(right))


def test_each_input_has_its_own_verdict():
    model = st.apply_masks(TwoInputs(), {"right.weight": torch.zeros(2, 3, dtype=torch.bool)})
    report = layer_collapse(model, {"left": torch.zeros(1, 2), "right": torch.zeros(1, 3)})
    assert report.inputs == {"left": True, "right": False}
    assert on_path(report) == {"left.weight": 4, "right.weight": 0, "head.weight": 2}


DIFFERENCES = {
    "-": lambda a, b: a - b,
    "sub": lambda a, b: torch.sub(a, b),
    "in place": lambda a, b: a.sub_(b),
    "as a statement": lambda a, b: (a.sub_(b), a)[1],
    "negative": lambda a, b: a + (-b),
    "add with a factor": lambda a, b: torch.add(a, b, alpha=-1),
    "product with -1": lambda a, b: a + -1 * b,
}


@pytest.mark.parametrize("spelling", DIFFERENCES)
def test_paths_do_not_cancel(spelling):
    class Difference(TwoInputs):
        def forward(self, x):
            return self.head(DIFFERENCES[spelling](self.left(x), self.right(x)))

    model = Difference()
    model.right = nn.Linear(2, 2)
    assert on_path(layer_collapse(model, torch.zeros(1, 2))) == {
        "left.weight": 4,
        "right.weight": 4,
        "head.weight": 2,
    }


class Gated(nn.Module):
    """Squeeze and excitation: what passes is multiplied by a gate that also depends on it."""

    def __init__(self):
        super().__init__()
        self.main, self.gate, self.head = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.main(x) * torch.sigmoid(self.gate(x)))


def test_a_dead_gate_does_not_stop_what_it_multiplies():
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert on_path(layer_collapse(st.apply_masks(Gated(), {"gate.weight": nothing}), torch.zeros(1, 2))) == {
        "main.weight": 4,
        "gate.weight": 0,
        "head.weight": 2,
    }
    # where nothing enters the main path its bias is still multiplied by the gate
    assert on_path(layer_collapse(st.apply_masks(Gated(), {"main.weight": nothing}), torch.zeros(1, 2))) == {
        "main.weight": 0,
        "gate.weight": 4,
        "head.weight": 2,
    }
    bare = Gated()
    bare.main.bias = None
    report = layer_collapse(st.apply_masks(bare, {"main.weight": nothing}), torch.zeros(1, 2))
    assert not report.connected and on_path(report) == dict.fromkeys(
        ("main.weight", "gate.weight", "head.weight"), 0
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_followed_through_scores_and_values(batch_first):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    values_of_head_one = torch.ones(12, 4, dtype=torch.bool)
    values_of_head_one[10:] = False  # rows: 4 of queries, 4 of keys, 4 of values; two to a head
    masks = {"attention.in_proj_weight": values_of_head_one}
    report = layer_collapse(st.apply_masks(Attending(), masks), torch.zeros(3, 5, 4))
    # the bias of the second head's values is still weighed by scores, so its queries and keys stay on a path
    assert on_path(report)["attention.in_proj_weight"] == 40
    model = Attending()
    model.attention.in_proj_bias = None
    report = layer_collapse(st.apply_masks(model, masks), torch.zeros(3, 5, 4))
    assert on_path(report)["attention.in_proj_weight"] == 40 - 16
    assert on_path(report)["attention.out_proj.weight"] == 8


def test_paths_start_at_embeddings_of_whole_numbers():
    model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 2))
    report = layer_collapse(
        st.apply_masks(model, {"2.weight": mask([1] * 6, [0] * 6)}), torch.zeros(1, 2).long()
    )
    assert on_path(report)["2.weight"] == 6 and report.inputs == {"embedding 0": True}


def test_depth_neither_overflows_nor_vanishes():
    generator = torch.Generator().manual_seed(0)
    layers = [m for _ in range(400) for m in (nn.Linear(32, 32), nn.ReLU())]
    masks = {f"{i}.weight": torch.rand(32, 32, generator=generator) < 0.1 for i in range(0, 800, 2)}
    report = layer_collapse(st.apply_masks(nn.Sequential(*layers), masks), torch.zeros(1, 32))
    forward, backward = [torch.ones(32, dtype=torch.bool)], [torch.ones(32, dtype=torch.bool)]
    for each in masks.values():
        forward.append((each & forward[-1]).any(1))
    for each in reversed(masks.values()):
        backward.append((each & backward[-1][:, None]).any(0))
    known = [
        int((each & forward[i] & backward[-2 - i][:, None]).sum()) for i, each in enumerate(masks.values())
    ]
    assert [layer.on_path for layer in report.layers] == known and min(known) > 0


def test_a_torchvision_network_is_whole_when_it_is_dense():
    import torchvision

    for build in (torchvision.models.resnet18, torchvision.models.mobilenet_v3_small):
        report = layer_collapse(st.inject_skips(build(num_classes=4)), torch.zeros(1, 3, 64, 64))
        assert report.connected and report.effective_sparsity < 0.05, build  # taps on padding alone


def test_the_overall_sparsity_is_that_of_the_prunable_weights():
    model = st.prune(Residual(), 0.5)
    report = effective_sparsity(model, torch.ones(1, 2, 4, 4))
    assert [layer.counted for layer in report.layers] == [True, False]
    assert report.sparsity == st.sparsity(model).overall == 0.5


def test_the_model_is_only_read_and_the_result_can_be_looked_at():
    model = st.prune(Residual(), 0.5).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = layer_collapse(model, torch.ones(1, 2, 4, 4))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert "every input has a path" in str(report) and list(report.table()[0]) == [
        "layer", "weights", "kept", "on_path", "sparsity", "effective_sparsity", "collapsed",
    ]  # fmt: skip
    figure = report.plot()
    assert figure.axes[0].get_yscale() == "log" and "%" in figure.axes[0].get_ylabel()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"fails on inputs of shape \(1, 3\)"):
        layer_collapse(nn.Linear(2, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="no weight of a convolution or linear layer"):
        layer_collapse(nn.ReLU(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="hold no example"):
        layer_collapse(nn.Linear(2, 2), torch.zeros(0, 2))
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        layer_collapse(broken, torch.zeros(1, 2))
