"""Every figure and table of the paper at a preset, by the real command; pictures and numbers go to experiments/figures.

    python experiments/figures.py --out runs/digits              # all, which takes under an hour on one thread
    python experiments/figures.py --out runs/digits 4a A12       # some of them

What is in the folder already is read back, so it goes on where it was. How long each took is added up in seconds.csv.
Afterwards `make results` puts the table "paper / ours" into the README.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from sparsetweaks.lottery.figures import FIGURES
from sparsetweaks.lottery.rows import append_row, csv_of, read_table
from sparsetweaks.lottery.spend import processor

KEPT = Path(__file__).parent / "figures"
ENDINGS = (".png", ".csv", ".claims.csv", ".txt")
ORDER = ("A12", "5", "10", "11", "4a", "1a", "1b", "1c", "1d", "4b", "8", "9", "A13", "7", "6", "2", "A1")
"""What others share comes first, above all runs of which several epochs are kept: each figure's time is what it adds."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figures", nargs="*", default=ORDER, metavar="FIGURE", help=f"of: {', '.join(ORDER)}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the lottery")
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--data", action="append", default=[], help="see `sparsetweaks reproduce --help`")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)  # so that the time of a call that is ended is noted
    assert set(ORDER) == set(FIGURES)
    missing = []
    for figure in arguments.figures:
        words = [figure, "--preset", arguments.preset, "--out", str(arguments.out)]
        words += [word for folder in arguments.data for word in ("--data", folder)]
        if not ran(figure, [*words, "--processes", str(arguments.processes)], arguments.out):
            missing.append(figure)
            continue
        for ending in ENDINGS:
            name = f"{figure}-{arguments.preset}{ending}"
            KEPT.mkdir(exist_ok=True)
            shutil.copyfile(arguments.out / "figures" / name, KEPT / name)
        (KEPT / f"seconds-{arguments.preset}.csv").write_text(seconds(arguments.out), encoding="utf-8")
    if missing:
        raise SystemExit(f"not drawn: {', '.join(missing)}")


def ran(figure: str, words: list[str], out: Path) -> bool:
    """One call of the command, and a line of how long it took; whether it drew the figure."""
    before, started = _children(), time.perf_counter()
    try:
        command = [sys.executable, "-m", "sparsetweaks", "reproduce", *words]
        return subprocess.run(command, check=False).returncode == 0
    finally:  # a call that was cut off took time too
        line = {
            "figure": figure,
            "seconds": round(time.perf_counter() - started, 1),
            "processor_seconds": round(_children() - before, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "hardware": processor(),
        }
        append_row(out / "seconds.csv", line)


def seconds(out: Path) -> str:
    """The calls of each figure added up, as the text of a CSV file."""
    total: dict[str, dict[str, str | float]] = {}
    for row in read_table(out / "seconds.csv"):
        line = total.setdefault(row["figure"], {**row, "calls": 0, "seconds": 0.0, "processor_seconds": 0.0})
        line["calls"] = int(line["calls"]) + 1
        for name in ("seconds", "processor_seconds"):
            line[name] = round(float(line[name]) + float(row[name]), 1)
    return csv_of(total[figure] for figure in ORDER if figure in total)


def _end(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice
    sys.exit(1)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
