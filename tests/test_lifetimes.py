"""Nothing here keeps a model, or its class, alive: long processes, and notebooks that define a class again and again."""

import gc
import subprocess
import sys
import textwrap
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import sparsetweaks as st

BATCH = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))


def model_of_a_new_class() -> nn.Module:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norm = parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(torch.relu(self.act(self.conv(x)))).mean((2, 3))

    return st.apply_masks(Network(), {"conv.weight": torch.rand(3, 3, 3, 3) > 0.5})


USES = {
    "rewind": lambda model: st.rewind(model, model.state_dict()),
    "skips": st.inject_skips,
    "ghost skips": lambda model: st.inject_skips(model, ghost=True),
    "swap": lambda model: st.swap_activations(model, "mish"),
    "ghosts": lambda model: st.swap_activations(model, "swish", ghost=True),
    "ghosts removed": lambda model: st.remove_ghosts(
        without(st.swap_activations(model, "swish", ghost=True))
    ),
    "scales": lambda model: st.learn_layer_scales(model, BATCH, iterations=1),
    "fold": lambda model: st.fold(st.inject_skips(model), inputs=BATCH[0]),
    "convert": lambda model: st.convert_masks(model, to="parametrization"),
    "prune": lambda model: st.prune(st.remove_masks(model), 0.5, exclude="norm"),
    "tweak": lambda model: st.tweak(model, BATCH).model,
    "cost": lambda model: seen(st.cost, model, BATCH[0]),
    "verify": lambda model: seen(st.verify, model, model, inputs=BATCH[0]),
    "changes": lambda model: seen(st.changes, model),
    "summary": lambda model: seen(lambda model: str(st.summary(model, inputs=BATCH[0])), model),
}


def without(model: nn.Module) -> nn.Module:
    st.anneal_ghosts(model, 1.0)
    return model


def seen(look: Any, model: nn.Module, *given: Any, **options: Any) -> nn.Module:
    look(model, *given, **options)
    return model


def stands_in_its_file(cls: type) -> bool:
    return getattr(sys.modules[cls.__module__], cls.__qualname__, None) is cls


def test_torch_does_not_keep_what_stands_in_for_its_functions_during_a_trace():
    # torch looks for the functions that may be overridden once in a process, during the first trace of all if need be
    first = textwrap.dedent(
        """
        import torch, sparsetweaks as st

        class Network(torch.nn.Module):
            def forward(self, x):
                return torch.cat([x.relu(), x.sigmoid()])

        st.swap_activations(Network(), "mish")
        print(*map(torch.overrides.resolve_name, (torch.cat, torch.stack, torch.relu)))
        """
    )
    done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch.cat", "torch.stack", "torch.relu"]


@pytest.mark.parametrize("use", USES)
def test_a_model_and_its_classes_die_with_their_last_reference(use):
    model = model_of_a_new_class()
    tweaked = USES[use](model)
    tweaked(BATCH[0]).sum().backward()
    modules = [*model.modules(), *tweaked.modules()]
    classes = {type(each) for each in modules if not stands_in_its_file(type(each))}
    assert len(classes) >= 2  # the model's own, and that of its parametrized layer
    watched = {repr(each): weakref.ref(each) for each in (*classes, *modules)}
    del model, tweaked, modules, classes
    for _ in range(2):  # a rewritten class first, then what it was made from
        gc.collect()
    assert [name for name, reference in watched.items() if reference() is not None] == []
