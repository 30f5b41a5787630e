"""See why: curvature and loss landscapes of a sparse network, in the space where its mask lets it move."""

from sparsetweaks.analysis.flatness import Flatness, flatness
from sparsetweaks.analysis.hessian import (
    Density,
    NotConvergedWarning,
    TopEigenvalues,
    Trace,
    hessian_density,
    hessian_top_eigenvalues,
    hessian_trace,
)
from sparsetweaks.analysis.landscape import LossLine, LossPlane, input_loss_plane, loss_line, loss_plane

__all__ = [
    "Density",
    "Flatness",
    "LossLine",
    "LossPlane",
    "NotConvergedWarning",
    "TopEigenvalues",
    "Trace",
    "flatness",
    "hessian_density",
    "hessian_top_eigenvalues",
    "hessian_trace",
    "input_loss_plane",
    "loss_line",
    "loss_plane",
]
