"""The sources of the documentation, without building it: every link, every name and every public function is there."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path for path in DOCS.rglob("*") if path.suffix in (".md", ".rst") and "_build" not in path.parts
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TUTORIALS = {f"tutorials/{path.stem}" for path in NOTEBOOKS}  # `make docs` puts the executed ones there


def text_of(path: Path) -> str:
    """What is written on a page, without its code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"```(python|sh|\{code-cell\}).*?```", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub and the site give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def found(name: str) -> object:
    """What a dotted name stands for."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            thing = getattr(thing, part)
        return thing
    raise AttributeError(f"nothing is called {name}")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path", [*PAGES, *NOTEBOOKS, *ROOT.glob("*.md"), *(ROOT / "experiments").rglob("*.md")], ids=name_of
)
def test_every_local_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if re.match(r"[a-z]+:", target):
            continue  # elsewhere: not looked up
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_page_that_is_named_is_there(path):
    text = text_of(path)
    named = re.findall(r"\{doc\}`([^`]+)`", text)
    for block in re.findall(r"```\{toctree\}\n(.*?)```", text, flags=re.DOTALL):
        named += [line for line in block.split() if not line.startswith(":") and not line.isdigit()]
    for name in named:
        there = (path.parent / name).resolve().relative_to(DOCS)
        page = any((DOCS / there.parent / f"{there.name}{suffix}").is_file() for suffix in (".md", ".rst"))
        assert page or str(there) in TUTORIALS, f"{name} is no page"


def test_every_page_is_in_a_list_of_contents():
    listed = {"index"}
    for path in PAGES:
        for block in re.findall(
            r"```\{toctree\}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL
        ):
            names = [line for line in block.split() if not line.startswith(":") and not line.isdigit()]
            listed |= {str((path.parent / name).resolve().relative_to(DOCS)) for name in names}
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in PAGES}
    assert pages | TUTORIALS <= listed


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_name_that_is_linked_or_documented_is_there(path):
    text = text_of(path)
    names = re.findall(r"\{py:\w+\}`~?([\w.]+)`", text) + re.findall(r":py:\w+:`~?([\w.]+)`", text)
    names += re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, flags=re.MULTILINE)
    names += re.findall(r"^\.\. modules:: ([\w.]+)", text, flags=re.MULTILINE)
    for name in names:
        assert found(name) is not None, name


@pytest.mark.parametrize(
    ("page", "package"), [("core", "sparsetweaks"), ("analysis", "sparsetweaks.analysis")]
)
def test_every_public_name_has_a_place_in_the_reference(page, package):
    text = (DOCS / "api" / f"{page}.rst").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, flags=re.MULTILINE)
    public = [f"{package}.{name}" for name in importlib.import_module(package).__all__]
    assert set(public) <= set(documented)
    assert len(documented) == len(set(documented))


def test_every_table_of_results_is_read_on_the_page():
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    for name in re.findall(r'read\("([^"]+)"\)', text):
        assert (ROOT / name).is_file(), f"{name} is not there"


def test_every_interval_that_is_told_of_the_figures_is_in_their_tables():
    figures = ROOT / "experiments" / "figures"
    _, _, told = (
        (figures / "README.md").read_text(encoding="utf-8").partition("## What they say about smoothness")
    )
    told = " ".join(told.partition("\n## ")[0].split())
    known = set()
    for path in figures.glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        known |= {(row["ratio_low"], row["ratio_high"]) for row in rows if row.get("ratio")}
    for path in figures.glob("*.claims.csv"):
        known |= set(re.findall(r"\(([\d.,]+) to ([\d.,]+)\)", path.read_text(encoding="utf-8")))
    intervals = set(re.findall(r"[,(] ?([\d.,]*\d) to (\d[\d.,]*\d)\b(?! %)", told))
    assert len(intervals) > 25
    assert intervals <= known


def test_the_tests_see_what_is_wrong(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("# One\n[there](#one) [gone](#two) [file](nowhere.md)\n", encoding="utf-8")
    assert anchors(page) == {"one"}
    with pytest.raises(AssertionError, match="no such heading"):
        test_every_local_link_leads_somewhere(page)
    page.write_text("{py:func}`~sparsetweaks.fold` {py:func}`sparsetweaks.folds`\n", encoding="utf-8")
    with pytest.raises(AttributeError, match="folds"):
        test_every_name_that_is_linked_or_documented_is_there(page)


def said_with_references(function: object, module: object) -> str:
    """A docstring, and those of the functions that it says its arguments are as in, and so on."""
    text, left, read = "", [function], set()
    while left:
        said = inspect.getdoc(left.pop()) or ""
        text += said
        for name in set(re.findall(r"\bas in\s+`(\w+)`", said)) - read:
            read.add(name)
            left.append(getattr(module, name))
    return text


def test_what_is_said_elsewhere_counts_where_it_is_referred_to():
    class Package:
        def first(data):
            """Args: data."""

        def second(data, loss):
            """Args: data: as in
            `first`."""

        def third(data, loss):
            """Args: loss, as in `second`."""

    assert "Args: data." in said_with_references(Package.third, Package)
    assert not re.search(r"\bloss\b", said_with_references(Package.second, Package))
    Package.second.__doc__ = "Args: as in `nowhere`."
    with pytest.raises(AttributeError, match="nowhere"):
        said_with_references(Package.third, Package)


@pytest.mark.parametrize("package", ["sparsetweaks", "sparsetweaks.analysis"])
def test_every_public_function_says_what_it_takes_gives_and_refuses(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        function = getattr(module, name)
        if isinstance(function, type):
            continue
        said = inspect.getdoc(function) or ""
        given = set(inspect.signature(function).parameters) - {"model"}
        explained = said_with_references(function, module)
        for parameter in given:
            assert re.search(rf"\b{parameter}\b", explained), f"{name} does not say what {parameter} is"
        returns = inspect.signature(function).return_annotation
        assert "Returns:" in said or returns in ("None", "Iterator[None]"), (
            f"{name} does not say what it returns"
        )
        assert ">>>" in said, f"{name} has no example"
