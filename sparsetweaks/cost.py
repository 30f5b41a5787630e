"""What a model costs: parameters, non-zeros, multiplications that survive its masks, memory and bytes on disk."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetweaks.calling import arguments, call_with
from sparsetweaks.copying import check_model, copy_model
from sparsetweaks.export import plain_state
from sparsetweaks.masks import find_masks, masks_by_parameter
from sparsetweaks.probing import rng_restored
from sparsetweaks.prunable import (
    check_dense,
    check_values,
    is_lazy,
    plain_zeros,
    select_weights,
    warn_of_zeros,
)
from sparsetweaks.sparse_file import size as sparse_size

_aten = torch.ops.aten

# What leaves a pruned weight zero: its result carries the same mask, so that a weight is known again in low precision
# and in the forms that multiply the mask in.
_KEEPS_ZEROS = (_aten.mul, _aten.div, _aten._to_copy, _aten.clone, _aten.neg)
# Where factors stand among the arguments, if something that is only added stands there too.
_FACTORS = {
    _aten.addmm: slice(1, 3),
    _aten.baddbmm: slice(1, 3),
    _aten.convolution: slice(0, 2),
    _aten._convolution: slice(0, 2),
}
_RUNNING = "(outside any module)"


@dataclass(frozen=True)
class ModuleCost:
    """What one module itself costs, without the modules inside it."""

    name: str
    type: str
    parameters: int
    nonzeros: int
    """Those of its parameters that no mask removes and that are no plain zeros."""
    flops: int
    effective_flops: int
    """The FLOPs that are left when multiplications by pruned weights are not counted."""


@dataclass(frozen=True)
class Cost:
    """What a model costs, module by module and overall; `print` it for a table."""

    modules: tuple[ModuleCost, ...]
    """The modules that have parameters of their own or compute what is counted, in order of registration."""
    added_nonzeros: int
    """How many of the non-zeros a tweak added."""
    peak_activation_bytes: int
    disk_bytes: int | None
    """Of the file that `export(..., format="torch")` writes; None on the meta device."""
    sparse_disk_bytes: int | None
    """Of the file that `export(..., format="sparse")` writes; None on the meta device."""

    @property
    def parameters(self) -> int:
        """All parameters, a tied one once, with what tweaks added."""
        return sum(module.parameters for module in self.modules)

    @property
    def nonzeros(self) -> int:
        """Those of the parameters that no mask removes and that are no plain zeros, with what tweaks added."""
        return sum(module.nonzeros for module in self.modules)

    @property
    def flops(self) -> int:
        """Of one forward of these inputs, two per multiply-add."""
        return sum(module.flops for module in self.modules)

    @property
    def effective_flops(self) -> int:
        """The FLOPs without those by pruned weights."""
        return sum(module.effective_flops for module in self.modules)

    def __str__(self) -> str:
        head = ("module", "type", "parameters", "non-zeros", "FLOPs", "effective")
        rows = [
            (m.name, m.type, *_thousands(m.parameters, m.nonzeros, m.flops, m.effective_flops))
            for m in self.modules
        ]
        numbers = _thousands(self.parameters, self.nonzeros, self.flops, self.effective_flops)
        total = ("all", "", *numbers)
        columns = list(zip(head, *rows, total, strict=True))
        widths = [max(map(len, column)) for column in columns]
        rule = tuple("-" * width for width in widths)
        lines = [
            "  ".join(
                [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
            ).rstrip()
            for row in (head, rule, *rows, rule, total)
        ]
        if self.added_nonzeros:
            lines.append(f"non-zeros that tweaks added, counted above: {self.added_nonzeros:,}")
        lines.append(f"peak activation memory: {self.peak_activation_bytes:,} bytes")
        if self.disk_bytes is not None and self.sparse_disk_bytes is not None:
            lines.append(f"on disk: {self.disk_bytes:,} bytes, sparse {self.sparse_disk_bytes:,}")
        return "\n".join(lines)


def cost(model: nn.Module, inputs: Any) -> Cost:
    """Count what a model costs for these inputs, with what tweaks added, and without what masks removed.

    A FLOP is counted as `torch.utils.flop_counter` does: two per multiply-add of matrix products, convolutions and
    attention; nothing for normalisation, activations, additions (so an identity skip counts nothing), pooling,
    look-ups and fused recurrent layers. Padding is multiplied with, as there. A FLOP is *effective* unless it belongs
    to a multiplication by a weight that a mask removes; this is known for weights that reach the product as they are,
    by view, in another precision, or scaled, and all others count as dense. Whether any machine runs faster for it is
    another question.

    *Plain zeros* count as if a mask removed them: exact zeros of prunable weights (`prunable_weights`) without a mask,
    where there are more than may be so by chance (one in 10,000). An `UnmaskedZerosWarning` says so, as only you know
    whether a pruner left them or they are to be trained; a mask, of either kind, settles it.

    *Peak activation memory* is the largest sum of bytes, at any moment of one forward in evaluation mode without
    gradients, of the memory that live tensors hold other than parameters and buffers: inputs, intermediate results and
    outputs, memory that several share once. It is the same on every device. Workspaces inside one operation and what
    an allocator keeps in reserve are not in it.

    Args:
        model: any module, masked in any form or not. It is not changed, and runs as a copy in evaluation mode. A model
            on the meta device can be counted where it has no masks.
        inputs: what one call of the model takes, without labels: a tensor, a tuple of positional or a mapping of keyword
            arguments. FLOPs and memory are for all of it: take a batch of one for those of a sample.

    Returns:
        Counts per module and overall.

    Raises:
        TypeError: what is given is no module.
        SurgeryError: the masks have no values (meta device); a parameter or buffer is stored in another way than number by
            number (sparse layouts, quantized); the model fails on the inputs; or the state has what a file cannot hold.

    Example:
        >>> import torch, sparsetweaks as st
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> ticket = st.prune(model, 0.75)
        >>> print(cost(ticket, torch.zeros(1, 8)))  # doctest: +ELLIPSIS
        module  type    parameters  non-zeros  FLOPs  effective
        ------  ------  ----------  ---------  -----  ---------
        0       Linear         144         48    256         64
        2       Linear          34         34     64         64
        ------  ------  ----------  ---------  -----  ---------
        all                    178         82    320        128
        peak activation memory: 160 bytes
        on disk: ... bytes, sparse ...
    """
    check_model(model)
    found = counted(model, inputs)
    warn_of_zeros(plain_zeros(select_weights(model), masks_by_parameter(model)))
    return found


def counted(model: nn.Module, inputs: Any) -> Cost:
    """`cost` without its warning, for whoever tells of plain zeros in another way."""
    check_dense(dict([*model.named_parameters(), *model.named_buffers()]))
    check_values(
        {name: parameter for name, parameter in model.named_parameters() if is_lazy(parameter)}
        | find_masks(model)
    )
    copied = copy_model(model).eval()
    masks = masks_by_parameter(copied)
    masks |= plain_zeros(select_weights(copied), masks)
    positional, keywords = arguments(copied, inputs)
    watch = _Watch(copied, masks, (positional, keywords))
    with (
        rng_restored(copied),
        _unfused_attention(),
        torch.no_grad(),
        _names_of_running(copied) as running,
    ):
        watch.running = running
        with watch:
            call_with(copied, positional, keywords)
    disk, sparse = _disk_bytes(model)
    return Cost(
        modules=tuple(_module_costs(copied, masks, watch.flops)),
        added_nonzeros=_added_nonzeros(copied, masks),
        peak_activation_bytes=watch.peak,
        disk_bytes=disk,
        sparse_disk_bytes=sparse,
    )


# ------------------------------------------------------------------------------------------------------------
# One forward, watched


class _Watch(TorchDispatchMode):
    """Counts FLOPs and the memory of live tensors, operation by operation."""

    def __init__(self, model: nn.Module, masks: dict[nn.Parameter, Tensor], inputs: Any) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # takes longer to import than all of this package

        self._registry: dict[Any, Any] = flop_registry
        self.flops: dict[str, list[int]] = {}
        self.peak = 0
        self.running: Callable[[], str] = lambda: _RUNNING
        self._live = 0
        self._masks: dict[int, tuple[int, int, Tensor]] = {}
        self._known = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
        for parameter, mask in masks.items():
            self._remember(parameter, mask)
        for tensor in pytree.tree_leaves(inputs):
            if isinstance(tensor, Tensor):
                self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self._registry and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if packet in self._registry:
            self._count(packet, args, kwargs, result)
        elif packet in _KEEPS_ZEROS:
            self._pass_on(args, result)
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _count(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        flops = self._registry[packet](*args, **kwargs, out_val=result)
        effective = flops
        for operand in args[_FACTORS.get(packet, slice(None))]:
            kept = self._kept(operand) if isinstance(operand, Tensor) else None
            if kept is not None and operand.numel():
                effective = min(effective, flops * int(kept.sum()) // operand.numel())
        counts = self.flops.setdefault(self.running(), [0, 0])
        counts[0] += flops
        counts[1] += effective

    # Masks by the memory that a weight lies in, so that any view of it finds the mask.

    def _remember(self, weight: Tensor, mask: Tensor) -> None:
        storage = weight.untyped_storage()
        laid_out = torch.empty_strided(weight.shape, weight.stride(), dtype=torch.bool, device=mask.device)
        self._masks[id(storage)] = int(weight.storage_offset()), weight.itemsize, laid_out.copy_(mask)
        weakref.finalize(storage, self._masks.pop, id(storage), None)

    def _kept(self, operand: Tensor) -> Tensor | None:
        """The mask of an operand, if it is a masked weight or a view of one."""
        found = self._masks.get(id(operand.untyped_storage()))
        if found is None:
            return None
        first, size, mask = found
        parts, rest = divmod(size, operand.itemsize)  # a complex number's parts share its mask
        if rest or not parts:
            return None
        strides = [stride // parts for stride in operand.stride()]
        return mask.as_strided(operand.shape, strides, operand.storage_offset() // parts - first)

    def _pass_on(self, args: tuple[Any, ...], result: Tensor) -> None:
        for operand in args:
            kept = self._kept(operand) if isinstance(operand, Tensor) else None
            if kept is not None and kept.shape == result.shape:
                self._remember(result, kept)
                return

    # Memory: each storage from when it is first seen until nothing refers to it.

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, key: int, count: int) -> None:
        self._known.discard(key)
        self._live -= count


@contextmanager
def _names_of_running(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Yield what tells the name of the innermost module whose forward runs."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(
            module, torch.jit.ScriptModule
        ):  # takes no hooks: what it does counts for the module around it
            continue

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            stack.append(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield lambda: stack[-1] if stack else _RUNNING
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Within, nn.TransformerEncoderLayer and nn.MultiheadAttention run as the operations that are counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# ------------------------------------------------------------------------------------------------------------
# Counting


def _module_costs(
    model: nn.Module, masks: dict[nn.Parameter, Tensor], flops: dict[str, list[int]]
) -> Iterator[ModuleCost]:
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        counted, effective = flops.get(name, (0, 0))
        if own or counted:
            yield ModuleCost(
                name or "(the model itself)",
                type(module).__name__,
                sum(p.numel() for p in own),
                sum(_nonzeros(p, masks) for p in own),
                counted,
                effective,
            )


def _nonzeros(parameter: nn.Parameter, masks: dict[nn.Parameter, Tensor]) -> int:
    return int(masks[parameter].sum()) if parameter in masks else parameter.numel()


def _added_nonzeros(model: nn.Module, masks: dict[nn.Parameter, Tensor]) -> int:
    added = (module for module in model.modules() if getattr(module, "added_by_tweak", False))
    return sum(_nonzeros(p, masks) for p in {p for module in added for p in module.parameters()})


def _disk_bytes(model: nn.Module) -> tuple[int | None, int | None]:
    """Of the exported weights, as `torch.save` and as the sparse file have them."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return None, None
    state, sink = plain_state(model), _Sink()
    torch.save(state, sink)
    return sink.count, sparse_size(state, find_masks(model))


class _Sink(io.BytesIO):
    """A file that only counts what is written to it."""

    count = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.count += size
        return size


def _thousands(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:,}" for number in numbers)
