from __future__ import annotations

import importlib
import linecache
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsetweaks.lottery.config import LotteryError, Network
from sparsetweaks.lottery.models import build, code_of
from sparsetweaks.surgery.sites import find_skip_sites

PUBLISHED = {  # parameters with 10 classes and 3 channels
    "resnet18": 11_173_962,  # the usual CIFAR variant
    "resnet34": 21_282_122,
    "resnet20": 269_722
    + 576
    + 2_176,  # He et al.'s 0.27 M, and 1x1 convolutions with BatchNorm as its two shortcuts
    "resnet32": 464_154 + 576 + 2_176,  # He et al.'s 0.46 M
    "plain20": 269_722,  # He et al.: a plain network has as many as its residual twin of option A
    "vgg16": 14_728_266 - 4_224,  # without the convolutions' biases, which BatchNorm makes idle
    "mobilenet_v1": 4_231_976 - 990 * 1_025,  # Howard et al.'s 4.2 M, with 10 classes and not 1,000
    "mobilenet_v2": 3_504_872 - 990 * 1_281,  # torchvision's, Sandler et al.'s 3.4 M
}
CONVOLUTIONS = {
    "resnet18": 20, "resnet34": 36, "resnet20": 21, "resnet32": 33, "plain20": 19, "vgg16": 13, "mobilenet_v1": 27,
    "mobilenet_v2": 52,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    model = build(Network(name), channels=3, classes=10, seed=0)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("size", [8, 32])
def test_images_of_any_size_give_logits(name: str, size: int) -> None:
    model = build(Network(name, width=8), channels=1, classes=7, seed=0)
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_image_shrinks_as_it_should_before_the_mean(name: str) -> None:
    model, shapes = build(Network(name, width=4), channels=3, classes=10, seed=0), []
    last = model.stages if hasattr(model, "stages") else model.features
    last.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[-1]))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert shapes == [
        {"resnet18": 4, "resnet34": 4, "vgg16": 1, "mobilenet_v1": 2, "mobilenet_v2": 4}.get(name, 8)
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_convolution_is_a_site_for_a_skip(name: str) -> None:
    model = build(Network(name, width=4), channels=3, classes=10, seed=0)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == len(list(find_skip_sites(model))) == CONVOLUTIONS[name]


def test_building_depends_on_the_seed_alone_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    models = [build(Network("vgg16", width=4), channels=3, classes=10, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [next(model.parameters()) for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_torchvision_by_name() -> None:
    pytest.importorskip("torchvision")
    model = build(Network("torchvision:squeezenet1_1"), channels=3, classes=5, seed=0)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(LotteryError, match="torchvision has no model 'resnet19'"):
        build(Network("torchvision:resnet19"), channels=3, classes=5, seed=0)
    with pytest.raises(LotteryError, match="3 channels, and these have 1"):
        build(Network("torchvision:squeezenet1_1"), channels=1, classes=5, seed=0)


def test_a_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_models.py").write_text(
        "from torch import nn\n"
        "def small(channels, classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))\n"
        "def wrong(channels, classes): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = build(Network("mine_of_models:small"), channels=1, classes=4, seed=0)
    assert isinstance(model, nn.Sequential)
    for name, message in (
        ("mine_of_models:wrong", "made a int, not a torch.nn.Module"),
        ("mine_of_models:none", "is not a function that can be imported"),
        ("no_such_module:none", "is not a function that can be imported"),
    ):
        with pytest.raises(LotteryError, match=message):
            build(Network(name), channels=1, classes=4, seed=0)
    sys.modules.pop("mine_of_models")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Network("resnet19"), r"depth must be 6n \+ 2"),
        (lambda: Network("plain18"), r"depth must be 6n \+ 2"),
        (lambda: Network("densenet"), "unknown network 'densenet'; choose from resnet18"),
        (lambda: Network("resnet"), "unknown network 'resnet'"),
        (lambda: Network("resnet20", width=0), "width must be at least 1"),
        (lambda: Network("torchvision:resnet18", width=8), "has no width"),
    ],
)
def test_networks_that_make_no_sense_are_refused(wrong, message: str) -> None:
    with pytest.raises(LotteryError, match=message):
        wrong()


def test_a_users_network_is_keyed_by_its_code(tmp_path, monkeypatch):
    def written(text: str) -> tuple[str, ...]:
        (tmp_path / "own_net.py").write_text(text, encoding="utf-8")
        sys.modules.pop("own_net", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        return code_of(Network("own_net:make"), channels=1, classes=3, seed=0)

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = (
        "from torch import nn\n\n"
        "def act(x):\n    return x.relu()\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, channels, classes):\n"
        "        super().__init__()\n        self.layer = nn.Linear(channels, classes)\n\n"
        "    def forward(self, x):\n        return act(self.layer(x))\n\n"
        "def make(channels, classes):\n    return Net(channels, classes)\n"
    )
    first = written(text)
    assert len(first) == 1
    assert written(text + "# a remark\n") == first
    assert written(text.replace("relu", "tanh")) != first
    assert written(text.replace("classes)\n\n", "classes, bias=False)\n\n")) != first
    drawn = "        import random; nn.init.constant_(self.layer.weight, random.random())\n"
    shown = "\n    def extra_repr(self):\n        return repr(act)\n"
    own = text.replace("classes)\n\n    def", f"classes)\n{drawn}{shown}\n    def")
    assert own != text
    assert written(own) == written(own)  # weights of its own, and an address in its text
    assert code_of(Network("resnet8", width=4), channels=1, classes=3, seed=0) == ()
    assert "own_net" in sys.modules


def test_networks_with_further_outputs_are_built_without():
    googlenet = build(Network("torchvision:googlenet"), channels=3, classes=2, seed=0)
    assert googlenet(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
