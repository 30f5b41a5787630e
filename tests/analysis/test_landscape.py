"""Lines and planes against brute force: the weights or inputs moved by hand, the loss taken again."""

from __future__ import annotations

import io
import math
import sys

import pytest
import torch
from torch import nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from sparsetweaks.analysis import hessian_top_eigenvalues, input_loss_plane, loss_line, loss_plane
from sparsetweaks.analysis.directions import rescale
from sparsetweaks.analysis.evaluation import Batches, reestimate_statistics, working_copy
from sparsetweaks.analysis.loss_shapes import LossLine, LossPlane
from sparsetweaks.analysis.terrain import Terrain
from sparsetweaks.copying import copy_model
from sparsetweaks.masks import apply_masks

FORMS = ["dense", "buffers", "torch.nn.utils.prune", "parametrization"]
FEW = {"points": 5}


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(3, 2, 2),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.uniform_(model[1].running_var, 0.5, 1.5)
    nn.init.normal_(model[1].running_mean)
    return model


def masks_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = {"0.weight": torch.rand(3, 1, 3, 3, generator=generator) > 0.5}
    masks["4.weight"] = torch.rand(2, 3, 2, 2, generator=generator) > 0.5
    masks["4.weight"][0] = False  # a filter that is pruned whole
    return masks


def masked(form: str = "buffers", seed: int = 0) -> nn.Sequential:
    model, masks = plain(seed), masks_of(seed)
    if form == "buffers":
        return apply_masks(model, masks)
    for name, mask in masks.items():
        layer = model.get_submodule(name[0])
        if form == "torch.nn.utils.prune":
            prune.custom_from_mask(layer, "weight", mask)
        if form == "parametrization":
            parametrize.register_parametrization(layer, "weight", FakeSparsity(mask))
    return model


def batch(examples: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(examples, 1, 5, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (examples,), generator=generator)


def loss_at(model: nn.Module, change=lambda name, weight: weight) -> float:
    """By hand, on an ordinary model that holds its own zeros."""
    moved = copy_model(model).eval()
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.copy_(change(name, parameter))
        return F.cross_entropy(moved(batch()[0].clone()), batch()[1]).item()


# ----------------------------------------------------------------------------------------------------
# Along a direction


@pytest.mark.parametrize("form", FORMS)
def test_a_line_along_the_top_eigenvector(form):
    model = masked(form)
    reference = plain() if form == "dense" else masked("buffers")
    top = hessian_top_eigenvalues(model, batch(), F.cross_entropy, tolerance=1e-12)
    line = loss_line(model, batch(), F.cross_entropy, direction=top, **FEW)
    assert line.positions == (-0.5, -0.25, 0, 0.25, 0.5)
    assert line.unit == "Euclidean distance"
    for t, value in zip(line.positions, line.losses, strict=True):
        expected = loss_at(reference, lambda name, weight: weight + t * top.vectors[0][name])  # noqa: B023
        assert value == pytest.approx(expected, rel=1e-12)
    assert line.rise == max(line.losses) - line.losses[2]
    near = loss_line(model, batch(), F.cross_entropy, direction=top, points=3, radius=1e-3)
    curvature = (near.losses[0] - 2 * near.losses[1] + near.losses[2]) / 1e-6
    assert curvature == pytest.approx(top.values[0], rel=1e-4)


def test_a_direction_of_some_parameters_scaled_by_filters():
    model = masked()
    direction = {"4.weight": torch.randn(2, 3, 2, 2).double(), "6.bias": torch.randn(3).double()}
    line = loss_line(model, batch(), F.cross_entropy, direction=direction, scale="filter", radius=2.0, **FEW)
    weight, bias = model[4].weight.detach(), model[6].bias.detach()
    filters = [part * w.norm() / part.norm() for part, w in zip(direction["4.weight"], weight, strict=True)]
    by_name = {
        "4.weight": torch.stack(filters),
        "6.bias": direction["6.bias"] * bias.norm() / direction["6.bias"].norm(),
    }
    for t, value in zip(line.positions, line.losses, strict=True):
        expected = loss_at(model, lambda n, w: w + t * by_name[n] if n in by_name else w)  # noqa: B023
        assert value == pytest.approx(expected, rel=1e-12)
    assert line.unit == "norms of each filter"
    assert line.kept == 12 + 3  # the pruned filter has norm 0 and stays
    with pytest.raises(ValueError, match="between two networks"):
        _ = line.barrier


def test_filters_that_are_all_zero_stay():
    weights = {"w": torch.tensor([[0.0, 0.0], [3.0, 4.0]])}
    scaled = rescale({"w": torch.tensor([[1.0, 1.0], [0.0, 2.0]])}, weights, "filter")
    assert scaled["w"].tolist() == [[0, 0], [0, 5]]
    assert rescale({"w": torch.tensor([[1.0, 1.0], [0.0, 0.0]])}, {"w": torch.ones(2, 2)}, "filter")["w"][
        1
    ].tolist() == [0, 0]
    with pytest.raises(ValueError, match="zero everywhere"):
        rescale({"w": torch.zeros(2, 2)}, weights, "plain")
    with pytest.raises(ValueError, match="nothing would move"):
        rescale({"w": torch.tensor([[1.0, 1.0], [0.0, 0.0]])}, weights, "filter")


# ----------------------------------------------------------------------------------------------------
# Between two networks


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("other_form", FORMS)
def test_a_line_between_two_networks_and_its_barrier(form, other_form):
    first, second = masked("buffers", 0), plain(1) if other_form == "dense" else masked("buffers", 1)
    other = second if other_form == "dense" else masked(other_form, 1)
    line = loss_line(masked(form, 0), batch(), F.cross_entropy, to=other, **FEW)
    assert line.positions == (0, 0.25, 0.5, 0.75, 1)
    expected = []
    for t in line.positions:
        moved = copy_model(first).eval()
        with torch.no_grad():
            tensors = {**dict(moved.named_parameters()), **dict(moved.named_buffers())}
            state = second.state_dict()
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    tensor.copy_((1 - t) * tensor + t * state[name])
            expected.append(F.cross_entropy(moved(batch()[0].clone()), batch()[1]).item())
    assert line.losses == pytest.approx(expected, rel=1e-12)
    assert line.losses[0] == pytest.approx(loss_at(first), rel=1e-12)
    assert line.losses[-1] == pytest.approx(loss_at(second), rel=1e-12)
    straight = [(1 - t) * expected[0] + t * expected[-1] for t in line.positions]
    assert line.barrier == pytest.approx(
        max(e - s for e, s in zip(expected, straight, strict=True)), abs=1e-12
    )
    masks = [masks_of(0), masks_of(1)]
    if other_form == "dense":
        masks[1] = {name: torch.ones_like(mask) for name, mask in masks[1].items()}
    pruned = sum(int((~(masks[0][name] | masks[1][name])).sum()) for name in masks[0])
    assert line.weights - line.kept == pruned


def test_the_intersection_of_the_masks_restricts_both_ends():
    first, second = masked("buffers", 0), masked("torch.nn.utils.prune", 1)
    line = loss_line(first, batch(), F.cross_entropy, to=second, masks="intersection", **FEW)
    masks = {name: masks_of(0)[name] & masks_of(1)[name] for name in masks_of(0)}
    ends = [masked("buffers", seed) for seed in (0, 1)]
    expected = [loss_at(end, lambda n, w: w * masks[n] if n in masks else w) for end in ends]
    assert (line.losses[0], line.losses[-1]) == pytest.approx(tuple(expected), rel=1e-12)
    assert line.weights - line.kept == sum(int((~mask).sum()) for mask in masks.values())
    assert loss_line(first, batch(), F.cross_entropy, to=first).barrier == pytest.approx(0, abs=1e-12)


class Attending(nn.Module):
    """Adds buffers to its scores, whose names end as masks' do."""

    def __init__(self, causal: float = -math.inf, shift: float = 0.0, allowed: bool = True) -> None:
        super().__init__()
        self.score = nn.Linear(3, 3).double()
        self.register_buffer("attn_mask", torch.triu(torch.full((3, 3), causal), 1).double())
        self.register_buffer("soft_mask", torch.full((3,), shift).double())
        self.register_buffer("allowed_mask", torch.tensor([allowed, True, True]))

    def forward(self, inputs):
        scores = (self.score(inputs)[:, None] + self.attn_mask).softmax(2).sum(1) + self.soft_mask
        return scores * self.allowed_mask


def test_buffers_between_two_networks_are_interpolated_unless_they_are_equal():
    data = torch.randn(8, 3).double(), torch.randint(3, (8,))
    first, second = Attending(), Attending(shift=1.0)
    second.soft_mask[0] = 3
    line = loss_line(first, data, F.cross_entropy, to=second, points=3)
    for t, value in zip(line.positions, line.losses, strict=True):
        moved = copy_model(first)
        with torch.no_grad():
            for parameter, end in zip(moved.parameters(), second.parameters(), strict=True):
                parameter.copy_((1 - t) * parameter + t * end)
            moved.soft_mask.copy_(t * second.soft_mask)
            assert value == pytest.approx(F.cross_entropy(moved(data[0]), data[1]).item(), rel=1e-12)
    same = loss_line(first, data, F.cross_entropy, to=first, points=11)
    assert len(set(same.losses)) == 1  # to the bit
    with pytest.raises(ValueError, match="'attn_mask' is infinite in one network"):
        loss_line(first, data, F.cross_entropy, to=Attending(causal=-1.0))
    with pytest.raises(ValueError, match=r"'allowed_mask' \(torch\.bool\) differs"):
        loss_line(first, data, F.cross_entropy, to=Attending(allowed=False))


class Waves(nn.Module):
    """Complex weights, one of them pruned, beside real ones, and a whole number that chooses."""

    def __init__(self, seed: int, chosen: int = 1) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128, generator=draw))
        self.real = nn.Parameter(torch.randn(3, generator=draw, dtype=torch.float64))
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex128, generator=draw))
        self.chosen = nn.Parameter(torch.tensor([chosen]), requires_grad=False)

    def forward(self, inputs):
        return ((inputs.to(self.mix.dtype) @ self.mix) * self.phase).abs() * self.real * self.chosen


@pytest.mark.parametrize("trainable", [True, False])
def test_complex_parameters_go_along_and_whole_numbers_must_be_equal(trainable):
    data = torch.randn(8, 3).double(), torch.randint(3, (8,))
    first, second = (Waves(seed).requires_grad_(False) for seed in (0, 1))
    first.mix.requires_grad_(trainable)
    line = loss_line(first, data, F.cross_entropy, to=second, points=3)
    for t, value in zip(line.positions, line.losses, strict=True):
        moved = copy_model(first)
        with torch.no_grad():
            for name in ("mix", "real", "phase"):
                getattr(moved, name).copy_((1 - t) * getattr(first, name) + t * getattr(second, name))
            assert value == pytest.approx(F.cross_entropy(moved(data[0]), data[1]).item(), rel=1e-12)
    assert line.losses[0] != line.losses[2] and line.weights == 12
    mask = torch.rand(3, 3) > 0.5
    masked = apply_masks(first, {"mix": mask})
    both = loss_line(masked, data, F.cross_entropy, to=second, masks="intersection", points=2)
    assert both.weights - both.kept == int((~mask).sum())
    with pytest.raises(ValueError, match=r"'chosen' \(torch\.int64\) differs between the two networks"):
        loss_line(first, data, F.cross_entropy, to=Waves(0, chosen=2))
    second.phase = second.phase.real.clone()
    with pytest.raises(
        ValueError, match=r"'phase' is torch\.complex128 in one network and torch\.float64 in"
    ):
        loss_line(first, data, F.cross_entropy, to=second)
    with pytest.raises(ValueError, match="complex at 'mix'"):
        loss_line(first, data, F.cross_entropy, direction={"mix": torch.ones(3, 3)}, points=3)


def test_a_buffer_that_one_network_lacks_is_named():
    first, second = Attending(), Attending()
    second.register_buffer("order", torch.tensor([2, 0, 1]))
    data = torch.randn(8, 3).double(), torch.randint(3, (8,))
    for one, other in ((first, second), (second, first)):
        with pytest.raises(ValueError, match=r"'order' \(torch\.int64\) differs"):
            loss_line(one, data, F.cross_entropy, to=other)


def test_buffers_that_are_only_stored_have_nothing_between_them():
    data = torch.randn(8, 3).double(), torch.randint(3, (8,))
    first, second = Attending(), Attending()
    for network in (first, second):
        network.register_buffer("scale", torch.ones(1).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"'scale' is torch\.float8_e4m3fn, which torch stores but does not"):
        loss_line(first, data, F.cross_entropy, to=second)


def test_statistics_are_estimated_anew_at_each_point():
    first, second = plain(0), plain(1)
    data = [tuple(part[:13] for part in batch()), tuple(part[13:] for part in batch())]
    line = loss_line(first, data, F.cross_entropy, to=second, batch_norm="reestimate", points=3)
    for t, value in zip(line.positions, line.losses, strict=True):
        moved = plain(0)
        with torch.no_grad():
            for parameter, end in zip(moved.parameters(), second.parameters(), strict=True):
                parameter.copy_((1 - t) * parameter + t * end)
            convolved = [moved[0](part) for part, _ in data]
            means = [part.mean(dim=(0, 2, 3)) for part in convolved]
            variances = [part.var(dim=(0, 2, 3)) for part in convolved]
            moved[1].running_mean.copy_((13 * means[0] + 7 * means[1]) / 20)
            moved[1].running_var.copy_((13 * variances[0] + 7 * variances[1]) / 20)
        assert value == pytest.approx(loss_at(moved), rel=1e-12)


class Twice(nn.Module):
    """One normalisation, called for two parts of each input, and another that is called once."""

    def __init__(self):
        super().__init__()
        self.twice, self.once = nn.BatchNorm1d(2).double(), nn.BatchNorm1d(2).double()

    def forward(self, inputs):
        return self.once(self.twice(inputs[:, :2]) + self.twice(3 + 2 * inputs[:, 2:]))


def test_a_normalisation_that_is_called_twice_has_the_statistics_of_both_calls():
    inputs, targets = torch.randn(20, 4).double(), torch.zeros(20)
    data = [(inputs[:12], targets[:12]), (inputs[12:], targets[12:])]
    model, reference = working_copy(Twice()), Twice()
    reestimate_statistics(model, Batches(data, model))
    reference.twice.momentum = reference.once.momentum = None  # torch's own cumulative average
    for start in range(0, 20, 4):  # in equal batches, whose means are those over the examples
        reference(inputs[start : start + 4])
    assert torch.allclose(model.twice.running_mean, reference.twice.running_mean)
    parts = [part for given, _ in data for part in (given[:, :2], 3 + 2 * given[:, 2:])]
    weights = (12, 12, 8, 8)
    for statistic, found in ((torch.mean, model.twice.running_mean), (torch.var, model.twice.running_var)):
        expected = sum(w * statistic(part, 0) for w, part in zip(weights, parts, strict=True)) / 40
        assert torch.allclose(found, expected, rtol=1e-12)
    assert not model.twice.training and not model.twice._forward_pre_hooks


def test_reestimating_without_any_statistics_changes_nothing():
    model = working_copy(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_statistics(model, Batches((torch.randn(4, 3), torch.zeros(4)), model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_that_diverges_in_between_is_shown_as_it_is():
    line = LossLine((0.0, 0.5, 1.0), (1.0, math.nan, 1.0), "of the way", True, 1, 1)
    assert line.barrier == math.inf

    def broken(outputs, targets):
        value = F.cross_entropy(outputs, targets)
        return value * math.nan if value > 1e3 else value

    direction = {"6.bias": torch.tensor([1.0, 0, 0]).double()}
    far = loss_line(plain(), batch(), broken, direction=direction, radius=1e5, points=3)
    assert math.isnan(far.losses[0])
    assert far.rise == math.inf


# ----------------------------------------------------------------------------------------------------
# Planes


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_plane_stays_in_the_mask_and_is_the_same_in_every_form(form):
    model, reference = masked(form), masked("buffers")
    plane = loss_plane(model, batch(), F.cross_entropy, points=3, generator=torch.Generator().manual_seed(3))
    again = loss_plane(
        reference, batch(), F.cross_entropy, points=3, generator=torch.Generator().manual_seed(3)
    )
    for row, other in zip(plane.losses, again.losses, strict=True):
        assert row == pytest.approx(other, rel=1e-12)
    assert plane.center == pytest.approx(loss_at(reference), rel=1e-12)
    assert plane.unit == "norms of each filter"
    assert abs(plane.cosine) < 0.9


def directions_of(monkeypatch, model, **options):
    """The states that a plane puts the network at."""
    seen = []
    real = Terrain.losses

    def watching(self, states, count, progress):
        states = list(states)
        seen.extend(states)
        return real(self, states, count, progress)

    monkeypatch.setattr(Terrain, "losses", watching)
    plane = loss_plane(model, batch(), F.cross_entropy, points=3, **options)
    center = seen[4]
    return plane, [{name: seen[number][name] - center[name] for name in center} for number in (5, 7)], center


def test_random_directions_have_the_filters_norms(monkeypatch):
    model = masked()
    plane, directions, center = directions_of(monkeypatch, model)
    for direction in directions:
        for name in ("0.weight", "4.weight", "6.weight"):
            for part, weight in zip(direction[name], center[name], strict=True):
                assert part.norm().item() == pytest.approx(weight.norm().item(), rel=1e-9)
        for name, mask in masks_of(0).items():
            assert direction[name][~mask].abs().max() == 0
            assert direction[name][mask].abs().min() > 0
        for name in ("1.weight", "1.bias", "4.bias", "6.bias"):
            assert direction[name].abs().max() == 0
    dot = sum((directions[0][n] * directions[1][n]).sum() for n in center)
    norms = [math.sqrt(sum(d.square().sum() for d in each.values())) for each in directions]
    assert plane.cosine == pytest.approx(dot.item() / math.prod(norms), rel=1e-6)
    for y, row in zip(plane.ys, plane.losses, strict=True):
        for x, value in zip(plane.xs, row, strict=True):
            expected = loss_at(
                model,
                lambda n, w: w + x * directions[0][n] + y * directions[1][n],  # noqa: B023
            )
            assert value == pytest.approx(expected, rel=1e-9)


def test_random_directions_by_option(monkeypatch):
    model = masked()
    _, (first, _), center = directions_of(
        monkeypatch, model, one_dimensional=True, over="all", where=["0", "1"]
    )
    assert first["1.bias"].norm() == pytest.approx(center["1.bias"].norm().item(), abs=1e-12)
    assert first["1.weight"].norm() == pytest.approx(center["1.weight"].norm().item())
    assert first["6.weight"].abs().max() == 0
    mask = masks_of(0)["0.weight"]
    assert first["0.weight"][~mask].abs().min() > 0
    _, (first, _), _ = directions_of(monkeypatch, model, scale="plain")
    assert sum(part.square().sum() for part in first.values()).item() == pytest.approx(1)


def test_a_parameter_has_the_same_direction_whatever_else_there_is(monkeypatch):
    model = masked()
    _, before, _ = directions_of(monkeypatch, model)
    longer = nn.Sequential(*masked(), nn.Linear(3, 3).double())
    _, after, _ = directions_of(monkeypatch, longer)
    denser = apply_masks(plain(), {"0.weight": masks_of(0)["0.weight"]})
    _, unmasked, _ = directions_of(monkeypatch, denser)
    for one, two, three in zip(before, after, unmasked, strict=True):
        for name in ("0.weight", "4.weight", "6.weight"):
            assert torch.allclose(one[name], two[name], atol=1e-12)
        for name in ("0.weight", "6.weight"):
            assert torch.allclose(one[name], three[name], atol=1e-12)
        own, whole = one["4.weight"][1], three["4.weight"][1]  # a filter scaled by what it keeps
        mask = masks_of(0)["4.weight"][1]
        assert torch.allclose(own / own.norm(), whole * mask / (whole * mask).norm(), atol=1e-12)


def test_planes_over_both_spaces_are_those_of_each_alone():
    model, calls = masked(), []
    both = loss_plane(
        model, batch(), F.cross_entropy, points=3, over="both", progress=lambda *call: calls.append(call)
    )
    for plane, over in ((both, "kept"), (both.beside, "all")):
        alone = loss_plane(model, batch(), F.cross_entropy, points=3, over=over)
        assert (plane.over, plane.losses) == (over, alone.losses)
    assert both.losses != both.beside.losses
    assert calls == [(number, 18) for number in range(1, 19)]
    assert [row["over"] for row in both.table()] == ["kept"] * 9 + ["all"] * 9
    assert "over the kept weights" in str(both) and "over all weights" in str(both)
    titles = [axes.get_title() for axes in both.plot().axes]
    assert titles[:2] == ["over the kept weights", "over all weights"]
    given = loss_plane(model, batch(), F.cross_entropy, directions=(GIVEN, GIVEN), points=3)
    assert given.over == "given"
    assert input_loss_plane(model, batch(), F.cross_entropy, points=3).over == "inputs"


def test_a_plane_of_given_directions():
    model = masked()
    top = hessian_top_eigenvalues(model, batch(), F.cross_entropy, k=2)
    plane = loss_plane(
        model, batch(), F.cross_entropy, directions=top.vectors, scale="plain", radius=0.2, points=3
    )
    expected = loss_at(model, lambda n, w: w + 0.2 * top.vectors[0][n] - 0.2 * top.vectors[1][n])
    assert plane.losses[0][2] == pytest.approx(expected, rel=1e-12)
    assert plane.cosine == pytest.approx(0, abs=1e-6)
    assert plane.rise == max(map(max, plane.losses)) - plane.center


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 20])
@pytest.mark.parametrize("directions", ["random", "gradient"])
def test_an_input_plane(directions, chunk_size):
    model = masked()
    plane = input_loss_plane(
        model,
        batch(),
        F.cross_entropy,
        directions=directions,
        radius=0.4,
        points=3,
        chunk_size=chunk_size,
        generator=torch.Generator().manual_seed(1),
    )
    generator = torch.Generator().manual_seed(1)
    inputs, targets = batch()
    firsts, seconds = [], []
    network = copy_model(model).eval()
    if directions == "gradient":
        leaf = inputs.clone().requires_grad_()
        F.cross_entropy(network(leaf), targets).backward()
        firsts.append(leaf.grad.sign())
        seconds.append(
            torch.randint(2, (inputs.numel(),), generator=generator).reshape(inputs.shape) * 2.0 - 1
        )
    else:
        one, two = (
            torch.randn(inputs.numel(), generator=generator, dtype=torch.float64).reshape(20, -1)
            for _ in range(2)
        )
        for pair in zip(one, two, strict=True):
            drawn = torch.stack(pair, dim=1)
            basis, _ = torch.linalg.qr(drawn)
            turned = 5 * basis * torch.sign((basis * drawn).sum(0))  # 5: the root of 25 elements
            firsts.append(turned[:, 0].reshape(1, 1, 5, 5))
            seconds.append(turned[:, 1].reshape(1, 1, 5, 5))
    first, second = torch.cat(firsts), torch.cat(seconds)
    for y, row in zip(plane.ys, plane.losses, strict=True):
        for x, value in zip(plane.xs, row, strict=True):
            moved = inputs + x * first + y * second
            assert value == pytest.approx(F.cross_entropy(network(moved), targets).item(), rel=1e-9)
    if directions == "random":
        assert plane.cosine == pytest.approx(0, abs=1e-12)
    else:
        assert plane.losses[1][2] > plane.center > plane.losses[1][0]


# ----------------------------------------------------------------------------------------------------
# What they share


def every(model, data, loss=F.cross_entropy, **options):
    loss_line(model, data, loss, direction={"6.bias": torch.ones(3)}, points=3, **options)
    loss_line(model, data, loss, to=model, points=3, **options)
    loss_plane(model, data, loss, points=3, **options)
    if options.get("batch_norm") != "reestimate":
        input_loss_plane(model, data, loss, points=3, directions="gradient", **options)


@pytest.mark.parametrize("form", FORMS)
def test_the_model_and_the_random_state_are_untouched_also_on_raise(form):
    model = masked(form)
    model.train()
    model(batch()[0].clone()).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    given = batch()

    def losing(outputs, targets):
        raise KeyboardInterrupt

    for batch_norm in ("eval", "train", "reestimate"):
        every(model, given, batch_norm=batch_norm)
        with pytest.raises(KeyboardInterrupt):
            every(model, given, losing, batch_norm=batch_norm)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(given[0], batch()[0])


def test_uneven_batches_chunks_and_precision_agree():
    model, (inputs, targets) = masked(), batch()
    whole = loss_plane(model, (inputs, targets), F.cross_entropy, points=3)
    cut = loss_plane(
        model, [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])], F.cross_entropy, points=3, chunk_size=4
    )
    single = loss_plane(model, (inputs, targets), F.cross_entropy, points=3, dtype=torch.float32)
    for row, other, rough in zip(whole.losses, cut.losses, single.losses, strict=True):
        assert other == pytest.approx(row, rel=1e-12)
        assert rough == pytest.approx(row, rel=1e-5)
        assert rough != row
    calls = []
    loss_plane(model, batch(), F.cross_entropy, points=3, progress=lambda *call: calls.append(call))
    assert calls == [(number, 9) for number in range(1, 10)]


def test_an_error_rate_will_do_for_a_loss():
    def wrong(outputs, targets):
        return (outputs.argmax(1) != targets).float().mean()

    line = loss_line(masked(), batch(), wrong, to=masked(seed=1), points=3)
    assert all(
        0 <= value <= 1 and (value * 20) == pytest.approx(round(value * 20), abs=1e-5)
        for value in line.losses
    )
    with pytest.raises(ValueError, match="no gradient with respect to the inputs"):
        input_loss_plane(masked(), batch(), wrong, directions="gradient")


def test_results_print_plot_and_turn_into_tables():
    model = masked()
    results = [
        loss_line(model, batch(), F.cross_entropy, to=masked(seed=1), points=3),
        loss_line(model, batch(), F.cross_entropy, direction={"6.bias": torch.ones(3)}, points=3),
        loss_plane(model, batch(), F.cross_entropy, points=3),
        input_loss_plane(model, batch(), F.cross_entropy, points=3),
        loss_plane(model, batch(), lambda outputs, targets: 0 * outputs.sum(), points=3),  # flat
    ]
    for result in results:
        figure = result.plot()
        picture = io.BytesIO()
        figure.savefig(picture)
        assert picture.tell() > 0
        assert result.unit in figure.axes[0].get_xlabel()
        assert figure.axes[0].get_ylabel()
        assert result.unit in str(result)
    assert len(results[0].table()) == 3
    assert len(results[2].table()) == 9
    assert "barrier" in str(results[0])
    assert "matplotlib.pyplot" not in sys.modules
    results[2].plot(logarithmic=True).savefig(io.BytesIO())
    with pytest.raises(ValueError, match="no logarithm"):
        results[4].plot(logarithmic=True)


GIVEN = {"6.bias": torch.ones(3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either a direction"),
        ({"direction": GIVEN, "to": nn.Linear(1, 1)}, "either a direction"),
        ({"to": nn.Linear(1, 1)}, "different architectures"),
        ({"to": nn.Linear(1, 1), "radius": 1.0}, "radius and scale belong"),
        ({"to": nn.Linear(1, 1), "points": 1}, "at least 2"),
        ({"direction": GIVEN, "masks": "intersection"}, "masks= is about two networks"),
        ({"direction": GIVEN, "masks": "both"}, "'union' or 'intersection'"),
        ({"direction": GIVEN, "scale": "layer"}, "'plain' or 'filter'"),
        ({"direction": GIVEN, "points": 4}, "odd number"),
        ({"direction": GIVEN, "radius": -1.0}, "radius must be positive"),
        ({"direction": GIVEN, "batch_norm": "none"}, "'eval', 'train' or 'reestimate'"),
        ({"direction": GIVEN, "batch_norm": "train", "chunk_size": 3}, "chunk_size cuts batches"),
        ({"direction": {"7.bias": torch.ones(3)}}, "'7.bias', which is no parameter"),
        ({"direction": {"6.bias": torch.ones(2)}}, r"has shape \(2,\) at '6.bias'"),
        ({"direction": {"6.bias": torch.full((3,), math.nan)}}, "not finite at '6.bias'"),
        ({"direction": {}}, "a direction is a dict"),
    ],
)
def test_wrong_lines(options, message):
    with pytest.raises(ValueError, match=message):
        loss_line(masked(), batch(), F.cross_entropy, **options)


def test_wrong_planes_and_data():
    model, data = masked(), batch()
    wider = plain()
    wider[6] = nn.Linear(8, 4).double()
    with pytest.raises(ValueError, match=r"'6\.bias' has shape"):
        loss_line(model, data, F.cross_entropy, to=wider)
    with pytest.raises(ValueError, match="'kept', 'all' or 'both'"):
        loss_plane(model, data, F.cross_entropy, over="pruned")
    for directions in (GIVEN, (GIVEN,), (GIVEN, GIVEN, GIVEN), "random"):
        with pytest.raises(ValueError, match="directions are a pair"):
            loss_plane(model, data, F.cross_entropy, directions=directions)
    with pytest.raises(ValueError, match="about random directions"):
        loss_plane(model, data, F.cross_entropy, directions=(GIVEN, GIVEN), where="6")
    with pytest.raises(ValueError, match="one_dimensional=True"):
        loss_plane(model, data, F.cross_entropy, where="6.bias")
    with pytest.raises(ValueError, match="no batch"):
        loss_plane(model, [], F.cross_entropy)
    with pytest.raises(ValueError, match="must be a scalar"):
        loss_plane(model, data, lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with pytest.raises(ValueError, match="the loss of the given network is nan"):
        loss_plane(model, data, lambda o, t: F.cross_entropy(o, t) * math.nan)
    with pytest.raises(ValueError, match="one pair"):
        input_loss_plane(model, [data], F.cross_entropy)
    with pytest.raises(ValueError, match="one floating-point tensor"):
        input_loss_plane(model, (data[0].long(), data[1]), F.cross_entropy)
    with pytest.raises(ValueError, match="at least 2 elements"):
        input_loss_plane(nn.Linear(1, 3), (torch.randn(4, 1), data[1][:4]), F.cross_entropy)
    with pytest.raises(ValueError, match="'random' or 'gradient'"):
        input_loss_plane(model, data, F.cross_entropy, directions="pca")
    with pytest.raises(ValueError, match="'eval' or 'train'"):
        input_loss_plane(model, data, F.cross_entropy, batch_norm="reestimate")
    with pytest.raises(ValueError, match="given network is inf"):
        input_loss_plane(model, data, lambda o, t: F.cross_entropy(o, t) + math.inf)
    empty = apply_masks(nn.Linear(3, 2, bias=False), {"weight": torch.zeros(2, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="is pruned"):
        loss_plane(empty, (torch.randn(4, 3), torch.zeros(4).long()), F.cross_entropy)


class Exponential(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


def test_a_point_that_diverges_leaves_the_others_as_they_are_where_statistics_are_reestimated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Exponential(), nn.BatchNorm1d(6), nn.Linear(6, 3))
    data = torch.randn(16, 4), torch.randint(3, (16,))
    options = {"direction": {"0.weight": torch.ones(6, 4)}, "batch_norm": "reestimate"}
    near = loss_line(model, data, F.cross_entropy, radius=0.1, points=3, **options).losses
    far = loss_line(model, data, F.cross_entropy, radius=150.0, points=5, **options).losses
    assert math.isnan(far[0]) and math.isnan(far[4])
    assert far[2] == near[1]
    plane = loss_plane(model, data, F.cross_entropy, radius=100.0, points=5, batch_norm="reestimate")
    assert f"loss {plane.center:.4g} at the centre, from" in str(plane)


def test_a_plane_that_is_finite_nowhere_prints_and_says_why_it_does_not_plot():
    nowhere = LossPlane(
        "kept", (-1.0, 0.0, 1.0), (0.0,), ((math.nan,) * 3,), "norms of each filter", ("a", "b"), 0.0
    )
    assert "loss nan at the centre, 3 points not finite" in str(nowhere)
    with pytest.raises(ValueError, match="the loss is finite nowhere on the plane"):
        nowhere.plot()
