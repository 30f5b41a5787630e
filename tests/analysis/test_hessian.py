"""Curvature against the dense Hessian of torch in float64, in every form of mask and both modes."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader, TensorDataset

from sparsetweaks.analysis import (
    NotConvergedWarning,
    hessian_density,
    hessian_top_eigenvalues,
    hessian_trace,
)
from sparsetweaks.lottery.config import Network
from sparsetweaks.lottery.models import build
from sparsetweaks.masks import apply_masks
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.skips import inject_skips

EXACT = {"tolerance": 1e-10}
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:FutureWarning"
)  # of torch.func


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, 3)).double()


def convolutional() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.SiLU(),
        nn.Dropout(0.5),
        nn.Conv2d(3, 2, 2),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()
    for norm in (model[1], model[5]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)
    return model


NETWORKS = {
    "mlp": (mlp, (5,), ["0.weight", "2.weight"]),
    "conv": (convolutional, (1, 5, 5), ["0.weight", "4.weight"]),
}


def case(kind: str, form: str = "buffers", examples: int = 24):
    """A masked network, the plain one that computes the same, its masks and a batch."""
    torch.manual_seed(0)
    make, shape, masked = NETWORKS[kind]
    plain = make()
    generator = torch.Generator().manual_seed(5)
    masks = {n: torch.rand(plain.get_parameter(n).shape, generator=generator) > 0.5 for n in masked}
    batch = torch.randn(examples, *shape).double(), torch.randint(3, (examples,))
    if form == "dense":
        return plain, plain, {}, batch
    plain = apply_masks(plain, masks)
    model = make()
    state = {name: value for name, value in plain.state_dict().items() if not name.endswith("_mask")}
    model.load_state_dict(state)
    if form == "buffers":
        model = apply_masks(model, masks)
    for name, mask in masks.items():
        layer, beneath = model.get_submodule(name[0]), torch.ones(mask.shape, dtype=torch.float64)
        if form == "torch.nn.utils.prune":
            with torch.no_grad():  # values beneath the mask: they are no part of the network
                layer.weight.masked_scatter_(~mask, beneath)
            prune.custom_from_mask(layer, "weight", mask)
        if form == "parametrization":
            parametrize.register_parametrization(layer, "weight", FakeSparsity(mask))
    return model, plain, masks, batch


def dense_hessian(plain, masks, batch, loss=F.cross_entropy, *, batch_norm="eval", over="kept"):
    """The whole matrix, its kept part, and where each entry lives: name and place."""
    plain.eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d) and batch_norm == "train":
            module.training, module.track_running_stats = True, False
    names = sorted(name for name, _ in plain.named_parameters())
    values = {name: plain.get_parameter(name).detach() for name in names}
    sizes = [value.numel() for value in values.values()]

    def of(flat):
        parts = {n: p.reshape(values[n].shape) for n, p in zip(names, flat.split(sizes), strict=True)}
        return loss(functional_call(plain, parts, (batch[0].clone(),)), batch[1])

    flat = torch.cat([value.reshape(-1) for value in values.values()])
    keep = torch.cat(
        [
            (masks[n] if n in masks and over == "kept" else torch.ones_like(v).bool()).reshape(-1)
            for n, v in values.items()
        ]
    )
    # With batch statistics torch.func.hessian is off by several percent, and not even symmetric (torch 2.15,
    # against finite differences); the one of torch.autograd.functional is exact there.
    matrix = torch.autograd.functional.hessian(of, flat) if batch_norm == "train" else hessian(of)(flat)
    return matrix[keep][:, keep], keep


def flat_vector(vector, keep):
    return torch.cat([vector[name].reshape(-1) for name in sorted(vector)])[keep]


FORMS = ["dense", "buffers", "torch.nn.utils.prune", "parametrization"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "batch_norm"), [("mlp", "eval"), ("conv", "eval"), ("conv", "train")])
def test_eigenpairs_of_the_dense_hessian(kind, batch_norm, form):
    model, plain, masks, batch = case(kind, form)
    top = hessian_top_eigenvalues(
        model, batch, F.cross_entropy, k=3, over="both", batch_norm=batch_norm, **EXACT
    )
    for over, found in (("kept", top), ("all", top.beside)):
        matrix, keep = dense_hessian(plain, masks, batch, batch_norm=batch_norm, over=over)
        values, vectors = torch.linalg.eigh(matrix)
        assert found.work.over == over
        assert found.work.dimension == len(matrix)
        assert found.work.masked == bool(masks)
        assert found.values == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-8)
        for number, vector in enumerate(found.vectors, 1):
            assert abs(flat_vector(vector, keep) @ vectors[:, -number]) == pytest.approx(1, abs=1e-6)
    for vector in top.vectors:
        for name, mask in masks.items():
            assert vector[name][~mask].abs().max() == 0
            assert vector[name][mask].abs().max() > 0


def test_the_tolerance_bounds_the_relative_error():
    model, plain, masks, batch = case("conv")
    expected = torch.linalg.eigvalsh(dense_hessian(plain, masks, batch)[0]).max().item()
    for tolerance in (1e-2, 1e-3, 1e-6):
        top = hessian_top_eigenvalues(model, batch, F.cross_entropy, tolerance=tolerance)
        assert abs(top.values[0] / expected - 1) <= tolerance
        assert abs(top.values[0] - expected) <= top.errors[0] <= tolerance * top.values[0]


@pytest.mark.parametrize("which", ["smallest", "magnitude"])
def test_the_other_ends(which):
    model, plain, masks, batch = case("mlp")
    values = torch.linalg.eigvalsh(dense_hessian(plain, masks, batch)[0])
    expected = values[0] if which == "smallest" else values[values.abs().argmax()]
    top = hessian_top_eigenvalues(model, batch, F.cross_entropy, which=which, **EXACT)
    assert top.values[0] == pytest.approx(expected.item(), rel=1e-8)


def test_any_cut_of_the_data_is_the_hessian_of_the_mean_over_all_examples():
    model, plain, masks, batch = case("conv")
    expected = torch.linalg.eigvalsh(dense_hessian(plain, masks, batch)[0]).max().item()
    inputs, targets = batch
    uneven = [(inputs[:3], targets[:3]), (inputs[3:4], targets[3:4]), (inputs[4:], targets[4:])]
    shuffled = DataLoader(TensorDataset(inputs, targets), batch_size=7, shuffle=True)
    for data in (batch, uneven, shuffled):
        for options in ({}, {"chunk_size": 5}, {"keep_graph": True, "chunk_size": 5}):
            top = hessian_top_eigenvalues(model, data, F.cross_entropy, **EXACT, **options)
            assert top.values[0] == pytest.approx(expected, rel=1e-9)
            kept = options.get("keep_graph", data is batch and not options)
            assert top.work.gradients == (1 if kept else 1 + top.work.products)


def test_batch_statistics_are_those_of_each_batch_as_given():
    model, plain, masks, batch = case("conv")
    halves = [tuple(part[:10] for part in batch), tuple(part[10:] for part in batch)]
    parts = [len(half[1]) * dense_hessian(plain, masks, half, batch_norm="train")[0] for half in halves]
    expected = torch.linalg.eigvalsh(sum(parts) / len(batch[1])).max().item()
    top = hessian_top_eigenvalues(model, halves, F.cross_entropy, batch_norm="train", **EXACT)
    assert top.values[0] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="chunk_size cuts batches"):
        hessian_top_eigenvalues(model, batch, F.cross_entropy, batch_norm="train", chunk_size=4)


def test_restricted_to_some_parameters():
    model, plain, masks, batch = case("mlp")
    matrix, keep = dense_hessian(plain, masks, batch)
    names = sorted(name for name, _ in plain.named_parameters())
    owner = [name for name in names for _ in range(plain.get_parameter(name).numel())]
    chosen = torch.tensor([name.startswith("2.") for name, k in zip(owner, keep, strict=True) if k])
    top = hessian_top_eigenvalues(model, batch, F.cross_entropy, where="2", **EXACT)
    assert top.values[0] == pytest.approx(torch.linalg.eigvalsh(matrix[chosen][:, chosen]).max().item())
    assert list(top.vectors[0]) == ["2.bias", "2.weight"]


def test_the_trace_by_its_expectation():
    model, plain, masks, batch = case("conv")
    for over in ("kept", "all"):
        matrix, _ = dense_hessian(plain, masks, batch, over=over)
        trace = hessian_trace(model, batch, F.cross_entropy, probes=400, over=over)
        assert abs(trace.value - matrix.trace()) < 4 * trace.standard_error
        off = matrix - torch.diag(matrix.diagonal())  # the variance of v^T H v is 2 * sum of its squares
        assert trace.standard_error == pytest.approx(math.sqrt(2 * off.square().sum() / 400), rel=0.25)
        assert trace.mean_eigenvalue == trace.value / len(matrix)


def test_probes_that_share_a_pass_see_the_same_hessian():
    model, _, _, batch = case("conv")
    one = hessian_trace(model, batch, F.cross_entropy, probes=11)
    two = hessian_trace(model, batch, F.cross_entropy, probes=11, chunk_size=7)
    assert two.samples == pytest.approx(one.samples, rel=1e-9)
    assert (one.work.products, one.work.gradients) == (11, 1)
    assert (two.work.products, two.work.gradients) == (11, 3)


def test_both_spaces_are_seen_by_the_same_probes():
    model, _, _, batch = case("mlp")
    whole = {"where": "4.*", "over": "both", "probes": 3}  # nothing is pruned there: the spaces are one
    trace = hessian_trace(model, batch, F.cross_entropy, **whole)
    assert trace.samples == trace.beside.samples
    density = hessian_density(model, batch, F.cross_entropy, steps=3, **whole)
    assert density.nodes == density.beside.nodes
    assert len(set(trace.samples)) == 3


def test_the_density_has_the_moments_and_ends_of_the_spectrum():
    model, plain, masks, batch = case("mlp")
    matrix, _ = dense_hessian(plain, masks, batch)
    values = torch.linalg.eigvalsh(matrix)
    density = hessian_density(model, batch, F.cross_entropy, probes=200, steps=4)
    for power in (1, 2, 3):
        samples = torch.tensor(
            [
                sum(w * n**power for n, w in zip(nodes, weights, strict=True))
                for nodes, weights in zip(density.nodes, density.weights, strict=True)
            ]
        )
        error = samples.std() / math.sqrt(len(samples))
        assert abs(density.moment(power) - (values**power).mean()) < 4 * error
    whole = hessian_density(model, batch, F.cross_entropy, probes=1, steps=len(values))
    assert max(whole.nodes[0]) == pytest.approx(values.max().item(), rel=1e-8)
    assert min(whole.nodes[0]) == pytest.approx(values.min().item(), rel=1e-8)


def test_the_density_is_smoothed_by_the_width_it_states():
    model, _, _, batch = case("mlp")
    density = hessian_density(model, batch, F.cross_entropy, probes=2, steps=5, width=0.05, grid=400)
    grid = torch.tensor(density.grid, dtype=torch.float64)
    expected = torch.zeros_like(grid)
    for nodes, weights in zip(density.nodes, density.weights, strict=True):
        for node, weight in zip(nodes, weights, strict=True):
            expected += weight / 2 * torch.distributions.Normal(node, 0.05).log_prob(grid).exp()
    assert torch.allclose(torch.tensor(density.density, dtype=torch.float64), expected)
    assert density.width == 0.05
    default = hessian_density(model, batch, F.cross_entropy, probes=1, steps=5)
    assert default.width == pytest.approx(0.01 * (max(default.nodes[0]) - min(default.nodes[0])))


def test_losses_without_curvature():
    model, _, _, batch = case("mlp")
    linear = nn.Linear(5, 3).double()
    top = hessian_top_eigenvalues(linear, batch, lambda outputs, targets: outputs.mean())
    assert top.values == (0,)
    density = hessian_density(linear, batch, lambda outputs, targets: outputs.mean())
    assert density.moment(2) == 0
    assert hessian_trace(model, batch, F.cross_entropy, where="4.bias", probes=2).work.dimension == 3


def test_an_all_pruned_layer_contributes_nothing():
    model, _, _, batch = case("mlp", "dense")
    model = apply_masks(model, {"2.weight": torch.zeros(4, 6, dtype=torch.bool)})
    top = hessian_top_eigenvalues(model, batch, F.cross_entropy)
    assert top.work.weights - top.work.dimension == 24
    assert top.values[0] > 0
    assert top.vectors[0]["2.weight"].abs().max() == 0


def test_frozen_parameters_and_attention():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double()
    model.linear1.weight.requires_grad_(False)
    batch = torch.randn(3, 4, 8).double(), torch.randn(3, 4, 8).double()
    top = hessian_top_eigenvalues(model, batch, F.mse_loss)
    assert "linear1.weight" not in top.vectors[0]
    assert top.converged


def test_what_tweaks_added_is_part_of_the_network():
    model = apply_masks(resnet(), {"stages.0.0.conv1.weight": torch.rand(4, 4, 3, 3) > 0.8})
    tweaked = swap_activations(inject_skips(model), "mish")
    batch = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
    plain, both = (hessian_top_eigenvalues(each, batch, F.cross_entropy) for each in (model, tweaked))
    assert both.work.weights > plain.work.weights
    assert both.work.weights - both.work.dimension == plain.work.weights - plain.work.dimension > 0
    assert both.values[0] > 0


def resnet() -> nn.Module:
    return build(Network("resnet8", width=4), channels=1, classes=10, seed=0)


def test_the_model_and_the_random_state_are_untouched_also_on_raise():
    for form in FORMS:
        model, _, _, batch = case("conv", form)
        model.train()
        model(batch[0].clone()).sum().backward()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        modes = [module.training for module in model.modules()]
        state = torch.get_rng_state()

        def losing(outputs, targets):
            raise KeyboardInterrupt

        quick = {hessian_trace: {"probes": 2}, hessian_density: {"probes": 1, "steps": 3}}
        for analyse in (hessian_top_eigenvalues, hessian_trace, hessian_density):
            analyse(model, batch, F.cross_entropy, batch_norm="train", **quick.get(analyse, {}))
            with pytest.raises(KeyboardInterrupt):
                analyse(model, batch, losing)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)


def test_works_under_no_grad_inference_mode_and_autocast():
    model, _, _, batch = case("mlp")
    expected = hessian_top_eigenvalues(model, batch, F.cross_entropy).values
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            assert hessian_top_eigenvalues(model, batch, F.cross_entropy).values == expected


def test_one_generator_draws_the_same_in_every_form_and_another_dtype_is_more_exact():
    values = [
        hessian_top_eigenvalues(*case("mlp", form)[::3], F.cross_entropy, tolerance=1e-2).values[0]
        for form in FORMS[1:]
    ]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)
    model, _, _, batch = case("conv")
    exact = hessian_top_eigenvalues(model, batch, F.cross_entropy, **EXACT).values[0]
    widened = hessian_top_eigenvalues(model.float(), batch, F.cross_entropy, dtype=torch.float64, **EXACT)
    assert widened.values[0] == pytest.approx(exact, rel=1e-5)  # the weights were rounded to float32
    assert model[0].weight.dtype == torch.float32


def test_stopped_too_early_warns_and_says_so():
    model, _, _, batch = case("conv")
    with pytest.warns(NotConvergedWarning, match="after 2 products") as caught:
        top = hessian_top_eigenvalues(model, batch, F.cross_entropy, iterations=2)
    assert caught[0].filename == __file__
    assert not top.converged
    assert "not converged" in str(top)


def test_progress():
    model, _, _, batch = case("mlp")
    calls = []
    top = hessian_top_eigenvalues(
        model, batch, F.cross_entropy, iterations=50, progress=lambda *call: calls.append(call)
    )
    assert calls == [(step, 50) for step in range(1, top.work.products + 1)]
    calls.clear()
    hessian_trace(model, batch, F.cross_entropy, probes=10, progress=lambda *call: calls.append(call))
    assert calls == [(8, 10), (10, 10)]
    calls.clear()
    hessian_density(
        model, batch, F.cross_entropy, probes=2, steps=2, progress=lambda *call: calls.append(call)
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_results_print_plot_and_turn_into_tables():
    model, _, _, batch = case("mlp")
    results = [
        hessian_top_eigenvalues(model, batch, F.cross_entropy, k=2, over="both"),
        hessian_trace(model, batch, F.cross_entropy, probes=4, over="both"),
        hessian_density(model, batch, F.cross_entropy, probes=1, steps=4, over="both"),
    ]
    for result in results:
        (axes,) = result.plot().axes
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(labels) == 2
        assert {row["over"] for row in result.table()} == {"kept", "all"}
        assert f"over the kept weights, {result.work.dimension} of {result.work.weights}; loss" in str(result)
        picture = io.BytesIO()
        result.plot().savefig(picture)
        assert picture.tell() > 0
    assert "matplotlib.pyplot" not in sys.modules
    assert [row["number"] for row in results[0].table()] == [1, 2, 1, 2]
    dense = hessian_trace(case("mlp", "dense")[0], batch, F.cross_entropy, probes=2)
    assert "the model has no masks" in str(dense)


@pytest.mark.parametrize(
    ("values", "scale"), [((50.0, 0.1), "log"), ((5.0, 0.1), "linear"), ((50.0, -0.1), "linear")]
)
def test_eigenvalues_over_decades_are_drawn_logarithmically(values, scale):
    model, _, _, batch = case("mlp")
    top = hessian_top_eigenvalues(model, batch, F.cross_entropy, k=2)
    (axes,) = replace(top, values=values).plot().axes
    assert axes.get_yscale() == scale
    assert "loss / weight²" in axes.get_ylabel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be a whole number"),
        ({"k": 3, "iterations": 2}, "iterations must be a whole number, at least 3"),
        ({"k": 100, "iterations": 100}, "only .* weights are kept"),
        ({"which": "lowest"}, "'largest', 'smallest' or 'magnitude'"),
        ({"over": "pruned"}, "'kept', 'all' or 'both'"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"missed": 0.0}, "missed must be positive"),
        ({"missed": 1.5}, "missed must be at most 1"),
        ({"batch_norm": "batch"}, "batch_norm must be"),
        ({"where": "nowhere"}, "matches no trainable parameter"),
        ({"chunk_size": 0}, "chunk_size must be"),
    ],
)
def test_wrong_options(options, message):
    model, _, _, batch = case("mlp")
    with pytest.raises(ValueError, match=message):
        hessian_top_eigenvalues(model, batch, F.cross_entropy, **options)


def test_wrong_models_data_and_losses():
    model, _, _, batch = case("mlp")
    with pytest.raises(ValueError, match="must be a scalar"):
        hessian_trace(model, batch, lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with pytest.raises(ValueError, match="was it detached"):
        hessian_trace(model, batch, lambda o, t: F.cross_entropy(o.detach(), t))
    with pytest.raises(ValueError, match="the model fails on these inputs"):
        hessian_trace(model, (batch[0][:, :2], batch[1]), F.cross_entropy)
    with pytest.raises(ValueError, match="no batch"):
        hessian_trace(model, [], F.cross_entropy)
    with pytest.raises(ValueError, match="the loss of the given network is inf"):
        hessian_trace(model, batch, lambda o, t: F.cross_entropy(o, t) + math.inf)
    with pytest.raises(ValueError, match="no trainable parameter"):
        hessian_trace(model.requires_grad_(False), batch, F.cross_entropy)
    with pytest.raises(ValueError, match="width must be positive"):
        hessian_density(model, batch, F.cross_entropy, width=0.0)
    with pytest.raises(ValueError, match="probes must be a whole number, at least 2"):
        hessian_trace(model, batch, F.cross_entropy, probes=1)
    root = nn.Linear(5, 3, bias=False).double()
    nn.init.zeros_(root.weight)
    with pytest.raises(ValueError, match="the Hessian is not finite"):
        hessian_trace(root, batch, lambda o, t: (o.square().mean(dim=0) ** 0.75).mean(), over="all")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        hessian_trace(model.state_dict(), batch, F.cross_entropy)


def test_embeddings_with_sparse_gradients_have_a_hessian():
    torch.manual_seed(0)
    sparse = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    dense = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    dense.load_state_dict(sparse.state_dict())
    data = torch.randint(10, (8, 3)), torch.randint(3, (8,))
    values = [hessian_top_eigenvalues(each, data, F.cross_entropy).values[0] for each in (sparse, dense)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
