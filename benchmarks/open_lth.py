"""open_lth from a checkout of github.com/facebookresearch/open_lth, as it can be imported today."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy
from torch import nn


class _Plain(nn.Module):
    """Stands for a class of torch that open_lth derives a class from, in a way that torch no longer allows."""


def modules(checkout: Path, *names: str) -> list[ModuleType]:
    """Import modules of it by name, its platform set to this machine."""
    vars(numpy).setdefault("product", numpy.prod)  # which numpy 2 took away
    sys.path.insert(0, str(checkout))
    try:
        with mock.patch("torch.nn.parallel.DistributedDataParallel", _Plain):
            local = importlib.import_module("platforms.local")
            importlib.import_module("platforms.platform")._PLATFORM = local.Platform()
            return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(checkout))
