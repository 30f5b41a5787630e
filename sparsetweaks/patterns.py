"""Patterns that hardware needs a mask to follow: so many kept of each group of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor


def is_semi_structured(mask: Tensor, *, kept: int = 2, of: int = 4, dim: int = 1) -> bool:
    """Tell whether a mask keeps at most `kept` of each `of` neighbours, as sparse tensor cores need (2:4).

    The neighbours lie along the dimension that the product sums over, in whole groups: a layer whose size there
    `of` does not divide, such as a first convolution of 3 channels, does not follow the pattern. NVIDIA's format
    and `torch.sparse.to_sparse_semi_structured` are 2:4 (Mishra et al. 2021, arXiv 2104.08378).

    Args:
        mask: bool, True = kept, of the weight's shape.
        kept: how many of a group may be kept, from 1 to `of`.
        of: how many neighbours make a group, at least 2.
        dim: along which they lie: 1, the inputs of a linear layer (outputs, inputs) and the input channels of a
            convolution (outputs, inputs, height, width); 0 for a transposed convolution.

    Returns:
        Whether every group keeps at most `kept`; a group may keep fewer.

    Raises:
        ValueError: a mask that is not bool or has no such dimension; a pattern that is none.

    Example:
        >>> two_four = torch.tensor([[True, False, False, True, False, True, False, False]])
        >>> is_semi_structured(two_four), is_semi_structured(~two_four)
        (True, False)
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError("pass one mask as a bool tensor, True = kept, e.g. find_masks(model)['fc.weight']")
    if not 1 <= kept <= of or of < 2:
        raise ValueError(f"a pattern keeps 1 to N of each N >= 2 neighbours; got {kept} of {of}")
    if not -mask.dim() <= dim < mask.dim():
        raise ValueError(f"the mask has shape {tuple(mask.shape)} and no dimension {dim}")
    if mask.shape[dim] % of:
        return False
    groups = mask.movedim(dim, -1).unflatten(-1, (-1, of)) if mask.numel() else mask.new_zeros(0, of)
    return bool((groups.sum(-1) <= kept).all())
