"""Everything in a folder of results as one HTML page that needs no other file: tables, pictures, settings, versions."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.files import write
from sparsetweaks.lottery.plots import picture
from sparsetweaks.lottery.rows import COUNTED_LATER, read_rows
from sparsetweaks.lottery.summaries import BASELINE, statistics, summarise, titled_rows

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1a1a1a; background: #fff }
h1, h2, h3 { line-height: 1.2 }
h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; height: auto }
.sure { font-weight: 600 }
.scroll { overflow-x: auto }
"""


def report(folder: Path) -> Path:
    """Write `report.html` into a folder of results.

    Args:
        folder: with `results.csv`, and whatever else the commands left there.

    Returns:
        The path of the page.

    Raises:
        LotteryError: when there are no results, or the page cannot be written.
    """
    rows = read_rows(folder / "results.csv")
    if not rows:
        raise LotteryError(f"{folder / 'results.csv'} holds no results: spend some tickets first")
    parts = ["<h1>sparsetweaks: results</h1>", _contents(rows)]
    for title, summary in summarise(rows).items():
        chosen = [line for line in statistics(rows) if line["setting"] == title]
        parts += [f"<h2>{escape(title)}</h2>", _accuracies(chosen)]
        if any(summary):
            parts.append(_image(picture({title: summary}), f"accuracy and gains against sparsity: {title}"))
    figures = sorted((folder / "figures").glob("*.png"))
    if figures:
        parts.append("<h2>Figures of the paper, reproduced</h2>")
    for file in figures:
        said = file.with_suffix(".txt")
        parts += [f"<h3>Figure {escape(file.stem)}</h3>", _image(file.read_bytes(), f"figure {file.stem}")]
        parts += [f"<p>{escape(line)}</p>" for line in _lines(said) if line]
    parts += ["<h2>What each run cost</h2>", _costs(rows), "<h2>Settings</h2>", _settings(rows)]
    commands = list(filter(_is_whole, _lines(folder / "commands.jsonl")))
    if commands:
        told = "\n".join(map(escape, commands))
        parts.append(f"<h3>Commands</h3><div class='scroll'><pre>{told}</pre></div>")
    page = folder / "report.html"
    head = f"<meta charset='utf-8'><title>sparsetweaks: {escape(folder.resolve().name)}</title><style>{STYLE}</style>"
    head += "<meta name='viewport' content='width=device-width'>"
    body = "\n".join(parts)
    write(
        page, f"<!doctype html><html lang='en'><head>{head}</head>\n<body>\n{body}\n</body></html>\n".encode()
    )
    return page


def _contents(rows: list[dict[str, str]]) -> str:
    variants = dict.fromkeys(row["variant"] for row in rows)
    seeds = {row.get("ticket_seed", row["seed"]) for row in rows}
    names = escape(", ".join(variants))
    protocol = "Test accuracies are those of the best epoch in validation."
    return f"<p>{len(rows)} runs of tickets of {len(seeds)} seeds; variants: {names}. {protocol}</p>"


def _accuracies(lines: list[dict[str, Any]]) -> str:
    """One setting: a row per sparsity and variant; gains beyond their interval stand out."""
    cells = []
    for line in lines:
        sparse = f"{100 * line['sparsity']:.4g} %" if line["sparsity"] else "dense"
        gain, interval = line["gain"], line["gain_interval"]
        sure = " class='sure'" if gain != "" and interval != "" and abs(gain) > interval else ""
        cells.append(
            f"<tr><td>{sparse}</td><td>{escape(line['variant'])}</td><td>{_number_of(line)}</td>"
            f"<td>{_with(line['mean'], line['interval'])}</td><td>{_number(line['deviation'])}</td>"
            f"<td{sure}>{_with(gain, interval, '+')}</td></tr>"
        )
    head = ("sparsity", "variant", "n", "test accuracy, %", "deviation", f"points over {BASELINE}")
    note = "mean ± half of the 95 % t-interval; gains are paired by seed, in bold where the interval leaves out zero"
    return f"{_table(head, cells)}<p>{note}</p>"


def _number_of(line: dict[str, Any]) -> str:
    """What the interval of a line is over: seeds, or trainings of one ticket, or tickets of several trainings."""
    if line["tickets"] == line["trainings"]:
        return f"{line['tickets']} seeds" if line["tickets"] > 1 else "1 seed"
    trainings = f"{line['trainings']} trainings"
    return f"{trainings} of one ticket" if line["tickets"] == 1 else f"{line['tickets']} tickets, {trainings}"


def _costs(rows: list[dict[str, str]]) -> str:
    columns = [
        name
        for name in (
            "parameters",
            "nonzero_parameters",
            "nonzeros",
            "added",
            "budget",
            "flops",
            "effective_flops",
            *COUNTED_LATER,
            "step_milliseconds",
        )
        if name in rows[0]
    ]
    costs: dict[tuple[str, ...], list[str]] = {}  # of the first seed: the others differ by little
    titled = sorted(
        titled_rows(rows),
        key=lambda each: (each[0], float(each[1]["sparsity"]), each[1]["variant"], int(each[1]["seed"])),
    )
    for title, row in titled:
        run = (title, f"{100 * float(row['sparsity']):.4g} %", row["variant"])
        costs.setdefault(
            run, [f"{int(row[name]):,}" if row[name].isdigit() else row[name] for name in columns]
        )
    cells = [
        "<tr>" + "".join(f"<td>{escape(value)}</td>" for value in [*run, *numbers]) + "</tr>"
        for run, numbers in costs.items()
    ]
    head = ["setting", "sparsity", "variant", *(name.replace("_", " ") for name in columns)]
    return _table(head, cells)


def _settings(rows: list[dict[str, str]]) -> str:
    told = "architecture width data train_images image_size drawn epochs recipe precision compiled threads torch hardware"
    cells = []
    for name in told.split():
        if name in rows[0]:
            values = ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))
            cells.append(f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{escape(values)}</td></tr>")
    return _table(("setting", "of the runs above"), cells)


def _table(head: Iterable[str], rows: Iterable[str]) -> str:
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<div class='scroll'><table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _image(content: bytes, words: str) -> str:
    return f"<img alt='{escape(words, quote=True)}' src='data:image/png;base64,{base64.b64encode(content).decode()}'>"


def _with(mean: Any, interval: Any, sign: str = "") -> str:
    if mean == "":
        return ""
    return f"{mean:{sign}.2f}" + (f" ± {interval:.2f}" if interval != "" else "")


def _number(value: Any) -> str:
    return "" if value == "" else f"{value:.2f}"


def _is_whole(line: str) -> bool:
    """Whether a line was not cut off, by a full disk or a killed process."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
