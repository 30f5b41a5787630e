"""Every deliberate break still fits the source, so that the mutation check cannot rot."""

from __future__ import annotations

import ast
import collections
from pathlib import Path

import mutants
import pytest

RULES = (
    *("Pure", "The rest survives", "Local", "Train and eval", "Neutral setting", "Never silent", "Whole"),
    *(
        "Keyword-only",
        "masks kept",
        "zeros held by keep_masks",
        "folded networks agree",
        "exact top-k under ties",
    ),
)
ROOT = Path(mutants.__file__).parent.parent


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: f"{mutant.rule}-{mutant.file}")
def test_the_break_fits_the_source_and_its_test_exists(mutant):
    text = (ROOT / "sparsetweaks" / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    path, _, name = mutant.test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name.partition("[")[0] in {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }


def test_every_ground_rule_is_broken_at_least_twice():
    counts = collections.Counter(mutant.rule for mutant in mutants.MUTANTS)
    assert set(counts) == set(RULES)
    assert min(counts.values()) >= 2


def test_a_break_that_nobody_notices_is_told(tmp_path):
    harmless = mutants.MUTANTS[0]._replace(new="    return copy.deepcopy(model, memo)  # as before")
    gone = mutants.MUTANTS[0]._replace(old="no such line")
    rows = mutants.check([harmless, gone], tmp_path)
    assert [row[3] for row in rows] == ["NO", "the text to patch is not there once"]
