"""Costs are counted exactly, on networks small enough to count by hand, and the model is left alone."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode

import sparsetweaks as st
from sparsetweaks.cost import cost


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def row(found: object, name: str) -> tuple[int, int, int, int]:
    (m,) = [m for m in found.modules if m.name == name]  # type: ignore[attr-defined]
    return m.parameters, m.nonzeros, m.flops, m.effective_flops


# ---------------------------------------------------------------------------------------------------------
# FLOPs and parameters


def test_convolutions_by_hand():
    masked = st.prune(convolutions(), 0.75, scope="layer")
    found = cost(masked, torch.zeros(2, 3, 7, 7))
    # outputs of 7x7 and 3x3; two images; two FLOPs per multiply-add
    assert row(found, "0") == (216, 54, 2 * 2 * 49 * 216, 2 * 2 * 49 * 54)
    assert row(found, "3") == (288 + 8, 72 + 8, 2 * 2 * 9 * 288, 2 * 2 * 9 * 72)
    assert row(found, "1") == (16, 16, 0, 0)
    assert row(found, "6") == (45, 45, 2 * 2 * 40, 2 * 2 * 40)
    assert found.parameters == sum(p.numel() for p in masked.parameters())
    assert found.nonzeros == st.sparsity(masked).parameters_kept


def test_the_dense_count_is_that_of_torch():
    from torchvision.models import resnet18

    model, images = resnet18().eval(), torch.zeros(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    found = cost(model, images)
    assert found.flops == found.effective_flops == counter.get_total_flops()
    theirs = counter.get_flop_counts()["ResNet.layer2.0.conv1"]
    assert row(found, "layer2.0.conv1")[2] == sum(theirs.values())


def fake_sparsity(mask: Tensor) -> nn.Module:
    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight: Tensor) -> Tensor:
            return self.mask * weight

    return Masking()


@pytest.mark.parametrize("form", ["ours", "torch", "parametrization"])
@pytest.mark.parametrize("autocast", [False, True])
def test_effective_flops_are_found_in_every_form_of_mask_and_precision(form, autocast):
    model = chain()
    mask = torch.zeros(8, 4, dtype=torch.bool)
    mask[0] = True
    if form == "ours":
        model = st.apply_masks(model, {"0.weight": mask})
    elif form == "torch":
        torch_prune.custom_from_mask(model[0], "weight", mask)
    else:
        parametrize.register_parametrization(model[0], "weight", fake_sparsity(mask))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = cost(model, torch.zeros(3, 4))
    dense = 2 * 3 * (8 * 4 + 2 * 8)
    assert (found.flops, found.effective_flops) == (dense, dense - 2 * 3 * 28)
    assert found.nonzeros == found.parameters - 28


def test_a_slice_of_a_masked_weight_counts_by_its_own_part_of_the_mask():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight[2:])

    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[:2] = True
    mask[3, 1] = True
    found = cost(st.apply_masks(Halves(), {"weight": mask}), torch.zeros(5, 3))
    assert (found.flops, found.effective_flops) == (2 * 5 * 6, 2 * 5 * 1)


def test_zeros_that_a_mask_keeps_are_multiplied_with():
    model = chain()
    nn.init.zeros_(model[0].weight)
    found = cost(st.prune(model, 0.0), torch.zeros(1, 4))
    assert found.effective_flops == found.flops and found.nonzeros == found.parameters


def test_memory_formats_and_transposed_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2, stride=2), nn.Conv2d(6, 2, 1))
    masked = st.prune(model.to(memory_format=torch.channels_last), 0.9)
    found = cost(masked, torch.zeros(1, 3, 6, 6).to(memory_format=torch.channels_last))
    kept = {name: int(mask.sum()) for name, mask in st.find_masks(masked).items()}
    assert row(found, "0")[3] == 2 * 16 * kept["0.weight"]
    assert row(found, "1")[3] == 2 * 16 * kept["1.weight"]  # each weight meets every input pixel
    assert row(found, "1")[2] == 2 * 16 * 4 * 6 * 4


def test_a_module_called_twice_and_a_tied_weight():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    masked = st.prune(Twice(), 6 / 9, include="*")
    found = cost(masked, torch.zeros(1, 3))
    assert row(found, "a") == (9, 3, 36, 12)
    assert row(found, "b") == (0, 0, 18, 6)


def test_attention_is_counted_whether_torch_would_fuse_it_or_not():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    found = cost(layer, torch.zeros(2, 5, 8))
    projections = 2 * 10 * 8 * (24 + 8 + 16 + 16)
    attention = 2 * 2 * 2 * 2 * 5 * 5 * 4  # two products, two images, two heads
    assert found.flops == projections + attention
    masked = st.prune(layer, 0.5, layers=("linear",), include="*")
    assert cost(masked, torch.zeros(2, 5, 8)).effective_flops == projections // 2 + attention


def test_what_tweaks_added_is_counted():
    model = convolutions()
    tweaked = st.inject_skips(st.prune(model, 0.9), shortcut="projection", strength=1.0, norm=True)
    report, found = st.sparsity(tweaked), cost(tweaked, torch.zeros(1, 3, 8, 8))
    assert report.added_kept > 0
    assert found.added_nonzeros == report.added_kept
    assert found.nonzeros == report.parameters_kept + report.added_kept
    assert f"added, counted above: {report.added_kept}" in str(found)
    assert found.flops > cost(model, torch.zeros(1, 3, 8, 8)).flops


# ---------------------------------------------------------------------------------------------------------
# Memory


def test_peak_memory_by_hand():
    """Floats: the input's 12 always; linear 24; with the ReLU's 24 more; then the first 24 are gone, and 6 come."""
    assert cost(chain(), torch.zeros(3, 4)).peak_activation_bytes == 4 * (12 + 24 + 24)


def test_work_in_place_and_views_take_no_memory_and_a_residual_holds_its_input():
    class Residual(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2  # 100
            z = (y + 1).relu_().view(-1)  # 200
            return z.view(10, 10) + y  # 300

    assert cost(Residual(), torch.zeros(10, 10)).peak_activation_bytes == 4 * (100 + 300)
    narrow = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    assert cost(narrow, torch.zeros(3, 4)).peak_activation_bytes == 4 * (12 + 24 + 6)


def test_parameters_buffers_and_masks_are_not_activations():
    dense = cost(chain(), torch.zeros(3, 4)).peak_activation_bytes
    assert cost(st.prune(chain(), 0.5), torch.zeros(3, 4)).peak_activation_bytes == dense
    wide = cost(chain().double(), torch.zeros(3, 4, dtype=torch.float64)).peak_activation_bytes
    assert wide == 2 * dense


def test_low_precision_copies_of_weights_are_let_go():
    """Autocast's cast weights live as long as autocast keeps them, not as long as the count."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10, 10))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = x @ self.weight.bfloat16()
            return x

    masked = st.apply_masks(Cast(), {"weight": torch.eye(10, dtype=torch.bool)})
    found = cost(masked, torch.zeros(1, 10, dtype=torch.bfloat16))
    assert found.peak_activation_bytes == 2 * (10 + 10 + 100 + 10)  # given, last, weight, new
    assert found.effective_flops == found.flops // 10


# ---------------------------------------------------------------------------------------------------------
# Disk


def test_bytes_on_disk_are_those_of_the_files(tmp_path):
    masked = st.prune(convolutions(), 0.95)
    found = cost(masked, torch.zeros(1, 3, 8, 8))
    st.export(masked, tmp_path / "dense.pt")
    st.export(masked, tmp_path / "sparse", format="sparse")
    assert found.sparse_disk_bytes == (tmp_path / "sparse").stat().st_size
    assert found.disk_bytes == (tmp_path / "dense.pt").stat().st_size


# ---------------------------------------------------------------------------------------------------------
# Any model, and none is changed


class Demanding(nn.Module):
    """Takes keywords, returns a dict, draws random numbers, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        x.mul_(scale)
        return {"out": self.layer(self.norm(x)) + torch.rand(())}


def test_the_model_its_inputs_and_the_random_state_are_left_alone():
    model = Demanding().train()
    model.norm.eval()
    model.layer.weight.grad = torch.ones(4, 4)
    state, x = copy.deepcopy(model.state_dict()), torch.ones(2, 4)
    random = torch.get_rng_state()
    found = cost(model, {"x": x, "scale": torch.tensor(2.0)})
    assert found.flops == 2 * 2 * 16
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (model.training, model.norm.training) == (True, False)
    assert torch.equal(model.layer.weight.grad, torch.ones(4, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(x, torch.ones(2, 4))


def test_a_forward_that_raises_leaves_all_as_it_was():
    model = chain().train()
    with pytest.raises(st.SurgeryError, match=r"the model fails on inputs of shape \(1, 5\)"):
        cost(model, torch.zeros(1, 5))
    assert model.training and torch.backends.mha.get_fastpath_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_tuple_is_positional_arguments_and_a_list_is_one():
    class Adds(nn.Module):
        def forward(self, x: Tensor | list[Tensor], y: Tensor | None = None) -> Tensor:
            return torch.cat(x) if isinstance(x, list) else x @ y

    assert cost(Adds(), (torch.zeros(2, 3), torch.zeros(3, 4))).flops == 48
    assert cost(Adds(), [torch.zeros(2), torch.zeros(3)]).peak_activation_bytes == 4 * 10


def test_on_the_meta_device_all_but_the_files_is_counted():
    real, meta = chain(), chain().to("meta")
    here, there = cost(real, torch.zeros(3, 4)), cost(meta, torch.zeros(3, 4, device="meta"))
    assert there.modules == here.modules
    assert there.peak_activation_bytes == here.peak_activation_bytes
    assert there.disk_bytes is there.sparse_disk_bytes is None
    assert "on disk" not in str(there)
    with pytest.raises(st.SurgeryError, match="meta"):
        cost(st.prune(chain(), 0.5).to("meta"), torch.zeros(3, 4, device="meta"))


def test_flops_outside_any_named_module_belong_to_the_model_itself():
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x

    found = cost(Product(), torch.zeros(3, 3))
    assert [(m.name, m.type, m.flops) for m in found.modules] == [("(the model itself)", "Product", 54)]


def test_a_cost_is_frozen_and_pickles():
    found = cost(chain(), torch.zeros(3, 4))
    with pytest.raises(AttributeError):
        found.peak_activation_bytes = 0  # type: ignore[misc]
    file = io.BytesIO()
    import pickle

    pickle.dump(found, file)
    assert pickle.loads(file.getvalue()) == found


def test_a_masked_bias_saves_no_multiplication():
    masks = {"bias": torch.tensor([True, *[False] * 9])}
    found = cost(st.apply_masks(nn.Linear(10, 10), masks), torch.zeros(1, 10))
    assert (found.flops, found.effective_flops, found.nonzeros) == (200, 200, 101)
    images = torch.zeros(1, 3, 8, 8)
    both = st.prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)), 0.5)
    before = cost(both, images).effective_flops
    torch_prune.random_unstructured(both[1], "bias", 0.9)
    assert cost(both, images).effective_flops == before


def test_a_complex_convolution_counts_its_masks_too():
    layer = nn.Conv1d(4, 4, 3, padding=1, bias=False, dtype=torch.complex64)
    ticket = st.apply_masks(layer, {"weight": torch.arange(48).view(4, 4, 3) % 4 == 0})
    found = cost(ticket, torch.zeros(1, 4, 5, dtype=torch.complex64))
    assert found.nonzeros == 12 and found.flops // 4 <= found.effective_flops < found.flops


def test_scripted_modules_count_for_the_module_around_them():
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's scripting retires
        scripted = nn.Sequential(plain[0], torch.jit.script(nn.ReLU()))
    x = torch.randn(1, 4, 5, 5)
    assert cost(scripted, x).flops == cost(plain, x).flops


def test_a_lazy_model_is_named():
    with pytest.raises(st.SurgeryError, match="run one batch through the lazy model first"):
        cost(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))
