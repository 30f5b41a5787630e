"""What is left of a model is counted: of the prunable weights, of all parameters, and with what tweaks added."""

from __future__ import annotations

import pytest
from small_models import Added, small_model
from torch import nn

from sparsetweaks.counting import sparsity
from sparsetweaks.errors import UnmaskedZerosWarning
from sparsetweaks.pruning import prune


def test_sparsity_counts_the_prunable_weights_all_parameters_and_what_tweaks_added():
    model = small_model()
    report = sparsity(prune(model, 0.75))
    weights = 4 * 2 * 9 + 4 * 4 * 9
    everything = sum(p.numel() for p in model.parameters())
    assert [layer.name for layer in report.layers] == ["0.weight", "1.conv.weight"]
    assert report.weights == weights
    assert report.overall == report.overall_with_added == 0.75
    assert report.of_all_parameters == pytest.approx(0.75 * weights / everything)
    assert sum(layer.zeros for layer in report.layers) == report.weights - report.kept

    tweaked = prune(model, 0.75)
    tweaked[1].add_module("skip", Added(3, 3))
    added = sparsity(tweaked)
    assert (added.added_parameters, added.added_kept) == (12, 12)
    assert added.overall == 0.75
    assert added.of_all_parameters == report.of_all_parameters
    assert added.overall_with_added == pytest.approx(1 - (report.kept + 12) / weights)
    assert added.of_all_parameters_with_added == pytest.approx(1 - (report.parameters_kept + 12) / everything)
    assert "added by tweaks" in str(added)
    assert "added by tweaks" not in str(report)


def test_a_layer_without_a_mask_shows_no_sparsity_or_that_of_its_plain_zeros():
    model = small_model()
    assert "no mask" in str(sparsity(model))
    nn.init.zeros_(model[0].weight)
    with pytest.warns(UnmaskedZerosWarning, match="72 of the 216 prunable weights"):
        report = sparsity(model)
    first, second = report.layers
    assert (first.sparsity, first.masked, first.zeros) == (1.0, False, 72)
    assert (second.sparsity, second.masked, second.zeros) == (0.0, False, 0)
    assert "100.00 %" in str(report) and "no mask" in str(report)


def test_a_masked_weight_counts_even_if_it_is_not_prunable_by_default():
    report = sparsity(prune(small_model(), 0.5, include="4"))
    assert [layer.name for layer in report.layers] == ["0.weight", "1.conv.weight", "4.weight"]
    assert report.layers[-1].sparsity == 0.5


def test_the_sparsity_of_a_model_without_weights_is_zero():
    report = sparsity(nn.ReLU())
    assert (report.layers, report.overall, report.of_all_parameters) == ((), 0.0, 0.0)
