"""The command `sparsetweaks`: runs `commands.py`, and turns whatever a user can put right into one line."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import NoReturn

EXTRA = ("click", "matplotlib", "numpy", "PIL", "safetensors", "sklearn", "tqdm")
FAILED, INTERRUPTED = 1, 130  # exit codes; click's own is 2, for a command line that makes no sense


def main() -> None:
    """Run the command line; ends the process with 0, or with 1, 2 or 130 and one line on stderr."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        _leave(FAILED, f"the command line needs {', '.join(missing)}: pip install 'sparsetweaks[lottery]'")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a user's MODULE:FUNCTION is likely to be
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        _interrupted()


def _run() -> int:
    import click

    from sparsetweaks.lottery.commands import commands

    try:
        return commands(prog_name="sparsetweaks", standalone_mode=False) or 0
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if _came_of_an_interrupt(error):
            _interrupted()
        _leave(FAILED, " ".join(str(error).split()))


def _came_of_an_interrupt(error: BaseException | None) -> bool:
    """Whether it was raised while an interrupt went through, as by a lock that was not yet held (tqdm's is one)."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _interrupted() -> NoReturn:
    _leave(INTERRUPTED, "interrupted: all that was finished is kept; the same command goes on from there")


def _leave(code: int, message: str) -> NoReturn:
    print(f"sparsetweaks: {message}", file=sys.stderr)
    sys.exit(code)
