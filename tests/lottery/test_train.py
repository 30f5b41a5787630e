from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsetweaks.lottery.config import LotteryError, Network, Recipe, RunError
from sparsetweaks.lottery.data import Data, load
from sparsetweaks.lottery.models import build
from sparsetweaks.lottery.train import accuracy, refresh_statistics, schedule, train
from sparsetweaks.masks import find_masks
from sparsetweaks.pruning import prune
from sparsetweaks.surgery.skips import inject_skips

NETWORK = Network("resnet8", width=4)
RECIPE = Recipe(epochs=2, batch_size=64, precision="float32")


def model_of(seed: int = 0) -> nn.Module:
    return build(NETWORK, channels=1, classes=10, seed=seed)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resnet20_is_that_of_the_paper() -> None:
    model = build(Network("resnet20", width=16), channels=3, classes=10, seed=0)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len([c for c in convolutions if c.kernel_size == (3, 3)]) == 19  # and the classifier makes 20
    assert sum(p.numel() for p in model.parameters()) == 272_474


def test_building_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = model_of(0), model_of(0), model_of(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first.state_dict(), second.state_dict())
    assert not torch.equal(first.conv.weight, other.conv.weight)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_digits_are_learned(precision: str) -> None:
    model = build(Network("resnet8", width=8), channels=1, classes=10, seed=0)
    recipe = Recipe(epochs=4, batch_size=64, precision=precision)
    assert train(model, load("digits"), recipe, seed=0).test > 0.7  # 0.93 and 0.91; by chance 0.1


@pytest.mark.parametrize(
    ("tweak", "precision", "last"),
    [
        (lambda model: model, "float32", True),
        (inject_skips, "float32", False),
        (inject_skips, "bfloat16", True),
    ],
    ids=["plain", "skips", "skips in bfloat16"],
)
def test_skips_are_trained_with_the_channels_first_where_that_is_quicker(
    digits: Data, tweak, precision, last
) -> None:
    model, gradients = tweak(model_of()), set()
    weight = model.stages[1][0].conv1.weight
    weight.register_hook(lambda g: gradients.add(g.is_contiguous(memory_format=torch.channels_last)))
    train(model, digits, replace(RECIPE, epochs=1, precision=precision), seed=0)
    assert weight.is_contiguous(memory_format=torch.channels_last) == last and gradients == {last}


@pytest.mark.parametrize(
    ("said", "mode"), [(False, "none"), (True, None), ("reduce-overhead", "reduce-overhead")]
)
def test_the_network_is_compiled_as_told(digits: Data, monkeypatch: pytest.MonkeyPatch, said, mode) -> None:
    modes = []
    monkeypatch.setattr("torch.compile", lambda model, mode: modes.append(mode) or model)
    train(model_of(), digits, replace(RECIPE, epochs=1, compile=said), seed=0)
    assert modes == ([] if mode == "none" else [mode])


def test_training_depends_on_its_seed_alone(digits: Data) -> None:
    state = torch.get_rng_state()
    runs = [train(model_of(), digits, RECIPE, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert same(runs[0].weights["last"], runs[1].weights["last"])
    assert not same(runs[0].weights["last"], runs[2].weights["last"])


def test_pruned_weights_stay_zero_and_masks_stay(digits: Data) -> None:
    masked = prune(model_of(), 0.9)
    masks = find_masks(masked)
    train(masked, digits, RECIPE, seed=0)
    assert all(torch.equal(mask, masks[name]) for name, mask in find_masks(masked).items())
    for name, mask in masks.items():
        weight = masked.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].all()


def test_the_best_epoch_in_validation_is_what_is_tested(digits: Data) -> None:
    seen = []
    model = model_of()
    trained = train(
        model, digits, replace(RECIPE, epochs=4), seed=0, on_epoch=lambda t: seen.append(t.validation)
    )
    assert seen == sorted(seen)  # the best so far
    assert trained.best_epoch == seen.index(max(seen)) + 1
    assert trained.test == accuracy(model, digits.test, digits)
    assert same(model.state_dict(), trained.weights["best"])


def test_rewinding_weights_are_those_of_their_epoch(digits: Data) -> None:
    start = model_of().state_dict()
    assert same(train(model_of(), digits, RECIPE, seed=0).weights["rewind"], start)
    late = train(model_of(), digits, RECIPE, seed=0, rewind_epoch=2)
    assert same(late.weights["rewind"], late.weights["last"])


def test_a_training_that_was_cut_off_ends_bit_for_bit_as_if_it_had_not_been(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsetweaks.lottery.train.SAVING", math.inf)  # after each epoch
    recipe = replace(RECIPE, epochs=4)
    whole = train(prune(model_of(), 0.5), digits, recipe, seed=0)

    class CutOff(Exception):
        pass

    def cut_off(trained: object) -> None:
        if trained.epochs == 2:
            raise CutOff

    file = tmp_path / "run.safetensors"
    with pytest.raises(CutOff):
        train(prune(model_of(), 0.5), digits, recipe, seed=0, checkpoint=file, on_epoch=cut_off)
    epochs = []
    resumed = train(
        prune(model_of(), 0.5),
        digits,
        recipe,
        seed=0,
        checkpoint=file,
        on_epoch=lambda t: epochs.append(t.epochs),
    )
    assert epochs == [3, 4]
    assert (resumed.test, resumed.validation, resumed.steps) == (whole.test, whole.validation, whole.steps)
    assert all(same(resumed.weights[name], whole.weights[name]) for name in ("last", "best", "rewind"))


def test_saving_takes_no_more_than_its_share(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def save(path: Path, kind: str, header: dict, groups: dict) -> None:
        saved.append(header["epochs"])
        now[0] += 0.05  # seconds

    def tick(trained: object) -> None:
        now[0] += 1.0

    monkeypatch.setattr("sparsetweaks.lottery.train.save", save)
    train(model_of(), digits, replace(RECIPE, epochs=13), seed=0, checkpoint=tmp_path / "a", on_epoch=tick)
    assert saved == [1, 6, 11, 13]  # 0.05 s are a hundredth of 5 s; the end is always kept


def test_averaging_reports_the_mean_of_the_last_weights_with_fresh_statistics(digits: Data) -> None:
    recipe, seen = replace(RECIPE, epochs=4, average_from=0.5), []
    model = prune(model_of(), 0.5)
    trained = train(
        model, digits, recipe, seed=0, on_epoch=lambda t: seen.append(copy.deepcopy(t.weights["last"]))
    )
    best = trained.weights["best"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(best[name], (seen[2][name] + seen[3][name]) / 2)
        assert torch.equal(parameter, best[name])
    assert not any(best[name][~mask].any() for name, mask in find_masks(model).items())
    pixels = digits.normalise(digits.train.images)
    with torch.no_grad():
        outputs = torch.cat([model.conv(part) for part in pixels.split(recipe.batch_size)])
    torch.testing.assert_close(model.bn.running_mean, outputs.mean(dim=(0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert trained.test == accuracy(model, digits.test, digits)
    assert "average" not in trained.weights
    assert [schedule(epoch, recipe) for epoch in (1.9, 2, 3.9)] == [1.0, 0.5, 0.5]


def test_averaging_survives_being_cut_off(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsetweaks.lottery.train.SAVING", math.inf)
    recipe = replace(RECIPE, epochs=4, average_from=0.25)
    whole = train(model_of(), digits, recipe, seed=0)

    def cut_off(trained: object) -> None:
        if trained.epochs == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model_of(), digits, recipe, seed=0, checkpoint=tmp_path / "a", on_epoch=cut_off)
    resumed = train(model_of(), digits, recipe, seed=0, checkpoint=tmp_path / "a")
    assert same(resumed.weights["best"], whole.weights["best"])
    assert (resumed.test, resumed.validation) == (whole.test, whole.validation)


def test_a_teacher_is_learned_from_and_not_changed(digits: Data) -> None:
    teacher, loss = model_of(1).train(), lambda logits, labels: logits.sum() * 0
    before = copy.deepcopy(teacher.state_dict())
    model, start = model_of(0), copy.deepcopy(model_of(0).state_dict())
    train(model, digits, RECIPE, seed=0, loss=loss, teacher=teacher)
    assert same(teacher.state_dict(), before)
    assert not torch.equal(model.fc.weight, start["fc.weight"])  # by the teacher alone
    images = digits.normalise(digits.test.images)

    def distance(student: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((student.eval()(images).softmax(1) - teacher.eval()(images).softmax(1)).abs().mean())

    fresh = model_of(0)
    assert distance(model) < distance(fresh)


def test_a_finished_training_is_read_back_without_a_step(digits: Data, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    first = train(model_of(), digits, RECIPE, seed=0, checkpoint=file, note={"who": "me"})
    again = train(
        model_of(), digits, RECIPE, seed=0, checkpoint=file, on_epoch=lambda _: pytest.fail("it trained")
    )
    assert (again.test, again.seconds, again.note) == (first.test, first.seconds, {"who": "me"})


def test_a_loss_that_is_not_finite_says_what_to_do(digits: Data) -> None:
    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return logits.sum() * float("nan")

    with pytest.raises(RunError, match=r"^the loss became nan in epoch 1: lower the learning rate"):
        train(model_of(), digits, RECIPE, seed=0, loss=loss)


def test_the_schedule_is_that_of_the_paper() -> None:
    rates = [0.1 * schedule(epoch, Recipe()) for epoch in (0, 89.9, 90, 134.9, 135, 179.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    warm = [schedule(epoch, Recipe(warmup_epochs=2)) for epoch in (0, 1, 2)]
    assert 0 < warm[0] < 0.01
    assert warm[1:] == pytest.approx([0.5, 1], abs=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Recipe(epochs=0), "at least 1 epoch"),
        (lambda: Recipe(learning_rate=0), "learning_rate must be positive"),
        (lambda: Recipe(precision="half"), "precision must be"),
        (lambda: Recipe(compile="fast"), "compile must be a bool or one of default, reduce-overhead"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message: str) -> None:
    with pytest.raises(LotteryError, match=message):
        wrong()


@pytest.mark.parametrize("epochs", [1, 2, 3, 5])
def test_the_last_epoch_at_least_is_averaged(digits: Data, epochs: int) -> None:
    recipe = replace(RECIPE, epochs=epochs, average_from=3 / 4)
    done = train(model_of(), digits, recipe, seed=0)
    assert done.averaged == {1: 1, 2: 1, 3: 1, 5: 1}[epochs]
    assert [schedule(epoch, recipe) == recipe.average_rate for epoch in range(epochs)].count(
        True
    ) == done.averaged


@pytest.mark.parametrize("epochs", [-1.0, 3.0, math.inf, math.nan])
def test_a_warm_up_is_a_part_of_the_training(epochs: float) -> None:
    with pytest.raises(LotteryError, match="warmup_epochs must lie between 0 and the 2 epochs"):
        replace(RECIPE, warmup_epochs=epochs)


def test_what_dropout_draws_is_the_seeds_and_the_epochs(digits: Data, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sparsetweaks.lottery.train.SAVING", math.inf)  # after each epoch
    recipe, file = replace(RECIPE, epochs=3), tmp_path / "run.safetensors"

    def dropping() -> nn.Module:
        return nn.Sequential(model_of(), nn.Dropout(0.5))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = train(dropping(), digits, recipe, seed=0)
    assert torch.equal(torch.get_rng_state(), state)

    def cut_off(trained: object) -> None:
        torch.rand(1)  # a caller's own
        if trained.epochs == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dropping(), digits, recipe, seed=0, checkpoint=file, on_epoch=cut_off)
    resumed = train(dropping(), digits, recipe, seed=0, checkpoint=file)
    assert same(resumed.weights["last"], whole.weights["last"])


class Normalised(nn.Module):
    """Normalises a single pixel, whose variance one image alone does not have."""

    def __init__(self, returns: str = "logits") -> None:
        super().__init__()
        self.layer, self.norm, self.returns = nn.Linear(1, 10), nn.BatchNorm1d(10), returns

    def forward(self, x: torch.Tensor) -> object:
        logits = self.norm(self.layer(x.mean((2, 3))))
        return logits if self.returns == "logits" else (logits, logits)


def test_a_last_image_alone_does_not_stop_the_averaging_of_weights() -> None:
    data = load("digits", limit=20)
    recipe = Recipe(epochs=1, batch_size=len(data.train) - 1)
    model = Normalised()
    refresh_statistics(model, data, size=recipe.batch_size)
    whole = copy.deepcopy(model)
    refresh_statistics(whole, data, size=len(data.train))
    assert same(model.state_dict(), whole.state_dict())


def test_a_network_that_returns_something_else_is_a_run_that_fails() -> None:
    data = load("digits", limit=5)
    with pytest.raises(
        RunError, match=r"the network returned a tuple, not logits of shape \(images, classes\)"
    ):
        train(Normalised("both"), data, Recipe(epochs=1), seed=0)
