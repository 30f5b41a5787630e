"""Which operators work number by number."""

from __future__ import annotations

import functools

import torch


@functools.cache
def works_number_by_number(name: str) -> bool:
    """Whether PyTorch calls the operator of this name pointwise: `add`, `add_`, `__radd__`, ..."""
    bare = name.strip("_")
    for each in (bare, bare[1:] if name.startswith("__") else bare):
        packet = getattr(torch.ops.aten, each, None)
        overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()
        if any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in overloads):
            return True
    return False
