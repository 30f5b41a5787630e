"""The ground rules, checked on one random network that goes through every surgery in one order.

A `Case` is one network of `sparsetweaks.testing`, masked in one form, and one order of the three kinds of surgery
(swap activations, inject skips, scale layers) with a variant of each. `check` takes the network through them and
raises an AssertionError, with the case and how to run it again, where a rule is broken. Another variant of a surgery
is one line in `SURGERIES`.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sparsetweaks import (
    NoEffectWarning,
    SurgeryError,
    apply_masks,
    changes,
    copy_model,
    find_activations,
    find_masks,
    find_skip_sites,
    inject_skips,
    keep_masks,
    learn_layer_scales,
    scale_layers,
    swap_activations,
)
from sparsetweaks.surgery.kinds import KINDS, RELU_FAMILY
from sparsetweaks.surgery.programs import original_class
from sparsetweaks.testing import (
    FORMS,
    Batch,
    Observation,
    Spec,
    build,
    differences,
    draw_spec,
    example_batch,
    isolated_rng,
    mask_model,
    maskable_weights,
    observe,
    picklable,
    snapshot,
)

DENSITIES = (0.5, 0.1, 0.0, 1.0)
REFUSALS = ("the gradient is zero everywhere", "is not finite", "the loss is nan", "the loss is inf")
"""Why learning layer scales may refuse a network: a mask without survivors, or scales that overshoot."""

TORCH_WARNS = "Full backward hook is firing"
"""What torch says of a backward hook of the network's where nothing before it needs a gradient."""

GRADIENTS = ("gradient of", "input gradient")
ROUNDING = 1e-5
"""Of a gradient in double precision. Batch normalisations in a row blew 1e-16 up to 1.6e-6, once in 20,000 networks."""

MAX_BLOCKS = 2
"""Most blocks in a network: pairs of neighbours, and two cost half of four."""

CASES_PER_SWEEP = 25
"""Each rewritten class is one more subclass of `nn.Module`, and torch.fx patches that class: sweep them away."""

_checked = itertools.count(1)


# --- The surgeries ------------------------------------------------------------------------------------------


class Surgery(NamedTuple):
    """One way of calling a surgery: what it does, whether it may change a bit, and which sites it promises."""

    apply: Callable[[nn.Module, Batch], nn.Module]
    neutral: bool = False
    preview: Callable[[nn.Module], tuple[Sequence[Any], Sequence[Any]]] | None = None
    kinds: Sequence[str] = ()


def same_relu(x: Tensor) -> Tensor:
    return F.relu(x)


def same_relu6(x: Tensor) -> Tensor:
    return F.relu6(x)


def swap(to: Any, *, kinds: Sequence[str] = RELU_FAMILY, neutral: bool = False) -> Surgery:
    def preview(model: nn.Module) -> tuple[Sequence[Any], Sequence[Any]]:
        sites = find_activations(model, kinds=kinds)
        return sites.possible, sites.left

    return Surgery(lambda model, batch: swap_activations(model, to, kinds=kinds), neutral, preview, kinds)


def inject(*, neutral: bool = False, **options: Any) -> Surgery:
    def preview(model: nn.Module) -> tuple[Sequence[Any], Sequence[Any]]:
        sites = find_skip_sites(model)
        every = options.get("shortcut") != "none"
        return [site for site in sites.possible if every or site.kind == "kept"], sites.left

    return Surgery(lambda model, batch: inject_skips(model, **options), neutral, preview)


def scale(factor: Callable[[random.Random], float], *, neutral: bool = False) -> Surgery:
    def apply(model: nn.Module, batch: Batch) -> nn.Module:
        drawn = random.Random(len(list(model.parameters())))
        return scale_layers(model, {name: factor(drawn) for name in logical_names(model).values()})

    return Surgery(apply, neutral)


def learn(*, iterations: int, order: int = 1) -> Surgery:
    def apply(model: nn.Module, batch: Batch) -> nn.Module:
        return learn_layer_scales(model, tuple(batch), iterations=iterations, order=order, loss=first_loss)

    return Surgery(apply, neutral=iterations == 0)


def first_loss(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(first_tensor(outputs), targets)


def first_tensor(outputs: Any) -> Tensor:
    return pytree.tree_leaves(getattr(outputs, "main", outputs))[0]


SURGERIES: dict[str, dict[str, Surgery]] = {
    "swap": {
        "relu to relu": swap("relu", kinds=("relu",), neutral=True),
        "relu to a function": swap(same_relu, kinds=("relu",), neutral=True),
        "relu6 to a function": swap(same_relu6, kinds=("relu6",), neutral=True),
        "leaky to leaky": swap("leaky_relu", kinds=("leaky_relu",), neutral=True),
        "silu": swap("silu"),
        "gelu": swap("gelu"),
        "a module": swap(nn.Softplus(beta=2)),
        "a factory with parameters": swap(nn.PReLU),
        "every kind to mish": swap("mish", kinds=tuple(KINDS)),
    },
    "inject": {
        "strength 0": inject(strength=0.0, neutral=True),
        "learned": inject(strength="learned", neutral=True),
        "learned, norm": inject(strength="learned", norm=True, neutral=True),
        "learned, projection": inject(strength="learned", shortcut="projection", neutral=True),
        "fixed": inject(strength=0.5),
        "fixed, norm": inject(strength=0.5, norm=True),
        "fixed, projection": inject(strength=0.5, shortcut="projection"),
        "fixed, project-all": inject(strength=1.0, shortcut="project-all"),
        "fixed, none": inject(strength=-0.5, shortcut="none"),
    },
    "scale": {
        "ones": scale(lambda drawn: 1.0, neutral=True),
        "learned for no iterations": learn(iterations=0),
        "random": scale(lambda drawn: drawn.uniform(0.5, 1.5)),
        "powers of two": scale(lambda drawn: drawn.choice((0.5, 1.0, 2.0))),
        "learned": learn(iterations=2),
        "learned, order 2": learn(iterations=1, order=2),
    },
}
ORDERS = tuple(itertools.permutations(SURGERIES))


# --- One case -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One network, its masks, and the surgeries in their order, as pairs of kind and variant."""

    spec: Spec
    form: str = "buffers"
    mask_seed: int = 0
    steps: tuple[tuple[str, str], ...] = (("swap", "silu"), ("inject", "fixed"), ("scale", "random"))
    training: bool = True
    adam: bool = False

    @property
    def order(self) -> tuple[str, ...]:
        """The kinds of surgery in the order of this case."""
        return tuple(kind for kind, _ in self.steps)


def draw_case(drawn: random.Random) -> Case:
    """A random case."""
    order = drawn.choice(ORDERS)
    return Case(
        spec=draw_spec(drawn, max_blocks=MAX_BLOCKS),
        form=drawn.choice(FORMS),
        mask_seed=drawn.randrange(2**16),
        steps=tuple((kind, drawn.choice(tuple(SURGERIES[kind]))) for kind in order),
        training=drawn.random() < 0.5,
        adam=drawn.random() < 0.5,
    )


def draw_masks(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Masks of most of the weights; all kept, all zero, and random ones."""
    drawn, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    masks = {}
    for name, weight in maskable_weights(model).items():
        density = drawn.choice(DENSITIES)
        if drawn.random() < 0.75:
            masks[name] = torch.rand(weight.shape, generator=generator) < density
    return masks


def masked_network(case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network of a case with its masks in it."""
    model = build(case.spec)
    masks = draw_masks(model, case.mask_seed)
    return mask_model(model, masks, case.form), masks


def reproduction(case: Case) -> str:
    """How to run one case again."""
    return f"{case}\nto run it again, in tests/properties:\n    python fuzz.py --case {str(case)!r}"


# --- The rules ----------------------------------------------------------------------------------------------


def check(case: Case) -> dict[str, int]:
    """Take the network of a case through its surgeries and hold it against every ground rule.

    Returns:
        Counts of what happened: sites rewritten and left, neutral steps, refusals.

    Raises:
        AssertionError: a rule is broken; the message ends with the case.
    """
    if next(_checked) % CASES_PER_SWEEP == 0:
        gc.collect()
    try:
        return _check(case)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\nin the case\n{reproduction(case)}") from error


def _check(case: Case) -> dict[str, int]:
    model, masks = masked_network(case)
    batch = example_batch(case.spec)
    counts = {"rewritten": 0, "left": 0, "neutral": 0, "refused": 0}
    seen: dict[bool, Observation] = {}
    passed_over: frozenset[tuple[str, str]] | None = None
    for kind, variant in case.steps:
        surgery = SURGERIES[kind][variant]
        with isolated_rng(case.spec.seed):
            before = snapshot(model)
            expected = surgery.preview(model) if surgery.preview else ((), ())
            result = apply(surgery, model, batch, expected, counts)
            no_differences(before, snapshot(model), f"{kind} changed the model it was given")
        if result is None:
            continue
        what = f"{kind} ({variant})"
        tensors_are_kept(model, result, what, values=kind != "scale" or surgery.neutral)
        modules_are_kept(model, result, expected[0] if kind == "swap" else (), what)
        masks_are_kept(result, masks, case, what)
        if kind == "swap":
            left = {(site.scope, site.name) for site in expected[1]}
            passed_over = frozenset(left) if variant in ("silu", "gelu") else None
        if surgery.neutral:
            counts["neutral"] += 1
            seen = seen or observe_both(model, batch)
            after = observe_both(result, batch)
            for training, observation in seen.items():
                mode = "train" if training else "eval"
                told = f"{what} is not neutral in {mode} mode"
                if kind != "scale" and mixes_memory_formats(case.spec):
                    no_differences_but_rounding(observation, after[training], (model, result), case, told)
                else:
                    no_differences(observation, after[training], told, added=True)
            seen = after
        else:
            seen = {}
        model = result
    copies_agree(model, case, batch, seen, passed_over)
    zeros_stay(model, masks, case, batch)
    return counts


def apply(
    surgery: Surgery, model: nn.Module, batch: Batch, expected: Any, counts: dict[str, int]
) -> nn.Module | None:
    """The surgery's result, whose report and warning say what the preview promised; None where it refuses."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = surgery.apply(model, batch)
        except SurgeryError as error:
            if not any(reason in str(error) for reason in REFUSALS):
                raise
            counts["refused"] += 1
            return None
    caught = [each for each in caught if not str(each.message).startswith(TORCH_WARNS)]
    rest = [str(each.message) for each in caught if each.category is not NoEffectWarning]
    assert rest == [], rest
    if surgery.preview:
        rewritten, left = expected
        report = changes(result)[-1]
        assert list(report.rewritten) == list(rewritten), "the report is not what the preview promised"
        assert list(report.left) == list(left), "the report leaves other sites than the preview"
        modules = dict(model.named_modules(remove_duplicate=False))
        assert all(site.left and site.left.strip() and site.scope in modules for site in left)
        assert bool(caught) == (not rewritten), "NoEffectWarning exactly where there is nothing to rewrite"
        counts["rewritten"] += len(rewritten)
        counts["left"] += len(left)
    else:
        assert caught == []
    return result


def no_differences(expected: Observation, found: Observation, what: str, *, added: bool = False) -> None:
    lines = differences(expected, found, added=added)
    assert lines == [], f"{what}: {'; '.join(lines[:4])}"


def no_differences_but_rounding(
    expected: Observation, found: Observation, models: tuple[nn.Module, nn.Module], case: Case, what: str
) -> None:
    """Bit-equal, but for gradients whose difference vanishes in double precision.

    Where tensors of several memory formats meet, a gradient that comes through a skip or an activation written over
    its input may have another format than it had. Sums over it then add in another order.
    """
    rest = {name: value for name, value in expected.values.items() if not name.startswith(GRADIENTS)}
    no_differences(Observation(rest), found, what, added=True)
    if differences(expected, found, added=True) == [] or any(b.form == "autocast" for b in case.spec.blocks):
        return
    batch = example_batch(case.spec)
    batch = batch._replace(inputs=batch.inputs.double())
    before, after = (observe_both(copy_model(model).double(), batch) for model in models)
    for training, observation in before.items():
        gradients = {k: v for k, v in observation.values.items() if k.startswith(GRADIENTS)}
        lines = differences(Observation(gradients), after[training], tolerance=ROUNDING, added=True)
        assert lines == [], f"{what}, in double precision: {'; '.join(lines[:4])}"


def mixes_memory_formats(spec: Spec) -> bool:
    """Whether some tensors in the network have their channels last and others not."""
    permuting = any(block.norm == "layer" or block.form == "attention" for block in spec.blocks)
    return "channels_last" in spec.extras or (permuting and spec.network != "mlp")


def observe_both(model: nn.Module, batch: Batch) -> dict[bool, Observation]:
    """What a copy of the model does in train and then in eval mode."""
    copied = copy_model(model)
    return {mode: observe(copied, batch, training=mode, calls=1) for mode in (True, False)}


def tensors_are_kept(model: nn.Module, result: nn.Module, what: str, *, values: bool) -> None:
    """Names, values, layout, flags and tying of everything that was there."""
    before, after = all_tensors(model), all_tensors(result)
    for name, tensor in before.items():
        assert name in after, f"{what}: {name} is gone"
        found = after[name]
        same = torch.equal(tensor, found) if values else torch.equal(tensor == 0, found == 0)
        assert same or not torch.equal(tensor, tensor), f"{what}: {name} has other values"
        assert tensor.numel() == 0 or tensor.data_ptr() != found.data_ptr(), f"{what}: {name} is shared"
        for fact in ("dtype", "device", "requires_grad", "is_leaf"):
            assert getattr(tensor, fact) == getattr(found, fact), f"{what}: {fact} of {name}"
        assert tensor.stride() == found.stride(), f"{what}: memory format of {name}"
        assert type(tensor) is type(found), f"{what}: class of {name}"
    assert tying(before, before) == tying(after, before), f"{what}: tensors are tied otherwise"
    names = list(model.state_dict())
    assert names == [name for name in result.state_dict() if name in set(names)], f"{what}: state_dict"


def modules_are_kept(model: nn.Module, result: nn.Module, swapped: Sequence[Any], what: str) -> None:
    """Names, classes, modes, attributes and hooks of every module but swapped activations."""
    exempt = {id(model.get_submodule(site.path)) for site in swapped if site.form == "module"}
    after = dict(result.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        found = after[name]
        assert found.training == module.training, f"{what}: mode of {name}"
        assert hooks_of(module) == hooks_of(found), f"{what}: hooks of {name}"
        if id(module) not in exempt:
            expected = original_class(module)
            if (
                "parametrizations" in module._modules
            ):  # of such a class every module, and every copy, has one of its own
                expected = expected.__bases__[-1]
            assert isinstance(found, expected), f"{what}: class of {name}"
            assert all(hasattr(found, each) for each in vars(module)), f"{what}: attributes of {name}"


def masks_are_kept(result: nn.Module, masks: dict[str, Tensor], case: Case, what: str) -> None:
    """The masks are those that were given, in their form, and what they prune is zero."""
    found = find_masks(result)
    assert set(found) == (set() if case.form == "zeros" else set(masks)), f"{what}: masks"
    assert all(torch.equal(mask, masks[name]) for name, mask in found.items()), f"{what}: masks"
    for name, mask in masks.items():
        assert bool((weight_of(result, name)[~mask] == 0).all()), f"{what}: {name} is revived"


def copies_agree(
    model: nn.Module,
    case: Case,
    batch: Batch,
    seen: dict[bool, Observation],
    passed_over: frozenset[tuple[str, str]] | None,
) -> None:
    """A deep copy, a pickled copy and one that loads the state do what the model does, and hide no ReLU."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pickled = None
    if (
        picklable(model)
        and picklable(case.spec)
        and all(each.form != "buffer_views" for each in case.spec.blocks)
    ):
        pickled = pickle.loads(pickle.dumps(model))  # pickle alone separates views, of any model
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    loaded.load_state_dict(state)
    options: dict[str, Any] = {"training": case.training, "calls": 1}
    with no_relu_but(passed_over, model):
        found = observe(copy.deepcopy(model), batch, **options)
    if True in seen and case.training:
        no_differences(seen[True], found, "a deep copy differs")
    if pickled is not None:
        no_differences(found, observe(pickled, batch, **options), "a pickled copy differs")
    no_differences(found, observe(loaded, batch, **options), "a copy that loaded the state differs")


def zeros_stay(model: nn.Module, masks: dict[str, Tensor], case: Case, batch: Batch) -> None:
    """Pruned weights are zero after optimizer steps, and the masks are what they were."""
    if not masks:
        return
    if case.form == "zeros":
        model = apply_masks(model, masks)
    model.train(case.training)
    parameters = list(model.parameters())
    if case.adam:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1)
    with isolated_rng(0), keep_masks(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            inputs = batch.inputs.clone().requires_grad_()  # torch warns of backward hooks without
            loss = first_tensor(model(inputs)).square().mean()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
    with isolated_rng(0):
        model(batch.inputs.clone())  # `torch.nn.utils.prune` computes the weight at each forward
    for name, mask in masks.items():
        assert bool((weight_of(model, name)[~mask] == 0).all()), f"{name} is revived by the optimizer"
    found = find_masks(model)
    assert set(found) == set(masks) and all(torch.equal(found[name], masks[name]) for name in masks)


# --- What is computed, and by whom --------------------------------------------------------------------------

RELU_FUNCTIONS = {
    *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    *(F.relu6, F.leaky_relu, F.leaky_relu_, F.hardtanh),  # the last is what `nn.ReLU6` calls
}


@contextmanager
def calling() -> Iterator[list[nn.Module]]:
    """Inside, the list holds the modules that are being called, the innermost last."""
    stack: list[nn.Module] = []
    enter = register_module_forward_pre_hook(lambda module, inputs: stack.append(module))
    leave = register_module_forward_hook(
        lambda module, inputs, output: (stack.pop(), None)[1], always_call=True
    )
    try:
        yield stack
    finally:
        enter.remove()
        leave.remove()


class Noting(TorchFunctionMode):
    """Tells `note` of each ReLU of any spelling."""

    def __init__(self, note: Callable[[Any], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RELU_FUNCTIONS:
            self.note(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_relu_but(left: frozenset[tuple[str, str]] | None, model: nn.Module) -> Iterator[None]:
    """Inside, each ReLU that a copy of `model` computes is one of those left, by scope and name; None: anything."""
    if left is None:
        yield
        return
    allowed = {scope for scope, _ in left} | {f"{scope}.{name}".lstrip(".") for scope, name in left}
    names = names_of(model)
    silent: set[str] = set()
    with calling() as stack:

        def note(function: Any) -> None:
            paths = [set(path.split("/")) for path in filter(None, map(name_of_copy, stack))]
            if paths and not paths[-1] & allowed:
                silent.add(f"{function.__name__} in {min(paths[-1])!r}")

        def name_of_copy(module: nn.Module) -> str:
            return "/".join(sorted(vars(module).get("_names_in_fuzz", ())))

        for module in model.modules():
            vars(module)["_names_in_fuzz"] = frozenset(names[id(module)])  # its copies have them too
        try:
            with Noting(note):
                yield
        finally:
            for module in model.modules():
                del vars(module)["_names_in_fuzz"]
    assert silent == set(), f"passed over in silence: {', '.join(sorted(silent))}"


# --- Looking at networks ------------------------------------------------------------------------------------


def names_of(model: nn.Module) -> dict[int, set[str]]:
    names: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), set()).add(name)
    return names


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def tying(tensors: dict[str, Tensor], names: dict[str, Tensor]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name in names:
        groups.setdefault(id(tensors[name]), set()).add(name)
    return {frozenset(group) for group in groups.values()}


def hooks_of(module: nn.Module) -> list[Any]:
    groups = [value for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)]
    hooks = [getattr(hook, "hook", hook) for group in groups for hook in group.values()]  # some are wrapped
    return [getattr(hook, "__qualname__", type(hook)) for hook in hooks]


def weight_of(model: nn.Module, name: str) -> Tensor:
    owner, _, parameter = name.rpartition(".")
    return functools.reduce(getattr, [*filter(None, owner.split(".")), parameter], model)  # type: ignore[arg-type]


def logical_names(model: nn.Module) -> dict[str, str]:
    """Each parameter's name to the weight's own, whatever form its mask has."""
    buffers = {name for name, _ in model.named_buffers()}
    names = {}
    for name, parameter in model.named_parameters():
        if name.endswith("_orig") and name.removesuffix("_orig") + "_mask" in buffers:
            names[name] = name.removesuffix("_orig")
        elif name.endswith(".original"):
            names[name] = name.removesuffix(".original").replace("parametrizations.", "")
        elif parameter.is_floating_point():
            names[name] = name
    return names
