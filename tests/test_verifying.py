"""The report finds every kind of damage, names it, and passes what every tweak rightly changes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_models import FORMS_AND_OURS, a_batch, inputs, masked_rooted, small_model, tied_model
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsetweaks.converting import convert_masks
from sparsetweaks.copying import copy_model
from sparsetweaks.errors import SurgeryError
from sparsetweaks.keeping import keep_masks
from sparsetweaks.masks import apply_masks, find_masks
from sparsetweaks.pruning import prune
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.skips import inject_skips
from sparsetweaks.testing import differences, snapshot
from sparsetweaks.verifying import Verification, verify


def ticket() -> nn.Module:
    return prune(small_model(), 0.5)


def batch() -> Tensor:
    return a_batch()[0]


def verdicts(report: Verification) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks}


def the_only_failure(report: Verification) -> str:
    assert [check.passed for check in report.checks].count(False) == 1, str(report)
    with pytest.raises(SurgeryError, match="the model is not what it was where it should be"):
        report.raise_if_failed()
    return str(report.failed[0])


@pytest.mark.parametrize("form", FORMS_AND_OURS)
def test_tweaks_at_their_neutral_setting_pass_in_every_form(form):
    model = masked_rooted(form)
    before = snapshot(model)
    tweaked = inject_skips(swap_activations(model, "relu"))
    report = verify(model, tweaked, inputs=inputs())
    assert report.raise_if_failed() is report
    assert report.ok
    assert set(verdicts(report).values()) == {True, None}
    assert verdicts(report)["function"] is True
    assert differences(before, snapshot(model)) == []
    assert (report.added_parameters, report.added_nonzeros, report.largest_difference) == (1, 1, 0.0)


@pytest.mark.parametrize("to", ["buffers", "torch_prune", "parametrization", "zeros"])
def test_conversions_pass(to):
    model = ticket()
    report = verify(model, convert_masks(model, to=to), inputs=batch(), zeros=True)
    assert report.ok, str(report)


def test_what_a_tweak_adds_is_counted():
    model = prune(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)), 0.5)
    report = verify(
        model, inject_skips(model, shortcut="project-all", strength=1.0), inputs=batch(), neutral=False
    )
    assert report.ok
    assert verdicts(report)["function"] is None
    assert report.largest_difference > 0
    assert report.added_parameters == report.added_nonzeros > 0
    assert report.added_flops == 2 * 6 * 9 * 2 * 4  # 6 images, 3 x 3 positions, from 2 to 4 channels
    assert report.added_effective_flops == report.added_flops
    dense = verify(model, model, inputs=batch())
    assert (dense.added_parameters, dense.added_flops, dense.added_effective_flops) == (0, 0, 0)


def test_the_function_is_judged_unless_it_may_differ():
    model = ticket()
    swapped = swap_activations(model, "silu")
    line = the_only_failure(verify(model, swapped, inputs=batch()))
    assert line.startswith("FAILED  function: eval: outputs differ by up to 0.")
    assert verify(model, swapped, inputs=batch(), neutral=False).ok
    assert "function" not in verdicts(verify(model, swapped))


def test_a_gradient_that_differs_is_found():
    class Stopped(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    model = ticket()
    after = copy_model(model)
    after[1].conv.__class__ = Stopped
    assert "eval: the gradient of '0.weight' differs" in the_only_failure(
        verify(model, after, inputs=batch())
    )


def test_a_mode_in_which_the_given_model_raises_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    line = next(
        check
        for check in verify(model, copy_model(model), inputs=torch.ones(1, 4)).checks
        if check.name == "function"
    )
    assert line.passed is True
    assert "in eval mode" in line.found
    assert "training mode, where the given model raises ValueError" in line.found


def lose_a_mask(model: nn.Module) -> None:
    del model[0]._buffers["weight_mask"]


def revive(model: nn.Module) -> None:
    model[0].weight.data[~model[0].weight_mask] = 1e-30


def change_a_value(model: nn.Module) -> None:
    model[1].norm.running_mean[0] += 1


def change_the_dtype(model: nn.Module) -> None:
    model[4].double()


def freeze(model: nn.Module) -> None:
    model[4].bias.requires_grad_(False)


def change_the_memory_format(model: nn.Module) -> None:
    model[1].conv.weight.data = model[1].conv.weight.data.contiguous(memory_format=torch.channels_last)


def drop(model: nn.Module) -> None:
    model[4].bias = None


def tie(model: nn.Module) -> None:
    model[4].register_parameter("twin", model[4].weight)
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())


def other_mask(model: nn.Module) -> None:
    model[0].weight_mask[tuple(model[0].weight_mask.nonzero()[0])] = False


DAMAGE: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "masks": (lose_a_mask, "'0.weight' has lost its mask"),
    "masks, other": (other_mask, "'0.weight' keeps 43 weights, was 44"),
    "zeros": (revive, "of '0.weight' have come back"),
    "values": (change_a_value, "'1.norm.running_mean' differs by up to 1"),
    "properties": (freeze, "requires_grad of '4.bias' is False, was True"),
    "properties, dtype": (change_the_dtype, "dtype of '4.weight' is torch.float64, was torch.float32"),
    "properties, format": (
        change_the_memory_format,
        "memory format (strides) of '1.conv.weight' is (36, 1, 12, 4)",
    ),
    "names": (drop, "'4.bias' is gone"),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_is_found_and_named(kind, trained):
    damage, message = DAMAGE[kind]
    model = ticket()
    after = copy_model(model)
    damage(after)
    report = verify(model, after, trained=trained)
    found = {check.name: check for check in report.checks}[kind.partition(",")[0]]
    if trained and kind == "values":
        assert report.ok
    else:
        assert found.passed is False
        assert message in found.found


def test_tying_that_came_or_went_is_found():
    tied, untied = tied_model(), tied_model()
    untied.load_state_dict(tied.state_dict())
    untied[1].weight = nn.Parameter(tied[0].weight.detach().clone())
    assert "'0.weight' and '1.weight' are two tensors now" in the_only_failure(verify(tied, untied))
    assert "'0.weight' and '1.weight' are one tensor now" in the_only_failure(verify(untied, tied))
    masked = apply_masks(tied, {"1.weight": torch.eye(4).bool()})
    assert verify(masked, convert_masks(masked, to="parametrization"), inputs=torch.ones(2, 4)).ok


def test_a_trained_ticket_is_judged_by_its_masks_and_structure():
    model = ticket()
    for kept in (True, False):
        after = swap_activations(model, "silu")
        optimizer = torch.optim.SGD(after.parameters(), lr=0.1, momentum=0.9)
        if kept:
            with keep_masks(after, optimizer):
                train(after, optimizer)
        else:
            train(after, optimizer)
        assert "; if it was trained or rescaled in between, give trained=True" in str(verify(model, after))
        report = verify(model, after, inputs=batch(), trained=True)
        assert verdicts(report)["values"] is None
        assert "function" not in verdicts(report)
        assert verdicts(report)["zeros"] is kept
        assert report.ok is kept


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    images, labels = a_batch()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def test_wrapped_models_are_looked_into():
    model = ticket()
    for wrapped in (
        torch.optim.swa_utils.AveragedModel(copy_model(model)),
        torch.compile(copy_model(model), backend="eager"),
        nn.DataParallel(copy_model(model)),
    ):
        assert verify(model, wrapped).ok


def test_plain_zeros_are_masks_when_asked_for():
    model = convert_masks(ticket(), to="zeros")
    after = copy.deepcopy(model)
    with torch.no_grad():
        after[0].weight[after[0].weight == 0] = 1.0
    assert verdicts(verify(model, model))["masks"] is None
    report = verify(model, after, zeros=True)
    assert [check.name for check in report.failed] == ["masks", "zeros", "values"]


def test_neither_model_nor_any_generator_is_touched():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4))
    model(torch.ones(2, 4)).sum().backward()
    after = swap_activations(copy_model(model), "silu") if find_masks(model) else copy_model(model)
    given = torch.ones(3, 4)
    states = [snapshot(model), snapshot(after), torch.get_rng_state(), random.getstate()]
    assert verify(model, after, inputs=given).ok
    assert differences(states[0], snapshot(model)) == []
    assert differences(states[1], snapshot(after)) == []
    assert torch.equal(states[2], torch.get_rng_state())
    assert random.getstate() == states[3]
    assert torch.equal(given, torch.ones(3, 4))


def test_models_with_arguments_and_outputs_of_many_kinds():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, object]:
            x = self.layer(x) * (1 if scale is None else scale)
            return {"values": [x, x.sum()], "text": "no tensor"}

    model, given = Many(), torch.ones(2, 4)
    other = copy_model(model)
    for arguments in (given, (given, torch.tensor(2.0)), {"x": given, "scale": torch.tensor(2.0)}):
        assert verify(model, other, inputs=arguments).ok
    torch_prune.l1_unstructured(other.layer, "weight", 0.5)
    report = verify(model, other, inputs=given)
    assert [check.name for check in report.failed] == ["masks", "values", "function"]


def test_only_models_are_verified():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        verify(small_model(), {})


def test_sparse_gradients_are_compared():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    words = torch.tensor([0, 1])
    assert not verify(model, copy_model(model), inputs=words, neutral=True).failed
    other = copy_model(model)
    with torch.no_grad():
        other[1].weight.add_(1)
    assert verify(model, other, inputs=words, neutral=True).failed


def test_a_tied_weight_is_masked_under_whichever_of_its_names():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    masked = convert_masks(
        prune(nn.Sequential(first, nn.ReLU(), second, nn.Linear(4, 2)), 0.5), to="torch_prune"
    )
    assert not verify(masked, convert_masks(masked, to="zeros"), zeros=True).failed
