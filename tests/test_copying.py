"""The copy is whole and separate, where `copy.deepcopy` is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm

from sparsetweaks.copying import copy_model


def model_with_everything() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout()
    )
    model[3].weight = model[2].weight
    model[0].requires_grad_(False)
    model[1].eval()
    model[1].register_buffer("scratch", torch.ones(2), persistent=False)
    return model.to(memory_format=torch.channels_last)


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def test_the_copy_is_equal_and_shares_nothing():
    model = model_with_everything()
    copied = copy_model(model)
    assert type(copied) is type(model)
    assert list(copied.state_dict()) == list(model.state_dict())
    for one, other in zip(tensors(model), tensors(copied), strict=True):
        assert torch.equal(one, other)
        assert (one.requires_grad, one.stride(), one.dtype) == (
            other.requires_grad,
            other.stride(),
            other.dtype,
        )
        assert one.data_ptr() != other.data_ptr()
    assert copied[3].weight is copied[2].weight
    assert [m.training for m in copied.modules()] == [m.training for m in model.modules()]


def test_the_original_and_the_random_state_are_untouched():
    model = model_with_everything()
    model[2](torch.ones(1, 4)).sum().backward()
    gradient = model[2].weight.grad.clone()
    state = torch.get_rng_state()
    before = [value.clone() for value in tensors(model)]
    copied = copy_model(model)
    with torch.no_grad():
        for value in copied.parameters():
            value.add_(1)
    assert all(torch.equal(one, other) for one, other in zip(before, tensors(model), strict=True))
    assert torch.equal(model[2].weight.grad, gradient)
    assert copied[2].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_torch_pruned_model_that_has_run_is_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    batch = torch.ones(2, 4)
    output = model(batch)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    copied = copy_model(model)
    assert model[0].weight.grad_fn is not None  # the caller's graph is as it was
    assert copied[0].weight.is_leaf
    assert torch.equal(copied(batch), output)
    with torch.no_grad():
        copied[0].weight_orig.zero_()  # its hook computes its own weight
    assert torch.equal(copied(batch), copied[2](copied[0].bias.relu()).expand(2, 2))
    assert torch.equal(model(batch), output)
    copied(batch).sum().backward()
    assert copied[0].weight_orig.grad is not None
    assert model[0].weight_orig.grad is None


def test_a_tensor_with_a_history_is_copied_wherever_it_is_kept():
    class Recorder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.last = out
            self.history = {"outputs": [out, (out * 2,)], "number": 3}
            return out

    model = Recorder(2, 2)
    output = model(torch.ones(1, 2))
    copied = copy_model(model)
    assert torch.equal(copied.last, output)
    assert copied.last is copied.history["outputs"][0] is not model.last  # one tensor twice stays one
    assert torch.equal(copied.history["outputs"][1][0], output * 2)
    assert not copied.last.requires_grad


def test_a_buffer_with_a_history_is_copied():
    model = nn.Linear(2, 2)
    model.register_buffer("mean", model.weight.mean())
    copied = copy_model(model)
    assert torch.equal(copied.mean, model.mean)
    assert "mean" in copied.state_dict()


def test_hooks_live_on_and_keep_the_callers_objects():
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen.append(output)

    recorder = Recorder()
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(recorder.record)
    copied = copy_model(model)
    copied(torch.ones(1, 2))
    assert len(recorder.seen) == 1


def test_a_hook_bound_to_a_module_of_the_model_is_bound_to_its_copy():
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.calls = 0
            self.inner.register_forward_hook(self.count)

        def count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.calls += 1

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = Counter()
    copied = copy_model(model)
    copied(torch.ones(1, 2))
    assert (model.calls, copied.calls) == (0, 1)


def test_parametrizations_are_copied():
    model = weight_norm(nn.Linear(3, 3))
    copied = copy_model(model)
    batch = torch.ones(1, 3)
    assert torch.equal(copied(batch), model(batch))
    with torch.no_grad():
        copied.parametrizations.weight.original0.mul_(2)
    assert not torch.equal(copied.weight, model.weight)


def test_a_parametrization_removed_from_or_added_to_the_copy_stays_with_the_original():
    """torch keeps the properties of a parametrized module in its class, which `copy.deepcopy` shares."""
    model = weight_norm(nn.Linear(3, 3))
    weight = model.weight.detach().clone()
    copied = copy_model(model)
    parametrize.register_parametrization(copied, "bias", nn.Softplus())
    assert torch.equal(copied.bias, nn.functional.softplus(model.bias))
    assert isinstance(model.bias, nn.Parameter)
    parametrize.remove_parametrizations(copied, "weight")
    assert torch.equal(model.weight, weight)
    assert isinstance(copied.weight, nn.Parameter)
    parametrize.remove_parametrizations(copied, "bias")
    assert type(copied) is nn.Linear
    assert parametrize.type_before_parametrizations(model) is nn.Linear


def test_only_models_are_copied():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        copy_model({})


def test_buffers_that_share_memory_still_share_it_in_the_copy():
    """torch's own deepcopy keeps views of one storage; the quick way for plain buffers must not part them."""
    model = nn.Module()
    whole = torch.arange(6.0)
    model.register_buffer("whole", whole)
    model.register_buffer("again", whole.view(2, 3))
    model.register_buffer("part", whole[2:4])
    model.register_buffer("alone", torch.ones(2, 3).t())
    model.register_buffer("complex", torch.ones(2, dtype=torch.complex64).conj())
    copied = copy_model(model)
    for name, buffer in model.named_buffers():
        assert torch.equal(copied.get_buffer(name), buffer)
        assert copied.get_buffer(name).stride() == buffer.stride()
    copied.whole[2] = 7.0
    assert copied.again[0, 2] == copied.part[0] == 7.0
    assert whole[2] == 2.0


def test_a_sparse_buffer_and_one_with_a_gradient_are_copied_as_torch_copies_them():
    model = nn.Module()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("trained", torch.ones(2, requires_grad=True))
    model.trained.sum().backward()
    copied = copy_model(model)
    assert torch.equal(copied.sparse.to_dense(), torch.eye(3))
    assert copied.trained.requires_grad
    assert torch.equal(copied.trained, model.trained)
    assert copied.trained is not model.trained
