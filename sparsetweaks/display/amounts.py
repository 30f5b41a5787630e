"""Numbers as people read them: counts with separators or in thousands and millions, shares in percent, changes."""

from __future__ import annotations

_EXACT_BELOW = 10_000
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def exact(count: float) -> str:
    """1,234,567."""
    return f"{count:,.0f}"


def short(count: float) -> str:
    """The count itself below 10,000, else three digits: 12.3 k, 1.23 M, 456 G."""
    if abs(count) < _EXACT_BELOW:
        return f"{count:,.0f}"
    power = 0
    while abs(count) >= 999.5 and power < len(_PREFIXES) - 1:
        count, power = count / 1000, power + 1
    digits = 2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0
    return f"{count:.{digits}f} {_PREFIXES[power]}"


def percent(share: float, digits: int = 2) -> str:
    """A share in percent; never 0 or 100 unless it is."""
    text, least = f"{100 * share:.{digits}f}", 10.0**-digits
    if share < 1 and float(text) == 100:
        text = f">{100 - least:.{digits}f}"
    elif share > 0 and float(text) == 0:
        text = f"<{least:.{digits}f}"
    return f"{text} %"


def signed(before: float | None, after: float | None, share: bool = False) -> str:
    """What was gained or lost, exactly; empty where nothing changed."""
    change = (after or 0) - (before or 0)
    if not change:
        return ""
    return f"{100 * change:+.2f} points" if share else f"{change:+,.0f}"


def signed_short(before: float | None, after: float | None) -> str:
    """`signed` in at most seven characters."""
    change = (after or 0) - (before or 0)
    return f"{'+' if change > 0 else '-'}{short(abs(change))}" if change else ""
