"""Sweep models and prove the surgeries on each: one row per model in a CSV table.

    python benchmarks/zoo.py --family torchvision --out benchmarks/results/zoo-torchvision.csv

Every model is built small with random weights (constant parameters and statistics are shaken, so that no branch is
multiplied by zero), half of its prunable weights are masked, and then:

*   Every activation is swapped for the very same one, through the real rewriting path, and skips of strength 0 are
    injected into the result. Outputs in eval and in train mode, buffers after the step and the gradients of all
    parameters must equal the original's bit for bit. Learned skips, which start at 0, likewise (gradients up to
    rounding).
*   Every activation is swapped to mish: outputs stay finite, and a dispatch-level count of the activations that still
    run shows any that the preview did not name.
*   Names, values, dtypes, strides, tying and masks are kept; the given model, its modes and the random state are
    untouched; a pickle round trip gives the same outputs; sites and warnings agree.

Status of a row:
    ok              every site was rewritten, every check held
    left            every check held; some sites were left as they were, and named with the reason
    missed          every check held; an activation runs that the preview did not list
    wrong           a check did not hold: a bug of sparsetweaks
    exception       a surgery raised: a bug of sparsetweaks
    model fails     the model does not build, run or copy here by itself; its own error is the note
    structure only  not run here, and with rewritten forwards that no other model's run has proven: see below
    timeout, crash  no verdict; the note says at which step

How a row was proven:
    run         the model ran here, before and after, in eval and (unless the note says otherwise) in train mode
    alike       a model of over 3 million parameters, operated on the meta device: names, counts and previews were
                checked, and every forward that was rewritten in it is, but for numbers such as widths, one that a
                smaller model of the same family ran and proved ("proves" counts those that a row was the first to prove)
    structure   as alike, but with forwards that no run has proven

A model that builds, and that nothing is found to call with, is operated on the meta device as a large one is.

Rows whose engine (a hash of the surgery's code) and library versions are current are not remade.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import copy
import csv
import dataclasses
import fnmatch
import gc
import hashlib
import io
import multiprocessing
import os
import pickle
import random
import re
import resource
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paired
import torch
import zoo_models
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsetweaks as st
from sparsetweaks.errors import NoEffectWarning
from sparsetweaks.surgery import kinds as k
from sparsetweaks.surgery import programs, scopes
from sparsetweaks.surgery import sites as s

LARGE = 500_000_000
"""Models with more parameters are only looked at on the meta device."""

MEDIUM = 3_000_000
"""Models with more parameters do not run if all forwards that are rewritten in them were proven by smaller ones."""

QUICK = 1.0
"""CPU seconds: models that run faster than this run in train mode with learned skips, too."""

MEMORY = 14 * 2**30
"""Bytes of address space beyond the parent's that one model may take."""

ROUNDING = 1e-5
"""Learned skips add a zero to gradients, which may change their memory format and so the order of later sums: a
difference of gradients below this fraction of the largest one is noted, not counted as wrong. Outputs get no such room."""

PATIENCE = 4
"""A model is given up after this many times its limit of CPU seconds: the limit decides what is still begun."""

CLOCK = 60
"""Or after this many times its limit on the clock, in which it may also sleep or wait for others."""

SPARSITY = 0.5
LAYERS = ("conv", "linear")
"""Skips are injected around units of both kinds."""

HERE = Path(__file__).resolve().parent

COLUMNS = (
    "family",
    "model",
    "status",
    "proof",
    "proves",
    "parameters",
    "relu_found",
    "activations_found",
    "activations_rewritten",
    "activations_left",
    "activations_missed",
    "skips_found",
    "skips_rewritten",
    "skips_left",
    "reasons",
    "difference_eval",
    "difference_train",
    "difference_gradient",
    "cpu_seconds_copy",
    "cpu_seconds_swap",
    "cpu_seconds_inject",
    "peak_memory_over_model",
    "masked",
    "input",
    "torch",
    "library",
    "engine",
    "note",
)


class ModelFails(Exception):
    """The model does not run here by itself; the message is the evidence."""


# ---------------------------------------------------------------------------------------- running and comparing


@dataclasses.dataclass
class Run:
    """What one model did: outputs in eval and train mode, gradients, and buffers after the train step."""

    eval: list[torch.Tensor]
    train: list[torch.Tensor] | None = None
    buffers: dict[str, torch.Tensor] | None = None
    gradients: dict[str, torch.Tensor | None] | None = None
    train_error: str = ""


def run(model: nn.Module, specimen: zoo_models.Specimen, *, train: bool = True) -> Run:
    """One call in eval mode and, if asked, one in train mode with a backward pass; same seeds for every model."""
    model.eval()
    with torch.no_grad():
        result = Run(tensors(call(model, specimen.inputs, specimen)))
    if not train:
        return result
    model.train()
    try:
        outputs = tensors(call(model, specimen.training or specimen.inputs, specimen))
        loss = sum(projection(each) for each in outputs if each.requires_grad)
        if isinstance(loss, torch.Tensor):
            loss.backward()
    except Exception as error:
        result.train_error = one_line(error)
        return result
    result.train = [each.detach() for each in outputs]
    result.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return result


def call(model: nn.Module, inputs: Callable[[torch.Generator], tuple[Any, ...]], specimen: Any) -> Any:
    """Call with inputs that depend on nothing but the specimen."""
    generator = torch.Generator().manual_seed(0)
    arguments, keywords = inputs(generator), specimen.keywords(generator)
    torch.manual_seed(0)
    np.random.seed(0)  # SpecAugment and LayerDrop draw from NumPy's generator
    random.seed(0)
    return model(*arguments, **keywords)


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a nested output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [each for key in value for each in tensors(value[key])]
    if isinstance(value, (list, tuple)):
        return [each for item in value for each in tensors(item)]
    if dataclasses.is_dataclass(value):
        return [
            each
            for each_field in dataclasses.fields(value)
            for each in tensors(getattr(value, each_field.name))
        ]
    return tensors(list(vars(value).values())) if hasattr(value, "__dict__") and not callable(value) else []


def projection(output: torch.Tensor) -> torch.Tensor:
    """A loss that looks at every element differently."""
    flat = (torch.view_as_real(output) if output.is_complex() else output).float().flatten()
    return (flat * torch.linspace(-1, 1, flat.numel(), device=flat.device)).mean()


def difference(left: Any, right: Any) -> float:
    """Largest absolute difference of two lists or dicts of tensors; 0 only if equal, infinite if not comparable."""
    if left is None or right is None:
        return 0.0 if left is right else float("inf")
    if isinstance(left, dict):
        if left.keys() - right.keys():
            return float("inf")
        return max((difference(left[name], right[name]) for name in left), default=0.0)
    if isinstance(left, list):
        if len(left) != len(right):
            return float("inf")
        return max((difference(a, b) for a, b in zip(left, right, strict=True)), default=0.0)
    if left.shape != right.shape or left.dtype != right.dtype:
        return float("inf")
    if torch.equal(left, right):
        return 0.0
    wide = torch.complex128 if left.is_complex() else torch.float64
    a, b = left.to(wide), right.to(wide)
    both = (a.isnan() & b.isnan()) | (a == b)
    apart = (a - b).abs().masked_fill(both, 0.0)
    return float(apart.nan_to_num(nan=float("inf")).max())


def largest(named: dict[str, torch.Tensor | None] | None) -> float:
    """The largest absolute value among tensors."""
    return max(
        (float(t.abs().max()) for t in (named or {}).values() if t is not None and t.numel()), default=0.0
    )


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that a surgery must not change on the model it is given."""
    found: dict[str, Any] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        found[f"tensor {name}"] = (id(tensor), checksum(tensor), tensor.requires_grad, tensor.stride())
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = tuple(len(getattr(module, hook)) for hook in ("_forward_hooks", "_forward_pre_hooks"))
        found[f"module {name}"] = (id(module), type(module), module.training, hooks, tuple(vars(module)))
    return found


def checksum(tensor: torch.Tensor) -> int:
    """Of a tensor's bytes."""
    if tensor.is_meta or isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return 0
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(
        plain.clone().numpy()
    )  # a clone, as a storage that NumPy has seen can no longer be resized


def kept(before: nn.Module, after: nn.Module, *, added: bool) -> str:
    """Whether names, values, kinds and tying of all parameters and buffers survived; the first that did not."""
    for group in ("named_parameters", "named_buffers"):
        old = dict(getattr(before, group)(remove_duplicate=False))
        new = dict(getattr(after, group)(remove_duplicate=False))
        if list(old) != [name for name in new if name in old]:
            return f"{group}: order or names changed: {sorted(old.keys() - new.keys())[:3]}"
        extra = [name for name in new if name not in old and not (added and ".skip." in name)]
        if extra:
            return f"{group}: unexpected {extra[:3]}"
        for name, tensor in old.items():
            other = new[name]
            facts = [
                (t.shape, t.dtype, t.device, t.stride(), t.requires_grad, checksum(t))
                for t in (tensor, other)
            ]
            if facts[0] != facts[1] or other is tensor:
                return f"{group}: {name} is not what it was"
        ties = [tying({name: tensors_[name] for name in old}) for tensors_ in (old, new)]
        if ties[0] != ties[1]:
            return f"{group}: tying changed"
    known = before.state_dict().keys()
    if list(known) != [name for name in after.state_dict() if name in known]:
        return "state_dict: names or order changed"
    return ""


def tying(named: dict[str, torch.Tensor]) -> list[int]:
    """For each name, the position of the first name of the same tensor."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), position) for position, tensor in enumerate(named.values())]


# ---------------------------------------------------------------------------------------- the neutral activation


@dataclasses.dataclass(frozen=True)
class Same:
    """A factory of the very same activation: a kind and its settings; not a name, so nothing is skipped."""

    kind: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> nn.Module:
        return k.KINDS[self.kind].module(**dict(self.settings))


_SETTINGS = {
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha",),
    "celu": ("alpha",),
    "gelu": ("approximate",),
    "softplus": ("beta", "threshold"),
}


def settings(found: s.Found) -> Same:
    """What a site computes now."""
    wanted = _SETTINGS.get(found.site.kind, ())
    if found.site.form == "module":
        return Same(found.site.kind, tuple((name, getattr(found.module, name)) for name in wanted))
    if found.trace is None:
        return Same(found.site.kind)
    nodes = (node for case in found.trace.cases for node in case.graph.nodes if node.name == found.site.name)
    node = next(node for node in nodes if k.kind_of_node(node) is not None)
    given = dict(zip(wanted, node.args[1:], strict=False)) | {
        n: v for n, v in node.kwargs.items() if n in wanted
    }
    return Same(found.site.kind, tuple(given.items()))


def swap_same(model: nn.Module, found: list[s.Found]) -> nn.Module:
    """Swap every activation for itself, one surgery per kind and settings."""
    groups: dict[Same, set[tuple[str, str]]] = {}
    for each in found:
        if each.site.left is None:
            groups.setdefault(settings(each), set()).add((each.site.scope, each.site.name))
    if not groups:
        return st.swap_activations(model, "mish", where=lambda site: False)  # a copy, and a warning
    for same, paths in groups.items():
        chosen = lambda site, paths=paths: (site.scope, site.name) in paths
        model = st.swap_activations(model, same, kinds=(same.kind,), where=chosen)
    return model


class CountActivations(TorchDispatchMode):
    """Counts the activations that really run, underneath any way of calling them."""

    OPS = ("relu", "leaky_relu", "hardtanh", "elu", "gelu", "silu", "hardswish", "softplus", "tanh", "mish")

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in self.OPS:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------- one model


class Examination:
    """All checks of one model; fills its row."""

    def __init__(
        self, family: str, name: str, seconds: float, proven: frozenset[str], tell: Callable[[str], None]
    ):
        self.family, self.name, self.seconds, self.proven, self.tell = family, name, seconds, proven, tell
        self.bodies: set[str] = set()
        self.kinds: set[str] = set()
        self.own: dict[str, float] | None = None
        self.row: dict[str, Any] = {"family": family, "model": name, "torch": torch.__version__}
        self.wrong: list[str] = []
        self.raised: list[str] = []
        self.notes: list[str] = []

    def __call__(self) -> dict[str, Any]:
        try:
            self.row["status"] = self.examine(time.process_time())
        except ModelFails as error:
            self.row["status"] = "model fails"
            self.notes.insert(0, str(error))
        self.row["note"] = "; ".join([*self.raised, *self.wrong, *self.notes])[:600]
        return self.row

    def examine(self, started: float) -> str:
        self.tell("building on meta")
        parameters = count_parameters(self.family, self.name)
        if parameters is not None and parameters > MEDIUM:
            verdict = self.structure_only()
            if verdict != "structure only" or parameters > LARGE:
                return verdict
            self.notes, self.bodies = [], set()
        try:
            specimen, model, reference = self.find_specimen()
        except ModelFails as error:
            self.notes, self.bodies = [f"nothing found that it can be called with: {error}"], set()
            return self.structure_only()
        self.row |= {"parameters": sum(each.numel() for each in model.parameters()), "input": specimen.text}
        train = reference.train is not None and (time.process_time() - started) * 6 < self.seconds
        if not train:
            error = reference.train_error
            self.notes.append(f"train mode fails by itself: {error}" if error else "eval only: slow")
            reference.train = reference.buffers = reference.gradients = None
        self.row["proof"] = "run"
        self.check_surgeries(model, specimen, reference, train)
        verdict = self.verdict()
        if verdict in ("ok", "left", "missed"):
            self.row["bodies"] = self.bodies
        return verdict

    def verdict(self) -> str:
        if self.raised:
            return "exception"
        if self.wrong:
            return "wrong"
        if self.row.get("activations_missed"):
            return "missed"
        return "left" if self.row["activations_left"] or self.row["skips_left"] else "ok"

    def find_specimen(self) -> tuple[zoo_models.Specimen, nn.Module, Run]:
        """The first way to build the model in which it runs, in train mode as well if there is one."""
        errors: list[str] = []
        fallback = None
        begun = time.process_time()
        for specimen in specimens(self.family, self.name):
            if errors and time.process_time() - begun > self.seconds:
                errors.append(f"given up after {self.seconds:g} CPU s")
                break
            self.tell(f"building {specimen.text}")
            try:
                torch.manual_seed(0)
                model = shake(specimen.build())
            except Exception as error:
                errors.append(one_line(error))
                continue
            model = self.masked(model)
            self.tell(f"running by itself, {specimen.text}")
            started = time.process_time()
            try:
                reference = run(self.twin(model), specimen)
            except Exception as error:
                errors.append(one_line(error))
                continue
            self.quick = time.process_time() - started < QUICK
            if reference.train is not None:
                return specimen, model, reference
            fallback = fallback or (specimen, model, reference)
        if fallback is None:
            raise ModelFails(
                errors[0] if len(errors) == 1 else " | ".join(dict.fromkeys(errors[-1:] + errors))
            )
        return fallback

    def twin(self, model: nn.Module) -> nn.Module:
        """A copy to run, made by torch itself where it can."""
        try:
            return copy.deepcopy(model)
        except Exception as error:
            note = f"cannot be copied by torch itself: {one_line(error)}"
            self.notes += [note] if note not in self.notes else []
            return st.copy_model(model)

    def masked(self, model: nn.Module) -> nn.Module:
        """The model with half of its prunable weights masked; a model without any stays dense."""
        try:
            model = st.prune(model, SPARSITY)
            self.row["masked"] = len(st.find_masks(model))
        except Exception as error:
            self.notes = [f"prune: {one_line(error)}"]
            self.row["masked"] = 0
        return model

    # -- the checks

    def check_surgeries(self, model: nn.Module, specimen: Any, reference: Run, train: bool) -> None:
        self.measure_copy(model)
        before = fingerprint(model)
        swapped = self.surgery("swap to the same", lambda: self.swap(model), model, before, added=False)
        if swapped is not None:
            second = lambda: st.inject_skips(swapped, layers=LAYERS, strength=0.0)
            swapped = self.surgery("inject 0 after swap", second, model, before)
        if swapped is not None:
            self.neutral("inject 0 after swap", swapped, model, specimen, reference, train)
            swapped = None
        learned = self.surgery("inject learned", lambda: self.inject(model), model, before)
        if learned is not None:
            again = self.round_trip(model, learned)
            if self.quick or again is None:
                self.neutral("inject learned", learned, model, specimen, reference, train and self.quick)
            if again is not None:
                self.neutral("pickled", again, model, specimen, reference, False)
            learned = again = None
        mish = self.surgery("swap to mish", lambda: self.to_mish(model), model, before, added=False)
        if mish is not None:
            self.look_for_missed(mish, specimen, reference)

    def surgery(
        self,
        what: str,
        operate: Callable[[], nn.Module],
        model: nn.Module,
        before: dict,
        *,
        added: bool = True,
    ) -> nn.Module | None:
        """Operate, and check everything that does not need a run."""
        self.tell(what)
        rng = torch.random.get_rng_state()
        try:
            result = operate()
        except Exception as error:
            traceback.print_exc()
            self.raised.append(f"{what}: {one_line(error)}")
            return None
        if not torch.equal(rng, torch.random.get_rng_state()):
            self.wrong.append(f"{what}: draws from the global generator")
        after = fingerprint(model)
        if after != before:
            changed = [name for name in before if after.get(name) != before[name]] or [
                *(after.keys() - before.keys())
            ]
            self.wrong.append(f"{what}: the given model changed: {changed[0]}")
        trouble = kept(model, result, added=added)
        if trouble:
            self.wrong.append(f"{what}: {trouble}")
        if self.row.get("masked"):
            old, new = st.find_masks(model), st.find_masks(result)
            if old.keys() != new.keys() or not all(torch.equal(old[name], new[name]) for name in old):
                self.wrong.append(f"{what}: masks lost")
        return result

    def swap(self, model: nn.Module) -> nn.Module:
        found = s.activation_sites(model, tuple(k.KINDS), scopes.Scopes())
        sites = s.Sites(each.site for each in found)
        self.row["relu_found"] = len(st.find_activations(model))
        self.count("activations", sites)
        return swap_same(model, found)

    def inject(self, model: nn.Module) -> nn.Module:
        sites = st.find_skip_sites(model, layers=LAYERS)
        self.count("skips", sites)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result, self.row["cpu_seconds_inject"], self.row["peak_memory_over_model"] = measured(
                lambda: st.inject_skips(model, layers=LAYERS), model
            )
        self.warned("inject", caught, sites)
        return result

    def to_mish(self, model: nn.Module) -> nn.Module:
        sites = st.find_activations(model, kinds=tuple(k.KINDS))
        self.kinds = {site.kind for site in sites.possible}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result, self.row["cpu_seconds_swap"], _ = measured(
                lambda: st.swap_activations(model, "mish", kinds=tuple(k.KINDS)), model
            )
        self.warned("swap", caught, sites)
        return result

    def warned(self, what: str, caught: list, sites: s.Sites) -> None:
        if any(issubclass(each.category, NoEffectWarning) for each in caught) == bool(sites.possible):
            self.wrong.append(f"{what}: NoEffectWarning and {len(sites.possible)} possible sites")

    def count(self, what: str, sites: s.Sites) -> None:
        self.row[f"{what}_found"] = len(sites)
        self.row[f"{what}_rewritten"] = len(sites.possible)
        self.row[f"{what}_left"] = len(sites.left)
        reasons = collections.Counter(short(site.left or "") for site in sites.left)
        text = "; ".join(f"{what}: {reason} x{count}" for reason, count in reasons.most_common())
        self.row["reasons"] = "; ".join(each for each in (self.row.get("reasons", ""), text) if each)

    def measure_copy(self, model: nn.Module) -> None:
        _, self.row["cpu_seconds_copy"], _ = measured(lambda: self.twin(model), model)

    def neutral(
        self,
        what: str,
        result: nn.Module,
        model: nn.Module,
        specimen: Any,
        reference: Run,
        train: bool,
    ) -> None:
        """At its neutral setting a surgery changes nothing, bit for bit."""
        self.tell(f"running after {what}")
        called: set[nn.Module] = set()
        watches = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in rewritten(result)]
        try:
            outcome = run(result, specimen, train=train)
        except Exception as error:
            traceback.print_exc()
            self.wrong.append(f"{what}: eval run raises {one_line(error)}")
            return
        if outcome.train_error:
            self.wrong.append(f"{what}: train run raises {outcome.train_error}")
            return
        for watch in watches:
            watch.remove()
        if not self.bodies:  # of the first run, which has every rewriting
            self.bodies = bodies(called)
            if idle := len(bodies(rewritten(result)) - self.bodies):
                self.notes.append(f"{idle} of its rewritten forwards are not called by this input")
        for kind, value in self.compare(reference, outcome).items():
            if value == 0 or value <= 10 * self.own_difference(model, specimen, reference).get(kind, 0.0):
                continue
            text = f"{what}: {kind} differs by {value:.3g}"
            rounding = (
                kind == "gradient" and "learned" in what and value <= ROUNDING * largest(reference.gradients)
            )
            (self.notes if rounding else self.wrong).append(f"{text} (rounding)" if rounding else text)

    def own_difference(self, model: nn.Module, specimen: Any, reference: Run) -> dict[str, float]:
        """How far two runs of the original are apart by themselves; asked only when a surgery's run differs."""
        if self.own is None:
            outcome = run(self.twin(model), specimen, train=reference.train is not None)
            self.own = self.compare(reference, outcome, record=False)
            if any(self.own.values()):
                self.notes.append(f"the model differs from its own copy: {self.own}")
        return self.own

    def compare(self, reference: Run, outcome: Run, *, record: bool = True) -> dict[str, float]:
        found = {"eval": difference(reference.eval, outcome.eval)}
        if outcome.train is not None:
            found["train"] = max(
                difference(reference.train, outcome.train), difference(reference.buffers, outcome.buffers)
            )
            found["gradient"] = difference(reference.gradients, outcome.gradients)
        if record:
            for kind, value in found.items():
                column = f"difference_{kind}"
                self.row[column] = max(value, self.row.get(column, 0.0))
        return found

    def round_trip(self, model: nn.Module, result: nn.Module) -> nn.Module | None:
        """Through pickle, into classes made anew from the stored source."""
        self.tell("pickling")
        try:
            pickle.loads(pickle.dumps(model))
        except Exception as error:
            self.notes.append(f"cannot be pickled by itself: {one_line(error)}")
            return None
        try:
            data = pickle.dumps(result)
            programs._CLASSES.clear()
            return pickle.loads(data)
        except Exception as error:
            traceback.print_exc()
            self.raised.append(f"pickle: {one_line(error)}")
            return None

    def look_for_missed(self, mish: nn.Module, specimen: Any, reference: Run) -> None:
        self.tell("running with mish")
        counter = CountActivations()
        try:
            with counter:
                outcome = run(mish, specimen, train=False)
        except Exception as error:
            traceback.print_exc()
            self.wrong.append(f"mish: run raises {one_line(error)}")
            return
        sane = all(each.isfinite().all() for each in reference.eval)
        if sane and not all(each.isfinite().all() for each in outcome.eval):
            negative = (
                "softplus" in self.kinds
            )  # mish is negative where a softplus never is: under a root, say
            (self.notes if negative else self.wrong).append("mish: outputs are not finite")
        counter.count.pop("mish", None)
        self.row["activations_missed"] = 0
        if counter.count and not self.row.get("activations_left"):
            self.row["activations_missed"] = sum(counter.count.values())
            self.notes.append(f"still run after the swap: {dict(counter.count)}")

    # -- on the meta device

    def structure_only(self) -> str:
        self.tell("structure only")
        model = build_on_meta(self.family, self.name)
        self.row |= {"parameters": sum(each.numel() for each in model.parameters()), "input": "meta"}
        before = fingerprint(model)
        self.measure_copy(model)
        swapped = self.surgery("swap to the same", lambda: self.swap(model), model, before, added=False)
        if swapped is not None:
            second = lambda: st.inject_skips(swapped, layers=LAYERS, strength=0.0)
            swapped = self.surgery("inject 0 after swap", second, model, before)
        self.surgery("inject learned", lambda: self.inject(model), model, before)
        self.surgery("swap to mish", lambda: self.to_mish(model), model, before, added=False)
        verdict = self.verdict()
        if swapped is None or verdict in ("wrong", "exception"):
            return verdict
        unproven = bodies(rewritten(swapped)) - self.proven
        self.row["proof"] = "structure" if unproven else "alike"
        if unproven:
            self.notes.append(f"{len(unproven)} of its rewritten forwards are not proven by a run")
        return "structure only" if unproven else verdict


def rewritten(model: nn.Module) -> set[nn.Module]:
    return {m for m in model.modules() if isinstance(m, programs.Rewritten)}


def bodies(found: set[Any]) -> set[str]:
    """A digest of each of these rewritten forwards, in which every number stands for any number."""
    texts = {f"{m._original.__module__} {m._original.__qualname__} {m._program.source}" for m in found}
    return {hashlib.sha256(re.sub(r"\d+", "#", text).encode()).hexdigest()[:8] for text in texts}


def specimens(family: str, name: str) -> Iterator[zoo_models.Specimen]:
    """The ways to build a model; that its library does not find it, or another one, is the model's own failure."""
    try:
        yield from zoo_models.specimens(family, name)
    except Exception as error:
        raise ModelFails(one_line(error)) from error


def build_on_meta(family: str, name: str) -> nn.Module:
    errors = []
    for specimen in specimens(family, name):
        try:
            with torch.device("meta"):
                return specimen.build()
        except Exception as error:
            errors.append(one_line(error))
    raise ModelFails(errors[-1] if errors else "no specimen")


def count_parameters(family: str, name: str) -> int | None:
    """Without allocating them; None where the model cannot be built on the meta device."""
    try:
        return sum(parameter.numel() for parameter in build_on_meta(family, name).parameters())
    except ModelFails:
        return None


def shake(model: nn.Module) -> nn.Module:
    """Move what is constant at initialisation (zero gammas, layer scales, statistics), so that no branch is idle."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                isinstance(parameter, nn.parameter.UninitializedTensorMixin)
                or not parameter.is_floating_point()
            ):
                continue
            if parameter.numel() and parameter.min() == parameter.max():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                if isinstance(module.running_mean, nn.parameter.UninitializedTensorMixin):
                    continue
                module.running_mean += 0.1 * torch.randn(module.running_mean.shape, generator=generator)
                module.running_var *= 0.5 + torch.rand(module.running_var.shape, generator=generator)
    return model


def measured(operate: Callable[[], Any], model: nn.Module) -> tuple[Any, float, float]:
    """The result, its CPU seconds, and its peak memory above the start as a multiple of the model's size."""
    gc.collect()
    held = None
    with contextlib.suppress(OSError):  # of a system that does not tell the peak
        paired.forget_peak()
        held = paired.resident("VmRSS")
    start = time.process_time()
    result = operate()
    seconds = time.process_time() - start
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if not t.is_meta)
    peak = (paired.resident("VmHWM") - held) / size if held is not None and size else float("nan")
    return result, round(seconds, 3), round(peak, 2)


def short(reason: str) -> str:
    return " ".join(reason.split())[:90]


def one_line(error: BaseException) -> str:
    text = re.sub(r"[^\s']*/site-packages/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:200]}"


# -------------------------------------------------------------------------------------------------- the sweep


_NOT_SWEPT = ("ghosts", "affine", "foldable", "folding", "norms")


def engine() -> str:
    """A hash of the code that decides a row; comments and docstrings do not count."""
    package = Path(st.__file__).parent
    rooms = sorted(path for path in (package / "surgery").glob("*.py") if path.stem not in _NOT_SWEPT)
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (*rooms, package / "copying.py")]
    for node in (each for tree in trees for each in ast.walk(tree)):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    return hashlib.sha256("".join(map(ast.dump, trees)).encode()).hexdigest()[:10]


def _is_text(statement: ast.AST) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def examine_apart(family: str, name: str, seconds: float, proven: frozenset[str]) -> dict[str, Any]:
    """One model in a forked process, so that a crash, a hang or a lack of memory costs only its row."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(family, name, seconds, proven, sender)
    )
    process.start()
    sender.close()
    step, deadline, late = "starting", time.monotonic() + CLOCK * seconds, False
    row: dict[str, Any] | None = None
    with contextlib.suppress(EOFError):
        while row is None and not late:
            if receiver.poll(1.0):
                message = receiver.recv()
                row, step = (message, step) if isinstance(message, dict) else (None, message)
            else:
                late = cpu_seconds(process.pid) > PATIENCE * seconds or time.monotonic() > deadline
    if row is None:
        process.kill()
        process.join()
        status, what = (
            ("timeout", f"after {PATIENCE * seconds:g} CPU s")
            if late
            else ("crash", f"exit code {process.exitcode}")
        )
        row = {"family": family, "model": name, "status": status, "note": f"{what}, while {step}"}
    process.join()
    return row


def cpu_seconds(pid: int | None) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(family: str, name: str, seconds: float, proven: frozenset[str], sender: Any) -> None:
    torch.set_num_threads(1)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sender.send(Examination(family, name, seconds, proven, sender.send)())
        except Exception as error:  # the sweep's own fault, or memory: still a row, never an end
            traceback.print_exc()
            status = "model fails" if "memory" in str(error).lower() else "exception"
            sender.send(
                {"family": family, "model": name, "status": status, "note": f"sweep: {one_line(error)}"}
            )


def read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The table so far, the last row of each model."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["family"], row["model"]): row for row in csv.DictReader(file)}


def write(path: Path, rows: Iterator[dict[str, Any]] | Any) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    temporary = path.with_suffix(".part")
    temporary.write_text(text.getvalue())
    os.replace(temporary, path)


def sweep(
    families: list[str], pattern: str, path: Path, seconds: float, limit: float, again: set[str]
) -> None:
    """Examine each model without a current row, writing as it goes."""
    started = time.monotonic()
    rows, current = read(path), engine()
    for family in families:
        zoo_models.preload(family)
        gc.freeze()  # a forked child need not look through the imported libraries
        library = zoo_models.library(family)
        current_rows = [r for r in rows.values() if (r["family"], r["engine"]) == (family, current)]
        proven = {digest for r in current_rows for digest in (r.get("proves") or "").split()}
        for name in zoo_models.names(family):
            old = rows.get((family, name), {})
            fresh = (old.get("engine"), old.get("torch"), old.get("library")) == (
                current,
                torch.__version__,
                library,
            )
            if not fnmatch.fnmatchcase(name, pattern) or (fresh and old.get("status") not in again):
                continue
            if time.monotonic() - started > limit:
                return
            row = examine_apart(family, name, seconds, frozenset(proven))
            new = row.pop("bodies", set()) - proven
            proven |= new
            row["proves"] = " ".join(sorted(new))
            row |= {"torch": torch.__version__, "library": library, "engine": current}
            rows[family, name] = row
            write(path, rows.values())
            print(f"{row['status']:>14}  {family}/{name}  {row.get('note', '')[:150]}", flush=True)


def totals(rows: dict[Any, dict[str, Any]]) -> str:
    """How many models of each family have which status."""
    counts: dict[str, collections.Counter[str]] = {}
    for (family, _), row in rows.items():
        counts.setdefault(family, collections.Counter())[row["status"]] += 1
    return "\n".join(
        f"{family}: {sum(count.values())} models, "
        + ", ".join(f"{n} {status}" for status, n in count.most_common())
        for family, count in sorted(counts.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", choices=zoo_models.FAMILIES, help="default: all")
    parser.add_argument("--filter", default="*", help="glob pattern on the model's name")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "zoo.csv")
    parser.add_argument("--seconds", type=float, default=180.0, help="CPU seconds per model")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for the whole sweep")
    parser.add_argument(
        "--again", action="append", default=[], help="remake current rows of this status, too"
    )
    options = parser.parse_args()
    sys.setrecursionlimit(10_000)
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sweep(
        options.family or list(zoo_models.FAMILIES),
        options.filter,
        options.out,
        options.seconds,
        options.limit,
        set(options.again),
    )
    print(totals(read(options.out)))


if __name__ == "__main__":
    main()
