"""What the benchmarks share: pairs of timings, the shape of their rows, the machine, and one command line.

Times of two things are taken one after the other in one process, in an order that turns from repeat to repeat, and
compared repeat by repeat: what slows the machine down for a while slows both. They are CPU seconds. A benchmark is a
set of cases by name, each a function of the options that gives `Row`s. `main` runs those that are asked for and puts
their rows in place of older ones of the same case, so a table can be made one case at a time:

    python benchmarks/pruning.py --only "11 M*" --repeats 9
    python benchmarks/pruning.py --resume          # only what has no row yet of this machine and so many threads

Tables are replaced as a whole, so what a killed run leaves is whole as well. A row that says that a peer was not given
never takes the place of one that was measured, and `--resume` measures it once the peer is there.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparsetweaks.lottery.spend import processor

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20
NOT_GIVEN = "peer not given"


@dataclass(frozen=True)
class Row:
    """One line: what was measured against what, how it came out, and what it was to come to.

    `median`, `lowest` and `highest` are over `n` repeats. `target` is the most that the median may be; without one
    there is nothing to meet.
    """

    what: str
    measure: str
    median: float | None
    lowest: float | None = None
    highest: float | None = None
    n: int = 0
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> str:
        if self.median is None or self.target is None:
            return ""
        return "met" if self.median <= self.target else "missed"


COLUMNS = (
    "case", "what", "measure", "median", "lowest", "highest", "n", "target", "met", "note",
    "threads", "versions", "hardware",
)  # fmt: skip

Case = Callable[[argparse.Namespace], Iterable[Row]]


def spread(
    what: str, measure: str, values: Sequence[float], *, target: float | None = None, note: str = ""
) -> Row:
    """A row of the median of some values, with the lowest and the highest."""
    return Row(what, measure, statistics.median(values), min(values), max(values), len(values), target, note)


def not_given(what: str, measure: str, *, target: float | None = None) -> Row:
    """A row that says that there was nothing to compare with."""
    return Row(what, measure, None, target=target, note=NOT_GIVEN)


# ----------------------------------------------------------------------------------------------------
# Time and memory


def clock() -> float:
    """CPU seconds where one thread does all the work, so that what else the machine does counts little; else wall time."""
    if torch.cuda.is_available() or torch.get_num_threads() > 1:
        return time.perf_counter()
    return time.process_time()


def seconds(run: Callable[[], object]) -> float:
    """Time of one call, of which a GPU's work is a part."""
    _synchronise()
    started = clock()
    run()
    _synchronise()
    return clock() - started


def interleaved(
    runs: Mapping[str, Callable[..., object]],
    repeats: int,
    *,
    warm_up: int = 1,
    fresh: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Time each run in turn, `repeats` times, each repeat in another order; a run may be given something `fresh`."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(-warm_up, repeats):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            run = functools.partial(runs[name], fresh[name]()) if fresh and name in fresh else runs[name]
            taken = seconds(run)
            if repeat >= 0:
                times[name].append(taken)
    return times


def ratios(times: Mapping[str, Sequence[float]], ours: str, peer: str) -> list[float]:
    """One ratio for each repeat."""
    return [a / b for a, b in zip(times[ours], times[peer], strict=True)]


def extra_bytes(run: Callable[[], object]) -> int:
    """What the peak of resident memory rises by while this runs; once per process, as memory is not given back."""
    forget_peak()
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def forget_peak() -> None:
    """`VmHWM` starts anew; an OSError where the system does not allow that."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(field: str) -> int:
    """Bytes that Linux tells of this process: `VmRSS`, resident now, or `VmHWM`, the most since it was reset."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this system does not tell {field}: memory is measured on Linux only")


def in_new_process(task: str) -> float:
    """The number that this very command prints last when it is given a `--task` as well."""
    command = [sys.executable, *sys.argv, "--task", task]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------
# The machine


def surroundings(packages: Iterable[str] = (), checkouts: Iterable[Path | None] = ()) -> dict[str, Any]:
    """The columns that say on what, and with what, a row was measured."""
    versions = [f"torch {torch.__version__}", *(f"{name} {version(name)}" for name in packages)]
    versions += [f"{path.name} {commit(path)}" for path in checkouts if path is not None]
    return {"threads": torch.get_num_threads(), "versions": ", ".join(versions), "hardware": hardware()}


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def commit(checkout: Path) -> str:
    """The commit of a peer's checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# ----------------------------------------------------------------------------------------------------
# The command line


def main(
    description: str | None,
    name: str,
    cases: Mapping[str, Case],
    *,
    repeats: int,
    packages: Sequence[str] = (),
    peers: Mapping[str, str] | None = None,
    arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    tasks: Callable[[argparse.Namespace], float] | None = None,
) -> None:
    """Run a benchmark's cases, print their rows as they come, and keep them in `results/<name>.csv`.

    Args:
        description: the module's docstring.
        name: of the table.
        cases: by name, each a function of the options that gives rows.
        repeats: how many pairs, unless told otherwise.
        packages: installed peers, whose versions are told.
        peers: peers that are handed in by path: option by what it is a checkout of.
        arguments: adds options of its own to the parser.
        tasks: what `--task` calls in a process of its own (see `in_new_process`).
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats, help=f"pairs per case (default: {repeats})")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help=f"of: {', '.join(cases)}")
    parser.add_argument(
        "--resume", action="store_true", help="leave out cases that the table has of this machine and threads"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.csv")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    for option, what in (peers or {}).items():
        parser.add_argument(f"--{option}", type=Path, help=f"a checkout of {what}")
    arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.task:
        assert tasks is not None
        print(tasks(options))
        return
    chosen = [case for case in cases if any(fnmatch.fnmatch(case, pattern) for pattern in options.only)]
    if not chosen:
        raise SystemExit(f"no case fits {' '.join(options.only)}: choose from {', '.join(cases)}")
    checkouts = [getattr(options, option.replace("-", "_")) for option in peers or {}]
    machine = surroundings(packages, checkouts)
    for case in chosen:
        if options.resume and done(read(options.out), case, machine, peer_given=any(checkouts)):
            continue
        rows = []
        for row in cases[case](options):
            rows.append(row)
            print(f"  {text(row)}", flush=True)
        put(options.out, case, rows, machine, order=list(cases))


def text(row: Row | Mapping[str, Any]) -> str:
    """A row to read."""
    line = row if isinstance(row, Mapping) else {**asdict(row), "met": row.met}
    number = lambda value: "" if value in (None, "") else f"{float(value):.4g}"
    parts = [f"{line['what']}: {line['measure']} {number(line['median']) or '-'}"]
    if line["lowest"] not in (None, ""):
        parts.append(f"({number(line['lowest'])} to {number(line['highest'])}, n = {line['n']})")
    if line["target"] not in (None, ""):
        parts.append(f"target {number(line['target'])} {line['met']}".rstrip())
    return " ".join(parts) + (f": {line['note']}" if line["note"] else "")


def done(
    lines: Iterable[Mapping[str, Any]], case: str, machine: Mapping[str, Any], *, peer_given: bool
) -> bool:
    """Whether a case has its rows of this machine; one that lacked its peer has not, once the peer is given."""
    found = [line for line in lines if _of(line, case, machine)]
    return bool(found) and not (peer_given and any(not _measured(line) for line in found))


def put(path: Path, case: str, rows: Iterable[Row], machine: Mapping[str, Any], *, order: list[str]) -> None:
    """Put a case's rows in place of its older ones of the same machine and threads.

    Where a peer was not given, what was measured with it before stays.
    """
    rows, lines = list(rows), read(path)
    measured = {
        (line["what"], line["measure"]): line
        for line in lines
        if _of(line, case, machine) and _measured(line)
    }
    lines = [line for line in lines if not _of(line, case, machine)]
    for row in rows:
        older = measured.pop((row.what, row.measure), None)
        lines.append(older if older and row.median is None else _line(case, row, machine))
    if any(row.median is None for row in rows):
        lines += measured.values()
    lines.sort(key=lambda line: order.index(line["case"]) if line["case"] in order else len(order))
    write(path, COLUMNS, lines)


def _line(case: str, row: Row, machine: Mapping[str, Any]) -> dict[str, Any]:
    values = {spec.name: getattr(row, spec.name) for spec in fields(row)}
    for column in ("median", "lowest", "highest"):
        if values[column] is not None:
            values[column] = f"{values[column]:.4g}"
    return {"case": case, **values, "met": row.met, **machine}


def _measured(line: Mapping[str, Any]) -> bool:
    return line["median"] not in ("", None)


def _of(line: Mapping[str, Any], case: str, machine: Mapping[str, Any]) -> bool:
    return line["case"] == case and agree(line, machine, ("threads", "hardware"))


def agree(line: Mapping[str, Any], other: Mapping[str, Any], columns: Iterable[str]) -> bool:
    """Whether a row of a table is the same as another in these columns."""
    return all(str(line.get(column)) == str(other[column]) for column in columns)


def keep(path: Path, columns: Sequence[str], same: Sequence[str], new: Iterable[Mapping[str, Any]]) -> None:
    """Put rows in place of those that are the same in some columns, for tables that have columns of their own."""
    lines: list[Mapping[str, Any]] = [*read(path)]
    for each in new:
        places = [place for place, line in enumerate(lines) if agree(line, each, same)]
        if places:
            lines[places[0]] = each
        else:
            lines.append(each)
    write(path, columns, lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; none where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a table as a whole or, when it is killed meanwhile, leave the old one as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: line.get(column, "") for column in columns} for line in lines)
    os.replace(unfinished, path)
