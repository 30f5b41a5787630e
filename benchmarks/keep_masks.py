"""What `keep_masks` costs per training step, on a CIFAR ResNet-18 and on a thin ResNet-20.

    python benchmarks/keep_masks.py --steps 5 --repeats 7

Each repeat trains two copies of one pruned model for a number of steps, one with `keep_masks` and one
without, in an order that alternates, and compares the two. Printed are the medians per step, the median of the
repeats' ratios and their quartiles. The line "holding alone" times the work of `keep_masks` by itself, which
the noise of two long times does not drown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsetweaks.copying import copy_model
from sparsetweaks.keeping import keep_masks
from sparsetweaks.pruning import prune

SPARSITY = 0.95


class Block(nn.Module):
    """The basic residual block (He et al., 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels_in == channels
            else nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def resnet(widths: list[int], blocks: int) -> nn.Sequential:
    """A residual network for 32x32 images: `blocks` blocks of each width."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    channels = widths[0]
    for width in widths:
        for block in range(blocks):
            layers.append(Block(channels, width, 2 if block == 0 and width != widths[0] else 1))
            channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: resnet([64, 128, 256, 512], 2),
    "resnet20": lambda: resnet([16, 32, 64], 3),
}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_step(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Wall time of one of `steps` calls."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    return (time.perf_counter() - started) / steps


def trainer(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step, optimizer


def measure(name: str, *, steps: int, repeats: int, batch_size: int, device: torch.device) -> None:
    torch.manual_seed(0)
    model = prune(MODELS[name]().to(device, memory_format=torch.channels_last), SPARSITY)
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    batch = images, torch.randint(10, (batch_size,), device=device)
    bare_step, _ = trainer(copy_model(model), batch)
    held_model = copy_model(model)
    held_step, optimizer = trainer(held_model, batch)

    def bare() -> float:
        return seconds_per_step(bare_step, steps, device)

    def held() -> float:
        with keep_masks(held_model, optimizer):
            return seconds_per_step(held_step, steps, device)

    bare(), held()  # warm up
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            without = bare()
            pairs.append((without, held()))
        else:
            with_masks = held()
            pairs.append((bare(), with_masks))
    ratios = sorted(with_masks / without for without, with_masks in pairs)
    low, _, high = statistics.quantiles(ratios, n=4) if repeats > 1 else (ratios[0],) * 3
    without, with_masks = (statistics.median(times) for times in zip(*pairs, strict=True))

    with keep_masks(held_model, optimizer):  # the hooks themselves, called as training calls them
        masked = [p for p in held_model.parameters() if p._backward_hooks]

        def hooks() -> None:
            for parameter in masked:
                for hook in parameter._backward_hooks.values():
                    hook(parameter.grad)
            for after in optimizer._optimizer_step_post_hooks.values():
                after(optimizer, (), {})

        hooks()
        alone = statistics.median(seconds_per_step(hooks, steps, device) for _ in range(repeats))
    where = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{name}, batch {batch_size}, {SPARSITY:.0%} sparse, {where}, {repeats} pairs of {steps} steps")
    print(f"  a step: {1e3 * without:.2f} ms without keep_masks, {1e3 * with_masks:.2f} ms with it")
    print(f"  ratio: {statistics.median(ratios):.4f}, quartiles {low:.4f} to {high:.4f}")
    print(f"  holding alone: {1e3 * alone:.3f} ms, {alone / without:.2%} of a step")


def main() -> None:
    parser = argparse.ArgumentParser(description="What keep_masks costs per training step.")
    parser.add_argument("--steps", type=int, default=5, help="training steps per timing (default: 5)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of timings (default: 7)")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step (default: 128)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = parser.parse_args()
    for name in given.models:
        measure(
            name, steps=given.steps, repeats=given.repeats, batch_size=given.batch_size, device=given.device
        )


if __name__ == "__main__":
    main()
