"""See why: curvature and loss landscapes of a sparse network, in the space where its mask lets it move."""

from sparsetweaks.analysis.hessian import (
    Density,
    NotConvergedWarning,
    TopEigenvalues,
    Trace,
    hessian_density,
    hessian_top_eigenvalues,
    hessian_trace,
)

__all__ = [
    "Density",
    "NotConvergedWarning",
    "TopEigenvalues",
    "Trace",
    "hessian_density",
    "hessian_top_eigenvalues",
    "hessian_trace",
]
