"""The ground rules of surgery, on random networks that contain what breaks it.

`SPARSETWEAKS_FUZZ` is the number of networks over all tests of this file; 600 unless told otherwise.
"""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rules import RELU_FUNCTIONS, calling, names_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from sparsetweaks.errors import NoEffectWarning
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.sites import find_activations, find_skip_sites
from sparsetweaks.surgery.skips import inject_skips
from sparsetweaks.testing import (
    Observation,
    Spec,
    build,
    differences,
    example_batch,
    hazards,
    isolated_rng,
    observe,
    picklable,
    snapshot,
    specs,
)

TESTS = 24  # those that are now in test_rules.py once counted here
NETWORKS = int(os.environ.get("SPARSETWEAKS_FUZZ", "600"))
drawn = settings(
    max_examples=max(1, NETWORKS // TESTS),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


# --- The surgeries ------------------------------------------------------------------------------------------


def same_relu(x: Tensor) -> Tensor:
    return torch.clamp_min(x, 0)


def quietly(surgery: Callable[..., Any], model: nn.Module, *args: Any, **options: Any) -> Any:
    """A surgery whose model may have no site."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        return surgery(model, *args, **options)


def swap(model: nn.Module) -> nn.Module:
    return quietly(swap_activations, model, "silu")


def inject(model: nn.Module) -> nn.Module:
    return quietly(inject_skips, model, strength=0.5, shortcut="pad")


def learn(model: nn.Module) -> nn.Module:
    return quietly(inject_skips, model, strength="learned", norm=True)


def project(model: nn.Module) -> nn.Module:
    return quietly(inject_skips, model, strength=0.5, shortcut="projection")


SURGERIES = {
    "swap": swap,
    "swap to a module": lambda model: quietly(swap_activations, model, nn.Softplus(beta=2)),
    "inject": inject,
    "inject learned": learn,
    "inject projections": project,
    "swap, inject": lambda model: inject(swap(model)),
    "inject, swap": lambda model: swap(inject(model)),
}
NEUTRAL = {
    "strength 0": lambda model: quietly(inject_skips, model, strength=0.0, shortcut="pad"),
    "learned strength": lambda model: quietly(inject_skips, model, strength="learned"),
    "relu to relu": lambda model: quietly(swap_activations, model, "relu", kinds=("relu",)),
    "relu6 to relu6": lambda model: quietly(swap_activations, model, "relu6", kinds=("relu6",)),
    "leaky to leaky": lambda model: quietly(swap_activations, model, "leaky_relu", kinds=("leaky_relu",)),
    "relu to a function": lambda model: quietly(swap_activations, model, F.relu, kinds=("relu",)),
    "relu6 to a function": lambda model: quietly(
        swap_activations, model, lambda x: F.relu6(x), kinds=("relu6",)
    ),
    "relu to its own": lambda model: quietly(swap_activations, model, lambda x: F.relu(x), kinds=("relu",)),
}
surgeries = st.sampled_from(sorted(SURGERIES))


# --- References: the same tweaks, made by other means -------------------------------------------------------

ALWAYS_IN_PLACE = {torch.relu_, Tensor.relu_, F.leaky_relu_}
RELU_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
INPLACE_POSITION = {F.relu: 1, F.relu6: 1, F.leaky_relu: 2, F.hardtanh: 3}


class SiluWhere(TorchFunctionMode):
    """Computes a SiLU for each ReLU of any spelling, in place where that was, if `chosen` says so."""

    def __init__(self, chosen: Callable[[Any], bool]) -> None:
        super().__init__()
        self.chosen = chosen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in RELU_FUNCTIONS or not self.chosen(func):
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        position = INPLACE_POSITION.get(func, len(args))
        in_place = (
            func in ALWAYS_IN_PLACE or kwargs.get("inplace") or (len(args) > position and args[position])
        )
        return x.copy_(F.silu(x.clone())) if in_place else F.silu(x.clone())


def silu_function(function: Any) -> Callable[[Tensor], Tensor]:
    """What an activation function held in an attribute becomes."""
    if function in ALWAYS_IN_PLACE:
        return lambda x: x.copy_(F.silu(x.clone()))
    return lambda x: F.silu(x)


def observe_swapped(spec: Spec, training: bool) -> Observation:
    """What the network does with SiLUs at the sites that the preview names, without any surgery."""
    model = build(spec)
    sites = find_activations(model)
    names = names_of(model)
    modules = {site.path for site in sites if site.form == "module" and site.left is None}
    scopes = {site.scope for site in sites if site.form in ("function", "method") and site.left is None}
    for site in sites:
        if site.form == "attribute" and site.left is None:
            scope = model.get_submodule(site.scope)
            setattr(scope, site.name, silu_function(getattr(scope, site.name)))
    with calling() as stack:

        def chosen(function: Any) -> bool:
            if not stack or (function is F.hardtanh and not isinstance(stack[-1], nn.ReLU6)):
                return False
            caller = names.get(id(stack[-1]), set())
            return bool(caller & (modules | scopes))

        with SiluWhere(chosen):
            return observe(model, example_batch(spec), training=training)


def shortcut(x: Tensor, conv: nn.Module, output: Tensor) -> Tensor:
    """The input at the output's positions and channels: He et al.'s option A, or neighbours' averages."""
    rank = len(conv.stride)
    padding = [None] * rank if conv.padding == "same" else conv.padding
    spans = zip(conv.dilation, conv.kernel_size, padding, conv.stride, output.shape[2:], strict=True)
    for axis, (dilation, kernel, pad, stride, size) in enumerate(spans, start=2):
        start = 0 if pad is None else (dilation * (kernel - 1) - 2 * pad) // 2
        x = x.index_select(axis, torch.arange(size) * stride + start)
    more = output.shape[1] - x.shape[1]
    if more >= 0:
        return torch.cat([x, x.new_zeros(x.shape[0], more, *x.shape[2:])], 1)
    return x.unflatten(1, (output.shape[1], -1)).mean(2)


def follows(scope: nn.Module, name: str) -> nn.Module | None:
    """The normalisation that directly follows a convolution in the forwards of `sparsetweaks.testing`."""
    owner, _, last = name.rpartition(".")
    holder = scope.get_submodule(owner)
    if isinstance(holder, nn.Sequential):
        after = dict(holder.named_children()).get(str(int(last) + 1))
        return after if "Norm" in type(after).__name__ else None
    return getattr(holder, {"conv": "norm", "conv2": "norm2"}.get(last, "no such"), None)


def observe_skipped(spec: Spec, training: bool, strength: float) -> Observation:
    """What the network does with skips at the sites that the preview names, added by hooks."""
    model = build(spec)
    inputs: dict[int, Tensor] = {}
    done: set[int] = set()
    for site in find_skip_sites(model).possible:
        scope = model.get_submodule(site.scope)
        conv = scope.get_submodule(site.name)
        if id(conv) in done:
            continue
        done.add(id(conv))
        norm = follows(scope, site.name)
        if norm is None or isinstance(norm, nn.Sequential):
            norm = conv

        def add(module: nn.Module, given: Any, output: Tensor, conv: nn.Module = conv) -> Tensor:
            return output + strength * shortcut(inputs[id(conv)], conv, output)

        norm.register_forward_hook(add)
    recorder = register_module_forward_pre_hook(
        lambda module, given: inputs.update({id(module): given[0]}) if given else None
    )
    try:
        return observe(model, example_batch(spec), training=training)
    finally:
        recorder.remove()


# --- The ground rules ---------------------------------------------------------------------------------------


@drawn
@given(spec=specs())
def test_previews_and_calls_that_raise_leave_the_model_untouched(spec):
    model = build(spec)
    with isolated_rng(spec.seed):
        before = snapshot(model)
        find_activations(model)
        find_skip_sites(model)
        with pytest.raises(ValueError, match="silu"):
            swap_activations(model, "no such activation")
        with pytest.raises(ValueError, match="no such site"):
            swap_activations(model, "silu", where="no such site")
        with pytest.raises(ValueError, match="no such site"):
            inject_skips(model, where="no such site")
        with suppress(ZeroDivisionError):  # raised in the middle, where there is a site
            quietly(swap_activations, model, lambda: 1 / 0, kinds=("relu", "gelu"))
        assert differences(before, snapshot(model)) == []


@drawn
@given(spec=specs(), training=st.booleans())
def test_swapped_activations_compute_what_a_reference_computes(spec, training):
    expected = observe_swapped(spec, training)
    found = observe(swap(build(spec)), example_batch(spec), training=training)
    if "form: checkpointed" in hazards(spec):  # the reference cannot follow the recomputation in the backward
        expected, found = _outputs(expected), _outputs(found)
    assert differences(expected, found, tolerance=1e-5) == []


@drawn
@given(spec=specs(), training=st.booleans())
def test_injected_skips_compute_what_a_reference_computes(spec, training):
    assume("form: two_names" not in hazards(spec))  # hooks cannot tell under which name it is called
    assume(
        "form: registered_in_list" not in hazards(spec)
    )  # its norm does not follow the convolution it is named for
    expected = observe_skipped(spec, training, strength=0.5)
    found = observe(inject(build(spec)), example_batch(spec), training=training)
    assert differences(expected, found, tolerance=1e-4) == []


@drawn
@given(spec=specs(), name=surgeries)
def test_results_copy_pickle_and_load(spec, name):
    batch = example_batch(spec)
    result = SURGERIES[name](build(spec))
    state = {key: value.clone() for key, value in result.state_dict().items()}
    copied = copy.deepcopy(result)
    pickled = pickle.loads(pickle.dumps(result)) if picklable(spec) and name != "swap to a lambda" else None
    expected = observe(result, batch)
    assert differences(expected, observe(copied, batch)) == []
    if pickled is not None:
        assert differences(expected, observe(pickled, batch)) == []
    fresh = SURGERIES[name](build(spec))
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    fresh.load_state_dict(state)
    assert differences(expected, observe(fresh, batch)) == []


@drawn
@given(spec=specs(), training=st.booleans())
def test_swapping_and_injecting_commute(spec, training):
    assume("activation: Tensor.relu" not in hazards(spec))  # cannot be traced until it is swapped
    batch = example_batch(spec)
    one = observe(inject(swap(build(spec))), batch, training=training)
    other = observe(swap(inject(build(spec))), batch, training=training)
    assert differences(one, other, tolerance=1e-5) == []


@drawn
@given(spec=specs(), name=surgeries, second=st.sampled_from(sorted(NEUTRAL)))
def test_a_second_neutral_surgery_changes_no_bit(spec, name, second):
    batch = example_batch(spec)
    once = observe(SURGERIES[name](build(spec)), batch, training=True)
    twice = observe(NEUTRAL[second](SURGERIES[name](build(spec))), batch, training=True)
    assert differences(once, twice, added=True) == []


def _outputs(seen: Observation) -> Observation:
    return Observation({key: value for key, value in seen.values.items() if key.startswith("output")})


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


def _tying(tensors: dict[str, Tensor], names: dict[str, Tensor]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name in names:
        groups.setdefault(id(tensors[name]), set()).add(name)
    return {frozenset(group) for group in groups.values()}


def _hooks(module: nn.Module) -> list[Any]:
    groups = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return [getattr(hook, "__qualname__", type(hook)) for group in groups for hook in group.values()]
