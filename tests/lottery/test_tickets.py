from __future__ import annotations

import json
import math
import sys
import types
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparsetweaks.cost import cost
from sparsetweaks.export import export
from sparsetweaks.lottery.config import (
    VARIANTS,
    LotteryError,
    Network,
    Recipe,
    RunError,
    Tweaks,
    key,
    variant,
)
from sparsetweaks.lottery.data import Data
from sparsetweaks.lottery.draw import UNTRAINED, draw, draw_by_masks, draw_one_shot, draw_untrained
from sparsetweaks.lottery.files import FORMAT, check_writable
from sparsetweaks.lottery.models import build
from sparsetweaks.lottery.pools import SHARES, pool, pool_key, pool_row
from sparsetweaks.lottery.pools import _neighbours as neighbours
from sparsetweaks.lottery.rows import COUNTED_LATER
from sparsetweaks.lottery.spend import row, run_key, spend, tweaked
from sparsetweaks.lottery.store import Ticket, dense_ticket, load_ticket, save_ticket, ticket_path
from sparsetweaks.lottery.train import train
from sparsetweaks.masks import find_masks
from sparsetweaks.pruning import erk_budgets, prune
from sparsetweaks.surgery.skips import inject_skips

NETWORK = Network("resnet8", width=4)
RECIPE = Recipe(epochs=2, batch_size=64, precision="float32")


@pytest.fixture(scope="module")
def tickets(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> list[Ticket]:
    return draw(
        digits, NETWORK, RECIPE, seed=0, folder=tmp_path_factory.mktemp("drawn"), levels=3, fraction=0.5
    )


def counts(ticket: Ticket) -> int:
    return sum(mask.numel() for mask in ticket.masks.values())


def test_each_level_prunes_its_fraction_of_what_remains(tickets: list[Ticket]) -> None:
    total = counts(tickets[1])
    assert [ticket.level for ticket in tickets] == [0, 1, 2, 3]
    assert tickets[1].nonzeros == total - round(0.5 * total)
    for before, after in pairwise(tickets[1:]):
        assert after.nonzeros == before.nonzeros - round(0.5 * before.nonzeros)


def test_masks_only_shrink(tickets: list[Ticket]) -> None:
    for before, after in pairwise(tickets[1:]):
        assert all(not (after.masks[name] & ~before.masks[name]).any() for name in after.masks)


def test_masks_keep_the_largest_of_what_was_trained(tickets: list[Ticket]) -> None:
    ticket = tickets[1]
    kept = torch.cat([ticket.trained[name][mask].abs() for name, mask in ticket.masks.items()])
    pruned = torch.cat([ticket.trained[name][~mask].abs() for name, mask in ticket.masks.items()])
    assert kept.min() >= pruned.max()


def test_survivors_are_rewound_to_the_initialisation(tickets: list[Ticket], digits: Data) -> None:
    initial = dense_ticket(NETWORK, digits, seed=0).initial
    for ticket in tickets[1:]:
        state = ticket.model().state_dict()
        for name, value in initial.items():
            expected = value * ticket.masks[name] if name in ticket.masks else value
            assert torch.equal(state[name], expected), name


def test_rewinding_to_a_later_epoch(digits: Data, tmp_path: Path) -> None:
    drawn = draw_one_shot(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, sparsities=[0.5], rewind_epoch=1)[
        1
    ]
    name = next(iter(drawn.masks))
    assert not torch.equal(drawn.late[name], drawn.initial[name])
    assert not torch.equal(drawn.late[name], drawn.trained[name])
    assert not drawn.model().state_dict()[name][~drawn.masks[name]].any()


def test_one_shot_reaches_each_sparsity_exactly(digits: Data, tmp_path: Path) -> None:
    drawn = draw_one_shot(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, sparsities=[0.9, 0.95])
    total = counts(drawn[1])
    assert [ticket.nonzeros for ticket in drawn[1:]] == [total - round(s * total) for s in (0.9, 0.95)]


def test_a_drawing_is_not_drawn_twice(digits: Data, tmp_path: Path) -> None:
    first = draw(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, levels=2)
    fail = lambda _: pytest.fail("it trained")
    again = draw(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, levels=2, on_epoch=fail)
    assert [ticket.identity for ticket in first] == [ticket.identity for ticket in again]
    assert all(torch.equal(first[2].masks[name], again[2].masks[name]) for name in first[2].masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "fraction must lie between 0 and 1"),
        ({"fraction": 1.0}, "fraction must lie between 0 and 1"),
        ({"levels": 0}, "levels must be at least 1"),
        ({"rewind_epoch": 2}, "rewind_epoch must lie between 0 and 1"),
    ],
)
def test_options_out_of_range_are_refused(digits: Data, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(LotteryError, match=message):
        draw(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, **options)
    assert not list(tmp_path.iterdir())  # nothing was trained first


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5])
def test_sparsities_out_of_range_are_refused(digits: Data, tmp_path: Path, sparsity: float) -> None:
    with pytest.raises(LotteryError, match="sparsity must lie between 0 and 1"):
        draw_one_shot(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, sparsities=[0.5, sparsity])


# ------------------------------------------------------------------------------------------------------- files


def test_a_ticket_file_gives_the_ticket_back(tickets: list[Ticket], tmp_path: Path) -> None:
    path = ticket_path(tmp_path, tickets[2])
    save_ticket(tickets[2], path)
    loaded = load_ticket(path)
    for name in ("identity", "network", "channels", "classes", "data", "fingerprint", "seed", "level"):
        assert getattr(loaded, name) == getattr(tickets[2], name)
    for name in ("masks", "initial", "late", "trained"):
        given, back = getattr(tickets[2], name), getattr(loaded, name)
        assert given.keys() == back.keys()
        assert all(
            torch.equal(given[key], back[key]) and given[key].dtype == back[key].dtype for key in given
        )
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no partial file is left


def test_anybody_can_read_the_header(tickets: list[Ticket], tmp_path: Path) -> None:
    from safetensors import safe_open

    save_ticket(tickets[1], tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        header = json.loads(file.metadata()["sparsetweaks"])
    assert header["kind"] == "ticket"
    assert header["header"]["network"] == {"name": "resnet8", "width": 4}
    assert header["header"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


def corrupt(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif how == "a bit flipped":
        content[-100] ^= 1
        path.write_bytes(content)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a ticket")
    elif how == "foreign safetensors":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(2)}, path)
    elif how == "pickle":
        torch.save({"weight": torch.zeros(2)}, path)
    elif how == "missing":
        path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "is not a file of sparsetweaks, or is damaged"),
        ("a bit flipped", "is damaged"),
        ("empty", "is not a file of sparsetweaks"),
        ("text", "is not a file of sparsetweaks"),
        ("foreign safetensors", "is not a file of sparsetweaks"),
        ("pickle", "is not a file of sparsetweaks"),
        ("missing", "does not exist"),
    ],
)
def test_broken_and_foreign_files_are_named(
    tickets: list[Ticket], tmp_path: Path, how: str, message: str
) -> None:
    path = tmp_path / "some.safetensors"
    save_ticket(tickets[1], path)
    corrupt(path, how)
    with pytest.raises(LotteryError, match=message) as caught:
        load_ticket(path)
    assert "some.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_training_is_no_ticket(digits: Data, tickets: list[Ticket], tmp_path: Path) -> None:
    spend(tickets[1], Tweaks(), digits, RECIPE, seed=0, folder=tmp_path)
    with pytest.raises(
        LotteryError, match=f"holds: training, format {FORMAT}; wanted: ticket, format {FORMAT}"
    ):
        load_ticket(next(tmp_path.iterdir()))


def test_a_ticket_of_another_network_does_not_fit_together(tickets: list[Ticket], tmp_path: Path) -> None:
    save_ticket(replace(tickets[1], network=Network("resnet8", 8)), tmp_path / "a")
    with pytest.raises(LotteryError, match="does not fit together"):
        load_ticket(tmp_path / "a")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LotteryError, match=r"cannot write to .*file/runs"):
        check_writable(tmp_path / "file" / "runs")


def test_files_of_another_version_are_not_taken_up(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of format 2, whose tickets said no scope and whose scales were learned in bfloat16."""
    with monkeypatch.context() as before:
        before.setattr("sparsetweaks.lottery.files.FORMAT", 2)
        ticket = draw(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, levels=1)[1]
    message = (
        "holds: {0}, format 2; wanted: {0}, format 3\\. If another version of sparsetweaks wrote it, choose"
    )
    with pytest.raises(LotteryError, match=message.format("ticket")):
        load_ticket(ticket_path(tmp_path, ticket))
    with pytest.raises(LotteryError, match=message.format("training")):
        draw(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, levels=1)


# ---------------------------------------------------------------------------------------------------- spending


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_trains_at_the_same_number_of_nonzeros(
    digits: Data, tickets: list[Ticket], tmp_path: Path, name: str
) -> None:
    ticket, tweaks = tickets[2], VARIANTS[name]
    if tweaks.scales is not None:
        tweaks = replace(tweaks, scales={"iterations": 2})
    trained = spend(ticket, tweaks, digits, RECIPE, seed=0, folder=tmp_path)
    result = row(ticket, name, tweaks, digits, RECIPE, trained, seed=0)
    assert result["nonzeros"] + result["added"] == result["budget"] == ticket.nonzeros
    assert (result["added"] > 0) == (tweaks.skips is not None)
    last = trained.weights["last"]
    assert sum(int(last[mask].count_nonzero()) for mask in ticket.masks) == result["nonzeros"]
    assert 0 <= result["test"] <= 1
    unmasked = sum(p.numel() for name, p in ticket.model().named_parameters() if name not in ticket.masks)
    assert result["nonzero_parameters"] == unmasked + ticket.nonzeros
    assert result["parameters"] == unmasked + counts(ticket) + result["added"]


def test_a_dense_network_has_all_its_weights(digits: Data, tickets: list[Ticket]) -> None:
    count = tweaked(tickets[0], Tweaks(), digits, RECIPE, seed=0)[2]
    assert count["nonzeros"] == count["budget"] == counts(tickets[1])
    assert count["nonzero_parameters"] == count["parameters"]


def test_what_pays_for_skips_are_the_smallest_survivors(digits: Data, tickets: list[Ticket]) -> None:
    ticket = tickets[2]
    model, _, count = tweaked(ticket, Tweaks(skips={"norm": True}), digits, RECIPE, seed=0)
    masks = {name: mask for name, mask in find_masks(model).items() if name in ticket.masks}
    gone = torch.cat([ticket.trained[n][ticket.masks[n] & ~mask.cpu()].abs() for n, mask in masks.items()])
    left = torch.cat([ticket.trained[n][mask.cpu()].abs() for n, mask in masks.items()])
    assert len(gone) == count["added"] > 0
    assert gone.max() <= left.min()


def test_skips_that_cost_more_than_survives_are_refused(digits: Data, tickets: list[Ticket]) -> None:
    with pytest.raises(LotteryError, match=r"the skips add .* choose skips that add fewer"):
        tweaked(tickets[3], Tweaks(skips={"shortcut": "project-all"}), digits, RECIPE, seed=0)


def test_tweaks_are_made(digits: Data, tickets: list[Ticket]) -> None:
    model, loss, _ = tweaked(tickets[1], variant("AT"), digits, RECIPE, seed=0)
    kinds = [type(module).__name__ for module in model.modules()]
    assert "ReLU" not in kinds
    assert "SiLU" in kinds
    assert "Skip" in kinds
    _, loss, _ = tweaked(tickets[1], variant("smoothing"), digits, RECIPE, seed=0)
    sure = torch.eye(10)[:2] * 100
    assert loss(sure, torch.tensor([0, 1])) > 1  # smoothing never lets a sure answer go free


def test_a_run_is_named_by_everything_that_determines_it(tickets: list[Ticket]) -> None:
    def named(ticket: Ticket, tweaks: Tweaks, recipe: Recipe, seed: int = 0) -> str:
        return run_key(ticket, tweaks, recipe, seed=seed, device=torch.device("cpu"))

    one, other = tickets[1], tickets[2]
    keys = {
        named(one, Tweaks(), RECIPE),
        named(one, Tweaks(), RECIPE, seed=1),
        named(one, Tweaks(), replace(RECIPE, epochs=3)),
        named(other, Tweaks(), RECIPE),
        named(one, Tweaks(skips={}), RECIPE),
        named(one, Tweaks(skips={"norm": True}), RECIPE),
    }
    assert len(keys) == 6
    assert named(one, Tweaks(skips={}), RECIPE) == named(one, Tweaks(skips={"norm": False}), RECIPE)


@pytest.mark.parametrize("native", [True, False])
def test_runs_and_drawings_are_named_by_what_is_really_computed_in(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    """A folder that moves to a machine without bfloat16 takes up none of the runs of the one before."""
    capabilities = {"avx512_bf16": native, "amx_bf16": native}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    auto = replace(RECIPE, epochs=1, precision="auto")
    told = replace(auto, precision="bfloat16" if native else "float32")
    options = {"seed": 0, "folder": tmp_path, "sparsities": [0.5]}
    drawn = draw_one_shot(digits, NETWORK, auto, **options)
    again = draw_one_shot(digits, NETWORK, told, **options, on_epoch=lambda _: pytest.fail("it trained"))
    assert [ticket.identity for ticket in drawn] == [ticket.identity for ticket in again]
    trained = spend(drawn[1], Tweaks(), digits, auto, seed=0, folder=tmp_path / "runs")
    lines = [row(drawn[1], "vanilla", Tweaks(), digits, each, trained, seed=0) for each in (auto, told)]
    assert lines[0] == lines[1]
    assert lines[0]["precision"] == told.precision
    capabilities.update(avx512_bf16=not native, amx_bf16=not native)
    other = row(drawn[1], "vanilla", Tweaks(), digits, auto, trained, seed=0)
    assert other["run"] != lines[0]["run"]
    assert other["recipe"] != lines[0]["recipe"]
    elsewhere = draw_one_shot(digits, NETWORK, auto, **options)
    assert elsewhere[1].identity != drawn[1].identity
    assert elsewhere[0].identity == drawn[0].identity


def test_a_ticket_of_other_data_is_refused(digits: Data, tickets: list[Ticket], tmp_path: Path) -> None:
    with pytest.raises(LotteryError, match="drawn on other data"):
        spend(tickets[1], Tweaks(), replace(digits, fingerprint="another"), RECIPE, seed=0, folder=tmp_path)


def test_unknown_variants_list_the_known() -> None:
    with pytest.raises(LotteryError, match="unknown variant 'magic'; choose from vanilla, AT, TRT"):
        variant("AT+magic")


def test_variants_are_put_together() -> None:
    assert variant("AT+TRT+rewinding") == Tweaks({}, "swish", {}, smoothing=0.1, start="late")
    assert variant("AT+TRT+KD") == Tweaks({}, "swish", {}, distillation=True)  # in place of smoothing
    assert variant("authors-TRT") == Tweaks(
        scales={}, scales_on="dense", smoothing=0.1, smoothing_form="wrong"
    )
    with pytest.raises(LotteryError, match="start must be one of ticket, late, trained, got 'early'"):
        Tweaks(start="early")


def test_the_authors_skips_add_what_their_code_adds_to_resnet18() -> None:
    model = build(Network("resnet18"), channels=3, classes=100, seed=0)
    added = {
        name: p.numel() for name, p in inject_skips(model, **variant("authors-AT").skips).named_parameters()
        if ".skip." in name
    }  # fmt: skip
    assert sum(count for name, count in added.items() if "projection" in name) == 1_220_608
    assert sum(count for name, count in added.items() if "norm" in name) == 2 * 4 * (64 + 128 + 256 + 512)


def test_the_authors_skips_cost_what_they_cost_unless_matched(digits: Data, tickets: list[Ticket]) -> None:
    model, _, counts = tweaked(tickets[3], variant("authors-AT+unmatched"), digits, RECIPE, seed=0)
    assert counts["nonzeros"] == tickets[3].nonzeros
    assert counts["added"] > tickets[3].nonzeros
    added = sum(p.numel() for n, p in model.named_parameters() if ".skip." in n)
    assert counts["budget"] - counts["nonzeros"] == counts["added"] == added
    vanilla = tweaked(tickets[3], Tweaks(), digits, RECIPE, seed=0)[2]
    assert counts["flops"] > vanilla["flops"] > vanilla["effective_flops"]
    assert (
        counts["effective_flops"] - vanilla["effective_flops"] == counts["flops"] - vanilla["flops"]
    )  # dense
    with pytest.raises(LotteryError, match=r"compare without matching \(\+unmatched\)"):
        tweaked(tickets[3], variant("authors-AT"), digits, RECIPE, seed=0)


def test_effective_flops_are_those_that_the_masks_leave(digits: Data, tickets: list[Ticket]) -> None:
    """On a network whose every layer is as large as the image: two per weight and pixel, and the classifier."""
    counts = [tweaked(ticket, Tweaks(), digits, RECIPE, seed=0)[2] for ticket in tickets]
    assert counts[0]["flops"] == counts[0]["effective_flops"] == counts[3]["flops"]
    pixels = {"conv": 64, "stages.0": 64, "stages.1": 16, "stages.2": 4}
    expected = 2 * 16 * 10
    for name, mask in tickets[3].masks.items():
        expected += 2 * int(mask.sum()) * next(n for start, n in pixels.items() if name.startswith(start))
    assert counts[3]["effective_flops"] == expected


def test_a_row_tells_the_memory_and_the_file_that_a_network_takes(
    digits: Data, tickets: list[Ticket], tmp_path: Path
) -> None:
    trained = spend(tickets[2], Tweaks(), digits, RECIPE, seed=0, folder=tmp_path)
    told = row(tickets[2], "vanilla", Tweaks(), digits, RECIPE, trained, seed=0)
    model = tickets[2].model().to(memory_format=torch.channels_last)
    image = digits.normalise(digits.test.images[:1])
    assert told["peak_activation_bytes"] == cost(model, image).peak_activation_bytes > image.nbytes
    export(model, tmp_path / "file", format="sparse")
    assert told["sparse_file_bytes"] == (tmp_path / "file").stat().st_size
    for name in COUNTED_LATER:  # as of a run that an earlier version has kept
        del trained.note[name]
    told = row(tickets[2], "vanilla", Tweaks(), digits, RECIPE, trained, seed=0)
    assert [told[name] for name in COUNTED_LATER] == ["", ""]


def test_scales_are_learned_in_float32_whatever_the_training_computes_in(
    digits: Data, tickets: list[Ticket]
) -> None:
    tweaks = Tweaks(scales={"iterations": 3})
    states = [
        tweaked(tickets[1], tweaks, digits, replace(RECIPE, precision=precision), seed=0)[0].state_dict()
        for precision in ("float32", "bfloat16")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv.weight"], tickets[1].model().state_dict()["conv.weight"])


def test_scales_learned_dense_are_not_those_of_the_ticket(digits: Data, tickets: list[Ticket]) -> None:
    options = {"iterations": 3}
    models = {
        on: tweaked(tickets[3], Tweaks(scales=options, scales_on=on), digits, RECIPE, seed=0)[0]
        for on in ("ticket", "dense")
    }
    start, masks = tickets[3].model().state_dict(), tickets[3].masks
    factors = {
        on: [float((model.get_parameter(n).detach()[m] / start[n][m]).mean()) for n, m in masks.items()]
        for on, model in models.items()
    }
    for on, model in models.items():  # one factor per tensor, and the same masks
        for (name, mask), factor in zip(masks.items(), factors[on], strict=True):
            torch.testing.assert_close(model.get_parameter(name)[mask], start[name][mask] * factor)
            assert not model.get_parameter(name)[~mask].any()
    assert factors["ticket"] != factors["dense"]


@pytest.mark.parametrize(
    ("start", "weights"), [("ticket", "initial"), ("late", "late"), ("trained", "trained")]
)
def test_where_a_variant_starts_from(digits: Data, tickets: list[Ticket], start: str, weights: str) -> None:
    model = tweaked(tickets[2], Tweaks(start=start), digits, RECIPE, seed=0)[0]
    for name, mask in tickets[2].masks.items():
        assert torch.equal(model.get_parameter(name)[mask], getattr(tickets[2], weights)[name][mask])
        assert not model.get_parameter(name)[~mask].any()


def test_late_weights_are_those_of_the_dense_training(
    digits: Data, tickets: list[Ticket], tmp_path: Path
) -> None:
    assert tickets[2].late_epoch == 1  # of 2: 18 %, at least the first
    dense = spend(tickets[0], Tweaks(), digits, replace(RECIPE, epochs=2), seed=0, folder=tmp_path)
    assert all(torch.equal(tickets[2].late[name], value) for name, value in dense.weights["rewind"].items())
    assert not torch.equal(tickets[2].late["fc.weight"], tickets[2].initial["fc.weight"])


def test_the_teacher_is_the_dense_training_which_is_not_run_again(digits: Data, tmp_path: Path) -> None:
    drawn = draw(digits, NETWORK, RECIPE, seed=0, folder=tmp_path, levels=1, fraction=0.5)
    runs = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    taught = spend(drawn[1], variant("KD"), digits, RECIPE, seed=0, folder=tmp_path / "runs")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(after) == len(runs) + 1
    assert runs.items() <= after.items()
    plain = spend(drawn[1], Tweaks(), digits, RECIPE, seed=0, folder=tmp_path / "runs")
    assert not torch.equal(taught.weights["last"]["fc.weight"], plain.weights["last"]["fc.weight"])


# -------------------------------------------------------------------------------------------- without training


@pytest.mark.parametrize("method", UNTRAINED)
def test_tickets_before_training(digits: Data, tmp_path: Path, method: str) -> None:
    options = {"method": method, "sparsities": [0.5, 0.9], "folder": tmp_path}
    drawn = draw_untrained(digits, NETWORK, seed=0, **options)
    total = counts(drawn[1])
    assert [ticket.nonzeros for ticket in drawn[1:]] == [total - round(s * total) for s in (0.5, 0.9)]
    again = draw_untrained(digits, NETWORK, seed=0, **options)
    assert [ticket.identity for ticket in drawn] == [ticket.identity for ticket in again]
    loaded = load_ticket(ticket_path(tmp_path, drawn[2]))
    assert all(torch.equal(loaded.masks[name], mask) for name, mask in again[2].masks.items())
    model, _, count = tweaked(drawn[2], Tweaks(skips={"norm": True}), digits, RECIPE, seed=0)
    masks = find_masks(model)  # what pays for the skips is what the method finds least important
    assert count["budget"] == drawn[2].nonzeros
    assert all(not (masks[name] & ~mask).any() for name, mask in drawn[2].masks.items())
    with pytest.raises(
        LotteryError, match=f"no late weights to start from, as one that was drawn by {method}"
    ):
        tweaked(drawn[1], variant("rewinding"), digits, RECIPE, seed=0)


def test_tickets_before_training_want_what_there_is(digits: Data, tmp_path: Path) -> None:
    for options, message in (
        ({"method": "magic"}, "unknown method 'magic'; choose from random, snip, grasp, synflow"),
        ({"method": "snip", "scope": "house"}, "unknown scope 'house'"),
        ({"method": "snip", "sparsities": [1.0]}, "sparsity must lie between"),
    ):
        with pytest.raises(LotteryError, match=message):
            draw_untrained(digits, NETWORK, seed=0, folder=tmp_path, **{"sparsities": [0.5], **options})


def shares(masks: dict[str, torch.Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


@pytest.mark.parametrize(
    ("method", "scope"),
    [("snip", "layer"), ("random", "layer"), ("random", "erk"), ("magnitude", "layer"), ("magnitude", "erk")],
)
def test_what_pays_for_skips_comes_out_of_each_layer_as_it_was_drawn(
    digits: Data, tmp_path: Path, method: str, scope: str
) -> None:
    common = {"sparsities": [0.8], "seed": 0, "folder": tmp_path, "scope": scope}
    if method == "magnitude":
        ticket = draw_one_shot(digits, NETWORK, RECIPE, **common)[1]
    else:
        ticket = draw_untrained(digits, NETWORK, method=method, **common)[1]
    assert load_ticket(ticket_path(tmp_path, ticket)).scope == scope
    model, _, count = tweaked(ticket, Tweaks(skips={"norm": True}), digits, RECIPE, seed=0)
    assert count["added"] > 100
    assert count["budget"] == ticket.nonzeros
    found = find_masks(model)
    left = {name: found[name] for name in ticket.masks}
    assert all(not (left[name] & ~mask).any() for name, mask in ticket.masks.items())
    density = count["nonzeros"] / ticket.nonzeros
    if scope == "layer":
        expected = [density * each for each in shares(ticket.masks)]
    else:
        expected = list(erk_budgets(ones(ticket), count["nonzeros"]).values())
    assert shares(left) == pytest.approx(expected, abs=1 if scope == "layer" else 0)


@pytest.mark.parametrize("scope", ["layer", "erk"])
def test_magnitudes_may_be_compared_within_layers(digits: Data, tmp_path: Path, scope: str) -> None:
    common = {"seed": 0, "folder": tmp_path, "scope": scope}
    levels = draw(digits, NETWORK, RECIPE, levels=2, fraction=0.5, **common)
    shot = draw_one_shot(digits, NETWORK, RECIPE, sparsities=[0.5], **common)[1]
    assert shares(levels[1].masks) == shares(shot.masks)
    assert (levels[1].drawn, shot.drawn) == (f"imp by {scope}", f"omp by {scope}")
    for before, after in pairwise([*levels[1:]]):
        assert all(not (after.masks[name] & ~before.masks[name]).any() for name in after.masks)
    if scope == "layer":
        for ticket, density in ((levels[1], 0.5), (levels[2], 0.25)):
            sizes = [mask.numel() for mask in ticket.masks.values()]
            assert shares(ticket.masks) == pytest.approx([density * size for size in sizes], abs=1)
    else:
        assert shares(shot.masks) == list(erk_budgets(ones(shot), shot.nonzeros).values())
    identities = {t.identity for t in (levels[1], shot)}
    assert (
        draw(digits, NETWORK, RECIPE, levels=1, fraction=0.5, seed=0, folder=tmp_path)[1].identity
        not in identities
    )
    with pytest.raises(LotteryError, match="unknown scope 'house'; choose from global, layer, erk"):
        draw(digits, NETWORK, RECIPE, levels=1, fraction=0.5, **{**common, "scope": "house"})
    with pytest.raises(LotteryError, match="unknown scope 'house'"):
        draw_one_shot(digits, NETWORK, RECIPE, sparsities=[0.5], **{**common, "scope": "house"})


def ones(ticket: Ticket) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(mask) for name, mask in ticket.masks.items()}


def test_tickets_say_what_tells_them_apart(digits: Data, tickets: list[Ticket], tmp_path: Path) -> None:
    plan = {"sparsities": [0.5], "seed": 0, "folder": tmp_path}
    drawn = [
        draw_untrained(digits, NETWORK, method="random", scope=scope, **plan)[1]
        for scope in ("global", "erk")
    ]
    assert [ticket.drawn for ticket in drawn] == ["random", "random by erk"]
    for number, ticket in enumerate(drawn):
        save_file(ticket.masks, tmp_path / f"mask{number}.pt")
    file = {"folder": tmp_path}
    first, other, same = (
        draw_by_masks(digits, NETWORK, tmp_path / f"mask{number}.pt", seed=seed, **file)[1]
        for number, seed in ((0, 0), (1, 0), (0, 1))
    )
    assert first.drawn.startswith("file mask0.pt ")
    assert other.drawn.startswith("file mask1.pt ")
    assert first.drawn == same.drawn  # the same masks on another initialisation
    names = [
        draw_by_masks(
            digits, NETWORK, tmp_path / f"mask{seed}.pt", seed=seed, name=" their  pruner ", **file
        )[1].drawn
        for seed in (0, 1)
    ]
    assert names == ["file their pruner"] * 2
    with pytest.raises(LotteryError, match="the name of the masks is empty"):
        draw_by_masks(digits, NETWORK, tmp_path / "mask0.pt", seed=0, name=" ", **file)
    longer = replace(RECIPE, epochs=1)
    imp = [
        draw(digits, NETWORK, r, levels=1, fraction=0.5, **{**file, "seed": 0})[1] for r in (RECIPE, longer)
    ]
    assert imp[0].drawn == imp[1].drawn == tickets[1].drawn == "imp"
    assert imp[0].drawing == tickets[1].drawing == tickets[2].drawing != imp[1].drawing


@pytest.mark.parametrize("form", ["safetensors", "torch", "state of a pruned model"])
def test_any_mask_from_a_file(digits: Data, tickets: list[Ticket], tmp_path: Path, form: str) -> None:
    file, masks = tmp_path / "masks", tickets[2].masks
    if form == "safetensors":
        save_file(masks, file)
    elif form == "torch":
        torch.save({f"{name}_mask": mask.float() for name, mask in masks.items()}, file)
    else:
        torch.save(tickets[2].model().state_dict(), file)
    dense, drawn = draw_by_masks(digits, NETWORK, file, seed=0, folder=tmp_path)
    assert dense.level == 0
    assert all(torch.equal(drawn.masks[name], mask) for name, mask in masks.items())
    assert tweaked(drawn, variant("AT"), digits, RECIPE, seed=0)[2]["budget"] == drawn.nonzeros


def test_masks_of_normalisation_pay_for_skips_as_well(
    digits: Data, tickets: list[Ticket], tmp_path: Path
) -> None:
    masks = dict(tickets[2].masks)
    for name, parameter in tickets[2].model().named_parameters():
        if name.endswith((".bn1.weight", ".bn1.bias")):
            masks[name] = torch.rand(parameter.shape) < 0.5
    assert len(masks) > len(tickets[2].masks)
    save_file(masks, tmp_path / "masks")
    _, drawn = draw_by_masks(digits, NETWORK, tmp_path / "masks", seed=0, folder=tmp_path)
    model, _, count = tweaked(drawn, Tweaks(skips={"norm": True}), digits, RECIPE, seed=0)
    assert count["added"] > 0
    assert count["budget"] == drawn.nonzeros
    found = find_masks(model)
    assert all(not (found[name] & ~mask).any() for name, mask in drawn.masks.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text", "is neither safetensors nor a file of torch.save"),
        ({"fc.weights": torch.ones(10, 16).bool()}, "holds no mask of this network: it holds fc.weights"),
        (
            {"fc.weight": torch.ones(10, 3).bool()},
            r"the mask of 'fc.weight' is \(10, 3\), its weight \(10, 16\)",
        ),
        ([1, 2], "holds a list, not tensors by name"),
    ],
)
def test_files_that_hold_no_masks_are_named(
    digits: Data, tmp_path: Path, content: object, message: str
) -> None:
    file = tmp_path / "masks"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(LotteryError, match=message):
        draw_by_masks(digits, NETWORK, file, seed=0, folder=tmp_path)
    assert not (tmp_path / "tickets").exists()


def test_a_mask_file_runs_no_code(digits: Data, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"fc.weight_mask": Bomb()}, tmp_path / "masks")
    with pytest.raises(LotteryError, match="neither safetensors nor"):
        draw_by_masks(digits, NETWORK, tmp_path / "masks", seed=0, folder=tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_a_ticket_of_a_users_network_asks_before_it_imports(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home_made.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('imported').touch()\n"
        "from torch import nn\n"
        "def small(channels, classes):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(144, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    network = Network("home_made:small")
    ticket = draw_untrained(digits, network, method="random", sparsities=[0.5], seed=0, folder=tmp_path)[1]
    (tmp_path / "imported").unlink()
    sys.modules.pop("home_made")
    path = ticket_path(tmp_path, ticket)
    with pytest.raises(LotteryError, match="if you trust it, allow it by --model home_made:small"):
        load_ticket(path)
    assert not (tmp_path / "imported").exists()
    assert load_ticket(path, model="home_made:small").nonzeros == ticket.nonzeros
    sys.modules.pop("home_made")


# ------------------------------------------------------------------------------------ what is wrong with one run


def test_what_is_wrong_with_a_run_is_said_with_its_name(
    digits: Data, tickets: list[Ticket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"seed": 0, "folder": tmp_path}
    untrained = draw_untrained(digits, NETWORK, method="random", sparsities=[0.5], **common)[1]
    title, wrong = "resnet8 on digits, seed 0, imp, level 1, 50.0 % sparse", "the loss became nan in epoch 1"
    huge = replace(variant("TRT"), scales={"iterations": 2, "floor": 1e38})
    with pytest.raises(RunError, match=f"^{title}, TRT: the loss is nan"):  # as the surgery says it
        spend(tickets[1], huge, digits, RECIPE, name="TRT", **common)
    with pytest.raises(RunError, match=r"random, level 1, .*, rewinding: this ticket has no late weights"):
        spend(untrained, variant("rewinding"), digits, RECIPE, name="rewinding", **common)
    taught = f"^{title}, KD: resnet8 on digits, seed 0, dense, vanilla: {wrong}"  # the teacher failed

    def diverge(*given: object, **options: object) -> object:
        return train(*given, **{**options, "loss": lambda logits, _: logits.sum() * math.nan})

    monkeypatch.setattr("sparsetweaks.lottery.spend.train", diverge)
    with pytest.raises(RunError, match=taught):
        spend(tickets[1], variant("KD"), digits, RECIPE, name="KD", **common)
    with pytest.raises(RunError, match=f"^{title}, pools: {title}, vanilla: {wrong}"):
        pool(tickets[1], tickets, digits, RECIPE, **common)


# ------------------------------------------------------------------------------------------------ Lottery Pools


def test_pools_keep_the_non_zeros_and_never_lose_in_validation(
    digits: Data, tickets: list[Ticket], tmp_path: Path
) -> None:
    for ticket in tickets:
        plain = spend(ticket, Tweaks(), digits, RECIPE, seed=0, folder=tmp_path)
        pooled = pool(ticket, tickets, digits, RECIPE, seed=0, folder=tmp_path)
        assert pooled.validation >= plain.validation
        left = sum(int(pooled.weights["best"][name].count_nonzero()) for name in tickets[1].masks)
        assert left <= (ticket.nonzeros or counts(tickets[1]))
        again = pool(ticket, tickets, digits, RECIPE, seed=0, folder=tmp_path)
        assert (again.test, again.validation) == (pooled.test, pooled.validation)
        line = pool_row(ticket, tickets, digits, RECIPE, pooled, seed=0)
        assert line["variant"] == "pools"
        assert line["budget"] == (ticket.nonzeros or counts(tickets[1]))
        assert line["run"] != row(ticket, "vanilla", Tweaks(), digits, RECIPE, plain, seed=0)["run"]


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_pools_keep_as_many_of_each_layer_as_the_scope_of_the_ticket_says(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    common = {"seed": 0, "folder": tmp_path, "scope": scope, "sparsities": [0.6, 0.7, 0.8]}
    drawn = draw_untrained(digits, NETWORK, method="random", **common)[1:]
    looks = iter(range(1, 20))  # each better than all before, so that the last interpolation is taken
    monkeypatch.setattr("sparsetweaks.lottery.pools.accuracy", lambda *_: next(looks))
    pooled = pool(drawn[1], drawn, digits, RECIPE, seed=0, folder=tmp_path).weights["best"]
    left = [int(pooled[name].count_nonzero()) for name in drawn[1].masks]
    assert sum(left) == drawn[1].nonzeros
    assert (left == shares(drawn[1].masks)) is (scope != "global")
    weights = [pooled[name] != 0 for name in drawn[1].masks]
    assert any((kept & ~mask).any() for kept, mask in zip(weights, drawn[1].masks.values(), strict=True))


def test_pools_by_layer_are_not_those_of_before_under_the_same_name(digits: Data, tmp_path: Path) -> None:
    """They were pruned as if they were global; the names of those that are global stay."""
    common = {"sparsities": [0.6, 0.8], "seed": 0, "folder": tmp_path}
    for scope in ("global", "layer"):
        drawn = draw_untrained(digits, NETWORK, method="random", scope=scope, **common)[1:]
        device = torch.device("cpu")
        runs = [run_key(each, Tweaks(), RECIPE, seed=0, device=device) for each in drawn]
        before = key("pools", runs, SHARES)
        assert (pool_key(drawn[0], drawn, RECIPE, seed=0, device=device) == before) is (scope == "global")


def test_pools_choose_on_validation_and_look_at_the_test_images_once(
    digits: Data, tickets: list[Ticket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ticket in tickets:
        spend(ticket, Tweaks(), digits, RECIPE, seed=0, folder=tmp_path)
    seen = []

    def watch(model: torch.nn.Module, part: object, data: Data) -> float:
        seen.append("test" if part is digits.test else "validation")
        return 0.0

    monkeypatch.setattr("sparsetweaks.lottery.pools.accuracy", watch)
    pool(tickets[2], tickets, digits, RECIPE, seed=0, folder=tmp_path)
    assert seen == ["validation"] * 18 + ["test"]  # nine shares of two neighbours


def test_pools_need_other_levels(digits: Data, tickets: list[Ticket], tmp_path: Path) -> None:
    with pytest.raises(LotteryError, match="give the tickets of several levels"):
        pool(tickets[2], [tickets[2]], digits, RECIPE, seed=0, folder=tmp_path)


def test_nothing_here_warns(digits: Data, tickets: list[Ticket]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tweaked(tickets[1], replace(variant("AT+TRT"), scales={"iterations": 1}), digits, RECIPE, seed=0)


def test_pools_take_the_nearest_of_the_same_drawing(digits: Data, tmp_path: Path) -> None:
    common = {"seed": 0, "folder": tmp_path}
    dense, *random = draw_untrained(
        digits, NETWORK, method="random", sparsities=[0.5, 0.8, 0.9, 0.95, 0.98], **common
    )
    _, other = draw_untrained(digits, NETWORK, method="synflow", sparsities=[0.9], **common)
    every = [dense, *random, other]

    def found(ticket: Ticket) -> list[float]:
        return sorted(round(each.sparsity, 2) for each in neighbours(ticket, every))

    assert [found(ticket) for ticket in random[2:]] == [[0.8, 0.95], [0.9, 0.98], [0.9, 0.95]]
    assert found(other) == [0.0]  # of its own drawing there is the dense network alone
    assert found(dense) == [0.5, 0.8]


def test_masks_of_another_name_are_other_tickets(digits: Data, tmp_path: Path) -> None:
    masks = find_masks(prune(build(NETWORK, channels=1, classes=10, seed=0), 0.5))
    torch.save(masks, tmp_path / "masks.pt")
    drawn = [
        draw_by_masks(digits, NETWORK, tmp_path / "masks.pt", seed=0, folder=tmp_path, name=name)[1]
        for name in (None, "alpha", "beta", "beta")
    ]
    assert len({each.identity for each in drawn}) == 3 and drawn[2].identity == drawn[3].identity


def test_what_prunes_nothing_or_everything_is_refused(digits: Data, tmp_path: Path) -> None:
    common = {"seed": 0, "folder": tmp_path}
    with pytest.raises(LotteryError, match="no weight of the network would be left"):
        draw_untrained(digits, NETWORK, method="random", sparsities=[0.999999], **common)
    with pytest.raises(LotteryError, match="less than one weight: there is no level after it"):
        draw(digits, NETWORK, RECIPE, levels=1, fraction=1e-6, **common)


class Causal(torch.nn.Module):
    """A network of a user's that has a mask of its own, which prunes nothing."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("attn_mask", torch.ones(64))
        self.first, self.head = torch.nn.Linear(64 * channels, 8), torch.nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(images.flatten(1) * self.attn_mask)))


def test_buffers_of_the_network_that_are_named_as_masks_stay(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "users", types.SimpleNamespace(make=Causal, wrong=lambda: None))
    network = Network("users:make")
    _, first, second = draw(digits, network, RECIPE, levels=2, seed=0, folder=tmp_path)
    assert "attn_mask" in second.model().state_dict() and second.sparsity > first.sparsity > 0
    with pytest.raises(LotteryError, match="users:wrong must be a function of channels= and classes="):
        draw(digits, Network("users:wrong"), RECIPE, levels=1, seed=0, folder=tmp_path)
