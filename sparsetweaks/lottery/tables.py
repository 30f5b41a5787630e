"""Summaries as text, which is Markdown too."""

from __future__ import annotations

from sparsetweaks.lottery.summaries import BASELINE, Cell, Summary, counted, ordered


def table(summary: Summary, *, over: str = BASELINE) -> str:
    """Test accuracy per sparsity and variant with its 95 % interval, and the gains over vanilla, as text (and Markdown).

    Args:
        summary: one setting of `summarise`.
        over: the variant that gains are over.

    Returns:
        Two tables, one below the other; the second only where there is something to compare.

    Example:
        >>> print(table({0.5: {"vanilla": Cell({0: 90.0, 1: 92.0}), "AT": Cell({0: 91.0, 1: 93.0})}}))
        | test accuracy, % | vanilla     | AT          |
        |------------------|-------------|-------------|
        | 50 % sparse      | 91.0 ± 12.7 | 92.0 ± 12.7 |
        <BLANKLINE>
        | points gained | AT         |
        |---------------|------------|
        | 50 % sparse   | +1.0 ± 0.0 |
        <BLANKLINE>
        mean ± half of the 95 % t-interval over 2 seeds; gains are paired by seed
    """
    variants = ordered({name for cells in summary.values() for name in cells})
    lines = [["test accuracy, %", *variants]]
    paired: list[Cell] = []
    gains = [["points gained", *(name for name in variants if name != over)]]
    for sparsity in sorted(summary):
        cells = summary[sparsity]
        title = f"{100 * sparsity:.4g} % sparse" if sparsity else "dense"
        lines.append([title, *(_text(cells.get(name), "") for name in variants)])
        if over in cells and len(cells) > 1:
            gained = [cells[name].over(cells[over]) if name in cells else None for name in gains[0][1:]]
            gains.append([title, *(_text(cell, "+") for cell in gained)])
            paired += [cell for cell in gained if cell is not None]
    count = counted([cell for cells in summary.values() for cell in cells.values()])
    pairs = counted(paired) if paired else count
    fewer = "" if pairs == count else f", over {pairs}"
    note = f"mean ± half of the 95 % t-interval over {count}; gains are paired by seed{fewer}"
    return "\n\n".join([grid_of(lines), *([grid_of(gains)] if len(gains) > 1 else []), note])


def _text(cell: Cell | None, sign: str) -> str:
    if cell is None:
        return ""
    return f"{round(cell.mean, 1) + 0.0:{sign}.1f}" + (
        "" if cell.interval is None else f" ± {cell.interval:.1f}"
    )


def grid_of(lines: list[list[str]]) -> str:
    """Lines of cells as a table in text (and Markdown), the first its head.

    Args:
        lines: of equal length.

    Returns:
        The text.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (width + 2) for width in widths]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join(rule) + "|", *text[1:]])
