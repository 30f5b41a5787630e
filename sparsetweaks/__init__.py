"""Spend sparse networks better after drawing them: tweaks for any model and any mask."""

from typing import TYPE_CHECKING

from sparsetweaks.budgets import match_budget
from sparsetweaks.converting import convert_masks
from sparsetweaks.copying import copy_model
from sparsetweaks.cost import cost
from sparsetweaks.counting import sparsity
from sparsetweaks.errors import NoEffectWarning, SurgeryError, UnmaskedZerosWarning
from sparsetweaks.export import export, load_sparse, remove_masks
from sparsetweaks.keeping import keep_masks
from sparsetweaks.masks import apply_masks, find_masks, rewind
from sparsetweaks.patterns import is_semi_structured
from sparsetweaks.prunable import prunable_weights
from sparsetweaks.pruning import prune
from sparsetweaks.recipe.labels import SoftLabelLoss, distillation_loss, smooth_labels
from sparsetweaks.recipe.layer_scales import find_layer_scales, learn_layer_scales, scale_layers
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.folding import fold
from sparsetweaks.surgery.ghosts import anneal_ghosts, remove_ghosts
from sparsetweaks.surgery.sites import changes, find_activations, find_skip_sites
from sparsetweaks.surgery.skips import inject_skips
from sparsetweaks.tweaks import tweak
from sparsetweaks.verifying import Verification, verify

__all__ = [
    "NoEffectWarning",
    "SoftLabelLoss",
    "SurgeryError",
    "UnmaskedZerosWarning",
    "Verification",
    "anneal_ghosts",
    "apply_masks",
    "changes",
    "convert_masks",
    "copy_model",
    "cost",
    "diff",
    "distillation_loss",
    "export",
    "find_activations",
    "find_layer_scales",
    "find_masks",
    "find_skip_sites",
    "fold",
    "inject_skips",
    "is_semi_structured",
    "keep_masks",
    "learn_layer_scales",
    "load_sparse",
    "match_budget",
    "prunable_weights",
    "prune",
    "remove_ghosts",
    "remove_masks",
    "rewind",
    "scale_layers",
    "smooth_labels",
    "sparsity",
    "summary",
    "swap_activations",
    "tweak",
    "verify",
]

if TYPE_CHECKING:
    from sparsetweaks import analysis as analysis
    from sparsetweaks.display import diff, summary
else:

    def __getattr__(name):
        """`analysis`, `diff` and `summary`, imported when first used: half as long again as all the rest."""
        from importlib import import_module

        if name == "analysis":
            return import_module("sparsetweaks.analysis")
        if name in ("diff", "summary"):
            return getattr(import_module("sparsetweaks.display"), name)
        raise AttributeError(f"module 'sparsetweaks' has no attribute {name!r}")
