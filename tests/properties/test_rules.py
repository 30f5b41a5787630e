"""A thousand random networks through every surgery, in every order, held against the ground rules; half by `make test`.

`python tests/properties/fuzz.py` does it with 20,000 and counts what they contained. A failure prints the simplest
case that fails and the command that runs it again.
"""

from __future__ import annotations

import random

import fuzz
import pytest
import rules
import torch
from torch import nn

from sparsetweaks import SurgeryError, swap_activations
from sparsetweaks.testing import FORMS, HAZARDS, BlockSpec, Spec

PIECES, MODELS = 8, 125
SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in range(PIECES // 2, PIECES)]


@pytest.mark.parametrize("number", [*range(PIECES // 2), *SLOW])
def test_the_ground_rules_hold_for_random_networks(number):
    piece = fuzz.draw_piece(number, MODELS)
    assert piece["failures"] == []
    assert piece["counts"]["models"] == MODELS


FOUND = [
    ("calls_own_call", "ReLU", "buffers", ("inject", "fixed")),  # its __call__ was done twice
    ("replaced_forward", "GELU", "buffers", ("swap", "silu")),  # from here on: passed over in silence
    ("hidden_in_dict", "GELU", "buffers", ("swap", "silu")),
    ("made_in_forward", "GELU", "buffers", ("swap", "silu")),
    ("by_name_in_a_branch", "GELU", "buffers", ("swap", "silu")),
    ("function_table_in_a_branch", "GELU", "buffers", ("swap", "silu")),
    ("global_table_in_a_branch", "GELU", "buffers", ("swap", "silu")),
    ("registered_in_list", "torch.relu_", "buffers", ("swap", "silu")),
    ("value_branch", "Tensor.relu", "buffers", ("swap", "silu")),
    ("value_branch", "alias of F.relu", "buffers", ("swap", "silu")),
    ("value_branch", "callable object", "buffers", ("swap", "silu")),
    ("lora", "ReLU", "parametrization", ("scale", "random")),  # a mask was found under the wrapper's name too
    ("inplace_residual", "x.relu_()", "torch_prune", ("swap", "relu to a function")),
]


@pytest.mark.parametrize(("form", "activation", "masked", "step"), FOUND)
def test_what_fuzzing_found_stays_mended(form, activation, masked, step):
    for root in ("tower", "sequential"):
        spec = Spec(blocks=(BlockSpec(form=form, activation=activation),), root=root)
        rules.check(rules.Case(spec, form=masked, mask_seed=1, steps=(step,)))


def test_what_is_drawn_covers_every_hazard_order_form_and_variant():
    """Drawn without checking, so that thousands cost seconds."""
    drawn, models = random.Random(0), 4000
    counts = fuzz.collections.Counter()
    for _ in range(models):
        counts.update(fuzz.contents(rules.draw_case(drawn)))
    assert {name: counts[name] for name in HAZARDS if counts[name] < models / 200} == {}
    orders = [name for name in counts if name.startswith("order: ")]
    variants = [name for name in counts if name.startswith("variant: ")]
    assert len(orders) == len(rules.ORDERS) == 6 and min(counts[name] for name in orders) > models / 10
    assert len(variants) == sum(map(len, rules.SURGERIES.values()))
    assert all(counts[f"mask form: {form}"] > models / 10 for form in FORMS)
    pairs = [name for name in counts if name.startswith("pair: ")]
    assert set(pairs) <= fuzz.possible_pairs()
    assert len(pairs) > 0.8 * len(fuzz.possible_pairs())


def broken_swap(change):
    """A surgery that swaps, and then does something that it must not."""

    def apply(model, batch):
        result = swap_activations(model, "silu")
        change(model, result)
        return result

    return rules.swap("silu")._replace(apply=apply)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, result: model.stem.weight.data.mul_(2), "changed the model it was given"),
        (lambda model, result: torch.rand(1), "changed the model it was given"),
        (lambda model, result: result.stem.weight.data.mul_(2), "stem.weight has other values"),
        (lambda model, result: result.eval(), "mode of"),
        (lambda model, result: result.stem.requires_grad_(False), "requires_grad of stem"),
        (lambda model, result: result.blocks[0]._forward_hooks.clear(), "hooks of blocks.0"),
        (lambda model, result: setattr(result, "head", nn.Identity()), "head.weight is gone"),
        (lambda model, result: result.stem.weight_mask.fill_(True), "weight_mask has other values"),
        (lambda model, result: setattr(result, "blocks", model.blocks), "is shared"),
        (lambda model, result: vars(result).pop("_changes"), "IndexError"),
    ],
)
def test_a_broken_surgery_is_caught(change, message, monkeypatch):
    monkeypatch.setitem(rules.SURGERIES["swap"], "silu", broken_swap(change))
    spec = Spec(blocks=(BlockSpec(),), extras=("block_hook",))
    case = rules.Case(spec, mask_seed=1)
    assert "stem.weight" in rules.masked_network(case)[1]
    with pytest.raises(AssertionError, match=message) as caught:
        rules.check(case)
    assert "fuzz.py --case" in str(caught.value)


def test_a_surgery_that_is_not_neutral_or_passes_over_an_activation_is_caught(monkeypatch):
    case = rules.Case(Spec(), steps=(("swap", "silu"),))
    rules.check(case)
    monkeypatch.setitem(rules.SURGERIES["swap"], "silu", rules.swap("silu", neutral=True))
    with pytest.raises(AssertionError, match="not neutral in train mode"):
        rules.check(case)
    monkeypatch.setitem(rules.SURGERIES["swap"], "silu", rules.swap("relu", kinds=("gelu",)))
    with pytest.raises(AssertionError, match="passed over in silence"):
        rules.check(case)


def test_an_unknown_refusal_is_an_error(monkeypatch):
    def refuse(model, batch):
        raise SurgeryError("I do not feel like it")

    monkeypatch.setitem(rules.SURGERIES["scale"], "random", rules.Surgery(refuse))
    with pytest.raises(AssertionError, match="feel like"):
        rules.check(rules.Case(Spec()))


def test_a_failure_is_simplified(monkeypatch):
    def fails_with_tanh(case):
        assert all(block.activation != "Tanh" for block in case.spec.blocks), (
            f"a tanh in the case\n{rules.reproduction(case)}"
        )
        return {}

    monkeypatch.setattr(rules, "check", fails_with_tanh)
    spec = Spec(blocks=(BlockSpec(form="alias"), BlockSpec(activation="Tanh", layer="same")), root="staged")
    told = fuzz.explained(rules.Case(spec, form="zeros", adam=True))
    assert f"{Spec(blocks=(BlockSpec(activation='Tanh'),))}" in told
    assert "alias" not in told and "staged" not in told and "adam=True" not in told


def test_a_table_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rules, "check", lambda case: {"neutral": 1})
    path = tmp_path / "fuzz.csv"
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--models", "600", "--seed", "3", "--csv", str(path)])
    assert fuzz.main() == 0
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "run,models,600" in lines and "event,neutral,600" in lines
    assert sum(line.startswith("hazard,") for line in lines) == len(HAZARDS)
    assert "seed 3" in capsys.readouterr().out
