"""Ghosts: skips and smooth activations for the early part of training, gone without a trace afterwards.

A ghost is a tweak whose strength is a buffer. `anneal_ghosts` lets it fall to 0 while the network trains, and there the
network computes what it did before the surgery; `remove_ghosts` then takes out what is left of it, so that inference
runs the original architecture and costs nothing more.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparsetweaks.copying import Model, check_model, copy_model
from sparsetweaks.errors import NoEffectWarning, SurgeryError
from sparsetweaks.surgery import kinds as k
from sparsetweaks.surgery import sites as s
from sparsetweaks.surgery.dataflow import called, first_input
from sparsetweaks.surgery.programs import Rewritten, edits_of, original_class, rewrite
from sparsetweaks.surgery.scopes import Scopes

GHOSTS_UNTIL = 0.5
"""The fraction of training after which ghosts are gone: the paper's first drop of the learning rate, epoch 90 of 180,
so that the network settles at the low rates in the architecture that it keeps (ToST: the early part of training)."""

SKIP_EDIT, SWAP_EDIT = "ghost skip", "ghost swap"
"""The kinds of edits of a forward that `remove_ghosts` takes back."""

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda age: 1 - age,
    "cosine": lambda age: (1 + math.cos(math.pi * age)) / 2,
    "step": lambda age: 1.0,
}
"""The strength at an age in [0, 1), as a fraction of the strength at the start; at age 1 it is 0."""


class Ghost(nn.Module):
    """A tweak whose strength is a buffer, so that checkpoints, DDP, averaging and compiled code carry it."""

    strength: Any  # a tensor; in a `Skip` it may be a number as well
    start: float

    def set_start(self, start: float, shape: tuple[int, ...], like: torch.Tensor | None) -> None:
        """Create the buffer, at the strength that the annealing starts from."""
        self.start = float(start)
        dtype = like.dtype if like is not None and like.is_floating_point() else torch.float32
        device = None if like is None else like.device
        self.register_buffer("strength", torch.full(shape, self.start, dtype=dtype, device=device))

    def stand_in(self, graph: fx.Graph, node: fx.Node) -> fx.Node | None:
        """What a call of this ghost is without it; None where the call was there before it."""
        raise NotImplementedError

    def leave(self, owner: nn.Module, name: str) -> None:
        """Undo what the ghost changed in the module that holds it under this name."""
        del owner._modules[name]

    def strength_in_words(self) -> str:
        now = "unknown" if self.strength.is_meta else f"{self.strength.item():g}"
        return f"{now} of {self.start:g}"


# --------------------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Call:
    """An activation call in a graph, apart from the value that it is given."""

    op: str
    target: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    @staticmethod
    def at(node: fx.Node) -> Call:
        keywords = tuple((name, value) for name, value in node.kwargs.items() if name != "input")
        return Call(node.op, node.target, tuple(node.args[1:]), keywords)

    def again(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        return graph.create_node(self.op, self.target, (value, *self.arguments), dict(self.keywords))

    def slope(self) -> float:
        """The slope that a leaky ReLU is called with; 0.01 is torch's default."""
        given = dict(self.keywords).get("negative_slope", self.arguments[0] if self.arguments else 0.01)
        return float(given)


@dataclass(frozen=True)
class Held:
    """An activation function that a module held as a plain attribute, with torch's note on it, if there is one."""

    function: Any
    fused: Any = None


@dataclass(frozen=True)
class Past:
    """What a ghost activation was, and how it treats its input.

    Attributes:
        was: None for a module, which it still is; else the call or the attribute that it took the place of.
        clones: whether it works on a copy, as its input is overwritten before the backward pass needs it.
        overwrites: whether it writes its result over its input, for callers that look at the input afterwards.
    """

    was: Call | Held | None = None
    clones: bool = False
    overwrites: bool = False


class GhostActivation(Ghost):
    """Swish with a growing beta, `x * sigmoid(x / strength)`, which at strength 0 is the original activation.

    At strength 1 it is Swish, and it is never further than 0.28 * strength from ReLU. For ReLU6 it has the same upper
    limit, for a leaky ReLU the same slope below. The class is a subclass of the activation's own, and the object is the
    same one, so that its attributes, hooks and names are all there when the ghost is gone.
    """

    past: Past
    _original: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = input.clone() if self.past.clones or self.past.overwrites else input
        if _can_be_asked(self.strength):
            result = self._smooth(x) if self.strength else self._plain(x)
        else:
            result = torch.where(self.strength != 0, self._smooth(x), self._plain(x))
        return input.copy_(result) if self.past.overwrites else result

    def _smooth(self, x: torch.Tensor) -> torch.Tensor:
        narrowest = max(
            torch.finfo(each.dtype).tiny for each in (x, self.strength)
        )  # a normal number in both
        width = self.strength.clamp_min(narrowest)
        smooth = x * torch.sigmoid(x / width)
        if isinstance(self, nn.LeakyReLU):
            return torch.add(smooth * (1 - self.negative_slope), x, alpha=self.negative_slope)
        return smooth.clamp_max(self.max_val) if isinstance(self, nn.ReLU6) else smooth

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        """The original activation, never in place."""
        if isinstance(self, nn.LeakyReLU):
            return F.leaky_relu(x, self.negative_slope)
        return F.relu6(x) if isinstance(self, nn.ReLU6) else F.relu(x)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"strength={self.strength_in_words()}"]))

    def stand_in(self, graph: fx.Graph, node: fx.Node) -> fx.Node | None:
        value = first_input(node)
        assert value is not None
        return self.past.was.again(graph, value) if isinstance(self.past.was, Call) else None

    def leave(self, owner: nn.Module, name: str) -> None:
        was = self.past.was
        if was is None:
            self.__class__ = self._original
            del self._buffers["strength"]
            for added in ("start", "past", "added_by_tweak"):
                delattr(self, added)
            return
        super().leave(owner, name)
        if isinstance(was, Held):
            vars(owner)[name] = was.function
            if was.fused is not None:
                vars(owner)["activation_relu_or_gelu"] = was.fused

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _revive, (self._original,), vars(self)


def _can_be_asked(strength: Any) -> bool:
    """Whether a strength may decide in Python which way to compute, which is faster than to compute both.

    Not where something traces or transforms the call, and not where the answer would have to come from another device.
    """
    return (
        type(strength) is torch.Tensor
        and strength.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _revive(original: Any) -> nn.Module:
    made = _ghost_class(original)
    return made.__new__(made)


_CLASSES: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
"""The ghosts of activations' classes that modules have now."""


def _ghost_class(original: Any) -> Any:
    made = _CLASSES.get(original)
    if made is None:
        members = {"_original": original, "__module__": original.__module__}
        made = _CLASSES[original] = type(f"Ghost{original.__name__}", (GhostActivation, original), members)
    return made


def haunt(activation: nn.Module, past: Past, like: torch.Tensor | None) -> None:
    """Turn an activation module into its ghost, in place, at strength 1."""
    kind: Any = type(activation)
    for name in ("strength", "start", "past"):
        if hasattr(activation, name):
            raise SurgeryError(
                f"this {kind.__name__} has an attribute {name!r} of its own: leave it out with where="
            )
    activation.__class__ = _ghost_class(kind)
    assert isinstance(activation, GhostActivation)
    activation.set_start(1.0, (), like)
    activation.past = past
    activation.added_by_tweak = True  # type: ignore[assignment]  # so `rewind` does not ask a state for its strength


def ghost_of_call(kind: k.Kind, call: Call, past: Past, like: torch.Tensor | None) -> nn.Module:
    """A ghost that takes the place of a call of an activation function."""
    made: nn.Module = nn.LeakyReLU(call.slope()) if kind.name == "leaky_relu" else kind.module()
    haunt(made, past, like)
    return made


def ghost_of_attribute(kind: k.Kind, module: nn.Module, name: str, like: torch.Tensor | None) -> nn.Module:
    """A ghost that takes the place of a function that a module holds as a plain attribute."""
    function = vars(module)[name]
    bare = getattr(function, "func", function)  # without what functools.partial adds
    keywords = getattr(function, "keywords", {})
    call = Call("call_function", bare, getattr(function, "args", ())[1:], tuple(keywords.items()))
    overwrites = bool(keywords.get("inplace")) or getattr(bare, "__name__", "").endswith("_")
    fused = vars(module).get("activation_relu_or_gelu")
    return ghost_of_call(kind, call, Past(Held(function, fused), overwrites=overwrites), like)


def calls_at(found: s.Found) -> set[Call]:
    """The calls that a site stands for: one, unless the cases of its forward differ there."""
    assert found.trace is not None
    return {
        Call.at(node)
        for case in found.trace.cases
        for node in case.graph.nodes
        if node.name == found.site.name and k.kind_of_node(node) is not None
    }


def why_no_ghost(found: s.Found) -> str | None:
    """Why this activation site can have no ghost, though it can be swapped."""
    if found.site.form not in ("function", "method"):
        return None
    calls = calls_at(found)
    if len(calls) != 1:
        return "its calls differ between the cases of this forward"
    (call,) = calls
    values = (*call.arguments, *(value for _, value in call.keywords))
    if any(isinstance(value, fx.Node) for value in values):
        return "it takes a slope that is computed"
    return None


# ----------------------------------------------------------------------------------------------------- annealing


def anneal_ghosts(
    model: nn.Module, progress: float, *, schedule: str = "linear", until: float = GHOSTS_UNTIL
) -> float:
    """Let the ghosts of `inject_skips` and `swap_activations` fade as training goes on (ToST, ICML 2022).

    Call it before each epoch or each step, with the model that is trained. It writes the strength into the ghosts'
    buffers, in place: like `optimizer.step` it is a part of the training loop, and unlike every surgery it changes the
    model that it is given. Nothing is recompiled, moved or synchronised.

    An average of models that averages buffers too (`AveragedModel(model, use_buffers=True)`) averages the strengths that
    the ghosts have had, and so lags behind: anneal the average itself to the end before `remove_ghosts`, see the example.

    Args:
        model: a model with ghosts, also wrapped by torch.compile, DistributedDataParallel or AveragedModel.
        progress: how much of the training is done, in [0, 1], e.g. `epoch / epochs`.
        schedule: how the strength falls from where it started to 0: "linear", "cosine" (half a period), or "step"
            (all of it stays until the end, then none).
        until: the progress at which the strength is 0, in (0, 1]. Default: 0.5, where the paper's learning rate drops
            for the first time; ToST says only that ghosts live early in training, and has no published schedule.

    Returns:
        The strength that is left, as a fraction of the one that each ghost started with.

    Raises:
        ValueError: for an unknown schedule, or a progress or `until` out of range.

    Warns:
        NoEffectWarning: if the model has no ghosts.

    Example:
        >>> import sparsetweaks as st
        >>> layers = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        >>> ticket = st.inject_skips(torch.nn.Sequential(*layers), ghost=True)
        >>> [st.anneal_ghosts(ticket, epoch / 8) for epoch in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        >>> ticket[0].skip.strength
        tensor([0.])

        >>> average = torch.optim.swa_utils.AveragedModel(ticket, use_buffers=True)
        >>> for epoch in range(4):
        ...     _ = st.anneal_ghosts(ticket, epoch / 3)
        ...     average.update_parameters(ticket)
        >>> average.module[0].skip.strength
        tensor([0.3333])
        >>> _ = st.anneal_ghosts(average, 1)
        >>> trained = st.remove_ghosts(average.module)
    """
    check_model(model)
    progress, until = _fraction("progress", progress), _fraction("until", until)
    if not isinstance(schedule, str) or schedule not in _SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(_SCHEDULES)}")
    if not 0 < until <= 1:
        raise ValueError(
            f"until is the fraction of training at whose end ghosts are gone, in (0, 1]; got {until}"
        )
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is the fraction of training that is done, in [0, 1]; got {progress}")
    left = 0.0 if progress >= until else _SCHEDULES[schedule](progress / until)
    ghosts = [module for module in model.modules() if isinstance(module, Ghost)]
    if not ghosts:
        warnings.warn(
            "the model has no ghosts: nothing was annealed; see ghost= of inject_skips and swap_activations",
            NoEffectWarning,
            stacklevel=2,
        )
    with torch.no_grad():
        for ghost in ghosts:
            ghost.strength.fill_(left * ghost.start)
    return left


def _fraction(name: str, value: Any) -> float:
    """A number, also one in a tensor, as torch's schedulers give them."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is a fraction of training, a number; got {value!r}") from error


# ------------------------------------------------------------------------------------------------------- removal


def remove_ghosts(model: Model, *, force: bool = False) -> Model:
    """Give back the original architecture after ghost training (ToST, ICML 2022).

    The result computes what the model computed before it had ghosts, bit for bit; and at strength 0 that is what it
    computed with them, forward and backward, within the limits that `ghost=` of the surgeries states.

    Args:
        model: a model whose ghosts were annealed to strength 0.
        force: whether to remove ghosts that still have some strength too. That changes what the model computes.

    Returns:
        A new model without ghosts: classes, forwards, attributes and `state_dict` names are the original ones. What
        other surgeries rewrote stays rewritten. `model` is left untouched.

    Raises:
        SurgeryError: if a ghost still has some strength, without `force`; the message names it. Also for a model that
            is wrapped in DistributedDataParallel: give `model.module`.

    Warns:
        NoEffectWarning: if the model has no ghosts.

    Example:
        >>> import sparsetweaks as st
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> ticket = st.swap_activations(model, "swish", ghost=True)
        >>> ticket[1]
        GhostReLU(strength=1 of 1)
        >>> _ = st.anneal_ghosts(ticket, 1.0)
        >>> st.remove_ghosts(ticket)[1]
        ReLU()
    """
    check_model(model)
    ghosts = {name: module for name, module in model.named_modules() if isinstance(module, Ghost)}
    alive = {name: ghost.strength for name, ghost in ghosts.items() if not force and ghost.strength.any()}
    if alive:
        name, strength = next(iter(alive.items()))
        raise SurgeryError(
            f"{len(alive)} ghosts are still alive, the first, {name!r}, at strength {strength.item():g}: "
            "anneal_ghosts(model, 1.0) and train on, or remove_ghosts(model, force=True)"
        )
    result = copy_model(model)
    s.refuse_wrapped(result)
    scopes = Scopes()
    for module in list(result.modules()):
        if isinstance(module, fx.GraphModule) or {SKIP_EDIT, SWAP_EDIT} & set(edits_of(module)):
            _take_back(module, scopes)
    for owner in list(result.modules()):
        for name, child in list(owner._modules.items()):
            if isinstance(child, Ghost):
                child.leave(owner, name)
    if isinstance(result, Ghost):
        result.leave(result, "")
    if not ghosts:
        warnings.warn("the model has no ghosts: nothing was removed", NoEffectWarning, stacklevel=2)
    s.record_change(result, "remove_ghosts", map(_site_of, ghosts), ())
    return result


def _site_of(name: str) -> s.Site:
    scope, _, name = name.rpartition(".")
    return s.Site(scope, name, "ghost", "module")


def _take_back(module: nn.Module, scopes: Scopes) -> None:
    """Undo the ghosts' edits of one forward: all of them if there were no others, else call by call."""
    others = tuple(each for each in edits_of(module) if each not in (SKIP_EDIT, SWAP_EDIT))
    if isinstance(module, Rewritten) and not others:
        module.__class__ = original_class(module)  # type: ignore[assignment]
        return
    trace = scopes.trace(module)
    if not any(True for case in trace.cases for _ in _ghost_calls(case.graph, module)):
        return

    def edit(graph: fx.Graph) -> None:
        for node, ghost in list(_ghost_calls(graph, module)):
            with graph.inserting_before(node):
                instead = ghost.stand_in(graph, node)
            if instead is not None:
                node.replace_all_uses_with(instead)
                graph.erase_node(node)

    rewrite(module, trace, ("remove ghosts",), edit, edits=others)


def _ghost_calls(graph: fx.Graph, module: nn.Module) -> Iterator[tuple[fx.Node, Ghost]]:
    for node in graph.nodes:
        if node.op == "call_module":
            child = called(node, module)
            if isinstance(child, Ghost):
                yield node, child
