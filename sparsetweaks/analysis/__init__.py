"""See why: curvature, landscapes, activations, gradients and paths of a sparse network, in its mask's subspace."""

from sparsetweaks.analysis.activations import ActivationSparsity, activation_sparsity
from sparsetweaks.analysis.calibration import Calibration, calibration
from sparsetweaks.analysis.collapse import LayerPathsReport, effective_sparsity, layer_collapse
from sparsetweaks.analysis.comparing import Comparison, compare
from sparsetweaks.analysis.flatness import Flatness, flatness
from sparsetweaks.analysis.gradient_flow import GradientFlow, gradient_flow
from sparsetweaks.analysis.hessian import (
    Density,
    NotConvergedWarning,
    TopEigenvalues,
    Trace,
    hessian_density,
    hessian_top_eigenvalues,
    hessian_trace,
)
from sparsetweaks.analysis.landscape import input_loss_plane, loss_line, loss_plane
from sparsetweaks.analysis.loss_shapes import LossLine, LossPlane

__all__ = [
    "ActivationSparsity",
    "Calibration",
    "Comparison",
    "Density",
    "Flatness",
    "GradientFlow",
    "LayerPathsReport",
    "LossLine",
    "LossPlane",
    "NotConvergedWarning",
    "TopEigenvalues",
    "Trace",
    "activation_sparsity",
    "calibration",
    "compare",
    "effective_sparsity",
    "flatness",
    "gradient_flow",
    "hessian_density",
    "hessian_top_eigenvalues",
    "hessian_trace",
    "input_loss_plane",
    "layer_collapse",
    "loss_line",
    "loss_plane",
]
