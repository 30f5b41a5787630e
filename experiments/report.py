"""Put the committed results into README.md, between its markers: `make results`.

python experiments/report.py            # rewrite the README
python experiments/report.py --check    # fail if it is not what the results say
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
from pathlib import Path

from sparsetweaks.lottery.results import read_rows, summarise, table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"


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
            f"{first['image_size']} pixels and all 10,000 test images, {first['epochs']} epochs, "
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
    milliseconds: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        milliseconds.setdefault((row["architecture"], row["variant"]), []).append(
            float(row["step_milliseconds"])
        )
    slower = [
        f"{variant} on {network} {statistics.median(times) / statistics.median(milliseconds[network, 'vanilla']):.2f}"
        for (network, variant), times in milliseconds.items()
        if variant in ("AT", "ghost AT") and (network, "vanilla") in milliseconds
    ]
    return "\n".join(
        [
            *parts,
            f"{first['precision']}, torch {first['torch'].split('+')[0]}, {first['hardware']}. A training step, in those "
            f"of vanilla: {', '.join(slower)}.",
        ]
    )


def speed() -> str:
    """The table of `make bench`."""
    with (BENCHMARKS / "bench.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    number = lambda text: f"{float(text):.3g}" if text else ""
    rows = ["| what | ratio of | median (lowest to highest) | n | at most | |", "|---|---|---|---|---|---|"]
    for line in lines:
        spread = f" ({number(line['lowest'])} to {number(line['highest'])})" if line["lowest"] else ""
        cells = (
            line["what"],
            line["measure"],
            number(line["median"]) + spread,
            line["n"],
            number(line["target"]),
        )
        rows.append(f"| {' | '.join(cells)} | {line['met'] or line['note']} |")
    machines = dict.fromkeys((line["hardware"], line["threads"]) for line in lines)
    where = " and ".join(f"{hardware}, {threads} thread" for hardware, threads in machines)
    return "\n".join(
        [*rows, "", f"{where}; versions, and why a target is missed, in benchmarks/results/bench.csv."]
    )


SECTIONS = {"real images": real_images, "ghosts": ghosts, "speed": speed}


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
