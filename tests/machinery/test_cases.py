"""The matrix itself: its models hold what they should, its surgeries do something, and its table is whole."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from machinery.cases import NEUTRAL, SURGERIES, assert_same_masks, batch_for, run

import sparsetweaks as st

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "machinery.csv"


def test_every_surgery_changes_what_the_model_computes(model, original, name, surgery):
    """Otherwise a cell could not tell whether a surgery was lost."""
    for training in (True, False):
        runs = [run(each, batch_for(name), training=training) for each in (model, original)]
        distance = float((runs[0].output - runs[1].output).norm() / runs[1].output.norm())
        assert distance == 0 if surgery == "none" else distance > 1e-3
    assert_same_masks(model, original)
    assert not [site for change in st.changes(model) for site in change.left]


def test_neutral_surgeries_change_nothing(original, name, surgery):
    expected = run(original, batch_for(name))
    actual = run(NEUTRAL[surgery](original), batch_for(name))
    assert torch.equal(actual.output, expected.output)
    for key, gradient in expected.gradients.items():
        assert torch.equal(actual.gradients[key], gradient)


def test_models_hold_what_machinery_trips_over(original, name):
    sites = st.find_activations(original)
    forms = {site.form for site in sites}
    assert {"module", "function"} <= forms
    units = st.find_skip_sites(original)
    assert {site.kind for site in units} == {"kept", "changed"}
    assert 0.5 < st.sparsity(original).overall < 0.7


def test_the_table_is_whole(request):
    """Remake it with the command in conftest.py."""
    if not TABLE.exists():
        pytest.skip("the table has not been made yet: see conftest.py")
    rows = {
        marker.args[0]
        for item in request.session.items
        if (marker := item.get_closest_marker("machinery")) is not None
    }
    with TABLE.open(newline="", encoding="utf-8") as file:
        table = {row["machinery"]: row for row in csv.DictReader(file)}
    assert rows <= table.keys()
    cells = [row[surgery] for row in table.values() for surgery in SURGERIES]
    assert all("passed" in cell or "torch cannot" in cell for cell in cells)
    assert not any("FAILED" in cell or "skipped" in cell for cell in cells)
