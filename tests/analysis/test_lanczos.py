"""Lanczos against dense eigenvalues: clusters, restarts, ends of the spectrum, spans that close early."""

from __future__ import annotations

import pytest
import torch

from sparsetweaks.analysis.lanczos import (
    Krylov,
    quadrature,
    random_signs,
    random_vector,
    top_eigenpairs,
    value_errors,
)


def matrix(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(eigenvalues) @ basis.T


def solve(dense: torch.Tensor, *, k: int = 1, which: str = "largest", tolerance: float = 1e-6, **options):
    generator = torch.Generator().manual_seed(1)
    return top_eigenpairs(
        lambda vector: dense @ vector,
        random_vector(dense[0], generator),
        k=k,
        which=which,
        tolerance=tolerance,
        generator=generator,
        **{"iterations": 2000, **options},
    )


CLUSTERED = torch.cat([torch.tensor([10, 9.99, 9.98, 9.97, 9.96, -4.0]), torch.linspace(-1, 8, 394)]).double()


@pytest.mark.parametrize("spare", [6, 60])  # restarted often, and seldom
def test_a_clustered_top_with_vectors(spare):
    dense = matrix(CLUSTERED)
    found = solve(dense, k=5, spare=spare)
    assert found.converged
    expected = CLUSTERED.sort(descending=True).values[:5]
    assert found.values == pytest.approx(expected.tolist(), rel=1e-6)
    for value, error, vector in zip(found.values, found.errors, found.vectors, strict=True):
        assert torch.linalg.vector_norm(vector) == pytest.approx(1, rel=1e-12)
        assert (dense @ vector - value * vector).norm() < 1e-2  # the root of the tolerance
        assert (CLUSTERED - value).abs().min() <= error + 1e-12


@pytest.mark.parametrize(
    ("which", "expected"), [("smallest", [-20, -4]), ("largest", [10, 9.99]), ("magnitude", [-20, 10])]
)
def test_ends_of_the_spectrum(which, expected):
    eigenvalues = CLUSTERED.clone()
    eigenvalues[7] = -20
    assert solve(matrix(eigenvalues), k=2, which=which).values == pytest.approx(expected, rel=1e-6)


def test_stopping_early_says_so_and_keeps_an_honest_bound():
    found = solve(matrix(CLUSTERED), iterations=8)
    assert not found.converged
    assert found.errors[0] > 1e-5
    assert abs(found.values[0] - 10) <= found.errors[0]


def test_the_error_is_within_the_tolerance_and_taken_in_few_products():
    steps = []
    for seed in range(20):
        eigenvalues = torch.cat([torch.tensor([145.0, 110, 73, 33]), torch.linspace(-1, 10, 296)]).double()
        taken = []
        found = solve(matrix(eigenvalues, seed), tolerance=1e-3, on_step=taken.append)
        assert abs(found.values[0] - 145) <= 0.145
        steps.append(len(taken))
    assert sum(steps) / len(steps) < 12


def test_a_span_that_closes_early_goes_on_elsewhere():
    dense = torch.diag(torch.tensor([3.0, 3, 3, 1, 1, 0, 0, 0], dtype=torch.float64))
    assert solve(dense, k=3, tolerance=1e-10).values[:2] == pytest.approx([3, 1])  # a multiple one shows once
    assert solve(dense, k=8).values == pytest.approx([3, 3, 3, 1, 1, 0, 0, 0], abs=1e-12)
    assert solve(0 * dense, k=2).values == [0, 0]


def test_more_steps_than_dimensions():
    dense = matrix(torch.arange(1.0, 7).double())
    assert solve(dense, k=6).values == pytest.approx([6, 5, 4, 3, 2, 1], rel=1e-10)


CLOSE = torch.cat([torch.tensor([1.02, 1.0, 0.6, 0.33]), torch.linspace(-0.01, 0.1, 2000)]).double()


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize(("k", "tolerance"), [(1, 1e-3), (1, 1e-2), (3, 1e-2)])
def test_the_top_is_not_missed_for_its_neighbour(k, tolerance, which):
    eigenvalues = -CLOSE if which == "smallest" else CLOSE.clone()
    if which == "magnitude":
        eigenvalues[1] *= -1
    expected = eigenvalues[:k]
    for seed in range(
        20
    ):  # with a test of the residual alone every second start ends at the neighbour, for k = 1
        generator = torch.Generator().manual_seed(seed)
        found = top_eigenpairs(
            lambda vector: eigenvalues * vector,
            random_vector(eigenvalues, generator),
            k=k,
            which=which,
            tolerance=tolerance,
            iterations=100,
            generator=generator,
        )
        assert found.converged
        assert found.values == pytest.approx(expected.tolist(), rel=tolerance)


def test_how_often_the_top_may_be_missed_is_for_the_caller_to_say():
    products, misses = {}, {}
    for missed in (1, 0.01, 1e-6):
        taken, found = [], []
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            found += top_eigenpairs(
                lambda vector: CLOSE * vector,
                random_vector(CLOSE, generator),
                k=1,
                which="largest",
                tolerance=1e-3,
                missed=missed,
                iterations=100,
                generator=generator,
                on_step=taken.append,
            ).values
        products[missed], misses[missed] = (
            len(taken),
            sum(abs(value / CLOSE[0] - 1) > 1e-3 for value in found),
        )
    assert misses[1] >= 5 and misses[0.01] == misses[1e-6] == 0
    assert products[1] < products[0.01] < products[1e-6]


def test_a_start_without_the_top_is_never_taken_for_converged_where_it_is_told_apart():
    start = torch.ones(2004, dtype=torch.float64)
    start[0] = 1e-3  # a start in ten has so little of the top, not one in a hundred
    generator = torch.Generator().manual_seed(0)
    options = {"k": 1, "which": "largest", "iterations": 100, "generator": generator}
    found = top_eigenpairs(lambda v: CLOSE * v, start, tolerance=1e-3, **options)
    assert found.values == pytest.approx([1.02], rel=1e-3)
    start[0] = 0  # nothing can be told of what the products never see
    found = top_eigenpairs(lambda v: CLOSE * v, start, tolerance=1e-3, **options)
    assert found.values == pytest.approx([1.0], rel=1e-3)


@pytest.mark.parametrize("restarts", [0, 1, 5])
def test_the_newest_direction_is_the_polynomial_of_all_ritz_values_of_the_start(restarts):
    generator = torch.Generator().manual_seed(0)
    start = random_vector(CLOSE, generator)
    krylov = Krylov(start, generator)
    for _ in range(restarts + 1):
        while len(krylov.projected) < 6:
            krylov.extend(lambda vector: CLOSE * vector)
            values, inner = torch.linalg.eigh(krylov.projected)
            if len(krylov.projected) < 6:
                krylov.advance(negligible=0)
        if len(krylov.left) < 3 * restarts:
            krylov.restart(values, inner, values.argsort(descending=True), 3)
            krylov.advance(negligible=0)
    zeros = torch.cat([values, krylov.left])
    assert len(zeros) == 6 + 3 * restarts
    sizes = ((CLOSE[:, None] - zeros).abs().log().sum(dim=1) - krylov.log_scale(0)).exp()
    expected = (krylov.rest / krylov.beta * start.norm() / start).abs()
    assert torch.allclose(
        sizes[3:], expected[3:], rtol=1e-6, atol=1e-9
    )  # the three kept are found to the last digit


def test_errors_of_values_use_the_gap_only_where_there_is_one():
    values, residuals = torch.tensor([0.0, 1.0, 10.0]), torch.tensor([0.9, 0.5, 0.1])
    assert value_errors(values, residuals).tolist() == pytest.approx([0.9, 0.5, 0.01 / 4])
    assert value_errors(values[:1], residuals[:1]).tolist() == pytest.approx([0.9])


def test_quadrature_has_the_moments_of_its_probe():
    dense = matrix(CLUSTERED)
    generator = torch.Generator().manual_seed(2)
    probe = random_signs(dense[0], generator)
    nodes, weights = quadrature(lambda v: dense @ v, probe, steps=8, generator=generator)
    assert len(nodes) == 8
    power = probe
    for degree in range(16):
        expected = torch.dot(probe, power).item() / len(probe)
        assert torch.dot(weights, nodes**degree).item() == pytest.approx(expected, rel=1e-9), degree
        power = dense @ power
    beyond = torch.dot(probe, power).item() / len(probe)
    assert torch.dot(weights, nodes**16).item() != pytest.approx(beyond, rel=1e-9)


def test_quadrature_of_a_probe_in_a_small_span():
    dense = torch.diag(torch.tensor([2.0, 2, 5, 5], dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    nodes, weights = quadrature(lambda v: dense @ v, torch.ones(4).double(), steps=4, generator=generator)
    assert nodes.tolist() == pytest.approx([2, 5])
    assert weights.tolist() == pytest.approx([0.5, 0.5])
