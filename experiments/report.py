"""Put the committed results into README.md, between its markers: `make results`.

python experiments/report.py            # rewrite the README
python experiments/report.py --check    # fail if it is not what the results say
"""

from __future__ import annotations

import csv
import functools
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from sparsetweaks.lottery.claims import POINTS, TIMES
from sparsetweaks.lottery.config import VARIANTS
from sparsetweaks.lottery.figures import FIGURES
from sparsetweaks.lottery.rows import read_rows, read_table
from sparsetweaks.lottery.summaries import Cell, summarise
from sparsetweaks.lottery.tables import grid_of, table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"
PICTURES = Path(__file__).parent / "figures"


def real_images() -> str:
    """The table of `real_images.py`, with what it cost and on what."""
    rows = read_rows(RESULTS / "real_images.csv")
    first = rows[0]
    seconds: dict[str, list[float]] = {}
    for row in rows:
        if float(row["sparsity"]):
            seconds.setdefault(row["variant"], []).append(float(row["prepare_seconds"]))
    ((_, summary),) = summarise(rows).items()
    highest = max(float(row["sparsity"]) for row in rows)
    added = {
        row["variant"]: f"{row['variant']} adds {row['added']} of {int(row['budget']):,}"
        for row in rows
        if int(row["added"]) and float(row["sparsity"]) == highest
    }
    cost = "; ".join(added[name] for name in sorted(added))
    return "\n".join(
        [
            table(summary),
            "",
            f"{first['architecture']}, {int(first['train_images']):,} training images of {first['image_size']} x "
            f"{first['image_size']} pixels, {first['epochs']} epochs, "
            f"{first['precision']}, torch {first['torch'].split('+')[0]}, {first['hardware']}. "
            f"Non-zeros added by tweaks at {highest:.0%} sparsity: {cost}. Learning the layer scales took "
            f"{sum(seconds['scales']) / len(seconds['scales']):.0f} s before the training.",
        ]
    )


def ghosts() -> str:
    """The table of `ghosts.py` for each network: what of a tweak is left when inference pays nothing for it."""
    rows = read_rows(RESULTS / "ghosts.csv")
    if {row["variant"] for row in rows} <= {"vanilla"}:
        return "Not run yet: there is nothing to compare."
    parts = []
    for title, summary in summarise(rows).items():
        parts += [f"{title}:", "", table(summary), ""]
    first = rows[0]
    slower = [
        f"{variant} on {network} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        for variant in ("AT", "ghost AT")
        for network, of in _groups(rows, "architecture").items()
        if (ratios := _step_ratios(of, variant))
    ]
    return "\n".join(
        [
            *parts,
            f"{first['precision']}, torch {first['torch'].split('+')[0]}, {first['hardware']}. A training step, in those "
            f"of vanilla on the same ticket: {', '.join(slower)}; medians, and the range, as other work shared the machine.",
        ]
    )


def _step_ratios(rows: Iterable[Mapping[str, str]], variant: str) -> list[float]:
    """The times of a variant's steps by vanilla's, each pair on one ticket."""
    of = {(row["variant"], row["sparsity"], row["seed"]): float(row["step_milliseconds"]) for row in rows}
    return [
        time / of[("vanilla", *ticket)]
        for (name, *ticket), time in of.items()
        if name == variant and ("vanilla", *ticket) in of
    ]


def where() -> str:
    """The tables of `where.py`: gains over vanilla by place, bold beyond noise; forms of a tweak apart from the tweaks."""
    parts: list[str] = []
    for path in sorted(RESULTS.glob("where-*.csv")):
        if path.stem.endswith(".failed"):
            continue
        failed = read_rows(path.with_suffix(".failed.csv"))
        failures = Counter((row["architecture"], row["variant"]) for row in failed)
        of_forms: dict[str, dict[str, Cell]] = {}  # by network
        for network, rows in _groups(read_rows(path), "architecture").items():
            places: dict[str, dict[str, Cell]] = {}
            lengths = _groups(rows, "epochs")
            for epochs, some in lengths.items():
                ((title, summary),) = summarise(some).items()
                for sparsity, cells in sorted(summary.items()):
                    forms = {name: cell for name, cell in cells.items() if name not in VARIANTS}
                    if forms:
                        of_forms[network] = {"vanilla": cells["vanilla"], **forms}
                    if sparsity:
                        place = f"{100 * sparsity:.3g} %, {epochs} epochs"
                        places[place] = {name: cell for name, cell in cells.items() if name in VARIANTS}
                if len(spent := [cells for sparsity, cells in summary.items() if sparsity]) > 1:
                    places[f"mean of these, {epochs} epochs"] = _mean(spent)
            others = ", and other lengths" if len(lengths) > 1 else ""
            parts += [
                f"{title.split(', iterative')[0]}{others}:",
                _gains(places, list(VARIANTS)),
                "",
            ]
        if of_forms:
            parts += [
                "Forms of the tweaks, at the sparsity and length where all are compared:",
                _gains(of_forms, failures=failures),
                "",
            ]
    return "\n".join(parts[:-1]) if parts else "Not run yet."


def _mean(places: list[dict[str, Cell]]) -> dict[str, Cell]:
    """What the variants that are in all places come to on average over them, by seed."""
    names = [name for name in places[0] if name in VARIANTS and all(name in cells for cells in places)]
    found = {}
    for name in names:
        seeds = set.intersection(*(set(cells[name].by_seed) for cells in places))
        found[name] = Cell({s: sum(cells[name].by_seed[s] for cells in places) / len(places) for s in seeds})
    return found


def _groups(rows: list[dict[str, str]], column: str) -> dict[str, list[dict[str, str]]]:
    """Rows by their value in a column, the numbers in their order."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return {value: found[value] for value in sorted(found, key=lambda value: (len(value), value))}


def _gains(
    places: dict[str, dict[str, Cell]],
    names: list[str] | None = None,
    failures: Mapping[tuple[str, str], int] = MappingProxyType({}),
) -> str:
    """Accuracies of vanilla, and what each variant gains over it in every place; bold where the interval leaves out 0.

    Where a variant has no accuracy, it says how often it failed (by place and variant).
    """
    known = list(dict.fromkeys(name for cells in places.values() for name in cells))
    lines = [["points gained over vanilla", *places]]
    for name in (name for name in names or known if name in known):
        line = [f"({name}, %)" if name == "vanilla" else name]
        for place, cells in places.items():
            cell, times = cells.get(name), failures.get((place, name))
            gain = cell if cell is None or name == "vanilla" else cell.over(cells["vanilla"])
            none = f"{times} of {times} failed" if times else ""
            line.append(none if gain is None else _with_interval(gain, "" if name == "vanilla" else "+"))
        lines.append(line)
    return grid_of(lines)


def _with_interval(cell: Cell, sign: str) -> str:
    if cell.interval is None:
        return f"{cell.mean:{sign}.1f} (one seed)"
    text = f"{cell.mean:{sign}.1f} ± {cell.interval:.1f}"
    return f"**{text}**" if sign and abs(cell.mean) > cell.interval else text


def paper_and_ours(preset: str) -> str:
    """For each figure what the paper says, what came out at a preset, and whether that agrees."""
    lines, settings = [["figure", "the paper says that", "here", "verdict"]], set()
    for figure, drawn in FIGURES.items():
        found: dict[str, list[dict[str, str]]] = {}
        path = PICTURES / f"{figure}-{preset}.claims.csv"
        if not path.is_file():
            continue
        for row in read_table(path):
            found.setdefault(row["paper"], []).append(row)
        name = f"[{figure}](experiments/figures/{figure}-{preset}.png) {drawn.title}"
        for said, rows in found.items():
            ours = "; ".join(_told(row, several=len(rows) > 1) for row in rows)
            verdicts = "; ".join(dict.fromkeys(row["verdict"] for row in rows))
            lines.append([name, said or "(nothing of the two spaces)", ours, verdicts])
            name = ""
        settings |= {rows[0]["setting"] for rows in found.values() if figure not in ("6", "7")}
    if not settings:
        return "Not run yet."
    times = read_table(PICTURES / f"seconds-{preset}.csv")
    used = sum(float(row["processor_seconds"]) for row in times) / 60
    count = sum((PICTURES / f"{figure}-{preset}.png").is_file() for figure in FIGURES)
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * 4, *lines[1:])),
            "",
            f"Unless it says otherwise: {'; '.join(sorted(settings))}. Ranges are 95 % intervals, paired by seed and not "
            'corrected for the number of claims; "times" are ratios of geometric means. A sentence of the paper that says '
            "several things has a line for each. A line is settled where the whole interval says the same; two are equal "
            f"where it lies within {POINTS[1]} points, or {math.exp(TIMES[0]):.1f} to {math.exp(TIMES[1]):.1f} times. "
            f"{count} of {len(FIGURES)} were run, in {used:.0f} minutes of one thread of {times[0]['hardware']}, torch "
            f"{times[0]['torch'].split('+')[0]}. What they say about smoothness: "
            "[experiments/figures](experiments/figures/README.md).",
        ]
    )


def _told(row: dict[str, str], *, several: bool) -> str:
    """What came out, with what tells its setting from the others of a figure."""
    if not several:
        return row["ours"]
    network, width, images, size = re.findall(
        r"^(\S+), width (\d+), on \S+ \(([\d,]+) images of (\d+) x", row["setting"]
    )[0]
    return f"{network} of width {width}, {images} images of {size} x {size}: {row['ours'].split(': ')[-1]}"


def speed() -> str:
    """The table of `make bench`."""
    with (BENCHMARKS / "bench.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    number = lambda text: f"{float(text):.3g}" if text else ""
    rows = ["| what | ratio of | median (lowest to highest) | n | at most | |", "|---|---|---|---|---|---|"]
    machines: dict[tuple[str, str], set[tuple[str, str]]] = {}  # that each measure was taken on, and threads
    for line in lines:
        machines.setdefault((line["what"], line["measure"]), set()).add((line["hardware"], line["threads"]))
    for line in lines:
        hardware, threads = map(set, zip(*machines[line["what"], line["measure"]]))
        where = f", on {line['hardware']}" if len(hardware) > 1 else ""
        where += f", {_threads(line)}" if len(threads) > 1 else ""
        spread = f" ({number(line['lowest'])} to {number(line['highest'])})" if line["lowest"] else ""
        if line["n"] == "1":
            spread = " (once)"
        cells = (
            line["what"] + where,
            line["measure"],
            number(line["median"]) + spread,
            line["n"],
            number(line["target"]),
        )
        rows.append(f"| {' | '.join(cells)} | {line['met'] or line['note']} |")
    where = " and ".join(dict.fromkeys(f"{line['hardware']}, {_threads(line)}" for line in lines))
    return "\n".join(
        [
            *rows,
            "",
            f"{where}; versions, and for most why a target is missed, in benchmarks/results/bench.csv.",
        ]
    )


def _threads(line: dict[str, str]) -> str:
    return f"{line['threads']} thread{'' if line['threads'] == '1' else 's'}"


def zoo() -> str:
    """How many models of each family came out how, from the table of `make zoo`."""
    with (BENCHMARKS / "zoo.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    head = (
        "models of",
        "in all",
        "shown by a run",
        "by others' forwards",
        "sites left, named",
        "not shown",
        "fail alone",
    )
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for family in dict.fromkeys(line["family"] for line in lines):
        of = [line for line in lines if line["family"] == family]
        held = [line for line in of if line["status"] in ("ok", "left")]
        fails = sum(line["status"] == "model fails" for line in of)
        cells = (
            next(line["library"] for line in of),
            len(of),
            sum(line["proof"] == "run" for line in held),
            sum(line["proof"] == "alike" for line in held),
            sum(line["status"] == "left" for line in held),
            len(of) - len(held) - fails,
            fails,
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    bad = [line for line in lines if line["status"] in ("wrong", "exception", "missed", "crash")]
    rows += ["", f"Wrong, passed over in silence, raised or crashed: {len(bad)} of {len(lines)}."]
    return "\n".join(rows)


SECTIONS = {
    "real images": real_images,
    "ghosts": ghosts,
    "where": where,
    **{
        f"paper and ours, {name}": functools.partial(paper_and_ours, name)
        for name in ("digits", "cifar10-small")
    },
    "zoo": zoo,
    "speed": speed,
}


def report(text: str) -> str:
    """The README with each section's results put in."""
    for name, section in SECTIONS.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise SystemExit(f"README.md has no '<!-- {name} -->' ... '<!-- end -->'")
        filled = section()
        text = re.sub(pattern, lambda m, filled=filled: f"{m[1]}{filled}\n{m[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = report(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit("README.md is not what experiments/results says: run `make results`")
        return
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
