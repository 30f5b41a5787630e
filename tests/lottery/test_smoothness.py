"""Looks at spent tickets: the right network, kept once, in both spaces."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsetweaks.analysis import activation_sparsity, hessian_top_eigenvalues
from sparsetweaks.lottery.config import LotteryError, Network, Recipe, RunError, Tweaks, variant
from sparsetweaks.lottery.data import Data
from sparsetweaks.lottery.draw import draw
from sparsetweaks.lottery.experiment import Experiment, Source, tickets_of
from sparsetweaks.lottery.grid import GridError
from sparsetweaks.lottery.smoothness import (
    ALL,
    BEST,
    EVERYTHING,
    KEPT,
    LOSS,
    MEASURES,
    activations,
    along_eigenvector,
    around_inputs,
    around_weights,
    curvature,
    look_at,
    some,
    spent_network,
    stage_of,
)
from sparsetweaks.lottery.spend import spend
from sparsetweaks.lottery.store import Ticket
from sparsetweaks.lottery.train import accuracy, after, train
from sparsetweaks.masks import find_masks

RECIPE = Recipe(epochs=3, batch_size=64, precision="float32")
NETWORK = Network("resnet8", width=4)
EXPERIMENT = Experiment(
    ("vanilla", "AT+TRT"), Source("digits", limit=20), NETWORK, RECIPE, 1, 0.8, (0,), scales={"iterations": 1}
)


@pytest.fixture
def ticket(digits: Data, tmp_path: Path) -> Ticket:
    return draw(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, levels=1, fraction=0.8)[1]


# ------------------------------------------------------------------------------------------------------- epochs


def test_the_weights_of_epochs_are_kept_and_change_nothing(digits: Data, ticket: Ticket) -> None:
    runs = [train(ticket.model(), digits, RECIPE, seed=0, keep_epochs=kept) for kept in ((), (1, 3))]
    assert set(runs[1].weights) - set(runs[0].weights) == {after(1), after(3)}
    for name in ("last", "best"):
        assert all(
            torch.equal(runs[0].weights[name][key], value) for key, value in runs[1].weights[name].items()
        )
    short = train(ticket.model(), digits, replace(RECIPE, epochs=1, milestones=(3 / 2, 9 / 4)), seed=0)
    assert all(
        torch.equal(runs[1].weights[after(1)][key], value) for key, value in short.weights["last"].items()
    )
    with pytest.raises(LotteryError, match="keep_epochs must lie between 1 and 3, the last, got \\[4\\]"):
        train(ticket.model(), digits, RECIPE, seed=0, keep_epochs=(4,))


class Killed(Exception):
    pass


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_run_cut_off_ends_with_the_epochs_asked_for(
    digits: Data, ticket: Ticket, tmp_path: Path, asked_before: bool
) -> None:
    def cut(trained: object) -> None:
        if trained.epochs == 2:
            raise Killed

    common = {"seed": 0, "checkpoint": tmp_path / "run.safetensors"}
    with pytest.raises(Killed):
        kept = (1,) if asked_before else ()
        train(ticket.model(), digits, RECIPE, keep_epochs=kept, on_epoch=cut, **common)
    epochs = []
    resumed = train(
        ticket.model(), digits, RECIPE, keep_epochs=(1,), on_epoch=lambda t: epochs.append(t.epochs), **common
    )
    assert epochs[0] == 1 if not asked_before else epochs[0] > 1  # begun anew where the epoch was missed
    whole = train(ticket.model(), digits, RECIPE, seed=0, keep_epochs=(1,))
    for group in (after(1), "last", "best"):
        assert all(
            torch.equal(whole.weights[group][key], value) for key, value in resumed.weights[group].items()
        )


def test_a_finished_run_without_the_epochs_is_run_again_under_its_name(
    digits: Data, ticket: Ticket, tmp_path: Path
) -> None:
    common = {"seed": 1, "folder": tmp_path / "more"}
    plain = spend(ticket, Tweaks(), digits, RECIPE, **common)
    kept = spend(ticket, Tweaks(), digits, RECIPE, keep_epochs=(2,), **common)
    assert after(2) in kept.weights and kept.test == plain.test
    assert len(list((tmp_path / "more").iterdir())) == 1
    assert after(2) in spend(ticket, Tweaks(), digits, RECIPE, **common).weights  # and stays


# ------------------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("name", ["vanilla", "skips", "swish", "scales", "AT+TRT", "authors-AT+unmatched"])
def test_the_network_of_a_spent_ticket_is_the_one_that_was_trained(
    digits: Data, ticket: Ticket, tmp_path: Path, name: str
) -> None:
    tweaks = variant(name)
    tweaks = replace(tweaks, scales={"iterations": 1}) if tweaks.scales is not None else tweaks
    trained = spend(ticket, tweaks, digits, RECIPE, seed=0, folder=tmp_path, name=name)
    model = spent_network(ticket, tweaks, digits, RECIPE, trained.weights["best"])
    assert not model.training
    assert accuracy(model, digits.test, digits) == trained.test
    assert accuracy(model, digits.validation, digits) == trained.validation
    kept = sum(int(mask.sum()) for mask in find_masks(model).values())
    assert kept == trained.note["nonzeros"]
    weights = dict(model.named_parameters())
    assert all(not weights[path][~mask].any() for path, mask in find_masks(model).items())


def test_weights_of_another_network_are_refused(digits: Data, ticket: Ticket, tmp_path: Path) -> None:
    trained = spend(ticket, variant("skips"), digits, RECIPE, seed=0, folder=tmp_path)
    with pytest.raises(LotteryError, match="not of this ticket spent with these tweaks"):
        spent_network(ticket, Tweaks(), digits, RECIPE, trained.weights["best"])


# ----------------------------------------------------------------------------------------------------- measures


@pytest.fixture
def model(digits: Data, ticket: Ticket, tmp_path: Path) -> torch.nn.Module:
    trained = spend(ticket, Tweaks(), digits, RECIPE, seed=0, folder=tmp_path)
    return spent_network(ticket, Tweaks(), digits, RECIPE, trained.weights["best"])


def test_curvature_is_that_of_both_spaces(model: torch.nn.Module, digits: Data) -> None:
    numbers, _ = curvature(model, digits, 0, images=64)
    batch = some(digits.train, digits, 64)
    for space, over in ((KEPT, "kept"), (ALL, "all")):
        exact = hessian_top_eigenvalues(model, batch, LOSS, over=over, tolerance=1e-4).values[0]
        assert numbers[space]["eigenvalue"] == pytest.approx(exact, rel=2e-2)
    assert (
        numbers[ALL]["eigenvalue"] > numbers[KEPT]["eigenvalue"] * 0.98
    )  # a larger space holds the smaller one
    assert numbers[KEPT]["gradient flow"] > 0


def test_a_dense_network_has_one_space(digits: Data, ticket: Ticket) -> None:
    numbers, _ = curvature(ticket.unmasked().eval(), digits, 0, images=32)
    assert numbers[KEPT]["eigenvalue"] == numbers[ALL]["eigenvalue"]


def test_the_line_rises_more_to_the_right(model: torch.nn.Module, digits: Data) -> None:
    numbers, drawn = along_eigenvector(model, digits, 0, images=32, points=5)
    with torch.no_grad():
        images, labels = some(digits.test, digits, 32)
        centre = float(LOSS(model(images), labels))
    for space in (KEPT, ALL):
        losses = drawn[space]["y"]
        assert losses[-1] >= losses[0]
        assert drawn[space]["x"] == (-0.5, -0.25, 0.0, 0.25, 0.5)
        assert numbers[space]["rise"] == pytest.approx(max(losses) - losses[2])
        assert losses[2] == pytest.approx(centre, rel=1e-4)


def test_planes_have_their_centre_at_the_network(model: torch.nn.Module, digits: Data) -> None:
    with torch.no_grad():
        images, labels = some(digits.train, digits, 32)
        centre = float(LOSS(model(images), labels))
    numbers, drawn = around_weights(model, digits, 0, images=32, points=3)
    assert set(numbers) == {KEPT, ALL}
    for space in numbers:
        assert numbers[space]["loss"] == pytest.approx(centre, rel=1e-4)
        assert drawn[space]["losses"][1][1] == numbers[space]["loss"]
        assert numbers[space]["rise"] >= numbers[space]["median rise"]
    assert drawn[KEPT]["losses"] != drawn[ALL]["losses"]
    other, _ = around_weights(model, digits, 1, images=32, points=3)
    assert other[KEPT]["rise"] != numbers[KEPT]["rise"]


def test_inputs_have_one_space_and_rise_along_the_gradient(model: torch.nn.Module, digits: Data) -> None:
    numbers, drawn = around_inputs(model, digits, 0, images=32, points=3)
    assert set(numbers) == {"inputs"}
    row = drawn["inputs"]["losses"][1]
    assert row[0] < row[1] < row[2]


def test_activations_are_gathered_by_stage(model: torch.nn.Module, digits: Data) -> None:
    numbers, _ = activations(model, digits, 0, images=32)
    assert set(numbers) == {"stem", "stage 1", "stage 2", "stage 3", EVERYTHING}
    whole = activation_sparsity(model, some(digits.test, digits, 32))
    assert numbers[EVERYTHING]["exact zeros"] == pytest.approx(100 * whole.zeros)
    assert numbers[EVERYTHING]["near zeros"] == pytest.approx(100 * whole.near_zeros)
    first = [site for site in whole.sites if site.site.startswith("stages.0.")]
    share = 100 * sum(site.zeros for site in first) / sum(site.values for site in first)
    assert numbers["stage 1"]["exact zeros"] == pytest.approx(share)


def test_stages_of_other_networks() -> None:
    assert [stage_of(site) for site in ("layer2.1.relu_1", "features.3", "relu")] == [
        "stage 2",
        "features",
        "stem",
    ]


# ------------------------------------------------------------------------------------------------------- looks


def test_looks_are_taken_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    measure = MEASURES["activations"]

    def watched(model: torch.nn.Module, data: Data, seed: int, *, images: int = 32) -> tuple:
        taken.append(seed)
        return measure(model, data, seed, images=images)

    monkeypatch.setitem(MEASURES, "activations", watched)
    counted = []
    first = look_at(EXPERIMENT, tmp_path, "activations", on_look=lambda: counted.append(1))
    assert [(look.sparsity, look.variant, look.seed, look.epoch) for look in first] == [
        (0.0, "vanilla", 0, BEST),
        (pytest.approx(0.8, abs=1e-3), "vanilla", 0, BEST),
        (pytest.approx(0.8, abs=1e-3), "AT+TRT", 0, BEST),
    ]
    assert len(taken) == len(counted) == 3
    assert look_at(EXPERIMENT, tmp_path, "activations") == first
    assert len(taken) == 3
    assert len(list((tmp_path / "analyses").iterdir())) == 3

    def other(model: torch.nn.Module, data: Data, seed: int, *, images: int = 16) -> tuple:
        return watched(model, data, seed, images=images)

    monkeypatch.setitem(MEASURES, "activations", other)  # its options are another, so it is another look
    look_at(EXPERIMENT, tmp_path, "activations")
    assert len(taken) == 6


def test_tickets_that_are_not_spent_yet_are_spent(tmp_path: Path) -> None:
    kept = replace(EXPERIMENT, keep_epochs=(1, 3), dense=())
    looks = look_at(kept, tmp_path, "activations", epochs=(1, 3))
    assert [(look.variant, look.epoch) for look in looks] == [
        ("vanilla", 1), ("vanilla", 3), ("AT+TRT", 1), ("AT+TRT", 3),
    ]  # fmt: skip
    assert all(math.isfinite(look.numbers[EVERYTHING]["near zeros"]) for look in looks)
    assert looks[0].numbers != looks[1].numbers
    assert len(tickets_of(kept, tmp_path, "cpu", 0)) == 2


def test_looks_go_on_without_a_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing, counted = "TRT", []

    def trained(*given: object, title: str, **options: object) -> object:
        if failing in title:
            raise RunError("the loss became nan")
        return train(*given, title=title, **options)

    monkeypatch.setattr("sparsetweaks.lottery.spend.train", trained)
    kept = replace(EXPERIMENT, keep_epochs=(1, 3), dense=(), variants=("AT+TRT", "vanilla"))
    with pytest.raises(GridError) as caught:
        look_at(kept, tmp_path, "activations", epochs=(1, 3), on_look=lambda: counted.append(1))
    (told,) = caught.value.args
    assert re.fullmatch(
        "resnet8 on digits, seed 0, imp, level 1, 80.. % sparse, AT.TRT: the loss became nan", told
    )
    assert len(counted) == 4 and len(list((tmp_path / "analyses").iterdir())) == 2
    failing = "seed 0, dense"
    with pytest.raises(
        GridError, match="no tickets of seed 0, and so none of its runs: resnet8 on digits, seed 0, dense"
    ):
        look_at(kept, tmp_path / "other", "activations", epochs=(1, 3))


def test_what_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    with pytest.raises(LotteryError, match="unknown measure 'taste'; choose from curvature, line"):
        look_at(EXPERIMENT, tmp_path, "taste")
    with pytest.raises(LotteryError, match="keeps no weights after epoch 2: name it in its keep_epochs"):
        look_at(EXPERIMENT, tmp_path, "activations", epochs=(2,))
    with pytest.raises(LotteryError, match=r"levels to spend must lie between 1 and 1, got \(2,\)"):
        replace(EXPERIMENT, spent=(2,))
