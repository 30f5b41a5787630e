"""Every row of the speed tables: run the benchmarks, print what each came to, and keep it in `results/bench.csv`.

    make bench
    make bench BENCH="--gradinit PATH --open-lth PATH --images PATH"
    python benchmarks/bench.py --only pruning hessian --resume
    python benchmarks/bench.py --table                            # run nothing: the tables that are there

Each benchmark also runs alone. Peers that no package index has are handed in by path, as checkouts of
github.com/zhuchen03/gradinit and github.com/facebookresearch/open_lth; without them their rows say so. `--images` is a
folder of train/<class>/ and test/<class>/, for the network whose Hessian is looked at; without it, it is of random images.
With `--resume` only what has no row yet of this machine is measured, so a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import paired

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "layer_scales", "keep_masks", "pruning", "hessian", "throughput", "surgery", "lottery", "activations", "sparse_file",
    "sparse_paths",
)  # fmt: skip
OPTIONS = {
    "layer_scales": ("gradinit",),
    "keep_masks": ("open_lth",),
    "lottery": ("open_lth",),
    "hessian": ("images", "work"),
}
COLUMNS = ("benchmark", *paired.COLUMNS)
Table = Iterable[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--resume", action="store_true", help="leave out what has a row already")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--gradinit", type=Path, help="a checkout of github.com/zhuchen03/gradinit")
    parser.add_argument("--open-lth", type=Path, help="a checkout of github.com/facebookresearch/open_lth")
    parser.add_argument("--images", type=Path, help="train/<class>/ and test/<class>/, for the Hessian")
    parser.add_argument("--work", type=Path, help="where the Hessian's benchmark keeps its network")
    options = parser.parse_args()
    failed = [] if options.table else [name for name in options.only if not ran(name, options)]
    lines = list(collected())
    paired.write(paired.RESULTS / "bench.csv", COLUMNS, lines)
    print(table(lines))
    if failed:
        raise SystemExit(f"did not run to the end: {', '.join(failed)}")


def ran(name: str, options: argparse.Namespace) -> bool:
    """Run one benchmark; whether it came to its end. One that is not there has nothing to run."""
    script = HERE / f"{name}.py"
    if not script.is_file():
        return True
    command = [sys.executable, str(script), *(["--resume"] if options.resume else [])]
    for option in OPTIONS.get(name, ()):
        if (value := getattr(options, option)) is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    print(f"{name}:", flush=True)
    return subprocess.run(command, check=False).returncode == 0


# ----------------------------------------------------------------------------------------------------
# One table of all


def collected() -> Iterator[dict[str, Any]]:
    """What has a target, or is a comparison that has none, from each benchmark's own table."""
    for name in BENCHMARKS:
        lines = paired.read(paired.RESULTS / f"{name}.csv")
        for line in READERS.get(name, with_targets)(lines):
            yield {"benchmark": name, **line}


def with_targets(lines: Table) -> Table:
    return (line for line in lines if line["target"])


def of_surgery(lines: Table) -> Table:
    for line in lines:
        if line["what"] == "time / deepcopy" and "of" not in line["model"]:
            yield _line(f"{line['surgery']}, {line['model']}", "time / copy.deepcopy", line, 1.5)


def of_throughput(lines: Table) -> Table:
    targets = {"torchvision in a DataLoader": 0.10, "bare steps": 0.02}
    for line in lines:
        if line["what"] == "input pipeline":
            measure = "time / torchvision's" if "torchvision" in line["over"] else "share of a ResNet-20 step"
            yield _line(line["what"], measure, line, targets.get(line["over"]))


def of_sparse_paths(lines: Table) -> Table:
    for line in lines:
        if line["sparsity"] == "0.95":
            low, _, high = line["layer_quartiles"].partition(" to ")
            made = {**line, "median": line["layer_ratio"], "least": low, "most": high, "n": line["repeats"]}
            yield _line(
                f"weights in CSR, {line['layer']}, 95 % sparse", "time / dense, quartiles", made, None
            )


READERS: dict[str, Callable[[Table], Table]] = {
    "surgery": of_surgery,
    "throughput": of_throughput,
    "sparse_paths": of_sparse_paths,
    "activations": iter,  # comparisons, none of which has a target
    "sparse_file": iter,
}


def _line(what: str, measure: str, line: dict[str, Any], target: float | None) -> dict[str, Any]:
    numbers = (float(line[column]) for column in ("median", "least", "most"))
    row = paired.Row(what, measure, *numbers, int(line["n"]), target)
    return {
        "what": what, "measure": measure, "median": row.median, "lowest": row.lowest, "highest": row.highest,
        "n": row.n, "target": "" if target is None else target, "met": row.met, "threads": line["threads"],
        "versions": f"torch {line['torch']}", "hardware": line["hardware"],
    }  # fmt: skip


def table(lines: Iterable[dict[str, Any]]) -> str:
    """The rows as text, notes below them where a target is missed."""
    head = ("what", "measure", "median", "lowest to highest", "n", "at most", "")
    rows, notes = [head], []
    for line in lines:
        number = lambda column, line=line: (
            f"{float(line[column]):.3g}" if line[column] not in ("", None) else ""
        )
        spread = f"{number('lowest')} to {number('highest')}" if number("lowest") else ""
        verdict = line["met"] or (line["note"] if line.get("note") == paired.NOT_GIVEN else "")
        rows.append(
            (
                line["what"],
                line["measure"],
                number("median"),
                spread,
                str(line["n"]),
                number("target"),
                verdict,
            )
        )
        if line["met"] == "missed" and line.get("note"):
            notes.append(f"{line['what']}, {line['measure']}: {line['note']}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*text, *([""] if notes else []), *notes])


if __name__ == "__main__":
    main()
