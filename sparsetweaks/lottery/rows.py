"""Rows of results, kept as CSV: appended whole or not at all, read back with what was cut off left out."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.files import hold

OF_TICKETS = ("ticket", "ticket_seed", "drawing")  # columns that rows to be added to must have
COUNTED_LATER = ("peak_activation_bytes", "sparse_file_bytes")
LATER = ("fingerprint", *COUNTED_LATER)  # columns that rows of earlier versions lack


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a CSV file, in a single write, so that several processes can add to one file.

    A line that was cut off, by a full disk or a killed process, is no line: it is removed before the next is added, and
    the run it belongs to, which is kept elsewhere, gives it again. A file that an earlier version began without the
    columns of `LATER` goes on without them.

    Args:
        path: of the file; made, with its header, if it is not there.
        row: values by column.

    Raises:
        LotteryError: when the file cannot be written, or has other columns; what it held before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            hold(file)
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            held = whole[: whole.find(b"\n")].decode(errors="replace").split(",")
            row = {
                name: value for name, value in row.items() if name not in LATER or not whole or name in held
            }
            header = _line(row)
            if whole and not whole.startswith(header.encode()):
                raise LotteryError(
                    f"{path} has other columns than these results: move it away, or choose another with --out"
                )
            if len(whole) < len(content):
                file.truncate(len(whole))
            file.write(((header if not whole else "") + _line(row.values())).encode())
    except OSError as error:
        raise LotteryError(
            f"cannot write {path}: {error.strerror}; what was finished before is kept"
        ) from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file, each run once; a last line that was cut off is left out.

    Args:
        path: of the file.

    Returns:
        Values by column; empty where there is no such file.

    Raises:
        LotteryError: when it is not a file of results.
    """
    rows = read_table(path) if path.exists() else []
    if any(name not in row for row in rows for name in ("run", "variant")):
        raise LotteryError(f"{path} is not a CSV file of results, or has a broken line")
    return list({(row["run"], row["variant"]): row for row in rows}.values())


def kept_runs(path: Path) -> set[tuple[str, str]]:
    """Which runs have a row already: to be asked before any training, as a file of another version takes no more rows.

    Args:
        path: of the file, as for `read_rows`.

    Returns:
        Pairs of run and variant.

    Raises:
        LotteryError: as `read_rows`, and for rows that do not say which ticket they are of.
    """
    rows = read_rows(path)
    check_columns(rows, OF_TICKETS)
    return {(row["run"], row["variant"]) for row in rows}


def check_columns(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
    missing = [name for name in columns if any(name not in row for row in rows)]
    if missing:
        raise LotteryError(
            f"these results say no {', '.join(missing)}: another version of sparsetweaks wrote them; choose another folder "
            "with --out, or move results.csv away and give the command again, which reads its runs back"
        )


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the lines of any CSV file with a header; a last one that was cut off is left out.

    Args:
        path: of the file.

    Returns:
        Values by column.

    Raises:
        LotteryError: when it is no such file.
    """
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(
            path.read_bytes()
        )  # the last letter may be cut off
        rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LotteryError(f"{path} is not a CSV file of results: {error}") from error
    if any(None in row or None in row.values() for row in rows):
        raise LotteryError(f"{path} is not a CSV file of results, or has a broken line")
    return rows


def csv_of(lines: Iterable[Mapping[str, Any]]) -> str:
    """Rows of equal columns as the text of a CSV file.

    Args:
        lines: from `statistics`, say; at least one.

    Returns:
        The text, with a header.

    Example:
        >>> print(csv_of([{"a": 1, "b": "x"}]), end="")
        a,b
        1,x
    """
    lines = list(lines)
    return "".join([_line(lines[0]), *(_line(line.values()) for line in lines)])


def _line(values: Iterable[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
