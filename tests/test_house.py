"""The house: what may import what, how fast it opens, and that the README says what the results say."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sparsetweaks"
FLOORS = (
    [
        "errors",
        "calling",
        "copying",
        "patterns",
        "selection",
        "recipe.labels",
        "surgery.kinds",
        "surgery.programs",
        "surgery.mentions",
    ],
    ["surgery.tracing", "surgery.dataflow", "surgery.norms", "probing"],
    ["surgery.scopes", "surgery.units"],
    ["forms", "surgery.sites", "testing"],
    ["prunable", "keeping", "sparse_file", "surgery.ghosts"],
    ["masks", "counting", "converting", "surgery.activations", "surgery.skips"],
    ["scores", "export", "surgery.affine"],
    ["surgery.foldable"],
    ["surgery.folding"],
    ["pruning"],
    ["recipe.layer_scales", "cost", "budgets"],
    ["verifying"],
    ["tweaks"],
    ["analysis.shown", "analysis.options", "analysis.pointwise", "analysis.stand_ins"],
    [
        "analysis.evaluation",
        "analysis.figures",
        "analysis.left_out",
        "analysis.subspace",
        "analysis.units",
        "analysis.paths",
    ],
    ["analysis.activations", "analysis.calibration", "analysis.collapse"],
    ["analysis.curvature", "analysis.lanczos"],
    ["analysis.gradient_flow", "analysis.hessian"],
    ["analysis.loss_shapes", "analysis.terrain"],
    ["analysis.directions"],
    ["analysis.landscape"],
    ["analysis.flatness"],
    ["analysis.comparing"],
    ["display.amounts", "display.style", "display.parts"],
    ["display.differences"],
    ["display.facts"],
    ["display.text", "display.html"],
    ["display.overview"],
    ["lottery"],
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OPTIONAL = {"export": {"onnx", "onnxruntime", "onnxscript"}}  # imported by the function that needs them
IMPORT_SHARE = 0.12  # of the time that `import torch` takes; 0.07 was measured


def room_of(module: str) -> str:
    """The room of a module's dotted name below the package."""
    if module.startswith(("lottery", "__main__")):
        return "lottery"
    return "testing" if module.startswith("testing.") else module


def lazy_of(room: str) -> set[str]:
    """What a room may import inside its functions; that nothing else loads it shows below."""
    if room == "export":
        return {"onnx", "onnxruntime", "onnxscript"}
    return {"matplotlib"} if room.startswith("analysis") else set()


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down_and_the_core_needs_torch_alone(path):
    here = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    for name in imports_of(path):
        if name.startswith("sparsetweaks."):
            there = room_of(name.removeprefix("sparsetweaks."))
            if there in ROOMS and there != here:
                assert ROOMS[there] <= ROOMS[here], f"{here} imports {there}"
                assert here != "testing" or there != "lottery"
            assert here in ("lottery", there) or there not in ("lottery", "testing"), (
                f"{here} imports {there}"
            )
        elif here not in ("lottery", "testing"):
            allowed = {"torch", *lazy_of(here), *sys.stdlib_module_names}
            assert name.split(".")[0] in allowed, f"{here} imports {name}"


def test_only_the_surgery_touches_fx():
    users = {path.parent.name for path in modules() if "torch.fx" in str(imports_of(path))}
    assert users <= {"surgery"}


def test_importing_is_quick_and_brings_in_nothing_but_torch():
    code = (
        "import sys, time; start = time.process_time(); import torch; before = set(sys.modules); "
        "middle = time.process_time(); import sparsetweaks; print((time.process_time() - middle) / (middle - start)); "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert min(float(run.splitlines()[0]) for run in runs) < IMPORT_SHARE
    brought = set(runs[0].splitlines()[1].split())
    assert brought <= {"sparsetweaks", "torch", *sys.stdlib_module_names}


def test_pictures_are_there_when_they_are_used_and_not_before():
    code = (
        "import sys, sparsetweaks as st; assert 'sparsetweaks.display' not in sys.modules; st.diff, st.summary; "
        "assert not {'matplotlib', 'IPython', 'sparsetweaks.analysis', 'sparsetweaks.lottery'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_draws_nothing():
    for path in modules():
        room = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        if not room.startswith(("display", "lottery")):
            assert not [name for name in imports_of(path) if name.startswith("sparsetweaks.display")], room


def test_the_analysis_is_there_when_it_is_used_and_not_before():
    code = (
        "import sys, sparsetweaks as st; assert 'sparsetweaks.analysis' not in sys.modules; "
        "st.analysis.hessian_trace; assert not {'matplotlib', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readme_says_what_the_results_say():
    command = [sys.executable, str(ROOT / "experiments" / "report.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_in_the_readme_and_has_an_example():
    import sparsetweaks as st

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in st.__all__:
        value = getattr(st, name)
        if not isinstance(value, type):
            assert ">>>" in value.__doc__, f"{name} has no example"
            assert "Args:" in value.__doc__, f"{name} does not say what it takes"
    named = set(re.findall(r"`(\w+)", readme))
    documented = {
        "copy_model",
        "prunable_weights",
        "NoEffectWarning",
        "SurgeryError",
        "UnmaskedZerosWarning",
        "Verification",
        "find_layer_scales",
        "scale_layers",
    }
    assert set(st.__all__) - documented <= named


def test_the_table_of_speed_names_each_machine_once_and_says_what_was_measured_once() -> None:
    text = runpy.run_path(str(ROOT / "experiments" / "report.py"))["speed"]()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    assert all(("(once)" in row[2]) == (row[3] == "1") for row in rows[2:])
    machines = text.splitlines()[-1].split(";")[0].split(" and ")
    assert all(re.fullmatch(r"[^,]+, \d+ threads?", each) for each in machines)
    assert len(machines) == len(set(machines))
