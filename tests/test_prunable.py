"""Which weights may be pruned: the paper's by default, any of them by name, type or predicate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm

from sparsetweaks.errors import SurgeryError
from sparsetweaks.prunable import prunable_weights


def classifier_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Flatten(),
        nn.Linear(4, 8),
        nn.Linear(8, 2),
    )


def transformer() -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(
        nn.Embedding(5, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 5)
    )


def test_convolutions_where_there_are_any():
    model = classifier_model()
    weights = prunable_weights(model)
    assert list(weights) == ["0.weight", "2.0.weight", "3.weight"]
    assert all(weights[name] is model.get_parameter(name) for name in weights)


def test_otherwise_linear_layers_and_attention_but_not_the_classifier_or_embeddings():
    assert [name.removeprefix("1.layers.0.") for name in prunable_weights(transformer())] == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    assert list(prunable_weights(attention)) == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
    ]  # its out_proj is the linear layer registered last


def test_every_kind_of_convolution():
    kinds = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
    model = nn.Sequential(*[kind(2, 2, 1) for kind in kinds], nn.Linear(2, 2))
    assert len(prunable_weights(model)) == len(kinds)


def test_layers_choose_the_kind():
    assert list(prunable_weights(classifier_model(), layers=["linear"])) == ["5.weight"]
    both = list(prunable_weights(classifier_model(), layers=("conv", "linear")))
    assert both == ["0.weight", "2.0.weight", "3.weight", "5.weight"]
    with pytest.raises(ValueError, match=r"unknown layers \['dense'\].*'conv', 'linear'"):
        prunable_weights(classifier_model(), layers=["dense"])


def test_a_backbone_that_ends_in_a_normalisation_has_no_classifier():
    convs = [nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)]
    assert list(prunable_weights(nn.Sequential(*convs))) == ["0.weight"]
    assert list(prunable_weights(nn.Sequential(*convs, nn.BatchNorm2d(2)))) == ["0.weight", "1.weight"]


def test_the_only_layer_is_no_classifier():
    assert list(prunable_weights(nn.Linear(2, 2))) == ["weight"]
    assert list(prunable_weights(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))) == ["1.weight"]


def test_what_a_tweak_added_is_neither_prunable_nor_the_classifier():
    class AddedConv(nn.Conv2d):
        added_by_tweak = True

    class AddedSkip(nn.Sequential):
        added_by_tweak = True

    model = classifier_model()
    plain = list(prunable_weights(model))
    model.append(AddedConv(2, 2, 1)).append(AddedSkip(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    assert list(prunable_weights(model)) == plain
    assert list(prunable_weights(model, layers="linear")) == ["5.weight"]
    with pytest.raises(ValueError, match="lies inside '7'"):
        prunable_weights(model, include="7")


def test_weights_tied_to_an_embedding_are_left_and_other_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5), nn.Linear(8, 2))
    model[1].weight = model[0].weight
    assert list(prunable_weights(model)) == ["0.weight", "2.weight"]
    model.insert(0, nn.Embedding(5, 8))
    model[3].weight = model[0].weight
    assert list(prunable_weights(model)) == ["1.weight"]
    with pytest.raises(ValueError, match=r"'3\.weight'"):
        prunable_weights(model, include="3.weight")


@pytest.mark.parametrize(
    ("include", "names"),
    [
        ("6", ["6.weight"]),
        ("6.weight", ["6.weight"]),
        ("2", ["2.0.weight"]),
        ("2.*", ["2.0.weight"]),
        ("[02]", ["0.weight", "2.0.weight"]),
        (nn.Linear, ["5.weight", "6.weight"]),
        (lambda name, module: getattr(module, "out_features", 0) == 2, ["6.weight"]),
        (["0", nn.ConvTranspose2d, lambda name, module: name == "6"], ["0.weight", "3.weight", "6.weight"]),
    ],
)
def test_include_is_exactly_what_is_taken(include, names):
    assert list(prunable_weights(classifier_model(), include=include)) == names


def test_exclude_takes_out_of_what_is_taken():
    model = classifier_model()
    assert list(prunable_weights(model, exclude="0")) == ["2.0.weight", "3.weight"]
    assert list(prunable_weights(model, exclude=[nn.ConvTranspose2d, "2"])) == ["0.weight"]
    assert list(prunable_weights(model, include=nn.Linear, exclude="6.weight")) == ["5.weight"]
    assert list(prunable_weights(model, exclude="6")) == list(prunable_weights(model))  # left out anyway
    assert list(prunable_weights(model, include=["0", "5"], layers="linear")) == ["5.weight"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_what_matches_nothing_is_told_with_close_names(argument):
    with pytest.raises(ValueError, match=f"{argument}: .*'2.0.wieght'; close: '2.0.weight'"):
        prunable_weights(classifier_model(), **{argument: "2.0.wieght"})
    with pytest.raises(
        ValueError, match=f"{argument}: .*BatchNorm2d; they belong to: Conv2d, ConvTranspose2d, Linear"
    ):
        prunable_weights(classifier_model(), **{argument: ["0", nn.BatchNorm2d]})
    with pytest.raises(ValueError, match="take a glob pattern"):
        prunable_weights(classifier_model(), **{argument: 3})


def test_nothing_to_prune_is_an_error():
    for model, exclude in ((nn.ReLU(), None), (nn.Conv2d(1, 1, 1), nn.Conv2d)):
        with pytest.raises(ValueError, match="nothing to prune"):
            prunable_weights(model, exclude=exclude)


def test_a_torch_pruned_weight_goes_by_its_logical_name():
    model = classifier_model()
    torch_prune.l1_unstructured(model[2][0], "weight", amount=0.5)
    weights = prunable_weights(model)
    assert list(weights) == ["0.weight", "2.0.weight", "3.weight"]
    assert weights["2.0.weight"] is model[2][0].weight_orig


def test_weights_that_have_no_values_of_their_own_are_told():
    lazy = nn.Sequential(nn.LazyConv2d(2, 1), nn.Linear(2, 2))
    with pytest.raises(SurgeryError, match=r"'0.weight' is not initialised.*one batch"):
        prunable_weights(lazy)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Linear(2, 2))
    with pytest.raises(SurgeryError, match=r"'0\.weight' is on the meta device"):
        prunable_weights(meta)
    computed = nn.Sequential(weight_norm(nn.Conv2d(2, 2, 1)), nn.Conv2d(2, 2, 1), nn.Linear(2, 2))
    with pytest.raises(SurgeryError, match="a parametrization computes it"):
        prunable_weights(computed)
    assert list(prunable_weights(computed, exclude="0")) == ["1.weight"]
