"""What people write themselves: one small model per hazard, for the zoo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from zoo_models import Specimen


def _pictures(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 3, 16, 16, generator=generator),)


def _vectors(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    return (torch.randn(4, 16, generator=generator),)


def _unit(channels_in: int, channels_out: int, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class ControlFlowOnShapes(nn.Module):
    """Branches on the size of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = _unit(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        if x.shape[-1] > 8:
            x = F.avg_pool2d(x, 2)
        return self.body(x).mean((2, 3))


class LoopOverModuleList(nn.Module):
    """A loop in which each turn adds to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
            outputs.append(x)
        return outputs


class SharedLayers(nn.Module):
    """One unit and one in-place activation, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv, self.norm, self.act = (
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        for _ in range(2):
            x = self.act(self.norm(self.conv(x)) + x)
        return x.flatten(1)


class TiedWeights(nn.Module):
    """Two layers with one weight, and an input that an in-place activation overwrites while it is still read."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(16, 16), nn.Linear(16, 16)
        self.decode.weight = self.encode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.encode(x)
        out = F.relu_(hidden)
        return self.decode(out) + hidden


class OwnSequential(nn.Sequential):
    """A subclass of Sequential with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self:
            x = module(x)
        return F.leaky_relu(x, 0.2) + self[0](torch.zeros(()).to(x).expand(2, 3, 16, 16)).mean()


class ManyForms(nn.Module):
    """Activations as modules, functions, methods and attributes, in place or not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.act_fn, self.table = F.gelu, {"relu": F.relu}
        self.leaky = nn.LeakyReLU(0.3, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act_fn(self.layers[0](x))
        x = self.layers[1](x).relu()
        x = self.layers[2](x).relu_()
        x = torch.relu_(self.layers[3](x))
        x = self.leaky(self.layers[4](x))
        return self.table["relu"](self.layers[5](x))


class DropoutByMode(nn.Module):
    """Dropout that asks for the mode, and an auxiliary output in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.side = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.dropout(F.relu(self.first(x)), 0.5, training=self.training)
        if self.training:
            return self.second(x), F.relu(self.side(x))
        return self.second(x)


@dataclasses.dataclass
class Output:
    """What a model returns under names."""

    features: torch.Tensor
    logits: torch.Tensor | None = None


class NamedOutputs(nn.Module):
    """Returns a dict or a dataclass, and takes keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = _unit(3, 8)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0, as_dict: bool = False) -> Any:
        x = F.relu6(self.norm(self.conv(self.unit(x)))) * scale
        if as_dict:
            return {"features": x, "logits": x.mean((2, 3))}
        return Output(features=x, logits=x.mean((2, 3)))


class DataDependent(nn.Module):
    """Control flow that depends on values: it cannot be traced, its children can."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.other = _unit(3, 8), _unit(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.unit(x)
        if x.sum() > 0:
            x = self.other(x)
        return F.relu(x - 0.1)


class Counts(nn.Module):
    """Counts its calls, on an attribute and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.calls = 0
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.steps += 1
        return F.relu(self.layer(x)) * self.steps


class VariableArguments(nn.Module):
    """`*args` and `**kwargs`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        return F.relu(self.layer(inputs[0])) * options.get("scale", 1.0)


class ChunkedInPlace(nn.Module):
    """In-place activation on a view, with the whole tensor read afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x)
        half = hidden[:, :8]
        F.relu(half, inplace=True)
        return hidden


class Recurrent(nn.Module):
    """A recurrent layer, whose weights torch keeps in a list as well."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sequence, _ = self.recurrent(x[:, None, :].expand(-1, 3, -1))
        return torch.tanh(self.head(F.relu(sequence[:, -1])))


class Checkpointed(nn.Module):
    """Gradient checkpointing inside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = _unit(3, 8), _unit(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        return F.relu(checkpoint(self.body, self.stem(x), use_reentrant=False) + 0.1)


class NoGradInside(nn.Module):
    """A part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.layer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = F.relu(self.frozen(x))
        return F.relu(self.layer(x))


def _convolutions() -> nn.Sequential:
    return nn.Sequential(
        _unit(3, 8), _unit(8, 8), _unit(8, 16, stride=2), _unit(16, 16, groups=4), nn.Flatten()
    )


def _weight_norm() -> nn.Module:
    model = _convolutions()
    parametrizations.weight_norm(model[1][0])
    return model


def _spectral_norm() -> nn.Module:
    model = _convolutions()
    parametrizations.spectral_norm(model[1][0])
    return model


def _old_weight_norm() -> nn.Module:
    model = _convolutions()
    torch.nn.utils.weight_norm(model[1][0])
    return model


def _scripted_child() -> nn.Module:
    return nn.Sequential(_unit(3, 8), torch.jit.script(_unit(8, 8)), _unit(8, 8))


def _lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.LazyBatchNorm2d(), nn.ReLU(), _unit(8, 8))
    model(torch.zeros(2, 3, 16, 16))
    return model


def _double(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def _hooked() -> nn.Module:
    model = _convolutions()
    model[1].register_forward_hook(_double)
    model[1][2].register_forward_hook(_double)
    model[2][0].register_forward_hook(_double)
    return model


def _prepared_for_quantisation() -> nn.Module:
    from torch.ao import quantization

    model = nn.Sequential(_unit(3, 8), _unit(8, 8))
    model.train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(model)


def _low_rank() -> nn.Module:
    import peft

    model = nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(approximate="tanh"), nn.Linear(16, 4)
    )
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    )


def _channels_last() -> nn.Module:
    return _convolutions().to(memory_format=torch.channels_last)


def _graph_module() -> nn.Module:
    return torch.fx.symbolic_trace(LoopOverModuleList())


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (1, 16)), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    )


def _frozen_half() -> nn.Module:
    model = _convolutions()
    model[0].requires_grad_(False)
    model[0].eval()
    return model


def _double_precision() -> nn.Module:
    return _convolutions().double()


def _specimen(
    build: Callable[[], nn.Module], inputs: Any = _pictures, **options: Any
) -> Callable[[], Specimen]:
    shape = "4x16" if inputs is _vectors else "2x3x16x16"
    return lambda: Specimen(build, inputs, shape, **options)


HAZARDS: dict[str, Callable[[], Specimen]] = {
    "control flow on shapes": _specimen(ControlFlowOnShapes),
    "loop over a ModuleList": _specimen(LoopOverModuleList),
    "shared layers": _specimen(SharedLayers),
    "tied weights": _specimen(TiedWeights, _vectors),
    "Sequential subclass": _specimen(lambda: OwnSequential(_unit(3, 8), _unit(8, 8))),
    "activations in every form": _specimen(ManyForms, _vectors),
    "dropout by mode": _specimen(DropoutByMode, _vectors),
    "dataclass output": _specimen(NamedOutputs),
    "dict output, keyword arguments": _specimen(
        NamedOutputs, keywords=lambda generator: {"scale": 0.5, "as_dict": True}
    ),
    "data-dependent control flow": _specimen(DataDependent),
    "counts its calls": _specimen(Counts, _vectors),
    "variable arguments": _specimen(VariableArguments, _vectors, keywords=lambda generator: {"scale": 0.5}),
    "in place on a view": _specimen(ChunkedInPlace, _vectors),
    "recurrent layer": _specimen(Recurrent, _vectors),
    "gradient checkpointing": _specimen(Checkpointed),
    "no_grad inside": _specimen(NoGradInside, _vectors),
    "weight_norm parametrization": _specimen(_weight_norm),
    "weight_norm hook": _specimen(_old_weight_norm),
    "spectral_norm parametrization": _specimen(_spectral_norm),
    "scripted child": _specimen(_scripted_child),
    "lazy modules after a batch": _specimen(_lazy),
    "forward hooks": _specimen(_hooked),
    "quantisation-aware training": _specimen(_prepared_for_quantisation),
    "LoRA": _specimen(_low_rank, _vectors),
    "channels last": _specimen(_channels_last),
    "GraphModule": _specimen(_graph_module),
    "torch's own Transformer": _specimen(_transformer, _vectors),
    "half of it frozen": _specimen(_frozen_half),
    "double precision": _specimen(_double_precision, lambda generator: (_pictures(generator)[0].double(),)),
}
