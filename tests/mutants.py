"""Break our own code on purpose, one line at a time, and see the named test fail.

    python tests/mutants.py                     every break, and a table of them in benchmarks/results/mutants.csv
    python tests/mutants.py --rule "Neutral"    those of one rule

Each break is a textual patch to a temporary copy of the package, never to the working tree. The tests must pass
without any break and fail with each. Exits non-zero if a break is not caught or its text is no longer in the source.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mutants.csv"

COPYING = "tests/test_copying.py::"
SCOPES = "tests/surgery/test_scopes.py::"
SKIPS = "tests/surgery/test_skips.py::"
ACTIVATIONS = "tests/surgery/test_activations.py::"
FOLDING = "tests/surgery/test_folding.py::"
SCALES = "tests/recipe/test_layer_scales.py::"
MASKS = "tests/test_masks.py::"
KEEPING = "tests/test_keeping.py::"
RULES = "tests/test_ground_rules.py::"


class Mutant(NamedTuple):
    """One break: the rule it breaks, where, the text that is there, what stands there instead, and who notices."""

    rule: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = (
    Mutant(
        "Pure",
        "copying.py",
        "    copied = _copied(model, memo)",
        "    copied = model",
        COPYING + "test_the_copy_is_equal_and_shares_nothing",
    ),
    Mutant(
        "Pure",
        "surgery/tracing.py",
        "        random.setstate(state)",
        "        pass",
        RULES + "test_a_forward_that_draws_random_numbers_leaves_the_random_states",
    ),
    Mutant(
        "Pure",
        "probing.py",
        "    copied = copy_model(model).eval()",
        "    copied = model.eval()",
        SCALES + "test_the_given_model_and_the_rng_are_untouched",
    ),
    Mutant(
        "Pure",
        "surgery/activations.py",
        "        with torch.random.fork_rng(devices=[]):\n            made = self.make()",
        "        if True:\n            made = self.make()",
        RULES + "test_a_factory_that_draws_random_numbers_leaves_the_random_state",
    ),
    Mutant(
        "The rest survives",
        "surgery/activations.py",
        "        if name not in base:\n            vars(old)[name] = value",
        "        if True:\n            vars(old)[name] = value",
        ACTIVATIONS + "test_hooks_and_modes_of_a_swapped_module_stay",
    ),
    Mutant(
        "The rest survives",
        "copying.py",
        "                memo[id(hook.__self__)] = hook.__self__",
        "                pass",
        COPYING + "test_hooks_live_on_and_keep_the_callers_objects",
    ),
    Mutant(
        "The rest survives",
        "recipe/layer_scales.py",
        "    parameters = _floating_parameters(copied)\n    with torch.no_grad():",
        "    parameters = _floating_parameters(copied)\n    copied.requires_grad_(True)\n    with torch.no_grad():",
        RULES + "test_every_surgery_keeps_frozen_parameters_frozen",
    ),
    Mutant(
        "Local",
        "surgery/programs.py",
        "    return type(original.__name__, bases, members)",
        "    return type(original.__name__, (mixin, nn.Module), members)",
        SCOPES + "test_class_methods_signature_and_docstring_survive",
    ),
    Mutant(
        "Local",
        "surgery/tracing.py",
        "    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:\n        return True",
        "    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:\n"
        "        return not m._modules",
        RULES + "test_a_child_is_called_and_not_read_where_its_parent_is_rewritten",
    ),
    Mutant(
        "Train and eval",
        "surgery/tracing.py",
        '    if "training" in names or names & DYNAMIC:',
        "    if names & DYNAMIC:",
        SCOPES + "test_every_case_of_a_forward_survives",
    ),
    Mutant(
        "Train and eval",
        "surgery/programs.py",
        '        return "self.training" if answer else "not self.training"',
        '        return "not self.training" if answer else "self.training"',
        SCOPES + "test_every_case_of_a_forward_survives",
    ),
    Mutant(
        "Train and eval",
        "surgery/skips.py",
        "    return skip.train(layer.training)",
        "    return skip",
        RULES + "test_new_modules_are_in_the_mode_of_what_they_stand_beside",
    ),
    Mutant(
        "Neutral setting",
        "surgery/skips.py",
        "nn.Parameter(torch.zeros(1, **factory))",
        "nn.Parameter(torch.ones(1, **factory))",
        SKIPS + "test_learned_strength_starts_at_zero_and_gets_a_gradient",
    ),
    Mutant(
        "Neutral setting",
        "surgery/dataflow.py",
        "        if any(user is not step and (user > node or not _makes_fresh(user, module)) for user in value.users):"
        "\n            return True",
        "        if False:\n            return True",
        ACTIVATIONS + "test_in_place_is_dropped_only_where_nobody_looks",
    ),
    Mutant(
        "Neutral setting",
        "recipe/layer_scales.py",
        "parameters[name].detach() * scales[name] for",
        "parameters[name].detach() * (scales[name] + 1e-6) for",
        SCALES + "test_no_iterations_and_scales_of_one_change_no_bit",
    ),
    Mutant(
        "Never silent",
        "surgery/activations.py",
        "    _warn_if_nothing(picked, done)",
        "    pass",
        ACTIVATIONS + "test_no_site_warns_and_returns_a_copy",
    ),
    Mutant(
        "Never silent",
        "surgery/sites.py",
        "        if not any(fnmatch.fnmatchcase(site.path, pattern) for site in sites):",
        "        if False:",
        ACTIVATIONS + "test_where_selects",
    ),
    Mutant(
        "Never silent",
        "surgery/sites.py",
        '            yield Found(Site(scope, kind_name, kind_name, "function", left=str(reason)), module)',
        "            continue",
        SCOPES + "test_what_a_trace_would_get_wrong_is_left_and_named",
    ),
    Mutant(
        "Whole",
        "surgery/programs.py",
        "    def __reduce_ex__(self, protocol: Any)",
        "    def not_reduced(self, protocol: Any)",
        SCOPES + "test_a_rewritten_module_copies_and_saves_whole",
    ),
    Mutant(
        "Whole",
        "surgery/units.py",
        '                return "it already has a skip"',
        "                return None",
        SKIPS + "test_a_second_injection_finds_the_skips_that_are_there",
    ),
    Mutant(
        "Keyword-only",
        "surgery/skips.py",
        "    model: Model,\n    *,\n",
        "    model: Model,\n",
        RULES + "test_options_are_keyword_only",
    ),
    Mutant(
        "Keyword-only",
        "pruning.py",
        "    sparsity: float,\n    *,\n",
        "    sparsity: float,\n",
        RULES + "test_options_are_keyword_only",
    ),
    Mutant(
        "masks kept",
        "forms.py",
        '            self.module.register_buffer(self.attribute + "_mask", empty)',
        '            self.module.register_buffer(self.attribute + "_mask", empty, persistent=False)',
        MASKS + "test_masks_survive_a_save_and_a_load",
    ),
    Mutant(
        "masks kept",
        "forms.py",
        "            erase(self.parameter, mask.to(self.parameter.device))",
        "            pass",
        MASKS + "test_what_is_applied_is_found_and_the_model_is_left_alone",
    ),
    Mutant(
        "masks kept",
        "recipe/layer_scales.py",
        "parameters[name].detach() * scales[name] for",
        "parameters[name].detach() + scales[name] for",
        RULES + "test_every_surgery_keeps_the_masks",
    ),
    Mutant(
        "zeros held by keep_masks",
        "keeping.py",
        "            stack.callback(optimizer.register_step_post_hook(after_step).remove)",
        "            pass",
        KEEPING + "test_nan_and_infinity_leave_exact_zeros_in_every_precision",
    ),
    Mutant(
        "zeros held by keep_masks",
        "keeping.py",
        "            stack.callback(_register_gradient_hook(parameter, hold).remove)",
        "            pass",
        KEEPING + "test_clipping_sees_the_survivors_alone",
    ),
    Mutant(
        "zeros held by keep_masks",
        "keeping.py",
        "            if isinstance(value, Tensor) and value.shape == parameter.shape:\n                _zero(value, bits)",
        "            pass",
        KEEPING + "test_state_from_before_the_masks_is_zeroed_on_entry",
    ),
    Mutant(
        "folded networks agree",
        "surgery/affine.py",
        "    shift = -mean * scale",
        "    shift = 0 * mean",
        FOLDING + "test_a_norm_after_a_linear_layer_folds_with_its_skip",
    ),
    Mutant(
        "folded networks agree",
        "surgery/affine.py",
        "        tap.append(centre // dilation)",
        "        tap.append(max(centre // dilation - 1, 0))",
        FOLDING + "test_every_number_of_dimensions_with_and_without_norm_and_bias",
    ),
    Mutant(
        "folded networks agree",
        "surgery/foldable.py",
        "        if own and path not in following:",
        "        if False:",
        FOLDING + "test_in_torchvision_every_norm_is_folded_or_named",
    ),
    Mutant(
        "exact top-k under ties",
        "selection.py",
        "        if 0 < drop < ties:",
        "        if drop > ties:",
        "tests/test_selection.py::test_it_is_a_stable_sort",
    ),
    Mutant(
        "exact top-k under ties",
        "selection.py",
        "            drops[places[: max(drop - found, 0)]] = True",
        "            drops[places] = True",
        "tests/test_selection.py::test_the_ways_of_millions_on_hundreds",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rule", default="", help="only the rules whose name contains this")
    parser.add_argument("--csv", type=Path, default=RESULT, help=f"the table (default: {RESULT.name})")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.rule.lower() in mutant.rule.lower()]
    if not chosen:
        parser.error(
            f"no rule contains {options.rule!r}: {', '.join(dict.fromkeys(m.rule for m in MUTANTS))}"
        )
    with tempfile.TemporaryDirectory() as folder:
        rows = [("rule", "break", "test", "caught"), *check(chosen, Path(folder))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(*("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), sep="\n")
    if chosen == list(MUTANTS):
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    caught = sum(row[3] == "yes" for row in rows)
    print(f"{caught} of {len(chosen)} breaks are caught")
    return int(caught < len(chosen))


def check(chosen: list[Mutant], copy: Path) -> list[tuple[str, str, str, str]]:
    """A row for each break: its rule, where and what it is, the test, and whether the test caught it."""
    for name in ("sparsetweaks", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    tests = sorted({mutant.test for mutant in chosen})
    unbroken = run(tests, copy)
    if unbroken.returncode != 0:
        sys.exit(f"without any break:\n{unbroken.stdout[-3000:]}{unbroken.stderr[-1000:]}")
    rows = []
    for mutant in chosen:
        path = copy / "sparsetweaks" / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            verdict = "the text to patch is not there once"
        else:
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            verdict = (
                "yes" if run([mutant.test], copy).returncode == 1 else "NO"
            )  # 1: tests ran and some failed
            path.write_text(text, encoding="utf-8")
        line = text[: text.find(mutant.old)].count("\n") + 1
        new = " ".join(mutant.new.split()) or "(deleted)"
        where = f"{mutant.file}:{line}: {' '.join(mutant.old.split())[:60]} -> {new[:60]}"
        rows.append((mutant.rule, where, mutant.test.removeprefix("tests/"), verdict))
    return rows


def run(tests: list[str], copy: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist"]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command += ["-o", "addopts=", *tests]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
