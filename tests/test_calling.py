"""What `inputs=` means, for every function that takes it: what one call of the model takes, without labels."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sparsetweaks as st
from sparsetweaks.calling import arguments, call

DRAW = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(2, 4, 5, 5, generator=DRAW), torch.tensor([0, 1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
    )


TAKE_INPUTS = {
    "cost": lambda model, inputs: st.cost(model, inputs),
    "fold": lambda model, inputs: st.fold(model, inputs=inputs),
    "summary": lambda model, inputs: st.summary(model, inputs=inputs),
    "diff": lambda model, inputs: st.diff(model, model, inputs=inputs),
    "verify": lambda model, inputs: st.verify(model, model, inputs=inputs).raise_if_failed(),
    "distillation_loss": lambda model, inputs: st.distillation_loss(
        torch.zeros(2, 4, 5, 5), teacher=model, inputs=inputs, weight=1.0
    ),
}


@pytest.fixture(params=TAKE_INPUTS.values(), ids=TAKE_INPUTS.keys())
def each(request):
    return request.param


def test_a_tensor_a_tuple_and_a_mapping_are_one_call(each):
    found = {str(each(network(), inputs)) for inputs in (IMAGES, (IMAGES,), {"input": IMAGES})}
    assert len(found) == 1


def test_labels_do_not_belong_to_inputs(each):
    message = (
        r"fails on inputs of shape \(2, 4, 5, 5\), \(2,\).*what one call of the model takes, without labels"
    )
    with pytest.raises(ValueError, match=message) as caught:
        each(network(), (IMAGES, LABELS))
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_are_brought_to_the_models_dtype(each, dtype):
    model = network().to(dtype)
    assert str(each(model, IMAGES)) == str(each(model, IMAGES.to(dtype)))


def test_inputs_are_copies_on_the_models_device_that_need_no_gradient():
    given = {"x": [IMAGES.clone().requires_grad_(True)], "ids": LABELS, "scale": 2.0}
    (nothing, keywords) = arguments(network().to("meta", torch.float16), given)
    assert nothing == () and list(keywords) == ["x", "ids", "scale"] and keywords["scale"] == 2.0
    assert keywords["x"][0].is_meta and keywords["x"][0].dtype == torch.float16
    assert keywords["ids"].is_meta and keywords["ids"].dtype == torch.int64
    assert not keywords["x"][0].requires_grad
    before = IMAGES.clone()
    call(nn.Sequential(nn.ReLU(inplace=True)), IMAGES)
    assert torch.equal(IMAGES, before)


def test_low_precision_is_left_to_a_model_that_is_not():
    ((found,), _) = arguments(nn.Linear(2, 2), torch.zeros(1, 2, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16


def test_a_model_of_two_dtypes_gets_its_inputs_as_they_are():
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    ((found,), _) = arguments(mixed, torch.zeros(1, 2, dtype=torch.float16))
    assert found.dtype == torch.float16


def test_a_named_tuple_within_stays_one():
    class Boxes(NamedTuple):
        corners: Tensor
        scores: Tensor

    class Adds(nn.Module):
        def forward(self, boxes: Boxes) -> Tensor:
            return boxes.corners + boxes.scores

    assert torch.equal(call(Adds(), {"boxes": Boxes(torch.ones(2), torch.ones(2))}), 2 * torch.ones(2))


def test_running_out_of_memory_is_no_fault_of_the_inputs():
    class Full(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        call(Full(), IMAGES)


@pytest.mark.parametrize("name", ["fold", "verify", "cost"])
def test_no_generator_is_seeded(name, monkeypatch):
    """`torch.manual_seed` reaches the generators of every GPU, whether they are put back or not."""
    seeded = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), Noise())
    before = torch.get_rng_state()
    TAKE_INPUTS[name](model, IMAGES)
    assert not seeded and torch.equal(torch.get_rng_state(), before)


class Noise(nn.Module):
    """Draws in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)
