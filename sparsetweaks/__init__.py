"""Spend sparse networks better after drawing them: tweaks for any model and any mask."""

from sparsetweaks.copying import copy_model
from sparsetweaks.errors import NoEffectWarning, SurgeryError
from sparsetweaks.masks import apply_masks, find_masks, keep_masks, rewind, sparsity
from sparsetweaks.prunable import prunable_weights
from sparsetweaks.pruning import prune
from sparsetweaks.recipe.labels import SoftLabelLoss, distillation_loss, smooth_labels
from sparsetweaks.recipe.layer_scales import find_layer_scales, learn_layer_scales, scale_layers
from sparsetweaks.surgery.activations import swap_activations
from sparsetweaks.surgery.sites import changes, find_activations, find_skip_sites
from sparsetweaks.surgery.skips import inject_skips
from sparsetweaks.tweaks import tweak

__all__ = [
    "NoEffectWarning",
    "SoftLabelLoss",
    "SurgeryError",
    "apply_masks",
    "changes",
    "copy_model",
    "distillation_loss",
    "find_activations",
    "find_layer_scales",
    "find_masks",
    "find_skip_sites",
    "inject_skips",
    "keep_masks",
    "learn_layer_scales",
    "prunable_weights",
    "prune",
    "rewind",
    "scale_layers",
    "smooth_labels",
    "sparsity",
    "swap_activations",
    "tweak",
]
