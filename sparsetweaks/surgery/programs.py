"""A traced forward as cases, and back: edited graphs become source, and source becomes the module's new class.

A rewritten module keeps everything it was: it is the same object with a subclass of its class, in which only
`forward` differs. The code is plain text, so it pickles, can be read with `inspect.getsource`, compiles and exports;
modules that are alike share it.
"""

from __future__ import annotations

import builtins
import copy
import enum
import importlib
import inspect
import linecache
import re
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from sparsetweaks.errors import SurgeryError

GIVEN = "given"
"""The answer of a case in which an argument is traced symbolically, whatever it is."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, type)
"""Types whose values are constants of a graph."""


class Untraceable(SurgeryError):
    """This forward cannot be rewritten; the message is the reason, a clause that follows "left as it is: "."""


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


@dataclass(frozen=True)
class Program:
    """A rebuilt forward as text, with the attributes that it took as constants and the edits that led to it."""

    source: str
    frozen: tuple[str, ...]
    edits: tuple[str, ...] = ()


def _write_program(trace: Trace, cases: Iterable[Case]) -> Program:
    """Edited cases as the source of one forward.

    Raises:
        Untraceable: if the code calls something that cannot be imported by name.
    """
    imports: dict[str, str] = {}
    bodies: list[tuple[dict[str, Any], str]] = []
    for case in cases:
        case.graph.lint()
        body, needed = source_of(case.graph)
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
            call = f"return case_{number}(self, {arguments})"
            branches.append(f"    if {guard}:\n        {call}" if questions else f"    {call}")
    head = f"def forward({_header(trace.signature)}):"
    if questions:
        branches.append(
            '    raise RuntimeError("this module was rewritten for other arguments: leave it out with where=")'
        )
    parts = [*sorted(imports.values()), *cases_source, "\n".join([head, *branches])]
    return Program("\n\n\n".join(parts) + "\n", trace.frozen)


def _questions_that_matter(
    questions: dict[str, tuple[Any, ...]], bodies: list[tuple[dict, str]]
) -> list[str]:
    """Drop each question whose answers all lead to the same code."""
    asked = [name for name, answers in questions.items() if answers != (GIVEN,)]
    for name in list(asked):
        rest = [each for each in asked if each != name]
        groups: dict[Hashable, set[str]] = {}
        for answers, body in bodies:
            groups.setdefault(tuple(repr(answers[each]) for each in rest), set()).add(body)
        constant = len(questions[name]) == 1
        if not constant and all(len(group) == 1 for group in groups.values()):
            asked = rest
    return asked


def _guard(name: str, answer: Any, signature: inspect.Signature) -> str:
    if name == "self.training":
        return "self.training" if answer else "not self.training"
    if answer is GIVEN:
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
        if name != "self.training" and (answer is GIVEN or answer in (torch.Tensor, list))
    ]


def _header(signature: inspect.Signature) -> str:
    """The signature as text, its defaults left to `__defaults__` so that any object can be one."""
    bare = [p.replace(default=p.empty, annotation=p.empty) for p in signature.parameters.values()]
    bare[0] = bare[0].replace(name="self")
    return str(inspect.Signature(bare))[1:-1]


def source_of(graph: fx.Graph) -> tuple[str, dict[str, str]]:
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
    plain_to_copy = True  # a copy may share the generated class; only a pickle needs the source

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = getattr(self, "__getstate__", lambda: vars(self))()
        return _revive, (self._original, self._program), state

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name in self._program.frozen
            and value is not vars(self).get(name)
            and value != vars(self).get(name)
        ):
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


def rewrite(
    module: nn.Module,
    trace: Trace,
    key: tuple[Hashable, ...],
    edit: Callable[[fx.Graph], None],
    *,
    edits: tuple[str, ...] | None = None,
) -> None:
    """Give the module (of our copy) an edited forward, in place.

    Args:
        module: the scope.
        trace: its trace.
        key: says what `edit` does, its kind first; modules that share the trace and the key share the rebuilt code.
        edit: changes one graph in place.
        edits: the kinds of all edits that the result holds; default: those that are there and this one.
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
    edits = (*edits_of(module), str(key[0])) if edits is None else edits
    program = replace(trace.programs[key], edits=edits)
    original: Any = original_class(module)
    module.__class__ = _rewritten_class(original, program)


def original_class(module: nn.Module) -> Any:
    """The class that the module had before any surgery; a class put above a rewritten one since counts as its own."""
    return module._original if "_program" in vars(type(module)) else type(module)


def edits_of(module: nn.Module) -> tuple[str, ...]:
    """The kinds of the edits that the module's forward holds, in order."""
    return module._program.edits if isinstance(module, Rewritten) else ()


def program_of(module: nn.Module) -> Program | None:
    """The rebuilt forward of the module's own class, or None where no surgery has written it."""
    return vars(type(module)).get("_program")


@contextmanager
def unwritten(module: nn.Module) -> Iterator[None]:
    """The module with the class it had before any surgery, and rewritten again on whatever class it has then."""
    program = program_of(module)
    if program is None:
        yield
        return
    module.__class__ = original_class(module)
    try:
        yield
    finally:
        rewritten: Any = _rewritten_class(type(module), program)  # type: ignore[arg-type]
        module.__class__ = rewritten


def _revive(original: Any, program: Program) -> nn.Module:
    return object.__new__(_rewritten_class(original, program))


_CLASSES: weakref.WeakValueDictionary[tuple[Any, Program], Any] = weakref.WeakValueDictionary()
"""The classes that modules have now: one that none has any more goes, and with it the class that it was made from."""


def _rewritten_class(original: type[nn.Module], program: Program) -> Any:
    made = _CLASSES.get((original, program))
    if made is None:
        made = _CLASSES[original, program] = _write_class(original, program)
    return made


def _write_class(original: type[nn.Module], program: Program) -> Any:
    source = program.source
    name = f"<{original.__name__} rewritten by sparsetweaks {abs(hash(source)):x}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope: dict[
        str, Any
    ] = {}  # without a `__name__`, by which torch.compile would look for these globals elsewhere
    exec(compile(source, name, "exec"), scope)
    forward, model = scope["forward"], inspect.unwrap(original.forward)  # type: ignore[arg-type]
    forward.__defaults__, forward.__kwdefaults__ = model.__defaults__, model.__kwdefaults__
    forward.__module__ = original.__module__
    forward.__doc__, forward.__annotations__ = model.__doc__, dict(model.__annotations__)
    members = {
        "forward": forward,
        "_original": original,
        "_program": program,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    mixin = RewrittenSequential if issubclass(original, nn.Sequential) else Rewritten
    bases = (original,) if issubclass(original, mixin) else (mixin, original)
    return type(original.__name__, bases, members)
