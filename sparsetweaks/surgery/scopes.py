"""The surgery engine: trace one module's own forward, let a surgery edit the graph, and rebuild that module.

A *scope* is a module whose own `forward` is traced with all its children as leaves. What is rebuilt is the scope's
`forward` and nothing else: the module keeps its class (a subclass of it, to be exact), its methods, attributes,
hooks, parameters and names. What is not a scope of an edit is never traced, so the outer model may do anything.

`torch.fx` runs the forward once, so it sees one path. Three things keep that honest:

*   Cases. A forward may ask for its mode, whether an optional argument was given, the value of a flag, or whether an
    input is a tensor or a list. Each answer is a case of its own, traced on its own; the rebuilt forward asks the
    same questions and picks.
*   Refusals. Whatever a trace would silently get wrong (side effects on attributes, random numbers drawn in Python,
    a tensor computed while tracing, `no_grad` or autocast inside, `*args`) raises `Untraceable` with the reason.
*   Frozen attributes. A plain attribute that the forward reads (`self.scale = 0.5`) is a constant of the graph, so
    the rebuilt module refuses to have it changed.

This is the only file that imports `torch.fx`.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import dis
import enum
import functools
import importlib
import inspect
import itertools
import linecache
import random
import re
import sys
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import fx, nn

from sparsetweaks.errors import SurgeryError

MAX_CASES = 32
"""A forward with more combinations of optional arguments than this is left as it is."""

_BASE_ATTRIBUTES = frozenset(vars(nn.Module()))
_GIVEN = "given"  # an argument that is traced symbolically, whatever it is
_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, type)
_GLOBAL_MODES = frozenset(
    ["is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled"]
    + ["get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype"]
)
SLICES, LOOPS = "[:]", "for"
"""What `Scopes.names` holds, beside names, for code that slices or loops."""

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


class Untraceable(SurgeryError):
    """This forward cannot be rewritten; the message is the reason, a clause that follows "left as it is: "."""


# --------------------------------------------------------------------------------------------- which modules


def is_scope(module: nn.Module) -> bool:
    """Whether the module's own forward may hold a site: not a layer of torch itself, not a scripted module."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    forward = _forward_of(type(module))
    if forward is None or getattr(forward, "__name__", "") == "_forward_unimplemented":
        return False
    origin = getattr(forward, "__module__", None) or ""
    if origin.startswith("torch.nn.modules.transformer") or forward is nn.Sequential.forward:
        return True
    return not origin.startswith(("torch.nn.", "torch.ao."))


def _forward_of(cls: type) -> Callable[..., Any] | None:
    return getattr(cls, "forward", None)


# ---------------------------------------------------------------------------------------------------- tracing


@dataclass
class Case:
    """One path through a forward: the answers that lead to it, and its graph."""

    answers: dict[str, Any]
    graph: fx.Graph


@dataclass
class Trace:
    """All cases of one forward, shared by modules that are alike: `rewrite` edits copies of the graphs."""

    cases: list[Case]
    signature: inspect.Signature
    questions: dict[str, tuple[Any, ...]]
    frozen: tuple[str, ...]
    programs: dict[Hashable, Program] = field(default_factory=dict)


class Scopes:
    """Traces the scopes of one model; modules that are alike are traced once."""

    def __init__(self) -> None:
        self._traces: dict[Hashable, Trace | Untraceable] = {}
        self._names: dict[Hashable, frozenset[str]] = {}

    def trace(self, module: nn.Module) -> Trace:
        """The cases of the module's own forward.

        Raises:
            Untraceable: with the reason.
        """
        names = self.names(module)
        key = _fingerprint(module, names)
        if key not in self._traces:
            try:
                self._traces[key] = _trace_cases(module, names)
            except Untraceable as reason:
                self._traces[key] = reason
        found = self._traces[key]
        if isinstance(found, Untraceable):
            raise found
        return found

    def names(self, module: nn.Module) -> frozenset[str]:
        """Every name that the code reachable from the module's forward mentions."""
        classes = frozenset(type(child) for child in module.modules())
        plain = (
            value for value in vars(module).values() if isinstance(value, (functools.partial, *_FUNCTIONS))
        )
        held = frozenset(value.func if isinstance(value, functools.partial) else value for value in plain)
        key = (type(module), classes, held)
        if key not in self._names:
            self._names[key] = _reachable_names(type(module), classes, held)
        return self._names[key]


def _trace_cases(module: nn.Module, names: frozenset[str]) -> Trace:
    if isinstance(module, fx.GraphModule):
        signature = inspect.signature(type(module).forward)
        return Trace([Case({}, module.graph)], signature, {}, ())
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced on the instance")
    if names & _GLOBAL_MODES:
        raise Untraceable(f"its forward asks for {min(names & _GLOBAL_MODES)}, which a trace would freeze")
    signature = inspect.signature(type(module).forward)
    questions = _questions(signature)
    cases: list[Case] = []
    settled = False
    while not settled:
        settled, cases = True, []
        if len(list(itertools.product(*questions.values()))) > MAX_CASES:
            raise Untraceable(f"its optional arguments make more than {MAX_CASES} cases")
        for answers in _combinations(questions):
            try:
                graph, asked = _trace_one(module, signature, answers)
            except _NotConstant as argument:
                questions[argument.name] = (signature.parameters[argument.name].default,)
                settled = False
                break
            except Untraceable:
                raise
            except Exception as error:
                if _is_optional_extra(signature, answers) and "Proxy" not in repr(error) + str(error):
                    continue  # None where no None is allowed: the original raises there as well
                raise Untraceable(_one_line(error)) from error
            new = [name for name in asked if torch.Tensor not in questions[name]]
            if new:
                for name in new:
                    questions[name] = (torch.Tensor, list) + tuple(a for a in questions[name] if a is None)
                settled = False
                break
            _source_of(graph)  # raises now, while the scope can still be left as it is
            cases.append(Case(answers, graph))
    if not cases:
        raise Untraceable("no combination of its arguments can be traced")
    plain = {name for name, value in vars(module).items() if isinstance(value, _PLAIN)}
    frozen = tuple(sorted((plain & names) - _BASE_ATTRIBUTES))
    return Trace(cases, signature, questions, frozen)


def _questions(signature: inspect.Signature) -> dict[str, tuple[Any, ...]]:
    """What a forward may ask, with the answers to trace: its mode, and each argument's cases."""
    questions: dict[str, tuple[Any, ...]] = {"self.training": (True, False)}
    for position, parameter in enumerate(signature.parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Untraceable(f"its forward takes {parameter}")
        if position == 0:
            continue  # self
        if isinstance(parameter.default, bool):
            questions[parameter.name] = (True, False)
        elif parameter.default is None or (parameter.default is parameter.empty and position > 1):
            questions[parameter.name] = (_GIVEN, None)
        else:
            questions[parameter.name] = (_GIVEN,)
    return questions


def _combinations(questions: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for answers in itertools.product(*questions.values()):
        yield dict(zip(questions, answers))


def _is_optional_extra(signature: inspect.Signature, answers: dict[str, Any]) -> bool:
    """Whether this case passes None for an argument that has no default."""
    return any(
        answer is None and signature.parameters[name].default is inspect.Parameter.empty
        for name, answer in answers.items()
        if name in signature.parameters
    )


class _NotConstant(Exception):
    """A plain argument (int, float, str) must be fixed at its default before the forward can be traced."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _trace_one(
    module: nn.Module, signature: inspect.Signature, answers: dict[str, Any]
) -> tuple[fx.Graph, set[str]]:
    """Run the forward of a stand-in once, with symbolic inputs; nothing of the module or the caller changes."""
    twins = _stand_ins(module)
    twin = twins[id(module)]
    vars(twin)["training"] = answers["self.training"]
    before = {key: _attributes(each) for key, each in twins.items()}
    tracer = _Tracer(signature, answers)
    state, rng = random.getstate(), torch.random.get_rng_state()
    try:
        with _watched(tracer):
            graph = tracer.trace(twin)
        if tracer.refusal is not None:
            raise tracer.refusal
        for node in graph.nodes:
            node.type = None  # annotations would need imports of their own
    except (_NotConstant, Untraceable):
        raise
    except Exception as error:
        if tracer.refusal is not None:
            raise tracer.refusal from error
        symbolic = [name for name in tracer.plain if answers[name] is _GIVEN]
        if symbolic:
            raise _NotConstant(symbolic[0]) from error
        raise
    finally:
        drew = random.getstate() != state or not torch.equal(torch.random.get_rng_state(), rng)
        random.setstate(state)
        torch.random.set_rng_state(rng)
    if drew:
        raise Untraceable("its forward draws random numbers that a trace would freeze")
    for key, each in twins.items():
        after = _attributes(each)
        changed = sorted(set(before[key]) ^ set(after)) or sorted(
            name for name in after if not _same(after[name], before[key][name])
        )
        if changed:
            raise Untraceable(f"its forward changes the attribute {changed[0]!r}")
    return graph, tracer.asked


def _stand_ins(module: nn.Module) -> dict[int, nn.Module]:
    """A shallow twin of every module below: own attributes and containers, the same tensors."""
    twins: dict[int, nn.Module] = {}
    for each in module.modules():
        twin = object.__new__(type(each))
        vars(twin).update({name: _own(value) for name, value in vars(each).items()})
        if each is not module:
            vars(twin).pop("training", None)  # a forward that reads a child's mode must fail, not freeze it
        twins[id(each)] = twin
    for twin in twins.values():
        children = vars(twin)["_modules"]
        for name, child in children.items():
            if child is not None:
                children[name] = twins[id(child)]
    return twins


def _own(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, set) or isinstance(value, dict) else value


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: _own(value) for name, value in vars(module).items()}


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(left[key] is right[key] for key in left)
    if isinstance(left, (list, tuple)) and type(left) is type(right):
        return len(left) == len(right) and all(a is b for a, b in zip(left, right))
    return left is right or (isinstance(left, (set, *_PLAIN)) and left == right)


class _Proxy(fx.Proxy):
    """A symbolic value that refuses, and has the tracer remember, what a trace cannot know."""

    def _needs_value(self, *_: Any) -> Any:
        self.tracer.refuse(f"its forward needs the value of {self.node.name} in Python")  # type: ignore[attr-defined]

    __len__ = __index__ = __int__ = __float__ = __complex__ = _needs_value


class _Tracer(fx.Tracer):
    """fx's tracer with every child a leaf, arguments as one case has them, and refusals where fx would be wrong."""

    proxy_buffer_attributes = True

    def __init__(self, signature: inspect.Signature, answers: dict[str, Any]):
        super().__init__()
        self.answers = answers
        self.signature = signature
        self.asked: set[str] = set()
        self.plain = [
            name for name, p in signature.parameters.items() if isinstance(p.default, (int, float, str))
        ]
        self.refusal: Untraceable | _NotConstant | None = None
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

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list]:
        positional: list[Any] = [self.root]
        keyword: dict[str, Any] = {}
        for name, parameter in list(self.signature.parameters.items())[1:]:
            answer = self.answers[name]
            symbolic = answer is _GIVEN or answer in (torch.Tensor, list)
            value = self.create_proxy("placeholder", name, (), {}) if symbolic else answer
            if parameter.kind is parameter.KEYWORD_ONLY:
                keyword[name] = value
            else:
                positional.append(value)
        return (lambda *given: root_fn(*given, **keyword)) if keyword else root_fn, positional

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def answer_type(self, node: fx.Node) -> type:
        if node.op != "placeholder":
            self.refuse(f"its forward asks for the type of an intermediate value ({node.name})")
        if node.target in self.plain:
            self.need_constant(str(node.target))
        self.asked.add(str(node.target))
        answer = self.answers[str(node.target)]
        return torch.Tensor if answer is _GIVEN else answer

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _execution_state() != self._state:
            self.refuse("its forward switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

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

    The answer cannot come from a `__class__` of the proxy: torch's argument parser would believe it, and read a
    tensor that is not there. Activation checkpointing works by saved-tensor hooks, which a trace would leave out.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks
    is_instance, enter = builtins.isinstance, hooks.__enter__

    def answer(value: Any, kinds: Any) -> bool:
        if type(value) is _Proxy:
            caller = sys._getframe(1).f_globals.get("__name__") or ""
            torch_asks = caller.startswith(("torch.", "dataclasses", "inspect"))
            if not torch_asks or caller.startswith("torch.nn.modules."):
                return issubclass(tracer.answer_type(value.node), kinds)
        return is_instance(value, kinds)

    def refuse(_: Any) -> NoReturn:
        tracer.refuse(
            "its forward saves memory for the backward pass by checkpointing or hooks on saved tensors"
        )

    builtins.isinstance = answer  # type: ignore[assignment]
    hooks.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        builtins.isinstance = is_instance
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


# ----------------------------------------------------------------------------------------- what makes two alike


def _fingerprint(module: nn.Module, names: frozenset[str]) -> Hashable:
    """Equal for modules whose traces are equal: class, structure, and every attribute that the code can name."""
    everything = bool(names & {"__dict__", "vars"})
    numbers: dict[int, int] = {}

    def describe(each: nn.Module) -> Hashable:
        if id(each) in numbers:
            return ("again", numbers[id(each)])
        numbers[id(each)] = len(numbers)
        attributes = tuple(
            (name, _value_key(value))
            for name, value in vars(each).items()
            if name not in _BASE_ATTRIBUTES and (everything or name in names)
        )
        tensors = tuple(
            (name, value is None)
            for group in (each._parameters, each._buffers)
            for name, value in group.items()
            if each is module or name in names
        )
        children = tuple(
            (name, None if child is None else describe(child)) for name, child in each._modules.items()
        )
        instance = id(each) if "forward" in vars(each) or isinstance(each, fx.GraphModule) else None
        return (type(each), instance, attributes, tensors, children)

    return describe(module)


def _value_key(value: Any) -> Hashable:
    if isinstance(value, (*_PLAIN, *_FUNCTIONS)):
        return (type(value), value)
    if isinstance(value, functools.partial):
        return (functools.partial, value.func, _value_key(value.args), _value_key(value.keywords))
    if type(value) in (tuple, list):
        return (type(value), tuple(_value_key(each) for each in value))
    if type(value) is dict:
        return (dict, tuple((_value_key(key), _value_key(each)) for key, each in value.items()))
    return id(value)


def _reachable_names(cls: type, classes: frozenset[type], held: frozenset[Any]) -> frozenset[str]:
    """Names and string constants in the code of `cls.forward` and of what it calls by name, torch's own left out."""
    names: set[str] = set()
    seen: set[int] = set()
    pending: list[Any] = [_forward_of(cls), *held]
    while pending:
        function = inspect.unwrap(pending.pop())
        code = getattr(function, "__code__", None)
        if code is None or id(code) in seen:
            continue
        seen.add(id(code))
        new = set(_names_in(code)) - names
        names |= new
        scope = getattr(function, "__globals__", {})
        for name in new:
            found = [vars(base).get(name) for base in cls.__mro__]
            if name not in ("forward", "__call__"):
                found += [vars(base).get(name) for each in classes for base in each.__mro__]
            found.append(scope.get(name))
            for candidate in found:
                candidate = getattr(candidate, "fget", None) or getattr(candidate, "__func__", candidate)
                origin = getattr(candidate, "__module__", None) or ""
                if isinstance(candidate, types.FunctionType) and not origin.startswith("torch."):
                    pending.append(candidate)
    return frozenset(names)


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("BUILD_SLICE", "BINARY_SLICE"):
            yield SLICES
        elif instruction.opname == "FOR_ITER":
            yield LOOPS
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, slice):
            yield SLICES
        elif isinstance(constant, types.CodeType):
            yield from _names_in(constant)


# -------------------------------------------------------------------------------------------------- rebuilding


@dataclass(frozen=True)
class Program:
    """A rebuilt forward as text, with the attributes that it took as constants."""

    source: str
    frozen: tuple[str, ...]


def _write_program(trace: Trace, cases: Iterable[Case]) -> Program:
    """Edited cases as the source of one forward.

    Raises:
        Untraceable: if the code calls something that cannot be imported by name.
    """
    imports: dict[str, str] = {}
    bodies: list[tuple[dict[str, Any], str]] = []
    for case in cases:
        case.graph.lint()
        body, needed = _source_of(case.graph)
        imports.update(needed)
        bodies.append((case.answers, body))
    questions = _questions_that_matter(trace.questions, bodies)
    cases_source: list[str] = []
    branches: list[str] = []
    numbers: dict[str, int] = {}
    seen: set[str] = set()
    for answers, body in bodies:
        number = numbers.setdefault(body, len(numbers))
        if number == len(cases_source):
            cases_source.append(body.replace("def forward(", f"def case_{number}(", 1))
        guard = " and ".join(_guard(name, answers[name], trace.signature) for name in questions) or "True"
        if guard not in seen:
            seen.add(guard)
            arguments = ", ".join(f"{name}={name}" for name in _symbolic(answers))
            branches.append(f"    if {guard}:\n        return case_{number}(self, {arguments})")
    head = f"def forward({_header(trace.signature)}):"
    tail = '    raise RuntimeError("this module was rewritten for other arguments: leave it out with where=")'
    parts = [*sorted(imports.values()), *cases_source, "\n".join([head, *branches, tail])]
    return Program("\n\n\n".join(parts) + "\n", trace.frozen)


def _questions_that_matter(
    questions: dict[str, tuple[Any, ...]], bodies: list[tuple[dict, str]]
) -> list[str]:
    """Drop each question whose answers all lead to the same code."""
    asked = [name for name, answers in questions.items() if answers != (_GIVEN,)]
    for name in list(asked):
        rest = [each for each in asked if each != name]
        groups: dict[Hashable, set[str]] = {}
        for answers, body in bodies:
            groups.setdefault(tuple(_value_key(answers[each]) for each in rest), set()).add(body)
        constant = len(questions[name]) == 1
        if not constant and all(len(group) == 1 for group in groups.values()):
            asked = rest
    return asked


def _guard(name: str, answer: Any, signature: inspect.Signature) -> str:
    if name == "self.training":
        return "self.training" if answer else "not self.training"
    if answer is _GIVEN:
        return f"{name} is not None"
    if answer is torch.Tensor:
        return f"isinstance({name}, torch.Tensor)"
    if answer is list:
        return f"isinstance({name}, (list, tuple))"
    if answer is None:
        return f"{name} is None"
    if isinstance(answer, bool):
        return name if answer else f"not {name}"
    return f"{name} == {answer!r}"


def _symbolic(answers: dict[str, Any]) -> list[str]:
    return [
        name
        for name, answer in answers.items()
        if name != "self.training" and (answer is _GIVEN or answer in (torch.Tensor, list))
    ]


def _header(signature: inspect.Signature) -> str:
    """The signature as text, its defaults left to `__defaults__` so that any object can be one."""
    bare = [p.replace(default=p.empty, annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


def _source_of(graph: fx.Graph) -> tuple[str, dict[str, str]]:
    """A graph as the source of a function, and the import line of each global that it uses."""
    code = graph.python_code("self")
    body = code.src[code.src.index("def forward(") :].rstrip()
    lines = {"torch": "import torch"}
    used = set(re.findall(r"\w+", body))
    for name, value in code.globals.items():
        if name not in used:
            continue
        if name in ("torch", "builtins") or getattr(builtins, name, None) is value:
            lines[name] = f"import {name}" if isinstance(value, types.ModuleType) else ""
        elif isinstance(value, types.ModuleType):
            lines[name] = f"import {value.__name__} as {name}" if "." in value.__name__ else f"import {name}"
        elif isinstance(value, float):
            lines[name] = f"{name} = float({str(value)!r})"
        else:
            lines[name] = _import_line(name, value)
    return body, {name: line for name, line in lines.items() if line}


def _import_line(name: str, value: Any) -> str:
    origin = getattr(value, "__module__", None) or ""
    qualified = getattr(value, "__qualname__", "")
    try:
        found: Any = importlib.import_module(origin)
        for part in qualified.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not value:
        raise Untraceable(f"its forward calls {qualified or value!r}, which cannot be imported by name")
    return f"import {origin}\n{name} = {origin}.{qualified}"


class Rewritten:
    """Mixed into a module's class by `rewrite`: pickles as the original class plus the rewritten source."""

    _original: type[nn.Module]
    _program: Program

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = getattr(self, "__getstate__", lambda: vars(self))()
        return _revive, (self._original, self._program.source, self._program.frozen), state

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._program.frozen and not _same(value, vars(self).get(name)):
            raise AttributeError(
                f"{name!r} became a constant when this {self._original.__name__} was rewritten: "
                "set it on the model before the surgery"
            )
        super().__setattr__(name, value)


class RewrittenSequential(Rewritten):
    """A rewritten `nn.Sequential`: its order of layers is fixed in its forward, so edits of it are refused."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            self._refuse()
        return super().__getitem__(index)  # type: ignore[misc]

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "the order of this nn.Sequential is fixed in its rewritten forward: slice it before the surgery"
        )

    append = insert = extend = pop = __delitem__ = __add__ = __iadd__ = __mul__ = __imul__ = _refuse


def rewrite(module: nn.Module, trace: Trace, key: Hashable, edit: Callable[[fx.Graph], None]) -> None:
    """Give the module (of our copy) an edited forward, in place.

    Args:
        module: the scope.
        trace: its trace.
        key: says what `edit` does; modules that share the trace and the key share the rebuilt code.
        edit: changes one graph in place.
    """
    if isinstance(module, fx.GraphModule):
        graph = copy.deepcopy(module.graph)
        edit(graph)
        graph.lint()
        module.graph = graph
        return
    if key not in trace.programs:
        cases = [Case(case.answers, copy.deepcopy(case.graph)) for case in trace.cases]
        for case in cases:
            edit(case.graph)
        trace.programs[key] = _write_program(trace, cases)
    program = trace.programs[key]
    original: Any = original_class(module)
    module.__class__ = _rewritten_class(original, program.source, program.frozen)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before any surgery."""
    return module._original if isinstance(module, Rewritten) else type(module)


def _revive(original: Any, source: str, frozen: tuple[str, ...]) -> nn.Module:
    return object.__new__(_rewritten_class(original, source, frozen))


@functools.cache
def _rewritten_class(original: type[nn.Module], source: str, frozen: tuple[str, ...]) -> Any:
    name = f"<{original.__name__} rewritten by sparsetweaks {abs(hash(source)):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": original.__module__}
    exec(compile(source, name, "exec"), scope)
    forward, model = scope["forward"], inspect.unwrap(_forward_of(original))  # type: ignore[arg-type]
    forward.__defaults__, forward.__kwdefaults__ = model.__defaults__, model.__kwdefaults__
    forward.__doc__, forward.__annotations__ = model.__doc__, dict(model.__annotations__)
    members = {
        "forward": forward,
        "_original": original,
        "_program": Program(source, frozen),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    mixin = RewrittenSequential if issubclass(original, nn.Sequential) else Rewritten
    return type(original.__name__, (mixin, original), members)


def submodule(module: nn.Module, target: object) -> nn.Module:
    """The module that a `call_module` node names."""
    return module.get_submodule(str(target))
