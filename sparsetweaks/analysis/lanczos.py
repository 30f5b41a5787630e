"""Lanczos' method for a symmetric matrix that is known by its products alone.

Every basis vector is orthogonalised against all others, so that no eigenvalue shows twice, and the basis is
restarted from its best part when it is full (thick restart, Wu and Simon 2000), so that memory is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]


SPARE = 60  # how many basis vectors there may be beyond two for each wanted eigenpair
WHICH: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda values: values,
    "smallest": lambda values: -values,
    "magnitude": torch.abs,
}
"""What is the most of it is wanted first."""
MISSED = 0.01
"""The default chance, over the random start, that an eigenvalue which belongs to the wanted ones is missed."""


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """What was found, in the order that was asked for."""

    values: list[float]
    errors: list[float]
    """A bound on each value's error, from its residual, and no less than the rounding of the products."""
    vectors: list[Tensor]
    """Of unit length."""
    converged: bool
    """Whether every error is within the tolerance, and no other is among the wanted, but by the chance `missed`."""


def top_eigenpairs(
    multiply: Multiply,
    start: Tensor,
    *,
    k: int,
    which: str,
    tolerance: float,
    iterations: int,
    generator: torch.Generator,
    missed: float = MISSED,
    on_step: Callable[[int], None] = lambda step: None,
    spare: int = SPARE,
) -> Eigenpairs:
    """The k wanted eigenpairs, each value to `tolerance` of itself, from at most `iterations` products.

    A residual says that an eigenvalue is near, and not that no larger one is hidden: that is `alone`'s to say, for which
    the start must be random. One that leans towards some direction, the gradient say, would save a product where that
    lies among the top eigenvectors, and stop at the second eigenvalue where it lies along that one.
    """
    krylov = Krylov(start, generator)
    full = min(2 * k + spare, len(start))
    for step in range(1, iterations + 1):
        krylov.extend(multiply)
        on_step(step)
        values, inner = torch.linalg.eigh(krylov.projected)
        residuals = krylov.beta * inner[-1].abs()
        wanted = _order(values, which)[:k]
        size = values.abs().max().item()
        floor = 10 * torch.finfo(start.dtype).eps * size  # below it the products themselves are not known
        errors = value_errors(values, residuals).clamp(min=floor)
        enough = torch.clamp(tolerance * values[wanted].abs(), min=floor)
        exhausted = len(krylov.basis) == len(start)
        converged = len(wanted) == k and (
            exhausted
            or (
                bool((errors[wanted] <= enough).all())
                and (missed == 1 or alone(krylov, values, wanted, enough, which, missed, floor))
            )
        )
        if converged or step == iterations:
            vectors = [krylov.combine(inner[:, column]) for column in wanted.tolist()]
            return Eigenpairs(values[wanted].tolist(), errors[wanted].tolist(), vectors, converged)
        if len(krylov.basis) == full:
            krylov.restart(values, inner, _order(values, which), k + (full - k) // 2)
        krylov.advance(negligible=floor)
    raise AssertionError("unreachable: iterations is at least 1")


def alone(
    krylov: Krylov,
    values: Tensor,
    wanted: Tensor,
    within: Tensor,
    which: str,
    missed: float,
    negligible: float,
) -> bool:
    """Whether no eigenvalue from the last wanted one on lies apart from all the wanted ones, but by the chance `missed`.

    The direction that the last product added is p(H) start, p a polynomial whose zeros are all Ritz values ever left
    behind and those there are. As it has length 1, |p| is at most 1 / share at every eigenvalue of whose vector the start
    holds that share. Of a random start it is seldom less than `missed` times its usual size. Between two neighbouring zeros
    log |p| is concave: where it is large enough at both ends of a gap, it is so within. (For the largest
    eigenvalue alone: van Dorsselaer, Hochstenbach and van der Vorst 1999.)
    """
    log_scale = krylov.log_scale(negligible)
    if log_scale == -math.inf:
        return True  # the start lies in the span of these eigenvectors
    rank = WHICH[which]
    centres = values[wanted]
    last = rank(centres)[-1] + within[-1]
    ends = torch.cat([centres - within, centres + within, last[None], -last[None]])
    inside = (ends[:, None] > centres - within) & (ends[:, None] < centres + within)
    ends = ends[(rank(ends) >= last) & ~inside.any(dim=1)]
    zeros = torch.cat([values, krylov.left])
    log_sizes = (ends[:, None] - zeros).abs().log().sum(dim=1) - log_scale
    share = missed * math.sqrt(math.pi / (2 * len(krylov.rest)))
    return bool((log_sizes >= -math.log(share)).all())


def value_errors(values: Tensor, residuals: Tensor) -> Tensor:
    """How far from an eigenvalue each Ritz value is at most: its residual r, or r^2 / gap where that is less.

    The gap is that to the nearest other eigenvalue, of which only Ritz values are known: taken for half of
    what is left when those have moved by twice their own residual. To take all of it, moved once, saves a product
    of six, and stops at a neighbour of the top eigenvalue four times as often where two are within 5 %.
    """
    apart = ((values[:, None] - values[None, :]).abs() - 2 * residuals[None, :]) / 2
    apart.fill_diagonal_(torch.inf)
    gaps = apart.min(dim=1).values
    known = (gaps > residuals) & gaps.isfinite()  # a single Ritz value has no neighbour yet
    return torch.where(known, residuals * (residuals / gaps), residuals)


def quadrature(
    multiply: Multiply,
    start: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[Tensor, Tensor]:
    """Nodes and weights (they sum to 1) of the spectrum as `start` sees it: exact for powers below 2 * steps."""
    krylov = Krylov(start, generator)
    for step in range(1, min(steps, len(start)) + 1):
        krylov.extend(multiply)
        on_step(step)
        size = torch.linalg.eigvalsh(krylov.projected).abs().max().item()
        if krylov.beta <= 10 * torch.finfo(start.dtype).eps * size:
            break  # `start` lies in the span of these eigenvectors: the rest of the spectrum has no weight
        if step < min(steps, len(start)):
            krylov.advance(negligible=0.0)
    nodes, inner = torch.linalg.eigh(krylov.projected)
    return nodes, inner[0].square()


class Krylov:
    """An orthonormal basis, and the matrix as that basis sees it."""

    def __init__(self, start: Tensor, generator: torch.Generator) -> None:
        self.generator = generator
        self.basis = [start / torch.linalg.vector_norm(start)]
        self.projected = torch.zeros(0, 0, dtype=torch.float64)
        self.rest = start
        self.beta = 0.0
        self.left = torch.zeros(0, dtype=torch.float64)
        """The Ritz values that restarts have left behind."""
        self._log_betas = 0.0

    def log_scale(self, negligible: float) -> float:
        """The logarithm of the product of all betas; minus infinity once one was nothing."""
        return self._log_betas + (math.log(self.beta) if self.beta > negligible else -math.inf)

    def extend(self, multiply: Multiply) -> None:
        """Take the product with the newest basis vector: one more row and column of `projected`."""
        self.rest = multiply(self.basis[-1])
        coefficients = self._orthogonalise()
        size = len(self.basis)
        grown = torch.zeros(size, size, dtype=torch.float64)
        grown[:-1, :-1] = self.projected
        grown[-1, :] = grown[:, -1] = coefficients
        self.projected = grown
        self.beta = torch.linalg.vector_norm(self.rest).item()

    def advance(self, *, negligible: float) -> None:
        """Go on with what the last product added; with a random direction if that is nothing."""
        self._log_betas = self.log_scale(negligible)
        if self.beta <= negligible:
            self.rest = random_vector(self.rest, self.generator)
            self._orthogonalise()
            self.beta = 0.0
        self.basis.append(self.rest / torch.linalg.vector_norm(self.rest))

    def restart(self, values: Tensor, inner: Tensor, order: Tensor, count: int) -> None:
        """Shrink the basis to the first Ritz vectors of an order."""
        keep, leave = order[:count], order[count:]
        self.left = torch.cat([self.left, values[leave]])
        self.basis = [self.combine(inner[:, column]) for column in keep.tolist()]
        self.projected = torch.diag(values[keep])

    def combine(self, coefficients: Tensor) -> Tensor:
        """The vector with these coordinates in the basis."""
        vector = torch.zeros_like(self.basis[0])
        for coefficient, each in zip(coefficients.tolist(), self.basis, strict=True):
            vector.add_(each, alpha=coefficient)
        return vector / torch.linalg.vector_norm(vector)

    def _orthogonalise(self) -> Tensor:
        """Take the basis out of `rest`, twice, as once leaves rounding errors in; what was taken out."""
        coefficients = torch.zeros(len(self.basis), dtype=torch.float64)
        for _ in range(2):
            for number, each in enumerate(self.basis):
                part = torch.dot(each, self.rest).item()
                self.rest = self.rest.sub(each, alpha=part)
                coefficients[number] += part
        return coefficients


def random_vector(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent standard normal entries."""
    drawn = torch.randn(len(like), generator=generator, device=generator.device, dtype=torch.float64)
    return drawn.to(device=like.device, dtype=like.dtype)


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent entries of 1 and -1 (Rademacher)."""
    drawn = torch.randint(2, (len(like),), generator=generator, device=generator.device)
    return (2 * drawn - 1).to(device=like.device, dtype=like.dtype)


def _order(values: Tensor, which: str) -> Tensor:
    return WHICH[which](values).argsort(descending=True)
