"""The surgeries on models nobody here wrote: counts stated, neutral settings bit-equal, everything else kept."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

import sparsetweaks as st

# Activation sites of the ReLU family, of all kinds, and units: (family, every kind, kept shape, changed shape, left).
# A module is one activation site however often it is called: resnet18 has 9 ReLU modules for its 17 activations.
COUNTS = {
    "resnet18": (9, 9, 13, 7, 0),
    "resnet50": (17, 17, 14, 39, 0),
    "vgg16_bn": (15, 15, 9, 4, 0),
    "densenet121": (121, 121, 2, 57, 0),
    "mobilenet_v2": (35, 35, 13, 39, 0),
    "mobilenet_v3_small": (14, 33, 8, 35, 0),
    "convnext_tiny": (0, 18, 0, 1, 0),
    "efficientnet_b0": (0, 49, 12, 53, 0),
    "fasterrcnn_resnet50_fpn": (20, 20, 15, 39, 2),
    "vit_b_16": (0, 12, 0, 0, 0),
}
EVERY_KIND = ("relu", "relu6", "leaky_relu", "gelu", "silu", "hardswish")
FACTORIES = {
    "relu": lambda: nn.ReLU(),
    "relu6": lambda: nn.ReLU6(),
    "gelu": lambda: nn.GELU(),
    "silu": lambda: nn.SiLU(),
    "hardswish": lambda: nn.Hardswish(),
}


def build(name: str) -> tuple[nn.Module, tuple]:
    """A model with random weights, half of its convolution weights pruned, and an input it accepts."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if "rcnn" in name:
            options = {"weights_backbone": None, "min_size": 64, "max_size": 64, "box_detections_per_img": 4}
            model = torchvision.models.get_model(name, weights=None, **options)
        else:
            model = torchvision.models.get_model(name, weights=None, num_classes=10)
    model = st.prune(model, 0.5)
    if "rcnn" in name:
        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
        images = [torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
        return model, (images, [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images])
    size = 224 if name == "vit_b_16" else 48
    return model, (torch.rand(2, 3, size, size, generator=generator),)


def run(model: nn.Module, inputs: tuple, train: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and gradients of a copy, with the same random numbers each time."""
    model = st.copy_model(model).train(train)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if train:
            outputs = tensors(model(*inputs))
            sum(o.square().sum() for o in outputs).backward()
        else:
            with torch.no_grad():
                outputs = tensors(model(*inputs[:1]))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [o.detach() for o in outputs], gradients


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for each in values for tensor in tensors(each) if tensor.is_floating_point()]


@pytest.fixture(scope="module", params=COUNTS)
def case(request):
    name = request.param
    model, inputs = build(name)
    return name, model, inputs


@pytest.mark.filterwarnings("ignore::sparsetweaks.NoEffectWarning")
class TestTorchvision:
    def test_sites_are_counted(self, case):
        name, model, _ = case
        units = st.find_skip_sites(model)
        counts = (
            len(st.find_activations(model).possible),
            len(st.find_activations(model, kinds=EVERY_KIND).possible),
            sum(site.kind == "kept" for site in units.possible),
            sum(site.kind == "changed" for site in units.possible),
            len(units.left),
        )
        assert counts == COUNTS[name]
        assert not st.find_activations(model, kinds=EVERY_KIND).left

    def test_every_site_is_rewritten(self, case):
        name, model, _ = case
        swapped = st.swap_activations(model, "mish", kinds=EVERY_KIND)
        assert len(st.find_activations(swapped, kinds=EVERY_KIND)) == 0
        assert len(st.find_activations(swapped, kinds=("mish",))) == COUNTS[name][1]
        skipped = st.inject_skips(model)
        assert sum(type(m).__name__ == "Skip" for m in skipped.modules()) == COUNTS[name][2] + COUNTS[name][3]
        assert all("skip" in site.left or "loops" in site.left for site in st.find_skip_sites(skipped))

    @pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
    def test_neutral_settings_are_bit_equal(self, case, train):
        _, model, inputs = case
        outputs, gradients = run(model, inputs, train)
        neutral = st.inject_skips(model, strength=0.0, norm=True)
        kinds = {site.kind for site in st.find_activations(model, kinds=EVERY_KIND)}
        for kind in kinds:
            neutral = st.swap_activations(neutral, FACTORIES[kind], kinds=(kind,))
        new_outputs, new_gradients = run(neutral, inputs, train)
        assert all(torch.equal(a, b) for a, b in zip(outputs, new_outputs, strict=True))
        assert all(torch.equal(gradients[name], new_gradients[name]) for name in gradients)

    def test_names_values_and_masks_are_kept(self, case):
        _, model, _ = case
        before = copy.deepcopy(model.state_dict())
        tweaked = st.swap_activations(st.inject_skips(model), "swish")
        after = tweaked.state_dict()
        assert [key for key in after if ".skip." not in key] == list(before)
        assert all(torch.equal(before[key], after[key]) for key in before)
        masks = st.find_masks(model)
        assert masks
        assert all(torch.equal(mask, st.find_masks(tweaked)[name]) for name, mask in masks.items())

    def test_given_model_is_untouched(self, case):
        _, model, _ = case
        before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
        shared = {p.data_ptr() for p in model.parameters()}
        tweaked = st.swap_activations(st.inject_skips(model), "swish")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [type(m) for m in model.modules()] == classes
        assert not shared & {p.data_ptr() for p in tweaked.parameters()}

    def test_outer_class_survives(self, case):
        _, model, _ = case
        with warnings.catch_warnings():
            tweaked = st.swap_activations(st.inject_skips(model), "swish")
        assert isinstance(tweaked, type(model))
