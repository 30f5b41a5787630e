"""The comparison: each number is the one that its analysis gives alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsetweaks as st
from sparsetweaks.analysis.activations import activation_sparsity
from sparsetweaks.analysis.calibration import calibration
from sparsetweaks.analysis.collapse import effective_sparsity
from sparsetweaks.analysis.comparing import compare
from sparsetweaks.analysis.flatness import flatness
from sparsetweaks.analysis.gradient_flow import gradient_flow
from sparsetweaks.errors import UnmaskedZerosWarning

GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.randn(12, 2, 6, 6, generator=GENERATOR), torch.randint(3, (12,), generator=GENERATOR)


def ticket():
    layers = (
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(),
    )
    return st.prune(nn.Sequential(*layers, nn.Flatten(), nn.Linear(216, 3)), 0.8)


def test_the_table_is_that_of_the_analyses_alone():
    before = ticket()
    networks = {"vanilla": before, "swish & skips": st.swap_activations(st.inject_skips(before), "swish")}
    found = compare(networks, DATA, F.cross_entropy)
    for row, model in zip(found.table(), networks.values(), strict=True):
        assert row["effective_sparsity"] == effective_sparsity(model, DATA[0]).effective_sparsity
        assert row["near_zeros"] == activation_sparsity(model, DATA).near_zeros
        assert row["effective_gradient_flow"] == gradient_flow(model, DATA, F.cross_entropy).effective
        assert row["calibration_error"] == calibration(model, DATA).error
        assert row["sparsity"] == st.sparsity(model).overall
    assert found.table()[1]["non-zeros"] == found.table()[0]["non-zeros"] + 2
    text = str(found)
    assert "vanilla" in text and "swish & skips" in text and max(map(len, text.splitlines())) <= 100
    figure = found.plot()
    assert all(axes.get_ylabel() for axes in figure.axes if axes.get_visible())


def test_flatness_by_option_and_only_what_was_asked_for():
    model = ticket()
    found = compare({"one": model}, DATA, F.cross_entropy, analyses=("flatness",))
    assert found.table()[0]["largest_eigenvalue"] == pytest.approx(
        flatness(model, DATA, F.cross_entropy).top.values[0], rel=1e-6
    )
    assert found.networks["one"].activations is None
    assert len([axes for axes in found.plot().axes if axes.get_visible()]) == 3  # sparsity, eigenvalue, trace


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="mapping of names to models"):
        compare([ticket()], DATA, F.cross_entropy)
    with pytest.raises(ValueError, match="unknown analyses"):
        compare({"a": ticket()}, DATA, F.cross_entropy, analyses=("hessian",))
    with pytest.raises(ValueError, match="'b': the model fails on"):
        compare({"a": ticket(), "b": nn.Sequential(nn.Linear(9, 3), nn.ReLU())}, DATA, F.cross_entropy)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module"):
        compare({"a": 3}, DATA, F.cross_entropy)
    model = ticket()
    with pytest.raises(ValueError, match="'before' and 'after' are one and the same network: compare copies"):
        compare({"before": model, "after": model}, DATA, F.cross_entropy)
    with pytest.raises(ValueError, match="names of networks must be text, got 1"):
        compare({1: model, "1": ticket()}, DATA, F.cross_entropy)
    with pytest.raises(ValueError, match="unknown analyses"):
        compare({"a": model}, DATA, F.cross_entropy, analyses=None)


def test_progress_and_plain_zeros():
    calls = []
    plain = st.convert_masks(ticket(), to="zeros")
    with pytest.warns(UnmaskedZerosWarning, match="count as kept") as told:
        compare(
            {"masked": ticket(), "plain": plain},
            DATA,
            F.cross_entropy,
            analyses=("gradient", "paths"),
            progress=lambda *call: calls.append(call),
        )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(told) == 1 and told[0].filename == __file__


def test_what_is_a_bound_only_is_said_so():
    class Spectrum(nn.Module):
        def forward(self, input):
            return torch.fft.fft(input, norm="ortho").real

    model = nn.Sequential(nn.Linear(4, 4), Spectrum(), nn.Linear(4, 3))
    batch = torch.randn(5, 4, generator=GENERATOR), torch.randint(3, (5,), generator=GENERATOR)
    known = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    found = compare({"relu": known, "fft": model}, batch, F.cross_entropy, analyses=("paths",))
    *_, before, last = str(found).splitlines()
    assert last == "effective_sparsity of 'fft' is at least this: what passes fft_fft is not known"
    assert "is not known" not in before


def test_a_segmentation_is_compared():
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    batch = DATA[0], torch.randint(3, (12, 6, 6), generator=GENERATOR)
    found = compare({"one": model}, batch, F.cross_entropy)
    assert found.networks["one"].calibration.examples == 12 * 36


def test_an_analysis_that_does_not_fit_is_named_with_how_to_leave_it_out():
    regression = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
    batch = torch.randn(4, 2, generator=GENERATOR), torch.randn(4, 1, generator=GENERATOR)
    message = (
        r"'one': the model must put out scores.*analyses=\('paths', 'activations', 'gradient'\) leaves out"
    )
    with pytest.raises(ValueError, match=message):
        compare({"one": regression}, batch, F.mse_loss)
    assert compare({"one": regression}, batch, F.mse_loss, analyses=("paths", "activations", "gradient"))
    with pytest.raises(ValueError, match=r"only once: pass a list or a DataLoader$"):  # no analysis's fault
        compare({"one": regression}, iter([batch]), F.mse_loss)


def test_what_an_analysis_leaves_out_is_said_of_its_network():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    frozen = copy.deepcopy(model)
    frozen[0].weight.requires_grad_(False)
    batch = torch.randn(16, 4), torch.randint(2, (16,))
    text = str(compare({"all": model, "half": frozen}, batch, F.cross_entropy))
    assert "'half': left out (frozen): '0.weight'" in text
    assert "'all': left out" not in text
