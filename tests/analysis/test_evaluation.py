"""The loss of the analyses: one exact mean however the data come, on a copy, with nothing else moved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset

from sparsetweaks.analysis import activation_sparsity, calibration, gradient_flow, hessian_top_eigenvalues
from sparsetweaks.analysis.evaluation import (
    Batches,
    Chunk,
    check_cut,
    chunk_loss,
    is_pair,
    mean_loss,
    undisturbed,
    working_copy,
)

GENERATOR = torch.Generator().manual_seed(0)
INPUTS, TARGETS = torch.randn(11, 3, generator=GENERATOR), torch.randint(2, (11,), generator=GENERATOR)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(4, 2)
    )


def test_the_mean_over_uneven_batches_is_that_over_all_examples():
    model = working_copy(network(), dtype=torch.float64)
    whole = F.cross_entropy(model(INPUTS.double()), TARGETS).item()
    uneven = [(INPUTS[:2], TARGETS[:2]), (INPUTS[2:3], TARGETS[2:3]), (INPUTS[3:], TARGETS[3:])]
    shuffled = DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4, shuffle=True)
    for data in ((INPUTS, TARGETS), uneven, shuffled):
        for chunk_size in (None, 1, 3, 100):
            batches = Batches(data, model, chunk_size=chunk_size)
            assert mean_loss(model, batches, F.cross_entropy) == pytest.approx(whole, rel=1e-12)


def test_each_iteration_sees_the_same_shuffle_and_the_random_state_survives():
    model = working_copy(network())
    state = torch.get_rng_state()
    with undisturbed(model):
        batches = Batches(DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4, shuffle=True), model)
        first, second = ([chunk.inputs for chunk in batches] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


class Permuted(Sampler):
    def __init__(self, generator):
        self.generator = generator

    def __iter__(self):
        yield from torch.randperm(11, generator=self.generator).split(4)


def loaders(generator):
    data = TensorDataset(INPUTS, TARGETS)
    drawn = RandomSampler(data, generator=generator)
    batches = BatchSampler(drawn, 4, False)
    return {
        "its own": DataLoader(data, batch_size=4, shuffle=True, generator=generator),
        "sampler": DataLoader(data, batch_size=4, sampler=drawn),
        "batch sampler's sampler": DataLoader(data, batch_sampler=batches),
        "batch sampler": DataLoader(data, batch_sampler=Permuted(generator)),
        "batches as a sampler": DataLoader(data, sampler=batches, batch_size=None),
    }


@pytest.mark.parametrize("where", loaders(None))
def test_a_loader_with_its_own_generator_shuffles_the_same_way_too_and_keeps_its_state(where):
    generator = torch.Generator().manual_seed(4)
    loader = loaders(generator)[where]
    state = generator.get_state()
    batches = Batches(loader, working_copy(network()))
    with undisturbed(network()):
        first, second = ([chunk.inputs for chunk in batches] for _ in range(2))
        next(iter(batches))  # left in the middle
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(generator.get_state(), state)


def test_the_modes_are_those_asked_for_and_statistics_stay():
    model = network()
    model(INPUTS)
    in_eval, in_train = working_copy(model), working_copy(model, batch_norm="train")
    model.eval()
    assert torch.equal(in_eval(INPUTS), model(INPUTS))
    model[1].train()
    before = in_train[1].running_mean.clone()
    assert torch.equal(in_train(INPUTS), model(INPUTS))
    assert torch.equal(in_train[1].running_mean, before)
    with pytest.raises(ValueError, match="batch_norm"):
        working_copy(model, batch_norm="batch")


def test_low_precision_is_widened():
    model = network().to(torch.bfloat16)
    assert working_copy(model)[0].weight.dtype == torch.float32
    (chunk,) = Batches((INPUTS.to(torch.bfloat16), TARGETS), working_copy(model))
    assert chunk.inputs.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16


class Casting(nn.Module):
    """Handles its two precisions by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4).bfloat16(), nn.Linear(4, 2)

    def forward(self, inputs):
        return self.second(self.first(inputs.bfloat16()).float())


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_forward_that_casts_by_itself_is_told_what_was_converted(dtype):
    chunk, model = Chunk(INPUTS, TARGETS, 11), Casting()
    with torch.no_grad():
        assert chunk_loss(working_copy(model, widen=False), chunk, F.cross_entropy) == F.cross_entropy(
            model(INPUTS), TARGETS
        )
    message = f"converted to {dtype or torch.float32} .* as in x.to"
    with pytest.raises(ValueError, match=message):
        chunk_loss(working_copy(model, dtype=dtype), chunk, F.cross_entropy)
    for given, wrong in ((nn.Linear(3, 2).bfloat16(), INPUTS[:, :2]), (nn.Linear(3, 2), INPUTS.long())):
        with pytest.raises(ValueError, match="fails on these inputs") as raised:
            chunk_loss(working_copy(given), Chunk(wrong, TARGETS, 11), F.cross_entropy)
        assert "converted" not in str(raised.value)  # the one has wrong shapes, the other is as it was


def test_complex_numbers_take_the_precision_too():
    model = nn.Linear(3, 2, dtype=torch.complex64)
    inputs = torch.randn(4, 3, dtype=torch.complex64)
    copied = working_copy(model, dtype=torch.float64)
    (chunk,) = Batches((inputs, torch.zeros(4)), copied)
    assert copied(chunk.inputs).dtype == torch.complex128
    assert model.weight.dtype == torch.complex64 and working_copy(model).weight.dtype == torch.complex64


def test_a_network_that_works_in_place_cannot_reach_the_batch():
    before = INPUTS.clone()
    model = working_copy(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)))
    mean_loss(model, Batches((INPUTS, TARGETS), model), F.cross_entropy)
    assert torch.equal(INPUTS, before)


def test_several_inputs_and_nested_targets():
    class Sum(nn.Module):
        def forward(self, first, second):
            return first + second

    model = Sum()
    for inputs in ((INPUTS, INPUTS), {"first": INPUTS, "second": INPUTS}):
        batches = Batches([(inputs, [TARGETS, TARGETS])], model, chunk_size=4)
        value = mean_loss(model, batches, lambda outputs, targets: outputs.mean() + len(targets))
        assert value == pytest.approx(2 * INPUTS.mean().item() + 2, rel=1e-5)


PAIR = INPUTS, TARGETS


@pytest.mark.parametrize(
    ("data", "count", "inside"),
    [
        ((INPUTS, (TARGETS, TARGETS)), 1, 2),
        ([INPUTS, [TARGETS, TARGETS]], 1, 2),
        (({"first": INPUTS}, (TARGETS, TARGETS)), 1, 2),
        (((INPUTS, INPUTS), (TARGETS, TARGETS, TARGETS)), 1, 3),
        (((INPUTS, INPUTS, INPUTS), (TARGETS, TARGETS)), 1, 2),
        ([(PAIR, (TARGETS, TARGETS))], 1, 2),
        ([PAIR, PAIR], 2, None),
        ([[*PAIR], [*PAIR]], 2, None),
        ((PAIR, PAIR, PAIR), 3, None),
    ],
)
def test_a_pair_of_tuples_is_told_from_two_batches(data, count, inside):
    chunks = list(Batches(data, working_copy(network()), chunk_size=11))
    assert len(chunks) == count
    for chunk in chunks:
        assert (len(chunk.targets) if isinstance(chunk.targets, (tuple, list)) else None) == inside


def test_two_pairs_in_a_tuple_may_be_one():
    assert not is_pair((PAIR, PAIR))
    with pytest.raises(
        ValueError, match=r"one pair .* or two of them: write \[\(inputs, targets\)\] for the one"
    ):
        Batches((PAIR, PAIR), network())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        (INPUTS, "got a Tensor"),
        (iter([(INPUTS, TARGETS)]), "only once"),
        ([INPUTS], "must be a pair"),
        ((INPUTS, TARGETS[:3]), "11 inputs but 3 targets"),
        ((INPUTS[:0], TARGETS[:0]), "no example"),
        (("text", TARGETS), "the inputs must be tensors"),
        ((torch.tensor(1.0), TARGETS), "first dimension"),
    ],
)
def test_wrong_data(data, message):
    with pytest.raises(ValueError, match=message):
        list(Batches(data, network()))


def test_a_batch_that_cannot_be_cut():
    batches = Batches(((INPUTS, INPUTS[:3]), TARGETS), working_copy(network()), chunk_size=4)
    with pytest.raises(ValueError, match="cannot cut a batch of 11 examples"):
        list(batches)
    with pytest.raises(ValueError, match="chunk_size"):
        Batches((INPUTS, TARGETS), network(), chunk_size=0)


WEIGHTS = torch.tensor([1.0, 5.0])


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(weight=WEIGHTS),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda outputs, targets: outputs.std(),
        lambda outputs, targets: F.cross_entropy(outputs, targets) / len(targets),
    ],
    ids=["class weights", "a sum", "of pairs", "divided twice"],
)
@pytest.mark.parametrize("chunk_size", [1, 7])
def test_a_loss_that_chunks_would_change_is_refused_where_batches_are_cut(loss, chunk_size):
    model = working_copy(network())
    for data in ((INPUTS, TARGETS), [(INPUTS[:1], TARGETS[:1]), (INPUTS[1:], TARGETS[1:])]):
        batches = Batches(data, model, chunk_size=chunk_size)
        with pytest.raises(
            ValueError, match=f"with chunk_size={chunk_size} the loss would be .*Leave chunk_size"
        ):
            check_cut(model, batches, loss)
        for whole in (None, 11):
            check_cut(model, Batches(data, model, chunk_size=whole), loss)


class Several(nn.Module):
    """Outputs in a mapping, one of them without examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs):
        return {"scores": self.layer(inputs), "beside": (self.layer.weight.square().sum(), 3)}


def test_a_mean_over_examples_may_be_cut():
    weighted = lambda o, t: F.cross_entropy(o, t, weight=WEIGHTS.to(o.dtype), reduction="sum") / len(t)
    wrong = lambda o, t: (o.argmax(1) != t).float().mean()
    for dtype in (torch.float32, torch.float64):
        model = working_copy(network(), dtype=dtype)
        whole = Batches((INPUTS, TARGETS), model)
        for loss in (F.cross_entropy, weighted, wrong, nn.CrossEntropyLoss(label_smoothing=0.1)):
            for chunk_size in (1, 7, 100):
                batches = Batches((INPUTS, TARGETS), model, chunk_size=chunk_size)
                check_cut(model, batches, loss)
                assert mean_loss(model, batches, loss) == pytest.approx(
                    mean_loss(model, whole, loss), rel=1e-5
                )
    several = lambda o, t: F.cross_entropy(o["scores"], t) + o["beside"][0]
    check_cut(Several(), Batches((INPUTS, TARGETS), Several(), chunk_size=4), several)


def test_wrong_losses_and_inputs_that_do_not_fit():
    model = working_copy(network())
    chunk = Chunk(INPUTS, TARGETS, 11)
    with pytest.raises(ValueError, match=r"must be a scalar.*shape \(11,\)"):
        chunk_loss(model, chunk, lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"))
    with pytest.raises(ValueError, match=r"must be a scalar, .* got float"):
        chunk_loss(model, chunk, lambda outputs, targets: 1.0)
    with pytest.raises(ValueError, match=r"the model fails on these inputs \(shape \(11, 2\)\)"):
        chunk_loss(model, Chunk(INPUTS[:, :2], TARGETS, 11), F.cross_entropy)
    with pytest.raises(ValueError, match="the loss fails"):
        chunk_loss(model, Chunk(INPUTS, TARGETS.float(), 11), lambda outputs, targets: outputs @ targets)


def test_weights_that_are_not_finite_are_named():
    model = network()
    with torch.no_grad():
        model[4].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"'4\.bias'"):
        working_copy(model)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6, track_running_stats=False), nn.BatchNorm1d(6)])
def test_batches_that_batchnorm_looks_at_whole_are_not_cut(norm):
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, 3))
    data, mode = (torch.randn(16, 4), torch.randint(3, (16,))), {"batch_norm": "train"}
    told = r"chunk_size cuts batches, and BatchNorm '(0\.)?1' uses the statistics of its batch"
    for analysis in (gradient_flow, hessian_top_eigenvalues):
        with pytest.raises(ValueError, match=told):
            analysis(model, data, F.cross_entropy, chunk_size=4, **mode)
    for analysis in (activation_sparsity, calibration):
        with pytest.raises(ValueError, match=told):
            analysis(nn.Sequential(model, nn.ReLU()), data, chunk_size=4, **mode)
    if norm.running_mean is None:
        with pytest.raises(ValueError, match=told):
            hessian_top_eigenvalues(model, data, F.cross_entropy, chunk_size=4)
    else:
        gradient_flow(model, data, F.cross_entropy, chunk_size=4)
