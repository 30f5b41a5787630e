"""Collapse and effective sparsity against networks with known dead paths, and paths found by search."""

from __future__ import annotations

import dataclasses
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


def test_the_rows_of_a_masked_embedding_start_paths():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2, bias=False))
    masks = {"0.weight": mask([1, 1], [0, 1], [0, 1]), "1.weight": mask([0, 1], [0, 1])}
    report = layer_collapse(st.apply_masks(model, masks), torch.zeros(1, 4).long())
    assert on_path(report) == {"0.weight": 3, "1.weight": 2}  # any row may be looked up
    masks["0.weight"] = mask([1, 0], [0, 0], [1, 0])
    report = layer_collapse(st.apply_masks(model, masks), torch.zeros(1, 4).long())
    assert on_path(report) == {"0.weight": 0, "1.weight": 0} and not report.connected


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_embeddings(mode):
    model = nn.Sequential(nn.EmbeddingBag(5, 2, mode=mode), nn.Linear(2, 1))
    masked = st.apply_masks(model, {"0.weight": mask(*[[1, 0]] * 5)})
    report = layer_collapse(masked, torch.zeros(2, 3).long())
    assert report.inputs == {"embedding 0": True} and not report.opened
    assert on_path(report) == {"0.weight": 5, "1.weight": 1}


def test_weights_of_a_bag_are_inputs():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(5, 2, mode="sum"), nn.Linear(2, 1)

        def forward(self, chosen, weights):
            return self.head(self.bag(chosen, per_sample_weights=weights))

    report = layer_collapse(Bag(), (torch.zeros(2, 3).long(), torch.ones(2, 3)))
    assert report.inputs == {"input 1": True, "embedding 1": True} and report.connected
    layer = nn.EmbeddingBag(5, 2, mode="sum")
    given = {
        "input": torch.zeros(4).long(),
        "offsets": torch.tensor([0, 3]),
        "per_sample_weights": torch.ones(4),
    }
    report = layer_collapse(st.apply_masks(layer, {"weight": mask(*[[1, 0]] * 5)}), given)
    assert report.inputs == {"per_sample_weights": True, "embedding 1": True} and on_path(report) == {
        "weight": 5
    }


def test_values_that_are_gathered_by_an_embedding_keep_their_paths():
    class Gathering(nn.Linear):
        def forward(self, x):
            return F.embedding(torch.tensor([0]), super().forward(x))

    report = layer_collapse(Gathering(2, 2), torch.zeros(3, 2))
    assert report.inputs == {"the input": True} and on_path(report) == {"weight": 4}


class Normalised(nn.Module):
    """A convolution, a normalisation and a head."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 2, 1), norm, nn.Linear(2, 1)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


NORMS = {
    "batch": lambda: nn.BatchNorm2d(2),
    "group": lambda: nn.GroupNorm(2, 2),
    "instance": lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    "layer": lambda: nn.LayerNorm([2, 1, 1]),
}


@pytest.mark.parametrize("norm", NORMS)
def test_the_weight_of_a_normalisation_is_a_factor_on_the_path(norm):
    model = Normalised(NORMS[norm]())
    second = torch.tensor([True, False]).view_as(model.norm.weight)
    masks = {"norm.weight": second, "norm.bias": second}
    report = layer_collapse(st.apply_masks(model, masks), torch.zeros(1, 1, 1, 1))
    assert on_path(report) == {"conv.weight": 1, "norm.weight": 1, "norm.bias": 1, "head.weight": 1}
    assert report.connected and not report.collapsed


def test_normalisations_of_torch_itself_and_by_root_mean_square():
    class Functional(Normalised):
        def forward(self, x):
            norm = self.norm
            x = torch.batch_norm(
                self.conv(x),
                norm.weight,
                norm.bias,
                norm.running_mean,
                norm.running_var,
                False,
                0.1,
                1e-5,
                False,
            )
            return self.head(x.mean((2, 3)))

    masks = {"norm.weight": torch.tensor([True, False])}
    report = layer_collapse(st.apply_masks(Functional(nn.BatchNorm2d(2)), masks), torch.zeros(1, 1, 1, 1))
    assert on_path(report) == {"conv.weight": 1, "norm.weight": 1, "head.weight": 1}
    model = nn.Sequential(nn.Linear(1, 2), nn.RMSNorm(2), nn.Linear(2, 1))
    report = layer_collapse(st.apply_masks(model, {"1.weight": mask(1, 0)}), torch.zeros(1, 1))
    assert on_path(report) == {"0.weight": 1, "1.weight": 1, "2.weight": 1}


def test_the_slopes_of_a_prelu_are_beside_the_path():
    model = nn.Sequential(nn.Linear(1, 3), nn.PReLU(3), nn.Linear(3, 1))
    masks = {"1.weight": mask(1, 0, 1), "2.weight": mask([1, 1, 0])}
    report = layer_collapse(st.apply_masks(model, masks), torch.zeros(1, 1))
    assert on_path(report) == {"0.weight": 2, "1.weight": 1, "2.weight": 2}


@pytest.mark.parametrize("form", ["buffers", "torch", "parametrization"])
def test_a_bias_is_on_a_path_if_it_reaches_an_output(form):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    masks = {
        "0.bias": mask(1, 1, 0),
        "2.weight": mask([1, 0, 1], [0, 0, 1]),
        "2.bias": mask(0, 0),
        "4.weight": mask([1, 0]),
        "4.bias": mask(1),
    }
    masked = st.convert_masks(st.apply_masks(model, masks), to={"torch": "torch_prune"}.get(form, form))
    assert on_path(layer_collapse(masked, torch.zeros(1, 2))) == {
        "0.weight": 4, "0.bias": 1, "2.weight": 2, "2.bias": 0, "4.weight": 1, "4.bias": 1,
    }  # fmt: skip
    # with nothing entering, weights are on no path, and the biases after them are all the same
    nothing = {"0.weight": mask([0, 0], [0, 0], [0, 0])}
    report = layer_collapse(st.apply_masks(masked, nothing), torch.zeros(1, 2))
    assert not report.connected and on_path(report) == {
        "0.weight": 0, "0.bias": 1, "2.weight": 0, "2.bias": 0, "4.weight": 0, "4.bias": 1,
    }  # fmt: skip


def test_torch_prunes_weights_and_biases_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    for part in (model[1].weight, model[5].bias):
        part.data.uniform_(0.1, 1)
    parts = [(model[i], name) for i in (0, 1, 3, 5) for name in ("weight", "bias")]
    torch_prune.global_unstructured(parts, pruning_method=torch_prune.L1Unstructured, amount=0.3)
    report = layer_collapse(model, torch.zeros(2, 4))
    found = on_path(report)
    assert found["0.bias"] > 0 and found["1.weight"] > 0 and found["3.bias"] > 0 and found["5.bias"] > 0
    assert report.sparsity == pytest.approx(st.sparsity(model).overall)


ADDED = {
    "sum": lambda x, token: x + token,
    "in place": lambda x, token: x.add_(token),
    "onto a copy": lambda x, token: (lambda y: (y.add_(x), y)[1])(token.clone()),
    "product added": lambda x, token: torch.addmm(token, x, torch.eye(2)),
    "side by side": lambda x, token: torch.cat([token, x]),
    "stacked": lambda x, token: torch.stack([token, x]),
    "written": lambda x, token: (lambda y: (y.__setitem__(0, token[0]), y)[1])(torch.cat([x, x])),
    "written beneath": lambda x, token: (
        lambda y: (y.__setitem__(slice(0, 1), token), y.__setitem__(slice(1, 2), x), y)[2]
    )(torch.zeros(2, 2)),
    "chosen": lambda x, token: torch.where(torch.tensor([[True, False]]), token, x),
}


class Tokened(nn.Module):
    """What a parameter adds on the way, in one of several spellings; then a layer."""

    def __init__(self, adding):
        super().__init__()
        self.first, self.token, self.adding = (
            nn.Linear(2, 2, bias=False),
            nn.Parameter(torch.ones(1, 2)),
            adding,
        )
        self.head = nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.head(self.adding(self.first(x), self.token))


@pytest.mark.parametrize("spelling", ADDED)
@pytest.mark.parametrize("dead", [False, True])
def test_whatever_is_added_is_a_source(spelling, dead):
    masks = {"token": mask([1, 1]), "head.weight": mask([1, 0])}
    if dead:
        masks["first.weight"] = mask([0, 0], [0, 0])
    report = layer_collapse(st.apply_masks(Tokened(ADDED[spelling]), masks), torch.zeros(1, 2))
    assert on_path(report) == {"token": 1, "first.weight": 0 if dead else 2, "head.weight": 0 if dead else 1}
    assert report.connected is not dead


def test_what_computes_a_weight_is_no_source():
    class Lowered(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.a, self.b = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(1, 2))

        def forward(self, x):
            return F.linear(x, self.weight + self.a @ self.b, self.bias)

    masks = {"0.weight": mask([0, 0], [0, 0]), "1.a": mask([1], [1]), "1.b": mask([1, 0])}
    model = nn.Sequential(nn.Linear(2, 2), Lowered())
    assert on_path(layer_collapse(st.apply_masks(model, masks), torch.zeros(1, 2))) == {
        "0.weight": 0, "1.weight": 0, "1.a": 0, "1.b": 0,
    }  # fmt: skip
    del masks["0.weight"]
    assert on_path(layer_collapse(st.apply_masks(model, masks), torch.zeros(1, 2))) == {
        "0.weight": 4, "1.weight": 4, "1.a": 2, "1.b": 1,
    }  # fmt: skip


def test_the_biases_of_attention_and_of_recurrent_layers():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
            self.core, self.head = nn.GRU(4, 2), nn.Linear(2, 1)

        def forward(self, x):
            return self.head(self.core(self.attention(x, x, x)[0])[0])

    masks = {
        "attention.in_proj_bias": torch.tensor([True] * 8 + [True, False, True, True]),
        "attention.bias_k": torch.ones(1, 1, 4).bool(),
        "attention.bias_v": torch.tensor([[[True, False, True, True]]]),
        "attention.out_proj.bias": mask(1, 1, 0, 1),
        "core.bias_hh_l0": mask(1, 0, 1, 1, 1, 1),
    }
    report = layer_collapse(st.apply_masks(Attending(), masks), torch.zeros(3, 5, 4))
    assert report.opened == ("gru",)
    assert {name: on_path(report)[name] for name in masks} == {
        name: int(m.sum()) for name, m in masks.items()
    }


def test_weights_of_what_a_tweak_added_are_not_counted():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2)
    )
    model = st.inject_skips(model, where="0", shortcut="projection")
    added = next(name for name, p in model.named_parameters() if p.shape == (4, 2, 1, 1))
    masked = st.apply_masks(
        model, {"0.weight": torch.rand(4, 2, 3, 3) < 0.5, added: torch.rand(4, 2, 1, 1) < 0.2}
    )
    assert layer_collapse(masked, torch.zeros(1, 2, 2, 2)).sparsity == pytest.approx(
        st.sparsity(masked).overall
    )


class Frozen(nn.Module):
    """A backbone that is run without gradients, and a head."""

    def __init__(self, without, function=torch.relu):
        super().__init__()
        self.backbone, self.head = nn.Linear(2, 3), nn.Linear(3, 1)
        self.without, self.function = without, function

    def forward(self, x):
        with self.without():
            x = self.function(self.backbone(x))
        return self.head(x)


@pytest.mark.parametrize(
    "without", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)]
)
def test_values_flow_without_gradients_too(without):
    report = layer_collapse(Frozen(without), torch.zeros(1, 2))
    assert report.connected and on_path(report) == {"backbone.weight": 6, "head.weight": 3}


def test_a_parameter_that_a_forward_writes_to():
    class Clipped(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-1, 1)
                self.weight.mul_(2)
                self.weight[0].add_(1)
            return super().forward(x)

    assert on_path(layer_collapse(Clipped(2, 2), torch.zeros(1, 2))) == {"weight": 4}


def test_parameters_of_whole_numbers_stay_as_they_are():
    class Indexed(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.order = nn.Parameter(torch.tensor([1, 0], dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return super().forward(x[:, self.order.long()])

    assert on_path(layer_collapse(Indexed(), torch.zeros(1, 2))) == {"weight": 4}


def test_inputs_within_lists_and_mappings():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])

        def forward(self, parts, scales=None):
            both = parts.values() if isinstance(parts, dict) else parts
            total = sum(layer(part) for layer, part in zip(self.layers, both, strict=True))
            return total if scales is None else total * scales["scale"]

    model = st.apply_masks(Nested(), {"layers.1.weight": mask([0, 0])})
    x = torch.zeros(1, 2)
    assert layer_collapse(model, ([x, x],)).inputs == {"the input[0]": True, "the input[1]": False}
    report = layer_collapse(model, ({"a": x, "b": x}, {"scale": torch.ones(1)}))
    assert report.inputs == {"input 0['a']": True, "input 0['b']": False, "input 1['scale']": True}
    assert layer_collapse(model, {"parts": (x, x)}).inputs == {"parts[0]": True, "parts[1]": False}


@pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*:FutureWarning", "ignore:Initializing zero-element tensors"
)
def test_what_is_left_out_is_named():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.look, self.head = nn.Embedding(3, 2), nn.Linear(2, 3)
            self.head.weight = self.look.weight

        def forward(self, x):
            return self.head(self.look(x))

    norm, spectral = nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm
    model = nn.Sequential(nn.Linear(2, 2), norm(nn.Linear(2, 2)), nn.utils.weight_norm(nn.Linear(2, 2)))
    model.extend([spectral(nn.Linear(2, 2)), nn.Linear(2, 0)])
    report = layer_collapse(model, torch.zeros(1, 2))
    assert list(on_path(report)) == ["0.weight"] and "weight_norm" not in str(report.opened)
    assert list(report.left) == ["1.weight", "2.weight", "3.weight", "4.weight"]
    assert "left out (no parameter, but computed: weight_norm, spectral_norm, ...): '1.weight', '2.w" in str(
        report
    )
    assert "left out (empty): '4.weight'" in str(report)
    assert not layer_collapse(nn.Linear(2, 2), torch.zeros(1, 2)).left
    for nothing, inputs, message in (
        (
            nn.Sequential(norm(nn.Linear(2, 2))),
            torch.zeros(1, 2),
            r"left out \(no parameter, but computed.*'0.weight'",
        ),
        (nn.Linear(3, 0), torch.zeros(1, 3), r"left out \(empty\): 'weight'"),
        (Tied(), torch.zeros(1, 2).long(), r"left out \(tied to an embedding\): 'head.weight'"),
    ):
        with pytest.raises(ValueError, match=f"no weight .* to follow paths through; {message}"):
            layer_collapse(nothing, inputs)
    masked = st.apply_masks(Tied(), {"look.weight": mask([1, 1], [1, 0], [0, 0])})
    report = layer_collapse(masked, torch.zeros(1, 2).long())
    assert on_path(report) == {"look.weight": 3} and not report.left


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_mask_beneath_weight_norm_is_followed():
    model = nn.Sequential(nn.Linear(1, 2), nn.utils.weight_norm(nn.Linear(2, 1)))
    report = layer_collapse(st.apply_masks(model, {"1.weight_v": mask([1, 0])}), torch.zeros(1, 1))
    assert [layer.on_path for layer in report.layers] == [1, 1] and not report.opened


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


class Masked(nn.Module):
    """Attention with a mask that is learned."""

    def __init__(self):
        super().__init__()
        self.attention, self.mask = nn.MultiheadAttention(4, 2), nn.Parameter(torch.zeros(3, 3))

    def forward(self, x):
        return self.attention(x, x, x, attn_mask=self.mask)[0]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"fails on inputs of shape \(1, 3\)"):
        layer_collapse(nn.Linear(2, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="no weight of a convolution or linear layer"):
        layer_collapse(nn.ReLU(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="hold no example"):
        layer_collapse(nn.Linear(2, 2), torch.zeros(0, 2))
    with pytest.raises(
        ValueError, match="the inputs are complex64, and nothing is looked up in an embedding"
    ):
        layer_collapse(nn.Linear(2, 2, dtype=torch.complex64), torch.zeros(1, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="learned or computed"):
        layer_collapse(Masked(), torch.zeros(3, 4))
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        layer_collapse(broken, torch.zeros(1, 2))


@dataclasses.dataclass
class Held:
    logits: torch.Tensor


class HoldsDeep(nn.Module):
    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.a, self.b, self.alone = nn.Linear(3, 2), nn.Linear(3, 2), alone

    def forward(self, x: torch.Tensor) -> object:
        held = {"head": [Held(self.b(x) + self.a(x))]}
        return held if self.alone else (self.a(x), held)


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_put_out_deep_inside_is_put_out(alone):
    assert not any(layer.collapsed for layer in layer_collapse(HoldsDeep(alone), torch.randn(2, 3)).layers)


class SoftGate(nn.Module):
    def __init__(self, softmax) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 2, bias=False)
        self.a, self.b = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
        self.softmax = softmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.softmax(self.gate(x))
        return gates[:, :1] * self.a(x) + gates[:, 1:] * self.b(x)


@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: x.softmax(1),
        lambda x: F.softmax(x, dim=-1),
        lambda x: torch.log_softmax(x, 1),
        lambda x: F.gumbel_softmax(x, 1.0, False, 1e-10, 1),
        nn.Softmax(dim=1),
    ],
)
def test_a_gate_by_softmax_depends_on_the_scores_of_the_others_too(softmax):
    model = st.apply_masks(SoftGate(softmax), {"b.weight": torch.zeros(1, 3, dtype=torch.bool)})
    x = torch.randn(5, 3)
    model(x).sum().backward()
    report = layer_collapse(model, x)
    found = {layer.name: layer.on_path for layer in report.layers}
    assert not report.opened  # softmax is followed, not merely opened
    assert found["gate.weight"] == int((model.gate.weight.grad != 0).sum()) == 6


class UsesWeights(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, average: bool) -> torch.Tensor:
        out, weights = self.attention(x, x, x, average_attn_weights=average)
        return self.head((weights if average else weights.sum(1))[:, :, : out.shape[1]] @ out)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}, {"add_bias_kv": True}])
def test_a_forward_may_use_the_weights_of_its_attention(average, options):
    inputs = (torch.randn(2, 5, 4), average)
    model = UsesWeights(**options)
    model(*inputs)
    assert not any(layer.collapsed for layer in layer_collapse(model, inputs).layers)
