"""See what a model is and what a surgery did to it: `summary` and `diff`, as text and as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsetweaks.copying import check_model
from sparsetweaks.display import html, text
from sparsetweaks.display.facts import Facts, facts_of_one, facts_of_two


@dataclass(frozen=True, repr=False)
class Overview:
    """What `summary` and `diff` return: text where it is printed, HTML where Jupyter shows it.

    Attributes:
        facts: the tree of modules, the totals and the notes, as plain data.
    """

    facts: Facts

    def __str__(self) -> str:
        return text.draw(self.facts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html.draw(self.facts)


def summary(model: nn.Module, *, inputs: Any = None) -> Overview:
    r"""Show a model: its modules, what is pruned where, its skips, what tweaks did to it and what they added.

    Args:
        model: any module, masked in any form or not, tweaked or not. It is only read.
        inputs: what it is called with, to count FLOPs for: a tensor, a tuple of positional or a mapping of keyword
            arguments, on the model's device. Without it no FLOPs are shown.

    Returns:
        An `Overview`. In a terminal, runs of alike modules are one line each; in Jupyter everything can be unfolded.

    Raises:
        ValueError: a parameter of a lazy model has no shape yet, or one is stored as a sparse tensor; whatever `cost`
            raises for the inputs.

    Example:
        >>> import torch, sparsetweaks as st
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8))
        >>> print(str(summary(st.inject_skips(st.prune(model, 0.5)))).rpartition("\n\n")[2])
        module  what                                 sparsity  params  non-zeros
        ------  -----------------------------  --------------  ------  ---------
        ╭ 0     Conv2d 8→8 3×3, identity skip  ███     50.0 %     585        297
        ╰ 1     BatchNorm2d 8                                      16         16
    """
    check_model(model)
    return Overview(facts_of_one(model, _flops(model, inputs)))


def diff(before: nn.Module, after: nn.Module, *, inputs: Any = None) -> Overview:
    r"""Show what became of a model: what was swapped, skipped, rewritten, scaled, pruned, added, and what was left.

    Args:
        before: any module. It is only read.
        after: what surgeries or pruning made of it. Modules are matched by name.
        inputs: what both are called with, to count FLOPs for, as in `summary`.

    Returns:
        An `Overview` of both, side by side. What modules and counts do not show is told in words: masks that keep
        as many weights but others, values of parameters and buffers, shapes, dtypes, requires_grad.

    Raises:
        ValueError: as `summary`.

    Example:
        >>> import torch, sparsetweaks as st
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU())
        >>> print(str(diff(model, st.swap_activations(model, "swish"))).rpartition("\n\n")[2])
        module  what                  sparsity  non-zeros  change
        ------  --------------  --------------  ---------  ------
        0       Conv2d 8→8 3×3           0.0 %        584
        1       ReLU → SiLU
    """
    check_model(before)
    check_model(after)
    flops = None
    if inputs is not None:
        flops = (_flops(before, inputs) or {}, _flops(after, inputs) or {})
    return Overview(facts_of_two(before, after, flops))


def _flops(model: nn.Module, inputs: Any) -> Mapping[str, tuple[int, int]] | None:
    if inputs is None:
        return None
    from sparsetweaks.cost import counted

    return {each.name: (each.flops, each.effective_flops) for each in counted(model, inputs).modules}
