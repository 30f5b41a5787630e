"""An overview as HTML for a notebook: no scripts, nothing loaded, styles that stay inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape

from sparsetweaks.display.amounts import exact, percent, short, signed, signed_short
from sparsetweaks.display.facts import Facts, Left, Total
from sparsetweaks.display.parts import Arc, Counts, Part, Row, fold, lanes, unfolded
from sparsetweaks.display.style import ROOT, sheet

_GUTTER = 18
_LANE = 7
"""Pixels: how far children are set in, where the arcs are, and how much more for each further lane of arcs."""

_NAMES, _TYPES, _MARKS = 66, 184, 184
"""Pixels: the columns of words. Only that of names grows, so that the others stand below each other at any depth."""

_BOX = 'viewBox="0 0 14 100" preserveAspectRatio="none" role="img"'
_ARC = '<path d="M14 1C-2 1-2 99 14 99" vector-effect="non-scaling-stroke"/>'


def draw(facts: Facts) -> str:
    """The overview as HTML."""
    columns, least = _columns(facts)
    pieces = [
        f'<div class="{ROOT}" style="--columns:{columns};--least:{least}px"><style>{sheet()}</style><div class="body">',
        f'<div class="title">{escape(facts.title)}<small>{_subtitle(facts)}</small></div>',
        '<div class="cards">',
        *(_card(total, facts.of_two) for total in facts.totals),
        "</div>",
        *_words(facts),
        _heads(facts),
        *_tree(facts),
        _legend(facts),
        "</div></div>",
    ]
    return "".join(pieces)


def _subtitle(facts: Facts) -> str:
    return "before and after" if facts.of_two else ""


# --------------------------------------------------------------------------------------------------- cards and words


def _card(total: Total, of_two: bool) -> str:
    show = percent if total.share else exact
    below = ""
    if of_two and total.before is not None:
        change = signed(total.before, total.after, total.share)
        below = (
            f"<s>was {show(total.before)}{', ' + change if change else ''}</s>"
            if change
            else "<s>as before</s>"
        )
    return f'<div class="card"><i>{escape(total.label)}</i><b>{show(total.after)}</b>{below}</div>'


def _words(facts: Facts) -> Iterator[str]:
    yield '<div class="words">'
    for change in facts.done:
        yield f"<div><b>{escape(change.tweak)}</b>: {_sites(len(change.rewritten))} rewritten</div>"
    for left in facts.left:
        yield _about(left)
    for note in facts.notes:
        yield f"<div>{escape(note)}</div>"
    yield "</div>"


def _about(left: Left) -> str:
    tweak = left.tweak.partition(",")[0].partition(" to ")[0]
    names = ", ".join(escape(site.path or "the model") for site in left.sites)
    said = f"{escape(tweak)} left {_sites(len(left.sites))} as they are: {escape(left.reason)}"
    return f"<details><summary>{said}</summary><div>{names}</div></details>"


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count:,} sites"


def _legend(facts: Facts) -> str:
    tick = "; the tick is where it was before" if facts.of_two else ""
    arcs = (
        " An arc is a skip: from what enters its unit to where it is added." if _has_arcs(facts.part) else ""
    )
    return (
        '<div class="legend">Bars: the fraction of prunable weights that is removed'
        f"{tick}. Non-zeros: parameters that no mask removes.{arcs}</div>"
    )


def _has_arcs(part: Part) -> bool:
    return bool(part.arcs) or any(map(_has_arcs, part.children))


# --------------------------------------------------------------------------------------------------------------- tree


def _columns(facts: Facts) -> tuple[str, int]:
    """The grid's columns, and the least width in pixels at which they are legible."""
    numbers = [142, *([118] * (1 + facts.has_flops) if facts.of_two else [68] * (2 + 2 * facts.has_flops))]
    words = [_TYPES, *([_MARKS] if _has_marks(facts.part) else [])]
    columns = ["minmax(0,1fr)", *(f"{width}px" for width in (*words, *numbers))]
    names = _NAMES + _GUTTER * _depth(facts.part)
    return " ".join(columns), names + sum(words) + sum(numbers) + 10 * len(columns) + 26


def _depth(part: Part) -> int:
    return 1 + max(map(_depth, part.children), default=0)


def _has_marks(part: Part) -> bool:
    return bool(part.marks) or any(map(_has_marks, part.children))


def _heads(facts: Facts) -> str:
    heads = ["module", "type and sizes", *(["what is marked"] if _has_marks(facts.part) else [])]
    numbers = ["sparsity", *([] if facts.of_two else ["parameters"]), "non-zeros"]
    if facts.has_flops:
        numbers += ["FLOPs kept"] if facts.of_two else ["FLOPs", "kept"]
    cells = [f"<span>{head}</span>" for head in heads] + [
        f'<span class="v">{head}</span>' for head in numbers
    ]
    return f'<div class="r h">{"".join(cells)}</div>'


def _tree(facts: Facts) -> Iterator[str]:
    part, marked = facts.part, _has_marks(facts.part)
    if part.marks or not part.children:
        yield _row(Row(part, False, 0, 1), facts, marked, "div", "(model)")
    shown: dict[object, str] = {}
    yield from _grid(part, fold(part, shown), facts, marked, shown, inside=False)


def _grid(
    part: Part, rows: Sequence[Row], facts: Facts, marked: bool, shown: dict[object, str], inside: bool = True
) -> Iterator[str]:
    """Rows below each other, and in the gutter beside them the arcs of skips whose ends have rows of their own."""
    number = {row.start: i for i, row in enumerate(rows) if row.stop == row.start + 1}
    arcs = [arc for arc in part.arcs if arc.first in number and arc.last in number]
    in_lanes = lanes(arcs)
    width = (_GUTTER if inside or part.arcs else 0) + _LANE * max(in_lanes, default=0)
    yield '<div class="k">' if width == _GUTTER else f'<div class="k" style="--gutter:{width}px">'
    for arc, lane in zip(arcs, in_lanes):
        aside = f";margin-left:{3 + _LANE * (max(in_lanes) - lane)}px" if max(in_lanes) else ""
        yield (
            f'<div class="a" style="grid-row:{number[arc.first] + 1}/{number[arc.last] + 2}{aside}">'
            f"<svg {_BOX}><title>skip: {escape(arc.text)}</title>{_ARC}</svg></div>"
        )
    for row in rows:
        if row.stop > row.start + 1:
            below = _inside_run(part, row)
        elif row.part.children:
            below = row.part
        else:
            yield _row(row, facts, marked)
            continue
        inner = fold(below, shown) if row.open else unfolded(below, open=False)
        yield f"<details{' open' if row.open else ''}>{_row(row, facts, marked, 'summary')}"
        yield from _grid(below, inner, facts, marked, shown)
        yield "</details>"
    yield "</div>"


def _inside_run(part: Part, row: Row) -> Part:
    """The parts that a run stands for, as the children of one part."""
    arcs = (
        Arc(arc.first - row.start, arc.last - row.start, arc.text)
        for arc in part.arcs
        if row.start <= arc.first and arc.last < row.stop
    )
    return replace(row.part, children=part.children[row.start : row.stop], arcs=tuple(arcs))


def _row(row: Row, facts: Facts, marked: bool, tag: str = "div", name: str = "") -> str:
    part = row.part
    cells = [f'<span class="n" title="{escape(part.path)}">{escape(name or part.name)}</span>', _type(row)]
    if marked:
        marks = "".join(
            f'<b class="m {mark.kind}" title="{escape(str(mark))}">{escape(str(mark))}</b>'
            for mark in part.marks
        )
        cells.append(f"<span>{marks}</span>")
    gone = " gone" if facts.of_two and part.after is None else ""
    return f'<{tag} class="r{gone}">{"".join(cells)}{_numbers(part, facts)}</{tag}>'


def _type(row: Row) -> str:
    part = row.part
    times = f"{part.times:,} × " if part.times > 1 else ""
    kind = f"({part.kind})" if "," in part.kind else part.kind
    detail = f"<i>{escape(part.detail)}</i>" if part.detail else ""
    return f'<span class="t" title="{escape(f"{part.kind} {part.detail}".rstrip())}">{times}{escape(kind)}{detail}</span>'


def _numbers(part: Part, facts: Facts) -> str:
    counts, before, after = part.counts, part.before, part.after
    if not counts.parameters and not counts.flops:
        return ""
    cells = [_bar(counts, before if facts.of_two else None)]
    if facts.of_two:
        cells.append(_change(before, after, "kept"))
        if facts.has_flops:
            cells.append(_change(before, after, "flops_kept"))
    else:
        numbers = [
            counts.parameters,
            counts.kept,
            *([counts.flops, counts.flops_kept] if facts.has_flops else []),
        ]
        cells += [
            f'<span class="v" title="{exact(number)}">{short(number) if number else ""}</span>'
            for number in numbers
        ]
    return "".join(cells)


def _bar(counts: Counts, before: Counts | None) -> str:
    share = counts.sparsity
    if share is None:
        return "<span></span>"
    tick = ""
    if before is not None and before.sparsity is not None and round(before.sparsity, 4) != round(share, 4):
        tick = f'<s style="left:{100 * before.sparsity:.1f}%"></s>'
    removed = f"{counts.prunable - counts.prunable_kept:,} of {counts.prunable:,} removed"
    filled = f'<i><b style="width:{100 * share:.1f}%"></b>{tick}</i>'
    return f'<span class="b" title="{removed}">{filled}<em>{percent(share, 1)}</em></span>'


def _change(before: Counts | None, after: Counts | None, name: str) -> str:
    old, new = getattr(before, name, 0), getattr(after, name, 0)
    change = signed_short(old, new)
    less = ' class="less"' if new < old else ""
    said = f"{exact(old)} before, {exact(new)} after"
    number, beside = short(new) if new or old else "", f"<s{less}>{change}</s>" if change else ""
    return f'<span class="v" title="{said}">{number}{beside}</span>'
