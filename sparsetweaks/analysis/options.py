"""What the options of the analyses may be: each with an error that names it and says what it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import torch

Progress = Callable[[int, int], None]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What torch computes in; floating-point numbers of 8 bits and fewer it only stores."""


def check_whole(name: str, value: Any, *, least: int = 1, most: float = math.inf) -> None:
    """Refuse what is no whole number, or too small or large a one."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        bounds = f"at least {least}" if most == math.inf else f"from {least} to {most:,}"
        raise ValueError(f"{name} must be a whole number, {bounds}, got {value!r}")


def check_odd(name: str, value: Any) -> None:
    """Refuse what is no odd number of points around 0."""
    check_whole(name, value, least=3)
    if value % 2 == 0:
        raise ValueError(f"{name} must be an odd number, at least 3, so that 0 is among them, got {value}")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive, a finite number, got {value!r}")


def check_least(name: str, value: Any, least: float) -> None:
    """Refuse what is no number, or too small a one."""
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= least:
        raise ValueError(f"{name} must be at least {least:g}, a number, got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Refuse what is no share of 1, or none at all."""
    check_positive(name, value)
    if value > 1:
        raise ValueError(f"{name} must be at most 1, got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is none of these names."""
    *first, last = map(repr, choices)
    if not isinstance(value, str) or repr(value) not in (*first, last):
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_dtype(dtype: Any) -> None:
    """Refuse what is no floating-point dtype that torch computes in; None is the model's own."""
    if dtype is not None and dtype not in DTYPES:
        *first, last = map(str, DTYPES)
        raise ValueError(
            f"dtype must be a floating-point one, {', '.join(first)} or {last}, or None, got {dtype!r}"
        )


def check_progress(progress: Any) -> None:
    """Refuse what cannot be called."""
    if progress is not None and not callable(progress):
        raise ValueError(f"progress must be a function of (so far, all), or None, got {progress!r}")


def generator_of(generator: torch.Generator | None) -> torch.Generator:
    """The given one, or by default one seeded with 0."""
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator, such as torch.Generator().manual_seed(0), got {generator!r}"
        )
    return generator
