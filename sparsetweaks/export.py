"""Out of the laboratory: weights without masks, in an ordinary checkpoint, in ONNX, or in a compact sparse file."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetweaks.calling import arguments, call
from sparsetweaks.converting import make_permanent
from sparsetweaks.copying import check_model, copy_model
from sparsetweaks.errors import MissingPackageError, SurgeryError
from sparsetweaks.forms import masked_places
from sparsetweaks.masks import apply_masks, find_masks, listed
from sparsetweaks.probing import rng_restored
from sparsetweaks.prunable import check_dense, check_values
from sparsetweaks.sparse_file import read as read_sparse
from sparsetweaks.sparse_file import write as write_sparse

Model = TypeVar("Model", bound=nn.Module)

Format = Literal["torch", "onnx", "sparse"]

# By what is computed in, of each value and beside it: ONNX Runtime has other kernels, in another order. In full precision
# ten times what torch.testing allows, in low precision ten units in the last place.
ONNX_TOLERANCES = {
    torch.float64: (1e-6, 1e-6),
    torch.float32: (1.3e-5, 1e-4),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (8e-2, 8e-2),
}
WEIGHTS_ALONE = "or export the weights alone, format='torch' or 'sparse'"
ONNX_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16, for which NumPy has no name


def remove_masks(model: Model) -> Model:
    """Return an ordinary copy of `model`: its masks made permanent and gone, the pruned weights exactly zero.

    All forms of masks go: our buffers, `torch.nn.utils.prune`'s `weight_orig` and hooks, mask parametrizations.
    What is left has the `state_dict` keys and the outputs of a model that never was masked, and the keys' order where
    a weight comes before its bias, or the layer is recurrent; `torch.nn.utils.prune` puts other weights last, and there
    they stay. Nothing holds the zeros any more if it is trained on.

    Args:
        model: any module, masked or not. It is not changed.

    Returns:
        A new model without masks.

    Example:
        >>> import torch, sparsetweaks as st
        >>> ticket = st.prune(torch.nn.Linear(4, 1), 0.5)
        >>> list(ticket.state_dict()), list(remove_masks(ticket).state_dict())
        (['weight', 'bias', 'weight_mask'], ['weight', 'bias'])
    """
    check_model(model)
    ordinary = copy_model(model)
    for place in masked_places(ordinary):
        make_permanent(place, ordinary)
    return ordinary


# ------------------------------------------------------------------------------------------------------------
# Writing


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: Format = "torch",
    inputs: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a masked model's weights without its masks, to be shipped.

    The file appears whole or not at all: it is written beside its place under another name, and then renamed.

    Args:
        model: any module, masked in any form or not at all. It is not changed.
        path: the file to write, in a folder that exists.
        format: what to write.

            - `"torch"`: the ordinary `state_dict` by `torch.save`, of the same size whatever the sparsity. Load it
              with `torch.load(path, weights_only=True)` into the architecture without masks.
            - `"sparse"`: a safetensors file that holds, of each masked weight, the values that its mask keeps and
              where they are. Load it with `load_sparse`, which gives every bit back. At 95 % sparsity it takes about
              a sixteenth of the dense bytes in fp32. A weight of plain zeros without a mask takes as little, and comes
              back as it was, without a mask.
            - `"onnx"`: the graph in evaluation mode, for the shapes of `inputs`. It is run in ONNX Runtime on these
              inputs before the file is put in its place, and its outputs must be the model's: to 1e-4 plus 1.3e-5 of
              each value in float32, 1e-6 twice in float64, 0.01 in float16, 0.08 in bfloat16 (of which ONNX Runtime
              has few operators), and whole numbers exactly. Zeros stay in it as zeros: it is no smaller, and no
              faster. Needs `pip install onnx onnxscript onnxruntime`.
        inputs: for `"onnx"`, which needs them: a tensor, a tuple of positional or a mapping of keyword arguments.
        overwrite: whether a file that is there may be replaced.

    Raises:
        FileExistsError: there is a file, and `overwrite` is False.
        FileNotFoundError: the folder does not exist.
        ValueError: an unknown format; inputs missing, or given where they mean nothing.
        TypeError: what is given is no module.
        SurgeryError: the model has no values (lazy, meta device), or weights that are stored in another way than number
            by number; it cannot be written in this format or not be run there, or computes something else there; or
            packages are missing, which the message names (then it is an `ImportError` too).

    Example:
        >>> import os, tempfile, torch, sparsetweaks as st
        >>> ticket = st.prune(torch.nn.Linear(256, 256), 0.95)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(ticket, f"{folder}/dense.pt")
        ...     export(ticket, f"{folder}/small.safetensors", format="sparse")
        ...     os.path.getsize(f"{folder}/small.safetensors") / os.path.getsize(f"{folder}/dense.pt") < 0.08
        True
    """
    check_model(model)
    if format not in get_args(Format):
        raise ValueError(f"unknown format {format!r}: choose from {', '.join(map(repr, get_args(Format)))}")
    if (inputs is None) == (format == "onnx"):
        raise ValueError(
            "format='onnx' needs inputs=, an example of what the model takes"
            if format == "onnx"
            else f"inputs are for format='onnx'; {format!r} writes weights only"
        )
    check_dense(dict(model.named_parameters()))
    state, masks = plain_state(model), find_masks(model)
    check_values({name: value for name, value in (state | masks).items() if isinstance(value, Tensor)})
    with _replacing(Path(path), overwrite) as temporary:
        if format == "onnx":
            _write_onnx(remove_masks(model), temporary, inputs)
        else:
            with open(temporary, "xb") as file:
                if format == "torch":
                    torch.save(state, file)
                else:
                    write_sparse(file, state, masks)
            if format == "torch":
                _check_loads(temporary, state)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` without masks: keys as of a model that never was masked, pruned weights exactly zero.

    With the versions of its modules, as `load_state_dict` of some asks for them.
    """
    return remove_masks(model).state_dict()


@contextmanager
def _replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A name beside `path` to write to; what is there on a normal exit takes the place of `path`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: make it first")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: pass overwrite=True to replace it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_loads(path: Path, state: Mapping[str, Any]) -> None:
    """Raise unless the file loads with weights_only=True; a state of tensors alone always does."""
    if all(isinstance(value, Tensor) for value in state.values()):
        return
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        kinds = sorted({type(value).__name__ for value in state.values() if not isinstance(value, Tensor)})
        raise SurgeryError(
            f"the state_dict holds {', '.join(kinds)} (get_extra_state), which weights_only=True will not load"
        ) from error


# ------------------------------------------------------------------------------------------------------------
# ONNX


def _write_onnx(model: nn.Module, path: Path, inputs: Any) -> None:
    runtime = _onnx_runtime()
    model = model.cpu().eval()
    with rng_restored(model):
        with torch.no_grad():
            wanted = _tensors(call(model, inputs))
        positional, keywords = arguments(model, inputs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch's own about itself
                torch.onnx.export(
                    model, positional, path, kwargs=keywords, external_data=False, verbose=False
                )
        except Exception as error:
            raise SurgeryError(
                f"torch.onnx cannot export this model: {_reasons(error)}. Write its forward as torch.export allows, "
                f"{WEIGHTS_ALONE}"
            ) from error
    given = _tensors((positional, keywords))
    precisions = {x.dtype for x in (*model.parameters(), *given, *wanted) if x.is_floating_point()}
    try:
        found = _run_onnx(runtime, path, given)
    except Exception as error:
        others = ", ".join(sorted(str(each) for each in precisions - {torch.float32}))
        advice = (
            f"It has few operators for {others}: export it in torch.float32" if others else "Rewrite that"
        )
        raise SurgeryError(
            f"ONNX Runtime cannot run this model: {_reasons(error)}. {advice}, {WEIGHTS_ALONE}"
        ) from error
    allowed = [ONNX_TOLERANCES[each] for each in ONNX_TOLERANCES if each in precisions]
    _check_same(wanted, found, max(allowed, default=(0.0, 0.0)))


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def _onnx_runtime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"format='onnx' needs the package {error.name}: pip install onnx onnxscript onnxruntime"
        ) from error
    return onnxruntime


def _run_onnx(runtime: Any, path: Path, given: list[Tensor]) -> list[Tensor]:
    """The outputs of the graph in a file."""

    def into(tensor: Tensor) -> Any:
        if tensor.dtype == torch.bfloat16:
            bits = tensor.contiguous().view(torch.uint16).numpy()
            return runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, ONNX_BFLOAT16)
        return runtime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())

    def out_of(value: Any) -> Tensor:
        if value.data_type() == "tensor(bfloat16)":
            return torch.from_dlpack(value)
        return torch.as_tensor(value.numpy())

    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feed = {name: into(tensor) for name, tensor in zip(names, given, strict=True)}
    return [out_of(value) for value in session.run_with_ort_values(None, feed)]


def _check_same(wanted: list[Tensor], found: list[Tensor], tolerance: tuple[float, float]) -> None:
    """Raise unless these are the same outputs; whole numbers exactly so."""
    kinds, theirs = (", ".join(map(_kind, outputs)) for outputs in (wanted, found))
    if kinds != theirs:
        raise SurgeryError(f"ONNX Runtime gives {theirs} where the model gives {kinds}. Nothing was written")
    for index, (ours, given) in enumerate(zip(wanted, found, strict=True)):
        relative, absolute = tolerance if ours.is_floating_point() else (0.0, 0.0)
        ours, given = ours.double(), given.double()
        if not torch.allclose(ours, given, relative, absolute, equal_nan=True):
            most = (ours - given).abs().max().item()
            raise SurgeryError(
                f"ONNX Runtime computes something else: output {index} differs by up to {most:.3g}, and {absolute:g} plus "
                f"{relative:g} of each value are allowed. Nothing was written. Does the model draw random numbers? Make it "
                f"compute the same each time, {WEIGHTS_ALONE}"
            )


def _reasons(error: BaseException) -> str:
    """The first line of each of an error's causes, if it has any: torch.onnx's own error tells its steps alone."""
    causes = []
    while error.__cause__ is not None:
        error = error.__cause__
        causes.append(error)
    lines = [(str(each) or type(each).__name__).splitlines()[0] for each in causes or [error]]
    return "; ".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Reading


@overload
def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]: ...
@overload
def load_sparse(path: str | os.PathLike[str], *, into: Model) -> Model: ...


def load_sparse(path: str | os.PathLike[str], *, into: nn.Module | None = None) -> Any:
    """Read what `export(..., format="sparse")` wrote, every bit as it was.

    Args:
        path: the file.
        into: a model of the architecture, masked or not, whose copy gets the weights and the masks. It is not
            changed.

    Returns:
        The `state_dict` of the model without masks, on the CPU, pruned weights zero; or, with `into`, a new model
        with the weights and masks of the file.

    Raises:
        TypeError: `into` is no module.
        SurgeryError: the file is no sparse file, of a later version, or damaged; or it does not fit `into`: a name is
            missing or unknown, a shape or dtype differs, or two tensors of the file are one tied weight there.

    Example:
        >>> import tempfile, torch, sparsetweaks as st
        >>> ticket = st.prune(torch.nn.Linear(8, 8), 0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(ticket, f"{folder}/small.safetensors", format="sparse")
        ...     state = load_sparse(f"{folder}/small.safetensors")
        ...     again = load_sparse(f"{folder}/small.safetensors", into=torch.nn.Linear(8, 8))
        >>> list(state), torch.equal(again.weight_mask, ticket.weight_mask)
        (['weight', 'bias'], True)
    """
    contents = read_sparse(path)
    if into is None:
        return contents.state
    check_model(into)
    check_dense(dict(into.named_parameters()))
    loaded = remove_masks(into)
    _check_fits(path, contents.state, loaded.state_dict())
    try:
        loaded.load_state_dict(contents.state)
    except RuntimeError as error:
        raise SurgeryError(f"{path} does not fit the model: {error}") from error
    return apply_masks(loaded, contents.masks) if contents.masks else loaded


def _check_fits(path: Any, stored: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> None:
    """Raise unless every bit of `stored` has a place of its own among what a model holds."""
    missing = [name for name in wanted if name not in stored]
    unknown = [name for name in stored if name not in wanted]
    if missing or unknown:
        raise SurgeryError(
            f"{path} does not fit the model: the file lacks {listed(missing)}, and the model does not know "
            f"{listed(unknown)}. Build the architecture that was exported, with the same tweaks"
        )
    first: dict[Any, str] = {}
    for name, value in stored.items():
        own = wanted[name]
        if own.is_meta:
            raise SurgeryError(
                f"{name!r} of the model is on the meta device: model.to_empty(device=...) first"
            )
        check_values({name: own})
        if (own.shape, own.dtype) != (value.shape, value.dtype):
            raise SurgeryError(
                f"{path} does not fit the model: {name!r} is {_kind(value)} in the file, and {_kind(own)} in the model. "
                "Build the model as it was exported; cast it, if need be, afterwards"
            )
        same = first.setdefault((own.data_ptr(), own.stride()) if own.numel() else name, name)
        if value is not stored[same] and not torch.equal(_bytes(value), _bytes(stored[same])):
            raise SurgeryError(
                f"{path} does not fit the model: {same!r} and {name!r} are one tied weight in the model, and two in the "
                "file. Untie them (a parameter of its own for each)"
            )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
