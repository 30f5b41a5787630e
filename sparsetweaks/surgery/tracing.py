"""Trace one module's own forward with all its children as leaves, in every case, without side effects.

`torch.fx` runs a forward once, so it sees one path. Two things keep that honest:

*   Cases. A forward may ask for its mode, whether an optional argument was given, the value of a flag, or whether an
    input is a tensor or a list. Each answer is a case of its own, traced on its own; the rebuilt forward asks the
    same questions and picks.
*   Refusals. Whatever a trace would silently get wrong (side effects on attributes, random numbers drawn in Python,
    a tensor computed while tracing, `no_grad` or autocast inside, checkpointing, `*args`) raises `Untraceable` with
    the reason.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import itertools
import math
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator, Set
from typing import Any, NoReturn

import torch
from torch import fx, nn

from sparsetweaks.surgery.mentions import DYNAMIC, MUTATES, STORES_GLOBAL, TYPE_CALL
from sparsetweaks.surgery.programs import GIVEN, PLAIN, Case, Trace, Untraceable, source_of

MAX_CASES = 32
"""A forward with more combinations of optional arguments than this is left as it is."""

BASE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What every module has; everything else in a module's `__dict__` is its own."""

_MUTATORS = frozenset(
    [MUTATES, "append", "appendleft", "extend", "insert", "add", "update", "setdefault", "pop", "popleft"]
    + ["popitem", "remove", "clear", "setattr", "__setitem__", "__setattr__"]
)
_TOUCHING = _MUTATORS | DYNAMIC | {"training"}
"""Code that mentions none of these can neither change an attribute of a module below nor ask for its mode."""

_one_at_a_time = threading.RLock()
_LIST_FUNCTIONS = ("cat", "concat", "stack")
_REGISTERED = ("_parameters", "_buffers", "_modules")
_GLOBAL_MODES = frozenset(
    ["is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"]
    + ["get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype"]
)


def trace_cases(module: nn.Module, names: Set[str]) -> Trace:
    """All cases of the module's own forward.

    Args:
        module: the scope; nothing of it changes.
        names: every name that the code reachable from its forward mentions.

    Raises:
        Untraceable: with the reason.
    """
    if isinstance(module, fx.GraphModule):
        signature = inspect.signature(type(module).forward)
        return Trace([Case({}, module.graph)], signature, {}, ())
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced on the instance")
    if names & _GLOBAL_MODES:
        raise Untraceable(f"its forward asks for {min(names & _GLOBAL_MODES)}, which a trace would freeze")
    if STORES_GLOBAL in names:
        raise Untraceable("its forward assigns to a global variable")
    if TYPE_CALL in names:
        raise Untraceable("its forward may ask for the type of its inputs")
    if names & _MUTATORS and (opaque := _opaque_attribute(module, names)):
        raise Untraceable(f"its forward may change what the attribute {opaque!r} holds")
    signature = inspect.signature(type(module).forward)
    questions = _questions(signature, names)
    cases: list[Case] = []
    twins = _StandIns(module, deep=bool(names & _TOUCHING))
    settled = False
    while not settled:
        settled, cases = True, []
        if len(list(itertools.product(*questions.values()))) > MAX_CASES:
            raise Untraceable(f"its optional arguments make more than {MAX_CASES} cases")
        for answers in _combinations(questions):
            try:
                graph, asked = _trace_one(twins, signature, answers, names)
            except _NotConstant as argument:
                questions[argument.name] = (signature.parameters[argument.name].default,)
                settled = False
                break
            except Untraceable:
                raise
            except Exception as error:
                if _raises_by_itself(signature, answers, error):
                    continue
                raise Untraceable(_one_line(error)) from error
            new = [name for name in asked if torch.Tensor not in questions[name]]
            if new:
                for name in new:
                    questions[name] = (torch.Tensor, list) + tuple(a for a in questions[name] if a is None)
                settled = False
                break
            source_of(graph)  # raises now, while the scope can still be left as it is
            cases.append(Case(answers, graph))
    if not cases:
        raise Untraceable("no combination of its arguments can be traced")
    plain = {name for name, value in vars(module).items() if isinstance(value, PLAIN)}
    frozen = tuple(sorted((plain if names & DYNAMIC else plain & names) - BASE_ATTRIBUTES))
    return Trace(cases, signature, questions, frozen)


def _opaque_attribute(module: nn.Module, names: Set[str]) -> str | None:
    """An attribute that the code names and whose inside a stand-in shares with the module."""
    for each in module.modules():
        for name, value in vars(each).items():
            if name in names and name not in BASE_ATTRIBUTES and not _is_flat(value):
                return name
    return None


def _is_flat(value: Any) -> bool:
    """Whether a shallow copy of an attribute shares nothing that code could change, tensors and modules aside."""
    if type(value) in (list, tuple, set):
        return all(map(_is_simple, value))
    if type(value) is dict:
        return all(map(_is_simple, value.values()))
    return _is_simple(value)


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_simple, value))
    return isinstance(value, (*PLAIN, torch.Tensor, nn.Module)) or callable(value)


def _questions(signature: inspect.Signature, names: Set[str]) -> dict[str, tuple[Any, ...]]:
    """What a forward may ask, with the answers to trace: its mode if its code can name it, each argument's cases."""
    questions: dict[str, tuple[Any, ...]] = {}
    if "training" in names or names & DYNAMIC:
        questions["self.training"] = (True, False)
    for position, parameter in enumerate(signature.parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable(f"its forward takes {parameter}")
        if position == 0:
            continue  # self
        if isinstance(parameter.default, bool):
            questions[parameter.name] = (True, False)
        elif parameter.default is None or (parameter.default is parameter.empty and position > 1):
            questions[parameter.name] = (GIVEN, None)
        else:
            questions[parameter.name] = (GIVEN,)
    return questions


def _combinations(questions: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for answers in itertools.product(*questions.values()):
        yield dict(zip(questions, answers))


def _raises_by_itself(signature: inspect.Signature, answers: dict[str, Any], error: Exception) -> bool:
    """Whether the original raises as well in this case: where it passes None for an argument that has no default."""
    none_for_needed = any(
        answer is None and signature.parameters[name].default is inspect.Parameter.empty
        for name, answer in answers.items()
        if name in signature.parameters
    )
    return none_for_needed and "Proxy" not in repr(error) + str(error)


class _NotConstant(Exception):
    """A plain argument (int, float, str) must be fixed at its default before the forward can be traced."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _trace_one(
    twins: _StandIns, signature: inspect.Signature, answers: dict[str, Any], names: Set[str]
) -> tuple[fx.Graph, set[str]]:
    """Run the forward of the stand-in once, with symbolic inputs; nothing of the module or the caller changes."""
    vars(twins.root)["training"] = answers.get("self.training", True)
    wrapped = (math,) if names & vars(math).keys() else ()
    tracer = _Tracer(signature, answers, wrapped)
    state, rng = random.getstate(), torch.random.get_rng_state()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state(legacy=False) if numpy else None
    try:
        with (
            _one_at_a_time
        ):  # what a trace puts in place of torch's and Python's own is there for every thread
            graph = tracer.trace(twins.root)
        if tracer.refusal is not None:
            raise tracer.refusal
        for node in graph.nodes:
            node.type = None  # annotations would need imports of their own
    except (_NotConstant, Untraceable):
        raise
    except Exception as error:
        if tracer.refusal is not None:
            raise tracer.refusal from error
        symbolic = [name for name in tracer.plain if answers[name] is GIVEN]
        if symbolic and not _raises_by_itself(signature, answers, error):
            raise _NotConstant(symbolic[0]) from error
        raise
    finally:
        drew = random.getstate() != state or not torch.equal(torch.random.get_rng_state(), rng)
        if numpy is not None:
            drew = drew or not _equal_states(numpy.random.get_state(legacy=False), numpy_state)
            numpy.random.set_state(numpy_state)
        random.setstate(state)
        torch.random.set_rng_state(rng)
    if drew:
        raise Untraceable("its forward draws random numbers that a trace would freeze")
    name = twins.changed()
    if name is not None:
        raise Untraceable(f"its forward changes the attribute {name!r}")
    return graph, tracer.asked


def _equal_states(one: Any, other: Any) -> bool:
    """Whether two states of NumPy's generator are equal: mappings of mappings, arrays and numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal_states(one[key], other[key]) for key in one)
    same = one == other
    return bool(same if isinstance(same, bool) else same.all())


class _StandIns:
    """A shallow twin of a module and, if `deep`, of every module below it: own attributes and containers, the same tensors.

    Whatever a forward does to its attributes while it is traced, it does to the twins.
    """

    def __init__(self, module: nn.Module, *, deep: bool):
        self.pairs: list[tuple[nn.Module, nn.Module]] = []
        twins: dict[int, nn.Module] = {}
        for each in module.modules() if deep else (module,):
            if isinstance(each, torch.jit.ScriptModule):
                twins[id(each)] = each  # a leaf without attributes that Python could change
                continue
            twin = object.__new__(type(each))
            attributes = vars(twin)
            attributes.update(vars(each))
            for name in _REGISTERED:
                attributes[name] = attributes[name].copy()
            for name, value in vars(each).items():
                if isinstance(value, (list, dict, set)) and (name not in BASE_ATTRIBUTES or each is module):
                    attributes[name] = value.copy()
            if each is not module:
                del attributes["training"]  # a forward that reads a child's mode must fail, not freeze it
            twins[id(each)] = twin
            self.pairs.append((each, twin))
        for _, twin in self.pairs:
            children = vars(twin)["_modules"]
            for name, child in children.items():
                if child is not None:
                    children[name] = twins.get(id(child), child)
        self.root = twins[id(module)]

    def changed(self) -> str | None:
        """The name of an attribute that a forward has changed on a twin."""
        for module, twin in self.pairs:
            before, after = vars(module), vars(twin)
            if len(after) != len(before) - (twin is not self.root):
                return min(before.keys() ^ after.keys() - {"training"})
            for name, value in after.items():
                if value is not before[name] and name != "training" and not _same(value, before[name], name):
                    return name
        return None


def _same(after: Any, before: Any, name: str) -> bool:
    if name == "_modules":
        return after.keys() == before.keys()
    if isinstance(before, dict) and isinstance(after, dict):
        return after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    if isinstance(before, list) and isinstance(after, list):
        return len(after) == len(before) and all(a is b for a, b in zip(after, before))
    return isinstance(before, (set, *PLAIN)) and type(after) is type(before) and after == before


class _Proxy(fx.Proxy):
    """A symbolic value that refuses, and has the tracer remember, what a trace cannot know."""

    def _needs_value(self, *_: Any) -> Any:
        self.tracer.refuse(f"its forward needs the value of {self.node.name} in Python")  # type: ignore[attr-defined]

    __len__ = __index__ = __int__ = __float__ = __complex__ = _needs_value


class _Tracer(fx.Tracer):
    """fx's tracer with every child a leaf, arguments as one case has them, and refusals where fx would be wrong."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        signature: inspect.Signature,
        answers: dict[str, Any],
        wrapped: tuple[types.ModuleType, ...],
    ):
        super().__init__(autowrap_modules=wrapped)
        self.answers = answers
        self.signature = signature
        self.asked: set[str] = set()
        self.plain = [
            name for name, p in signature.parameters.items() if isinstance(p.default, (int, float, str))
        ]
        self.refusal: Untraceable | _NotConstant | None = None
        self.stand_ins: dict[Any, Any] = {}  # builtins by what takes their place while tracing
        self._state = _execution_state()

    def refuse(self, reason: str) -> NoReturn:
        """Give up; remembered, as the forward may catch whatever is raised in it."""
        self.refusal = self.refusal or Untraceable(reason)
        raise self.refusal

    def need_constant(self, name: str) -> NoReturn:
        """Give up until the plain argument of that name is fixed at its default."""
        self.refusal = self.refusal or _NotConstant(name)
        raise self.refusal

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        call = type(m).__call__
        own = call is not nn.Module.__call__ and not (getattr(call, "__module__", None) or "").startswith(
            "torch."
        )
        if own and not isinstance(m, fx.GraphModule):  # what it does around the call would be done twice
            self.refuse(f"its child of class {type(m).__name__} has a __call__ of its own")
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list]:
        positional: list[Any] = [self.root]
        keyword: dict[str, Any] = {}
        for name, parameter in list(self.signature.parameters.items())[1:]:
            answer = self.answers[name]
            symbolic = answer is GIVEN or answer in (torch.Tensor, list)
            value = self.create_proxy("placeholder", name, (), {}) if symbolic else answer
            if parameter.kind is parameter.KEYWORD_ONLY:
                keyword[name] = value
            else:
                positional.append(value)

        def forward(*given: Any) -> Any:
            with _watched(self):  # only here: fx asks `isinstance` of everything that a model holds
                return root_fn(*given, **keyword)

        return forward, positional

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def answer_type(self, node: fx.Node) -> type:
        if node.op != "placeholder":
            self.refuse(f"its forward asks for the type of an intermediate value ({node.name})")
        if node.target in self.plain:
            self.need_constant(str(node.target))
        self.asked.add(str(node.target))
        answer = self.answers[str(node.target)]
        return torch.Tensor if answer is GIVEN else answer

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if _execution_state() != self._state:
            self.refuse("its forward switches gradients or autocast on or off")
        if callable(target):
            target = self.stand_ins.get(target, target)
        return super().create_node(kind, target, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is not _Proxy and isinstance(a, torch.Tensor):
            registered = itertools.chain(self.root.parameters(), self.root.buffers(), self.tensor_attrs)
            if not any(a is tensor for tensor in registered):
                self.refuse("its forward computes a tensor that does not depend on its inputs")
        return super().create_arg(a)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            self.refuse(f"its forward loops over a value known only at run time ({obj.node.name})")

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse(f"its forward unpacks a mapping known only at run time ({obj.node.name})")

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node.op == "placeholder" and obj.node.target in self.plain:
            self.need_constant(str(obj.node.target))
        self.refuse(f"its control flow depends on its inputs ({obj.node.name})")


@contextlib.contextmanager
def _watched(tracer: _Tracer) -> Iterator[None]:
    """Answer the model's own `isinstance` of symbolic values as the case says, and refuse saved-tensor hooks.

    Also record functions of a list of tensors, which older versions of torch refuse to do if the list is an input.

    The answer cannot come from a `__class__` of the proxy: torch's argument parser would believe it, and read a
    tensor that is not there. Activation checkpointing works by saved-tensor hooks, which a trace would leave out.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks
    is_instance, has, get, enter = builtins.isinstance, builtins.hasattr, builtins.getattr, hooks.__enter__

    def answer(value: Any, kinds: Any) -> bool:
        if type(value) is _Proxy and models_own(sys._getframe(1)):
            if not any(issubclass(each, kinds) for each in (torch.Tensor, list)):
                tracer.refuse("its forward asks whether an input is something other than a tensor or a list")
            return issubclass(tracer.answer_type(value.node), kinds)
        return is_instance(value, kinds)

    def models_own(frame: types.FrameType) -> bool:
        caller = frame.f_globals.get("__name__") or ""
        return caller.startswith("torch.nn.modules.") or not caller.startswith(
            ("torch.", "dataclasses", "inspect")
        )

    def answer_has(value: Any, name: str) -> bool:
        if type(value) is _Proxy and models_own(sys._getframe(1)):
            tracer.refuse(f"its forward asks whether an input has an attribute {name!r}")
        return has(value, name)

    def answer_get(value: Any, name: str, *default: Any) -> Any:
        if default and type(value) is _Proxy and models_own(sys._getframe(1)):
            tracer.refuse(f"its forward asks whether an input has an attribute {name!r}")
        return get(value, name, *default)

    def refuse(_: Any) -> NoReturn:
        tracer.refuse(
            "its forward saves memory for the backward pass by checkpointing or hooks on saved tensors"
        )

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if type(tensors) is _Proxy:
                return tracer.create_proxy("call_function", function, (tensors, *args), kwargs)
            return function(tensors, *args, **kwargs)

        return call

    torch.overrides.get_overridable_functions()  # torch keeps what it finds the first time: not our stand-ins
    originals = {name: getattr(torch, name) for name in _LIST_FUNCTIONS}
    for name, function in originals.items():
        setattr(torch, name, recording(function))
    tracer.stand_ins[answer_get] = get
    builtins.isinstance = answer  # type: ignore[assignment]
    builtins.hasattr, builtins.getattr = answer_has, answer_get  # type: ignore[assignment]
    hooks.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)
        builtins.isinstance, builtins.hasattr, builtins.getattr = is_instance, has, get
        hooks.__enter__ = enter  # type: ignore[method-assign]


def _execution_state() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
