from __future__ import annotations

import json
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sparsetweaks.lottery.config import VARIANTS, LotteryError, Network, Recipe, Tweaks, variant
from sparsetweaks.lottery.data import Data
from sparsetweaks.lottery.draw import draw, draw_one_shot
from sparsetweaks.lottery.files import check_writable
from sparsetweaks.lottery.spend import row, run_key, spend, tweaked
from sparsetweaks.lottery.store import Ticket, dense_ticket, load_ticket, save_ticket, ticket_path
from sparsetweaks.masks import find_masks

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
    with pytest.raises(LotteryError, match="is a training of format 2; wanted is a ticket"):
        load_ticket(next(tmp_path.iterdir()))


def test_a_ticket_of_another_network_does_not_fit_together(tickets: list[Ticket], tmp_path: Path) -> None:
    save_ticket(replace(tickets[1], network=Network("resnet8", 8)), tmp_path / "a")
    with pytest.raises(LotteryError, match="does not fit together"):
        load_ticket(tmp_path / "a")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LotteryError, match=r"cannot write to .*file/runs"):
        check_writable(tmp_path / "file" / "runs")


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
    one, other = tickets[1], tickets[2]
    keys = {
        run_key(one, Tweaks(), RECIPE, seed=0),
        run_key(one, Tweaks(), RECIPE, seed=1),
        run_key(one, Tweaks(), replace(RECIPE, epochs=3), seed=0),
        run_key(other, Tweaks(), RECIPE, seed=0),
        run_key(one, Tweaks(skips={}), RECIPE, seed=0),
        run_key(one, Tweaks(skips={"norm": True}), RECIPE, seed=0),
    }
    assert len(keys) == 6
    assert run_key(one, Tweaks(skips={}), RECIPE, seed=0) == run_key(
        one, Tweaks(skips={"norm": False}), RECIPE, seed=0
    )


def test_a_ticket_of_other_data_is_refused(digits: Data, tickets: list[Ticket], tmp_path: Path) -> None:
    with pytest.raises(LotteryError, match="drawn on other data"):
        spend(tickets[1], Tweaks(), replace(digits, fingerprint="another"), RECIPE, seed=0, folder=tmp_path)


def test_unknown_variants_list_the_known() -> None:
    with pytest.raises(LotteryError, match="unknown variant 'magic'; choose from vanilla, AT, TRT"):
        variant("magic")


def test_nothing_here_warns(digits: Data, tickets: list[Ticket]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tweaked(tickets[1], replace(variant("AT+TRT"), scales={"iterations": 1}), digits, RECIPE, seed=0)
