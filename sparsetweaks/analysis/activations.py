"""How sparse the activations of a network are, wherever its forward computes them, and which units are dead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsetweaks.analysis.evaluation import Batches, Data, run, table_text, undisturbed, working_copy
from sparsetweaks.analysis.figures import COLORS, label, new_figure
from sparsetweaks.analysis.options import check_least
from sparsetweaks.analysis.units import Units
from sparsetweaks.surgery.activations import Function, InPlace, OnCopy
from sparsetweaks.surgery.ghosts import Ghost
from sparsetweaks.surgery.kinds import KINDS, kind_of_function, kind_of_module
from sparsetweaks.surgery.sites import changes
from sparsetweaks.surgery.skips import Skip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLD = 1e-2  # what the paper's released code counts as zero in table A1
_NAMED_AT_MOST = 40
_METHODS = {getattr(Tensor, name): kind for kind in KINDS.values() for name in kind.methods}
_NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax)


@dataclass(frozen=True)
class SiteActivations:
    """What one site of a network put out over all the data.

    Attributes:
        site: its path: a module's, or that of a call in a module's forward, which is the scope's, the activation's name and,
            from the second on, a number; a name that a module has there is passed over.
        kind: the activation's name.
        values: how many numbers came out.
        zeros: how many of these are exactly zero.
        near_zeros: how many are at most the threshold in absolute value.
        units: channels or neurons, those of each call of a module that is called several times; None where it is not
            known which they are, as behind a reshaping that merges them with positions.
        dead: the units that are exactly zero on all the data; None where the units are not known.
    """

    site: str
    kind: str
    values: int
    zeros: int
    near_zeros: int
    units: int | None
    dead: int | None

    @property
    def stage(self) -> str:
        """The first part of the path: the stage in networks that name their stages."""
        return self.site.partition(".")[0]


@dataclass(frozen=True)
class ActivationSparsity:
    """What `activation_sparsity` found; `print` it, `plot()` it, or take its `table()`.

    Attributes:
        sites: in the order in which they are first called.
        threshold: up to which an activation counts as near zero.
        examples: of the data.
    """

    sites: tuple[SiteActivations, ...]
    threshold: float
    examples: int

    @property
    def zeros(self) -> float:
        """The fraction of all activations that is exactly zero."""
        return _share(self.sites, "zeros", "values")

    @property
    def near_zeros(self) -> float:
        """The fraction of all activations within the threshold."""
        return _share(self.sites, "near_zeros", "values")

    @property
    def dead(self) -> float:
        """How many units are zero on all the data; nan if the units of a site are not known."""
        dead = _sum(site.dead for site in self.sites)
        return math.nan if dead is None else dead

    def table(self, *, by: str = "site") -> list[dict[str, Any]]:
        """A row for each site, or with `by="stage"` for each stage (the paper's table A1), fractions in [0, 1].

        `units` and `dead` are None where the units of a site are not known.
        """
        if by not in ("site", "stage"):
            raise ValueError(f"by must be 'site' or 'stage', got {by!r}")
        groups: dict[str, list[SiteActivations]] = {}
        for site in self.sites:
            groups.setdefault(getattr(site, by), []).append(site)
        return [
            {
                by: name,
                "activation": ", ".join(dict.fromkeys(site.kind for site in sites)),
                "values": sum(site.values for site in sites),
                "zeros": _share(sites, "zeros", "values"),
                "near_zeros": _share(sites, "near_zeros", "values"),
                "units": _sum(site.units for site in sites),
                "dead": _sum(site.dead for site in sites),
            }
            for name, sites in groups.items()
        ]

    def __str__(self) -> str:
        known = [site for site in self.sites if site.dead is not None]
        dead = f"{_sum(site.dead for site in known):,} dead units" if known else "units not known"
        if 0 < len(known) < len(self.sites):
            dead += f" at the {len(known)} of {len(self.sites)} sites where units are known"
        head = (
            f"activations of {self.examples:,} examples: {100 * self.zeros:.2f} % exactly zero, "
            f"{100 * self.near_zeros:.2f} % at most {self.threshold:g}; {dead}"
        )
        rows = [{name: "-" if cell is None else cell for name, cell in row.items()} for row in self.table()]
        return f"{head}\n{table_text(rows)}"

    def plot(self) -> Figure:
        """Bars for each site: the exact zeros, and what is near zero beside them."""
        rows = self.table()
        figure, axes = new_figure(size=(7.0, max(3.0, 0.22 * min(len(rows), 2 * _NAMED_AT_MOST) + 1.2)))
        places = range(len(rows))
        near = [100 * (row["near_zeros"] - row["zeros"]) for row in rows]
        zeros = [100 * row["zeros"] for row in rows]
        axes.barh(places, zeros, color=COLORS[0], label="exactly zero")
        axes.barh(places, near, left=zeros, color=COLORS[5], label=f"others up to {self.threshold:g}")
        if len(rows) <= _NAMED_AT_MOST:
            axes.set_yticks(list(places), [row["site"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.legend(loc="best")
        label(axes, x="activations, %", y="site" if len(rows) <= _NAMED_AT_MOST else "number of the site")
        return figure


def activation_sparsity(
    model: nn.Module,
    data: Data,
    *,
    threshold: float = THRESHOLD,
    batch_norm: str = "eval",
    chunk_size: int | None = None,
) -> ActivationSparsity:
    """Count the zeros among a network's activations, site by site, and its dead units (paper, table A1).

    A smooth activation puts out hardly any exact zero; the paper's code counts what is at most 0.01 in absolute
    value. Both are counted here. Every site counts, also a call of a function or method in a forward, before or
    after a swap; activations inside scripted modules and torch's recurrent layers are not seen.

    Args:
        model: any module, masked or not. It is not changed, and runs as a copy with dropout off, in its own precision.
        data: one pair (inputs, targets), or an iterable of them; the targets are not looked at.
        threshold: up to which absolute value an activation counts as near zero, at least 0. Default: 0.01, as in the
            paper's released code.
        batch_norm: `"eval"` for the running statistics or `"train"` for the batch's.
        chunk_size: how many examples of a batch to run at once; None for all.

    Returns:
        Counts for each site, in the order of first calls. A unit is a neuron of the linear layer or a channel of the
        convolution or normalisation before, wherever permutations have put it; one is dead if it is exactly zero on all
        the data. Where it is not known which dimension holds the units, both counts are None.

    Raises:
        ValueError: no activation is seen; the data hold no batch or do not fit; a parameter is not finite, or an
            activation not a number.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> _ = nn.init.zeros_(model[0].weight), nn.init.constant_(model[0].bias, -1.0)
        >>> found = activation_sparsity(model, (torch.randn(5, 2), torch.zeros(5)))
        >>> found.zeros, found.dead
        (1.0, 3)
    """
    check_least("threshold", threshold, 0)
    threshold = float(threshold)
    network = working_copy(model, batch_norm=batch_norm, widen=False)
    counter = _Counter(threshold)
    examples = 0
    with undisturbed(network), torch.no_grad(), counter.listening(network):
        for chunk in Batches(data, network, chunk_size=chunk_size):
            counter.new_forward()
            run(network, chunk)
            examples += chunk.examples
    if not counter.counts:
        raise ValueError(
            "no activation was seen: the known ones are "
            f"{', '.join(KINDS)}, torch's activation modules, and what a swap put in"
        )
    return ActivationSparsity(tuple(counter.found()), threshold, examples)


def _sum(counts: Iterable[int | None]) -> int | None:
    """None if one of the counts is."""
    known = list(counts)
    return None if None in known else sum(filter(None, known))


def _share(sites: Any, part: str, whole: str) -> float:
    total = sum(getattr(site, whole) for site in sites)
    return sum(getattr(site, part) for site in sites) / total if total else 0.0


# ------------------------------------------------------------------------------------------------------------
# Listening to a forward


class _Counts:
    """The running counts of one site."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.values = self.zeros = self.near = 0
        self.alive: dict[tuple[int, int], Tensor] = {}
        """By the number of the call in one forward, and the number of units."""
        self.units_known = True


class _Counter(TorchFunctionMode):
    """Counts what activation modules put out, and what calls of activation functions outside of them return."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.counts: dict[str, _Counts] = {}
        self._inside: list[str] = []  # the modules that are running, the innermost last
        self._calls: list[dict[str, int]] = []  # for each of these: how often it has called each function
        self._repeats: dict[str, int] = {}
        self._modules: set[str] = set()
        self._within = 0  # how many activation modules are running
        self._units = Units()

    def new_forward(self) -> None:
        """Start to number the calls of each site anew."""
        self._repeats = {}

    def listening(self, network: nn.Module) -> _Counter:
        """Hook every module of a copy of our own."""
        swapped = set(_swapped_modules(network))
        self._modules = {path for path, _ in network.named_modules(remove_duplicate=False)}
        for path, module in network.named_modules():
            kind = _kind(module, swapped)
            module.register_forward_pre_hook(self._enter(path, kind), prepend=True)
            module.register_forward_hook(self._leave(path, kind, module))
        return self

    def _enter(self, path: str, kind: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._inside.append(path)
            self._calls.append({})
            self._within += kind is not None

        return hook

    def _leave(self, path: str, kind: str | None, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            self._inside.pop()
            self._calls.pop()
            self._within -= kind is not None
            if kind is not None and self._within == 0 and isinstance(output, Tensor):
                self._units.same(output, inputs)
                self._count(path or kind, kind, output)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._units.follow(func, args, kwargs or {}, result)
        kind = kind_of_function(func) or _METHODS.get(func)
        if kind is not None and self._within == 0 and self._inside and isinstance(result, Tensor):
            number = self._calls[-1].get(kind.name, 0)
            scope = self._inside[-1]
            name = f"{kind.name}_{number}" if number else kind.name
            while (path := f"{scope}.{name}" if scope else name) in self._modules:
                number += 1
                name = f"{kind.name}_{number}"
            self._calls[-1][kind.name] = number + 1
            self._count(path, kind.name, result)
        return result

    def _count(self, site: str, kind: str, output: Tensor) -> None:
        if output.isnan().any():
            raise ValueError(
                f"the activations at {site!r} are not numbers: are the inputs, and the buffers on the way, finite?"
            )
        counts = self.counts.setdefault(site, _Counts(kind))
        nonzero = output != 0
        counts.values += output.numel()
        counts.zeros += output.numel() - int(nonzero.sum())
        counts.near += int((output.abs() <= self.threshold).sum())
        number = self._repeats.get(site, 0)
        self._repeats[site] = number + 1
        dimension = self._units.of(output)
        if dimension is None:
            counts.units_known = False
            return
        alive = nonzero.movedim(dimension, 0).flatten(1).any(1) if output.ndim > 1 else nonzero
        key = (number, len(alive))
        counts.alive[key] = counts.alive[key] | alive if key in counts.alive else alive

    def found(self) -> Iterator[SiteActivations]:
        """What was counted."""
        for site, counts in self.counts.items():
            units = dead = None
            if counts.units_known:
                units = sum(len(alive) for alive in counts.alive.values())
                dead = units - sum(int(alive.sum()) for alive in counts.alive.values())
            yield SiteActivations(site, counts.kind, counts.values, counts.zeros, counts.near, units, dead)


def _kind(module: nn.Module, swapped: set[nn.Module]) -> str | None:
    """The name of a module's activation, or None if it is none."""
    known = kind_of_module(module)
    if known is not None:
        return known.name
    if isinstance(module, (Function, OnCopy, InPlace)) or (
        isinstance(module, Ghost) and not isinstance(module, Skip)
    ):
        return type(module).__name__
    torchs = type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
        module, _NO_ACTIVATIONS
    )
    return type(module).__name__ if torchs or module in swapped else None


def _swapped_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that a swap of activations put in, whatever their class."""
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    for change in changes(model):
        if change.tweak.startswith("swap_activations"):
            yield from (modules[site.path] for site in change.rewritten if site.path in modules)
