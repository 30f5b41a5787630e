"""An overview as terminal text, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from sparsetweaks.display.amounts import exact, percent, short, signed, signed_short
from sparsetweaks.display.facts import Facts, Left, Total
from sparsetweaks.display.parts import Arc, Mark, Part, Row, fold, lanes, unfolded, walk

WIDTH = 100
_NAMES = 30
"""The widest that the column of names gets."""
_BAR = 6
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SHORT_TREE = 45
"""A tree of at most this many lines is not folded."""
_SITES = 4
"""How many sites are named for each reason to leave them."""


def draw(facts: Facts) -> str:
    """The overview as text."""
    title = facts.title + (": before and after" if facts.of_two else "")
    blocks = [[title, "=" * len(title)], _totals(facts.totals, facts.of_two)]
    words = [f"{change.tweak}: {_sites(len(change.rewritten))} rewritten" for change in facts.done]
    words += [line for left in facts.left for line in _wrapped(_about(left))]
    words += [line for note in facts.notes for line in _wrapped(note)]
    blocks += [words] if words else []
    return "\n\n".join("\n".join(block) for block in [*blocks, _tree(facts)])


# ---------------------------------------------------------------------------------------------------------- words


def _totals(totals: Sequence[Total], of_two: bool) -> list[str]:
    head = ["", "before", "after", "change"] if of_two else []
    lines = [head] if of_two else []
    for total in totals:
        after = percent(total.after) if total.share else exact(total.after)
        if not of_two:
            lines.append([total.label, after])
            continue
        before = "" if total.before is None else percent(total.before) if total.share else exact(total.before)
        lines.append([total.label, before, after, signed(total.before, total.after, total.share)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [_join(line, widths).rstrip() for line in lines]


def _join(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = [
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))
    ]
    return "   ".join([first, *others])


def _about(left: Left) -> str:
    names = ", ".join(site.path or "the model" for site in left.sites[:_SITES])
    more = f" and {len(left.sites) - _SITES} more" if len(left.sites) > _SITES else ""
    tweak = left.tweak.partition(",")[0].partition(" to ")[0]
    return f"{tweak} left {_sites(len(left.sites))}: {left.reason} ({names}{more})"


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count:,} sites"


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=True)


# ----------------------------------------------------------------------------------------------------------- tree


def _tree(facts: Facts) -> list[str]:
    """A line per module; where the tree is long, runs of alike ones in one line."""
    part = facts.part
    whole = sum(1 for _ in walk(part)) <= _SHORT_TREE
    lines = list(_lines(part, "", {}, whole))
    if part.marks or not lines:
        lines.insert(0, ("(model)", Row(part, False, 0, 1)))
    cells = [_numbers(facts, row.part) for _, row in lines]
    head = _heads(facts)
    columns = [(len(name), *map(len, row)) for (name, _), row in zip(lines, cells)]
    widths = [max(column) for column in zip(*columns, (6, *map(len, head)))]
    widths[0] = min(widths[0], _NAMES)
    room = WIDTH - sum(widths) - 2 * len(widths)
    what = max(len("what"), min(room, max(len(_what(row)) for _, row in lines)))
    table = [_line("module", "what", head, what, widths)]
    table.append(_line("-" * widths[0], "-" * what, ["-" * width for width in widths[1:]], what, widths))
    return table + [
        _line(name, _what(row), numbers, what, widths) for (name, row), numbers in zip(lines, cells)
    ]


def _line(name: str, what: str, numbers: Sequence[str], room: int, widths: Sequence[int]) -> str:
    left = [_cut(name, widths[0]).ljust(widths[0]), _cut(what, room).ljust(room)]
    return "  ".join([*left, *(cell.rjust(width) for cell, width in zip(numbers, widths[1:]))]).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _lines(part: Part, indent: str, shown: dict[object, str], whole: bool) -> Iterator[tuple[str, Row]]:
    rows = unfolded(part) if whole else fold(part, shown)
    for row, gutter in zip(rows, _gutters(part, rows)):
        yield indent + gutter + row.part.name, row
        if row.open:
            below = "".join("│" if mark in "╭│" else " " for mark in gutter)
            yield from _lines(row.part, indent + below + "  ", shown, whole)


def _gutters(part: Part, rows: Sequence[Row]) -> list[str]:
    """What stands before each row to draw the skips whose two ends have rows of their own."""
    number = {row.start: i for i, row in enumerate(rows) if row.stop == row.start + 1}
    drawn = [
        Arc(number[arc.first], number[arc.last], arc.text)
        for arc in part.arcs
        if arc.first in number and arc.last in number
    ]
    in_lanes = list(zip(drawn, lanes(drawn)))
    width = max((lane + 1 for _, lane in in_lanes), default=0)
    gutters = [[" "] * width for _ in rows]
    for arc, lane in in_lanes:
        column = width - 1 - lane
        for row in range(arc.first, arc.last + 1):
            gutters[row][column] = "│"
        gutters[arc.first][column], gutters[arc.last][column] = "╭", "╰"
        if arc.first == arc.last:
            gutters[arc.first][column] = "("
    return ["".join(gutter) + (" " if width else "") for gutter in gutters]


def _what(row: Row) -> str:
    """What a row stands for: how many of what, its sizes, and what is marked on it."""
    part = row.part
    marks = list(part.marks)
    what = part.kind
    if marks and marks[0].kind == "swap" and marks[0].text.endswith(f"→ {part.kind}"):
        what = marks.pop(0).text
    if part.times > 1:
        what = f"{part.times:,} × ({what})" if "," in what else f"{part.times:,} × {what}"
    if part.detail:
        what += f" {part.detail}"
    if row.like and not row.open:
        what += f", as {row.like}"
    return ", ".join([what, *map(_brief, marks)])


def _brief(mark: Mark) -> str:
    if mark.kind == "skip":
        return mark.text.removeprefix("skip: ").partition(",")[0] + " skip"
    return "rewritten" if mark.kind == "rewritten" else str(mark).replace(" scaled ×", " ×")


def _heads(facts: Facts) -> list[str]:
    if facts.of_two:
        return ["sparsity", "non-zeros", "change", *(["FLOPs kept", "change"] if facts.has_flops else [])]
    return ["sparsity", "params", "non-zeros", *(["FLOPs", "kept"] if facts.has_flops else [])]


def _numbers(facts: Facts, part: Part) -> list[str]:
    counts, before = part.counts, part.before
    sparsity = "" if counts.sparsity is None else f"{percent(counts.sparsity, 1):>7}"
    if sparsity and not facts.has_flops:  # with FLOPs there is no room for bars
        sparsity = f"{bar(counts.sparsity or 0)} {sparsity}"
    if not counts.parameters and not counts.flops:
        return [""] * len(_heads(facts))
    if not facts.of_two:
        flops = [short(count) if count else "" for count in (counts.flops, counts.flops_kept)]
        flops = flops if facts.has_flops else []
        return [sparsity, short(counts.parameters), short(counts.kept), *flops]
    kept = [getattr(each, "kept", None) for each in (before, part.after)]
    cells = [sparsity, short(kept[1] or 0), signed_short(*kept)]
    if facts.has_flops:
        flops_kept = [getattr(each, "flops_kept", None) for each in (before, part.after)]
        cells += [short(flops_kept[1]) if flops_kept[1] else "", signed_short(*flops_kept)]
    return cells


def bar(share: float) -> str:
    """A share as a bar of `_BAR` characters, in eighths of one."""
    eighths = round(8 * _BAR * share)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR)
