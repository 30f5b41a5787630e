"""The matrix: rows are PyTorch's machinery (a marker), columns are surgeries, and each cell is a test per model.

    python -m pytest -q tests/machinery --machinery-table benchmarks/results/machinery.csv

runs every cell and writes down how it went.
"""

from __future__ import annotations

import csv
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from machinery.cases import MODELS, SURGERIES, ticket_of
from torch import nn

import sparsetweaks as st

LONGEST_REASON = 160


@cache
def _made(name: str, surgery: str) -> nn.Module:
    return SURGERIES[surgery](ticket_of(name), name)


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """Which model."""
    return request.param


@pytest.fixture(params=SURGERIES)
def surgery(request: pytest.FixtureRequest) -> str:
    """Which surgery."""
    return request.param


@pytest.fixture
def model(name: str, surgery: str) -> nn.Module:
    """A ticket after the surgery: the test's own copy."""
    return st.copy_model(_made(name, surgery))


@pytest.fixture
def original(name: str) -> nn.Module:
    """The ticket before it."""
    return st.copy_model(_made(name, "none"))


@pytest.fixture
def torch_cannot(
    record_property: Callable[[str, object], None],
) -> Callable[..., AbstractContextManager[None]]:
    """Expects that torch itself fails, which the table then says; turns red once torch has learned it."""

    @contextmanager
    def expect(error: type[Exception], match: str) -> Iterator[None]:
        with pytest.raises(error, match=match) as caught:
            yield
        record_property("torch cannot", f"{error.__name__}: {caught.value}".splitlines()[0][:LONGEST_REASON])

    return expect


# ------------------------------------------------------------------------------------------- which cells are slow


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "machinery(row, fast): a row of the matrix; `fast` lists the cells that are not slow, by default all",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("machinery")
        if marker is None:
            continue
        fast = marker.kwargs.get("fast")
        assert fast is None or fast, f"{marker.args[0]} has no fast cell"
        if fast is not None and f"{_model_of(item)}, {_column_of(item)}" not in fast:
            item.add_marker(pytest.mark.slow)


# ------------------------------------------------------------------------------------------------------ the table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--machinery-table",
        type=Path,
        default=None,
        help="write the matrix of tests/machinery to this CSV file",
    )


def _model_of(item: Any) -> str:
    return item.callspec.params["name"]


def _column_of(item: Any) -> str:
    return item.callspec.params["surgery"]


@pytest.fixture(autouse=True)
def _cell(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    marker = request.node.get_closest_marker("machinery")
    if marker is not None:
        record_property("cell", (marker.args[0], _column_of(request.node), _model_of(request.node)))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path = config.getoption("machinery_table", default=None)
    if path is None:
        return
    table: dict[str, dict[str, dict[str, str]]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            properties = dict(getattr(report, "user_properties", ()))
            if "cell" in properties and report.when == "call":
                row, column, model = properties["cell"]
                cell = table.setdefault(row, {}).setdefault(column, {})
                if (
                    cell.get(model, "passed") == "passed"
                ):  # of several tests in one cell, the first that did not
                    cell[model] = _outcome(report, properties)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["machinery", *SURGERIES, "torch", "python"])
        for row in sorted(table):
            cells = [_joined(table[row].get(column, {})) for column in SURGERIES]
            writer.writerow([row, *cells, torch.__version__, platform.python_version()])
    terminalreporter.write_line(f"wrote {len(table)} rows to {path}")


def _outcome(report: Any, properties: dict[str, Any]) -> str:
    if report.failed:
        return f"FAILED: {report.longrepr.reprcrash.message.splitlines()[0][:LONGEST_REASON]}"
    if "torch cannot" in properties:
        return f"torch cannot: {properties['torch cannot']}"
    return "passed" if report.passed else report.outcome


def _joined(outcomes: dict[str, str]) -> str:
    if len(set(outcomes.values())) == 1 and len(outcomes) == len(MODELS):
        return next(iter(outcomes.values()))
    return "; ".join(f"{model} {outcomes[model]}" for model in MODELS if model in outcomes)
