"""Ghosts: what they compute on the way, that they leave no trace, and what carries them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import Call
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import sparsetweaks as st
from sparsetweaks.surgery.ghosts import Ghost, GhostActivation
from sparsetweaks.surgery.programs import Rewritten
from sparsetweaks.surgery.skips import GhostSkip


def unit(*args, **kwargs) -> nn.Sequential:
    conv = nn.Conv2d(*args, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())


class Block(nn.Module):
    """A unit with a functional activation, so that a skip and a swap both rewrite its forward."""

    def __init__(self, call=F.relu):
        super().__init__()
        self.conv, self.norm, self.call = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), call

    def forward(self, x):
        return self.call(self.norm(self.conv(x)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = unit(3, 4, 3, padding=1)
        self.block = Block()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def ghosted(model: nn.Module, **options) -> nn.Module:
    return st.swap_activations(st.inject_skips(model, ghost=True, **options), "swish", ghost=True)


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 6, 6)


def passes(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, input gradient and parameter gradients by name, in training and in eval mode."""
    found = []
    for training in (True, False):
        model = copy.deepcopy(model).train(training)
        given = x.clone().requires_grad_()
        output = model(given)
        leaves = output if isinstance(output, tuple) else (output,)
        sum((leaf * leaf.cos().detach()).sum() for leaf in leaves).backward()
        found += [*leaves, given.grad, *(p.grad for p in model.parameters())]
    return found


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


# --- What they compute --------------------------------------------------------------------------------------


def test_a_ghost_skip_adds_its_strength_times_its_input():
    model, x = unit(4, 4, 3, padding=1), images(4)
    ghost = st.inject_skips(model, ghost=True, strength=0.5)
    assert isinstance(ghost[0].skip, GhostSkip)
    assert dict(ghost.named_buffers())["0.skip.strength"].shape == (1,)
    assert "strength=0.5 of 0.5" in repr(ghost[0].skip)
    plain = model[1](model[0](x))
    torch.testing.assert_close(ghost(x), F.relu(plain + 0.5 * x))
    assert st.anneal_ghosts(ghost, 0.25) == 0.5
    torch.testing.assert_close(ghost(x), F.relu(plain + 0.25 * x))


ORIGINALS = {
    "relu": (nn.ReLU(), F.relu),
    "relu6": (nn.ReLU6(), F.relu6),
    "leaky_relu": (nn.LeakyReLU(0.2), lambda x: F.leaky_relu(x, 0.2)),
}


@pytest.mark.parametrize("kind", ORIGINALS)
def test_a_ghost_swish_goes_from_swish_to_the_original(kind):
    module, original = ORIGINALS[kind]
    ghost = st.swap_activations(nn.Sequential(module), "swish", kinds=(kind,), ghost=True)
    assert isinstance(ghost[0], GhostActivation) and isinstance(ghost[0], type(module))
    x = torch.linspace(-20, 20, 2001, dtype=torch.double)
    if kind == "relu":
        torch.testing.assert_close(ghost(x), F.silu(x))
    distances = []
    for progress in (0.0, 0.2, 0.4, 0.45, 0.499):
        strength = st.anneal_ghosts(ghost, progress)
        distance = (ghost(x) - original(x)).abs().max().item()
        assert distance <= 0.279 * strength
        distances.append(distance)
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.2
    st.anneal_ghosts(ghost, 0.5)
    assert torch.equal(ghost(x), original(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [1.0, 1e-3, 1e-7, 1e-30, 0.0])
def test_no_strength_gives_nan(dtype, strength):
    ghost = st.swap_activations(nn.Sequential(nn.ReLU()), "swish", ghost=True).to(dtype)
    ghost[0].strength.fill_(strength)
    x = torch.tensor([-1e4, -1.0, -1e-7, 0.0, 1e-7, 1.0, 1e4], dtype=dtype, requires_grad=True)
    y = ghost(x)
    y.sum().backward()
    assert y.dtype == dtype and y.isfinite().all() and x.grad.isfinite().all()


FORMS = {
    "F.relu": lambda x: F.relu(x),
    "F.relu input": lambda x: F.relu(input=x),
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu_": lambda x: F.relu_(x),
    "torch.relu": lambda x: torch.relu(x),
    "torch.relu_": lambda x: torch.relu_(x),
    "x.relu": lambda x: x.relu(),
    "x.relu_": lambda x: x.relu_(),
    "F.relu6": lambda x: F.relu6(x),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "F.leaky_relu keyword": lambda x: F.leaky_relu(x, negative_slope=0.2),
    "F.leaky_relu_": lambda x: F.leaky_relu_(x, 0.2),
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU inplace": nn.ReLU(inplace=True),
    "nn.ReLU6 inplace": nn.ReLU6(inplace=True),
    "nn.LeakyReLU": nn.LeakyReLU(0.3),
}


@pytest.mark.parametrize("kind", ORIGINALS)
def test_strengths_that_python_cannot_read_give_the_same(kind):
    ghost = st.swap_activations(nn.Sequential(ORIGINALS[kind][0]), "swish", kinds=(kind,), ghost=True)
    x, strengths = torch.linspace(-9, 9, 37), torch.tensor([0.0, 0.3, 1.0])

    def called(strength: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(ghost, {"0.strength": strength}, (x,))

    alone = torch.stack([called(strength) for strength in strengths])
    assert torch.equal(torch.func.vmap(called)(strengths), alone)
    with FlopCounterMode(display=False):
        assert torch.equal(torch.stack([called(strength) for strength in strengths]), alone)


@pytest.mark.parametrize("seen", [False, True], ids=["alone", "seen"])
@pytest.mark.parametrize("form", FORMS)
def test_at_strength_0_every_form_is_the_original_and_removal_gives_it_back(form, seen):
    model, x = Call(FORMS[form], seen), torch.randn(3, 4)
    ghost = st.swap_activations(model, "swish", ghost=True)
    expected, alive = passes(model, x), passes(ghost, x)
    assert not torch.equal(alive[-1], expected[-1])
    st.anneal_ghosts(ghost, 1.0)
    assert_same(expected, passes(ghost, x))
    back = st.remove_ghosts(ghost)
    assert_same(expected, passes(back, x))
    assert [type(each) for each in back.modules()] == [type(each) for each in model.modules()]
    assert list(back.state_dict()) == list(model.state_dict())
    assert set(vars(back)) - {"_changes"} == set(vars(model))


def test_a_network_of_ghosts_at_strength_0_is_the_original():
    model, x = Network(), images()
    for options in ({}, {"norm": True}, {"shortcut": "project-all"}):
        ghost = ghosted(model, **options)
        assert not torch.allclose(passes(ghost, x)[0], passes(model, x)[0], rtol=0.1, atol=0.01)
        st.anneal_ghosts(ghost, 1.0)
        extra = {name for name, _ in ghost.named_parameters()} - {
            name for name, _ in model.named_parameters()
        }
        found = copy.deepcopy(ghost)
        for name in extra:
            assert ".skip." in name
            found.get_parameter(name).requires_grad_(False)
        left, right = passes(model, x), [each for each in passes(found, x) if each is not None]
        assert_same(left, right)


def test_every_surviving_weight_gets_a_gradient_through_living_ghosts():
    model = ghosted(Network(), shortcut="projection", norm=True)
    model(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# --- Annealing ----------------------------------------------------------------------------------------------


def test_the_schedules():
    model = st.inject_skips(unit(4, 4, 3, padding=1), ghost=True, strength=2.0)
    for schedule, expected in {
        "linear": [1.0, 0.75, 0.5, 0.25, 0.0],
        "cosine": [(1 + math.cos(math.pi * age)) / 2 for age in (0, 0.25, 0.5, 0.75, 1)],
        "step": [1.0, 1.0, 1.0, 1.0, 0.0],
    }.items():
        for progress, left in zip((0, 0.2, 0.4, 0.6, 0.8), expected):
            assert st.anneal_ghosts(model, progress, schedule=schedule, until=0.8) == pytest.approx(left)
            assert model[0].skip.strength.item() == pytest.approx(2 * left)
        assert model[0].skip.strength.item() == 0
    assert st.anneal_ghosts(model, 1, schedule="cosine") == 0


def test_bad_annealing_is_named():
    model = st.inject_skips(unit(4, 4, 3, padding=1), ghost=True)
    with pytest.raises(ValueError, match="known: linear, cosine, step"):
        st.anneal_ghosts(model, 0.5, schedule="exponential")
    for progress in (-0.1, 1.1, float("nan"), 5):
        with pytest.raises(ValueError, match="progress"):
            st.anneal_ghosts(model, progress)
    for until in (0, 1.5, float("nan"), "a"):
        with pytest.raises(ValueError, match="until"):
            st.anneal_ghosts(model, 0.5, until=until)
    with pytest.raises(TypeError):
        st.anneal_ghosts("model", 0.5)
    assert model[0].skip.strength.item() == 1
    with pytest.warns(st.NoEffectWarning, match="no ghosts"):
        st.anneal_ghosts(unit(4, 4, 3), 0.5)


def test_annealing_recompiles_nothing_and_the_compiled_model_follows():
    model, x = ghosted(Network()).eval(), images()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outputs = []
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for progress in (0.0, 0.1, 0.3, 0.5, 1.0):
            st.anneal_ghosts(compiled, progress)
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], model(x))
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[3], outputs[4])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("strength", "input"), [(torch.float16, torch.float32), (torch.float32, torch.float16)]
)
def test_a_ghost_at_strength_0_has_gradients_where_another_precision_computes(strength, input):
    model = st.swap_activations(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "swish", ghost=True)
    st.anneal_ghosts(model, 1.0)
    activation = model[1]
    activation.strength = activation.strength.to(strength)
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=input)
    slopes = torch.func.grad(lambda x: activation(x).sum())(x)  # where both ways are computed
    assert slopes.tolist() == [0, 0, 1]


def test_distributed_and_averaged_models_carry_ghosts(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = ghosted(Network())
        wrapped = nn.parallel.DistributedDataParallel(model)
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False)
        st.anneal_ghosts(wrapped, 0.25)
        wrapped(images()).sum().backward()
        assert model.block.conv.skip.strength.item() == 0.5
        average.update_parameters(model)
        assert average.module.block.conv.skip.strength.item() == 0.5
        assert st.anneal_ghosts(average, 0.5) == 0
        assert average.module.block.relu.strength.item() == 0
        with pytest.raises(st.SurgeryError, match=r"model\.module"):
            st.anneal_ghosts(wrapped, 1.0)
            st.remove_ghosts(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_averaged_buffers_lag_until_the_average_is_annealed():
    model, x = ghosted(Network()), images()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for epoch in range(4):
        st.anneal_ghosts(model, epoch / 3)
        average.update_parameters(model)
    st.remove_ghosts(model)
    assert average.module.block.conv.skip.strength.item() == pytest.approx(1 / 3)
    with pytest.raises(st.SurgeryError, match="4 ghosts are still alive"):
        st.remove_ghosts(average.module)
    alive = average.eval()(x)
    assert st.anneal_ghosts(average, 1) == 0
    back = st.remove_ghosts(average.module)
    assert torch.equal(back(x), average(x)) and (back(x) - alive).abs().max() > 1e-3


def test_checkpoints_copies_and_exports_carry_ghosts():
    model, x = ghosted(Network()).eval(), images()
    st.anneal_ghosts(model, 0.3)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), st.copy_model(model)):
        assert torch.equal(other(x), expected)
        st.anneal_ghosts(other, 1.0)
        assert type(st.remove_ghosts(other).block) is Block
        assert torch.equal(model(x), expected)
    fresh = ghosted(Network()).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_memory_format_and_half_precision_are_kept():
    model = ghosted(Network())
    x = images().to(memory_format=torch.channels_last)
    assert model.stem(x).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    half = model.bfloat16()
    assert half.block.relu.strength.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16


# --- Removal ------------------------------------------------------------------------------------------------


def test_living_ghosts_are_not_removed_unless_forced():
    model, x = Network().eval(), images()
    ghost = ghosted(model)
    st.anneal_ghosts(ghost, 0.25)
    with pytest.raises(
        st.SurgeryError, match=r"4 ghosts are still alive, the first, 'stem\.0\.skip', at strength 0\.5"
    ):
        st.remove_ghosts(ghost)
    assert torch.equal(st.remove_ghosts(ghost, force=True)(x), model(x))
    assert isinstance(ghost.stem[2], GhostActivation)


def test_without_ghosts_a_copy_and_a_warning():
    model = Network()
    with pytest.warns(st.NoEffectWarning, match="no ghosts"):
        back = st.remove_ghosts(model)
    assert back is not model and type(back) is Network


@pytest.mark.parametrize("first", ["swap", "ghost"])
def test_other_surgeries_in_the_same_forward_stay(first):
    """A swapped function and a ghost skip share the block's forward; only the ghost goes."""
    model, x = Network().eval(), images()
    expected = st.swap_activations(model, "mish", where="block.*")
    if first == "swap":
        ghost = st.inject_skips(expected, ghost=True)
    else:
        ghost = st.swap_activations(st.inject_skips(model, ghost=True), "mish", where="block.*")
    st.anneal_ghosts(ghost, 1.0)
    back = st.remove_ghosts(ghost)
    assert isinstance(back.block, Rewritten)
    assert type(back.stem) is nn.Sequential
    assert not any(isinstance(module, Ghost) for module in back.modules())
    assert torch.equal(back(x), expected(x))
    assert list(back.state_dict()) == list(model.state_dict())
    again = st.remove_ghosts(st.swap_activations(st.inject_skips(back, ghost=True, strength=0.0), "swish"))
    assert isinstance(again.block, Rewritten)


def test_a_ghost_call_beside_a_skip_that_stays_is_called_as_it_was():
    model, x = Block(lambda x: F.leaky_relu(x, 0.3)).eval(), images(4)
    expected = st.inject_skips(model, strength=0.5)
    ghost = st.swap_activations(expected, "swish", ghost=True)
    st.anneal_ghosts(ghost, 1.0)
    back = st.remove_ghosts(ghost)
    assert torch.equal(back(x), expected(x))
    assert [name for name, _ in back.named_children()] == ["conv", "norm"]


def test_hooks_attributes_and_sharing_of_activations_survive():
    class Named(nn.ReLU):
        pass

    act = Named(inplace=True)
    act.note = "mine"
    seen = []
    act.register_forward_hook(lambda module, given, output: seen.append(type(module)))
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    ghost = st.swap_activations(model, "swish", ghost=True)
    assert ghost[1] is ghost[3]
    ghost(torch.randn(2, 4))
    assert len(seen) == 2
    st.anneal_ghosts(ghost, 1.0)
    back = st.remove_ghosts(ghost)
    assert type(back[1]) is Named and back[1] is back[3] and back[1].note == "mine" and back[1].inplace
    assert len(back[1]._forward_hooks) == 1
    assert set(vars(back[1])) == set(vars(act))


def test_functions_held_as_attributes_come_back():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = F.relu

        def forward(self, x):
            return self.act(x) if x.sum() > 0 else -self.act(x)

    for model, x in (
        (Opaque(), torch.randn(3, 4)),
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 3, 8)),
    ):
        ghost = st.swap_activations(model, "swish", ghost=True)
        alive = passes(ghost, x)[0]
        st.anneal_ghosts(ghost, 1.0)
        assert not torch.equal(passes(ghost, x)[0], alive)
        torch.testing.assert_close(passes(ghost, x), passes(model, x))
        back = st.remove_ghosts(ghost)
        assert_same(passes(back, x), passes(model, x))
        assert list(back.state_dict()) == list(model.state_dict())
        assert set(vars(back)) - {"_changes"} == set(vars(model))
        assert getattr(back, "activation_relu_or_gelu", 0) == getattr(model, "activation_relu_or_gelu", 0)


def test_graph_modules_get_and_lose_ghosts():
    model, x = fx.symbolic_trace(Block()).eval(), images(4)
    ghost = ghosted(model)
    assert not torch.equal(ghost(x), model(x))
    st.anneal_ghosts(ghost, 1.0)
    back = st.remove_ghosts(ghost)
    assert torch.equal(back(x), model(x))
    assert [n.target for n in back.graph.nodes] == [n.target for n in model.graph.nodes]


def test_what_can_have_no_ghost_is_named():
    class Differs(nn.Module):
        def forward(self, x):
            return F.leaky_relu(x, 0.1) if self.training else F.leaky_relu(x, 0.2)

    with pytest.warns(st.NoEffectWarning, match="its calls differ between the cases"):
        st.swap_activations(Differs(), "swish", ghost=True)

    class Own(nn.ReLU):
        strength = 3

    with pytest.raises(st.SurgeryError, match="attribute 'strength' of its own"):
        st.swap_activations(nn.Sequential(Own()), "swish", ghost=True)


def test_bad_options_are_named():
    model = unit(4, 4, 3, padding=1)
    for to in ("mish", nn.SiLU, F.silu):
        with pytest.raises(ValueError, match="to='swish'"):
            st.swap_activations(model, to, ghost=True)
    with pytest.raises(ValueError, match="relu, relu6, leaky_relu; kinds has gelu"):
        st.swap_activations(model, "swish", kinds=("relu", "gelu"), ghost=True)
    with pytest.raises(ValueError, match="annealed, not learned"):
        st.inject_skips(model, ghost=True, strength="learned")


# --- In training --------------------------------------------------------------------------------------------


def test_masks_hold_and_rewinding_works_with_ghosts():
    initial = Network()
    masked = st.prune(initial, 0.7)
    ticket = st.rewind(ghosted(masked), initial)
    optimizer = torch.optim.SGD(ticket.parameters(), lr=0.1, momentum=0.9)
    with st.keep_masks(ticket, optimizer):
        for progress in (0.0, 0.3, 0.6):
            st.anneal_ghosts(ticket, progress)
            optimizer.zero_grad()
            ticket(images()).square().mean().backward()
            optimizer.step()
    back = st.remove_ghosts(ticket)
    masks = st.find_masks(masked)
    for name, mask in st.find_masks(back).items():
        assert torch.equal(mask, masks[name])
        assert torch.equal(back.get_parameter(name) != 0, mask)
    assert list(back.state_dict()) == list(masked.state_dict())


def test_ghost_training_on_digits_ends_in_the_original_network():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
    y = torch.tensor(digits.target)
    layers = [*unit(1, 8, 3, padding=1), *unit(8, 8, 3, padding=1), *unit(8, 16, 3, stride=2, padding=1)]
    dense = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    ticket = ghosted(st.prune(dense, 0.8))
    optimizer = torch.optim.SGD(ticket.parameters(), lr=0.05, momentum=0.9)
    steps = 60
    with st.keep_masks(ticket, optimizer):
        for step in range(steps):
            st.anneal_ghosts(ticket, step / steps)
            batch = torch.randint(1297, (64,))
            optimizer.zero_grad()
            F.cross_entropy(ticket(x[batch]), y[batch]).backward()
            optimizer.step()
    trained = st.remove_ghosts(ticket)
    assert type(trained) is nn.Sequential
    assert list(trained.state_dict()) == list(st.prune(dense, 0.8).state_dict())
    with torch.no_grad():
        with_ghosts, without = (model.eval()(x[1297:]) for model in (ticket, trained))
    assert torch.equal(with_ghosts, without)
    assert (without.argmax(1) == y[1297:]).float().mean() > 0.8


def test_progress_is_a_number_of_any_kind_and_what_is_none_is_refused():
    model = st.inject_skips(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), ghost=True)
    left = st.anneal_ghosts(model, torch.tensor(0.25))
    assert type(left) is float and left == 0.5
    with pytest.raises(ValueError, match="progress is a fraction of training, a number; got 'x'"):
        st.anneal_ghosts(model, "x")
    with pytest.raises(ValueError, match="unknown schedule"):
        st.anneal_ghosts(model, 0.5, schedule=["linear"])
