"""Hold pruned weights at zero through training, whatever the optimizer does."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from sparsetweaks.copying import check_model
from sparsetweaks.forms import INTEGERS, Place, masked_parameters
from sparsetweaks.prunable import how_to_mask

# LBFGS keeps its state for all parameters in one flat vector each: single ones, and lists of them.
_LBFGS_VECTORS = ("d", "prev_flat_grad")
_LBFGS_HISTORIES = ("old_dirs", "old_stps")
_LBFGS_LEAST_CURVATURE = 1e-10  # as in torch.optim.LBFGS: a pair below it is not kept


@contextmanager
def keep_masks(model: nn.Module, *optimizers: Optimizer) -> Iterator[None]:
    """Hold pruned weights at exactly zero while you train, whatever the optimizer does (paper, section 3).

    On entry the pruned weights, their gradients and their optimizer state are zeroed (momentum, say, from
    before the masks). Within, a gradient hook on every masked parameter zeroes the gradient of what is
    pruned, so that gradient clipping, line searches and distributed averaging see the sparse network alone;
    and after every `optimizer.step()` the pruned weights and their optimizer state are zeroed again, also
    where the optimizer made them infinite or NaN. On leaving, by whatever way, the hooks are gone and the
    masks remain.

    The masks are those of the model's buffers at each moment, so a checkpoint may be loaded within. Parameter
    groups may be added within. Layers of `torch.nn.utils.prune` and mask parametrizations hold their own
    weights; for these only gradients and optimizer state are held. It costs one integer AND per masked
    tensor of weights, gradients and state, and the memory of one more copy of the masked weights. Of weights
    that FSDP2 shards, each process holds its own shard.

    Args:
        model: the masked model that is trained, also wrapped by torch.compile or DistributedDataParallel, or
            sharded by `fully_shard`.
        optimizers: every optimizer that steps its parameters.

    Raises:
        TypeError: what is given first is no module.
        ValueError: the model has no masks, no optimizer is given, or none of the masked parameters is in one
            (the usual cause: the optimizer was built for another copy of the model).

    Example:
        >>> import torch, sparsetweaks as st
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> ticket = st.apply_masks(layer, {"weight": torch.tensor([[True, False]])})
        >>> optimizer = torch.optim.SGD(ticket.parameters(), lr=0.1, momentum=0.9)
        >>> with keep_masks(ticket, optimizer):
        ...     ticket(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> ticket.weight[0, 1].item()
        0.0
    """
    if isinstance(model, Optimizer):
        raise TypeError(f"keep_masks takes the model first, then the optimizers; got {type(model).__name__}")
    check_model(model)
    _reshard(model)
    held = {parameter: _Held(place) for parameter, place in masked_parameters(model).items()}
    if not held:
        raise ValueError(f"the model has no masks to keep: {how_to_mask(model)}")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"expected torch.optim optimizers after the model, got {type(optimizer).__name__}"
            )
    if not any(parameter in held for optimizer in optimizers for parameter in _parameters_of(optimizer)):
        raise ValueError(
            "none of the masked parameters is in the optimizers: build the optimizer from the parameters "
            "of this very model (every function here returns a new one), then keep_masks(model, optimizer)"
        )

    by_id = {id(parameter): hold for parameter, hold in held.items()}  # hashing a tensor takes longer

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _zero_pruned(optimizer, by_id)

    with ExitStack() as stack:
        for parameter, hold in held.items():
            hold.zero_gradient_(parameter)
            stack.callback(_register_gradient_hook(parameter, hold).remove)
        with torch.no_grad():
            for hold in held.values():
                hold.zero_weight_(hold.bits())
        for optimizer in dict.fromkeys(optimizers):
            _zero_pruned(optimizer, by_id)
            if isinstance(optimizer, LBFGS):
                _renew_curvature(optimizer)
            stack.callback(optimizer.register_step_post_hook(after_step).remove)
        yield


class _Held:
    """A masked parameter, with its mask as integers of its width: all bits set where kept, else none.

    ANDed with the bits of a tensor they give an exact zero also for NaN and inf, where multiplying would
    not, and on a CPU in about a tenth of the time of `masked_fill_`.
    """

    def __init__(self, place: Place) -> None:
        self._parameter = place.parameter
        self._plain = place.plain
        self._slots = place.slots()
        self._stored: list[tuple[Tensor | None, int | None]] = [(None, -1) for _ in self._slots]

    def bits(self) -> Tensor:
        for (buffers, key), (known, version) in zip(self._slots, self._stored):
            stored = buffers[key]
            if stored is not known or (stored is not None and stored._version != version):
                break  # loaded, moved or changed
        else:
            return self._bits
        stored_now = [buffers[key] for buffers, key in self._slots]
        self._stored = [(each, None if each is None else each._version) for each in stored_now]
        integer = INTEGERS.get(self._parameter.dtype.itemsize, torch.int8)
        kept = [each != 0 for each in stored_now if each is not None]
        mask = functools.reduce(torch.Tensor.logical_and, kept)
        self._bits: Tensor = _shard_of(mask, self._parameter).to(integer).neg_()
        return self._bits

    def zero_weight_(self, bits: Tensor) -> None:
        """Zero the pruned weights, where they are the parameter's own; call it without gradients."""
        if self._plain:
            _zero(self._parameter, bits)

    @torch.no_grad()
    def zero_gradient_(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            _zero(parameter.grad, self.bits())

    def zeroed(self, gradient: Tensor) -> Tensor:
        bits = self.bits()
        if gradient.layout == torch.sparse_coo:  # an embedding's: of the rows that were looked up
            gradient = gradient.coalesce()
            places, values = gradient.indices(), gradient.values()
            values = values.masked_fill(bits[tuple(places)] == 0, 0)
            return torch.sparse_coo_tensor(
                places, values, gradient.shape, is_coalesced=True, check_invariants=False
            )
        # with create_graph the gradient has a gradient itself, and integers have none
        if gradient.requires_grad or not _fit(gradient, bits):
            return gradient.masked_fill(bits == 0, 0)
        return (gradient.view(bits.dtype) & bits).view(gradient.dtype)


def _zero(tensor: Tensor, bits: Tensor) -> None:
    """Zero the pruned places of a tensor shaped like the parameter that these bits are of."""
    tensor = _local(tensor)
    if _fit(tensor, bits):
        tensor.view(bits.dtype).bitwise_and_(bits)
    else:  # optimizer state of another width, or held elsewhere
        tensor.masked_fill_((bits == 0).to(tensor.device), 0)


def _fit(tensor: Tensor, bits: Tensor) -> bool:
    return tensor.dtype.itemsize == bits.dtype.itemsize and tensor.device == bits.device


def _register_gradient_hook(parameter: nn.Parameter, hold: _Held) -> Any:
    """Have each gradient zeroed, also of a parameter that is frozen now: it may be unfrozen later."""
    frozen = not parameter.requires_grad
    parameter.requires_grad_(True)
    if _is_sharded(parameter):  # FSDP sets a shard's gradient itself, past the hooks of gradients
        handle = parameter.register_post_accumulate_grad_hook(hold.zero_gradient_)
    else:
        handle = parameter.register_hook(hold.zeroed)
    parameter.requires_grad_(not frozen)
    return handle


def _is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "placements")


def _local(tensor: Any) -> Tensor:
    """The memory of a tensor in this process."""
    if type(tensor) in (Tensor, nn.Parameter):  # as asking for an attribute that is not there takes longer
        return tensor
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _shard_of(mask: Any, parameter: Any) -> Tensor:
    """The part of a mask that belongs to this process's shard of a parameter; nothing is communicated."""
    if not _is_sharded(parameter):
        return mask
    from torch.distributed.tensor import DTensor, Replicate  # loaded long since where there is one

    mesh = parameter.device_mesh
    if not _is_sharded(mask):
        replicated = [Replicate()] * mesh.ndim
        mask = DTensor.from_local(mask.to(parameter.device), mesh, replicated, run_check=False)
    return mask.redistribute(placements=parameter.placements).to_local()


def _reshard(model: nn.Module) -> None:
    """Have FSDP2 put back its shards, which are what the optimizer steps: after a forward pass alone the whole
    parameters of the outermost module stay in their place."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


@torch.no_grad()
def _zero_pruned(optimizer: Optimizer, held: Mapping[int, _Held]) -> None:
    """Zero the pruned weights that `optimizer` steps, and all the state it keeps for them."""
    for parameter in _parameters_of(optimizer):
        hold = held.get(id(parameter))
        if hold is None:
            continue
        bits = hold.bits()
        hold.zero_weight_(bits)
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                _zero(value, bits)
    if isinstance(optimizer, LBFGS):
        parameters = list(_parameters_of(optimizer))
        sizes = [parameter.numel() * (1 + parameter.is_complex()) for parameter in parameters]
        for vector in _lbfgs_vectors(optimizer):
            for parameter, part in zip(parameters, vector.split(sizes), strict=True):
                if hold := held.get(id(parameter)):
                    part = torch.view_as_complex(part.view(-1, 2)) if parameter.is_complex() else part
                    _zero(part.view(parameter.shape), hold.bits())


def _lbfgs_vectors(optimizer: LBFGS) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (state[key] for key in _LBFGS_VECTORS if state.get(key) is not None)
        for key in _LBFGS_HISTORIES:
            yield from state.get(key) or ()


def _renew_curvature(optimizer: LBFGS) -> None:
    """Bring LBFGS's scalars back in line with its history, after parts of the history were zeroed."""
    for state in optimizer.state.values():
        if not state.get("old_dirs"):
            continue
        pairs = [(y, s, y.dot(s)) for y, s in zip(state["old_dirs"], state["old_stps"], strict=True)]
        pairs = [(y, s, ys) for y, s, ys in pairs if ys > _LBFGS_LEAST_CURVATURE]
        state["old_dirs"] = [y for y, _, _ in pairs]
        state["old_stps"] = [s for _, s, _ in pairs]
        state["ro"] = [1.0 / ys for _, _, ys in pairs]
        state["H_diag"] = pairs[-1][2] / pairs[-1][0].dot(pairs[-1][0]) if pairs else 1
