"""Thousands of random networks through every surgery in every order, and what they contained, counted.

    python tests/properties/fuzz.py                                   20,000 networks, a table of what they contained
    python tests/properties/fuzz.py --models 1000 --seed 7
    python tests/properties/fuzz.py --case "Case(spec=Spec(...), ...)"     one case again, as a failure prints it

One model is one drawn network with masks in one drawn form, taken through one drawn order of the three kinds of
surgery with a drawn variant of each, and held against every rule of `rules.check`. The networks are drawn in pieces;
a piece that is there is not drawn again, so a run that was cut off goes on. Exits non-zero if a rule was broken.
"""

from __future__ import annotations

import argparse
import collections
import csv
import dataclasses
import json
import platform
import random
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import rules
import torch

from sparsetweaks import testing
from sparsetweaks.testing import HAZARDS, BlockSpec, Spec, hazards

PIECE = 500
KIND_LENGTH = 60
RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.csv"


def draw_piece(number: int, models: int) -> dict[str, Any]:
    """Check `models` cases drawn from the seed `number`; counts of what they contained, and what failed."""
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    start = time.process_time()

    drawn = random.Random(number)
    for _ in range(models):
        case = rules.draw_case(drawn)
        counts.update(contents(case))
        try:
            counts.update({f"event: {name}": count for name, count in rules.check(case).items()})
        except AssertionError:
            failures.append(explained(case))
            print(failures[-1], flush=True)
    return {"seed": number, "seconds": time.process_time() - start, "counts": counts, "failures": failures}


def contents(case: rules.Case) -> list[str]:
    """Everything that is counted about a case."""
    found = [
        "models",
        f"order: {', '.join(case.order)}",
        f"mask form: {case.form}",
        *sorted(hazards(case.spec)),
    ]
    found += [f"variant: {kind}, {variant}" for kind, variant in case.steps]
    found += sorted({f"pair: {block.layer} x {block.form}" for block in case.spec.blocks})
    return found


def explained(case: rules.Case) -> str:
    """The simplest case near this one that fails, and how."""
    kind = kind_of_failure(failure_of(case))
    while kind:
        for simpler in simplifications(case):
            if kind_of_failure(failure_of(simpler)) == kind:
                case = simpler
                break
        else:
            break
    return failure_of(case) or f"failed once, and not again: {rules.reproduction(case)}"


def kind_of_failure(told: str | None) -> str:
    """The beginning of what a failure says, without numbers, so that simplifying keeps to one failure."""
    return re.sub(r"\d+", "", (told or "").partition("in the case\n")[0])[:KIND_LENGTH]


def failure_of(case: rules.Case) -> str | None:
    try:
        rules.check(case)
    except AssertionError as error:
        return str(error)
    return None


def simplifications(case: rules.Case) -> list[rules.Case]:
    """Cases with one thing less: a step, a block, an extra, a choice that is not the plainest."""
    replace, spec = dataclasses.replace, case.spec
    steps = case.steps
    found = [replace(case, steps=steps[:i] + steps[i + 1 :]) for i in range(len(steps)) if len(steps) > 1]
    specs = [replace(spec, extras=spec.extras[:i] + spec.extras[i + 1 :]) for i in range(len(spec.extras))]
    blocks = spec.blocks
    if len(blocks) > 1:
        specs += [replace(spec, blocks=blocks[:i] + blocks[i + 1 :]) for i in range(len(blocks))]
    plain_block, plain_spec = BlockSpec(), Spec()
    for i, block in enumerate(blocks):
        for name in ("form", "layer", "norm", "activation", "options"):
            if getattr(block, name) != getattr(plain_block, name):
                simpler = replace(block, **{name: getattr(plain_block, name)})
                specs.append(replace(spec, blocks=(*blocks[:i], simpler, *blocks[i + 1 :])))
    for name in ("network", "width", "size", "batch", "root", "returns"):
        if getattr(spec, name) != getattr(plain_spec, name):
            specs.append(replace(spec, **{name: getattr(plain_spec, name)}))
    found += [replace(case, spec=each) for each in specs]
    for name, value in (("form", "buffers"), ("training", True), ("adam", False)):
        if getattr(case, name) != value:
            found.append(replace(case, **{name: value}))
    return found


def possible_pairs() -> set[str]:
    """The pairs of layer and form that the strategy can draw."""
    return {
        f"pair: {layer} x {form}"
        for form, block in testing.BLOCKS.items()
        for layer in testing.LAYERS
        if not (block.adds_input and layer in testing.RESHAPING)
    }


def write_table(pieces: list[dict[str, Any]], path: Path) -> None:
    """What the networks contained, as rows of kind, name and count; pairs of layer and form are summed up."""
    counts: collections.Counter[str] = collections.Counter()
    for piece in pieces:
        counts.update(piece["counts"])
    pairs = {name: counts[name] for name in possible_pairs()}
    rows = [
        ("run", "models", counts["models"]),
        ("run", "counterexamples", sum(len(piece["failures"]) for piece in pieces)),
        ("run", "CPU seconds", round(sum(piece["seconds"] for piece in pieces))),
        ("run", f"seeds, {PIECE} models each", " ".join(str(piece["seed"]) for piece in pieces)),
        ("run", "torch", torch.__version__),
        ("run", "python", platform.python_version()),
        ("pairs of layer and form", "possible", len(pairs)),
        ("pairs of layer and form", "drawn", sum(count > 0 for count in pairs.values())),
        ("pairs of layer and form", "fewest draws of one", min(pairs.values())),
    ]
    for kind in ("event", "order", "mask form", "variant"):
        rows += [
            (kind, name.partition(": ")[2], counts[name])
            for name in sorted(counts)
            if name.startswith(f"{kind}: ")
        ]
    rows += [("hazard", name, counts[name]) for name in sorted(HAZARDS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("kind", "name", "count"))
        writer.writerows(rows)
    for row in rows[:9]:
        print(*row)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=20_000, help="how many networks (default: 20,000)")
    parser.add_argument("--seed", type=int, help="the first piece's seed; default: a random one, printed")
    parser.add_argument("--pieces", type=Path, help="folder for the pieces, so that a run can go on")
    parser.add_argument("--csv", type=Path, default=RESULT, help=f"the table (default: {RESULT.name})")
    parser.add_argument("--case", help="check this one case and say what fails")
    options = parser.parse_args()
    if options.case:
        names = {name: getattr(rules, name) for name in ("Case", "Spec")} | {"BlockSpec": BlockSpec}
        failure = failure_of(eval(options.case, names))
        print(failure or "every rule holds")
        return bool(failure)
    first = secrets.randbelow(10**6) if options.seed is None else options.seed
    print(f"seed {first}", flush=True)
    pieces = []
    for number in range(first, first - (-options.models // PIECE)):
        saved = options.pieces / f"{number}.json" if options.pieces else None
        if saved and saved.exists():
            pieces.append(json.loads(saved.read_text(encoding="utf-8")))
            continue
        pieces.append(draw_piece(number, min(PIECE, options.models - PIECE * (number - first))))
        print(
            f"{pieces[-1]['counts']['models']} models in {pieces[-1]['seconds']:.0f} CPU seconds", flush=True
        )
        if saved:
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(json.dumps(pieces[-1]), encoding="utf-8")
    write_table(pieces, options.csv)
    failures = [failure for piece in pieces for failure in piece["failures"]]
    print(*failures, sep="\n\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
