"""Rows of results: kept as CSV, read as a table with intervals, and seen as a picture."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsetweaks.lottery.config import LotteryError

Row = Mapping[str, Any]


def append_row(path: Path, row: Row) -> None:
    """Add one line to a CSV file, in a single write, so that several processes can add to one file.

    Args:
        path: of the file; made, with its header, if it is not there.
        row: values by column.

    Raises:
        LotteryError: when the file cannot be written, or has other columns.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _create(path, _line(row))
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
        if columns != list(row):
            raise LotteryError(
                f"{path} has other columns than these results: move it away, or choose another with --out"
            )
        with path.open("a", newline="") as file:
            file.write(_line(row.values()))
    except OSError as error:
        raise LotteryError(f"cannot write {path}: {error.strerror}") from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file, each run once.

    Args:
        path: of the file.

    Returns:
        Values by column; empty where there is no such file.

    Raises:
        LotteryError: when it is not a file of results.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LotteryError(f"{path} is not a CSV file of results: {error}") from error
    if any(None in row or None in row.values() or "run" not in row for row in rows):
        raise LotteryError(f"{path} is not a CSV file of results, or has a broken line")
    return list({(row["run"], row["variant"]): row for row in rows}.values())


def _create(path: Path, header: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(header, newline="")
    try:
        os.link(partial, path)  # unlike a rename, never over a file that another process has begun
    except FileExistsError:
        pass
    finally:
        partial.unlink()


def _line(values: Iterable[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
