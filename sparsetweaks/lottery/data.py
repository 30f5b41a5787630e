"""Data sets as tensors in memory: decoded once, normalised and augmented a whole batch at a time."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.files import first_line
from sparsetweaks.lottery.files import load as load_file
from sparsetweaks.lottery.files import save as save_file
from sparsetweaks.lottery.layouts import SPLIT_SEED, Examples, list_folder

VALIDATION = 0.1  # the paper: training images are split 9:1 at random
DIGITS_TEST = 0.2  # scikit-learn's digits come without a split
CIFAR = {
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
}  # torchvision's class, and its folder


@dataclass(frozen=True)
class Images:
    """Some images, (N, C, H, W) in 0 to 255, and their labels, (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Images:
        return Images(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> Images:
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A data set ready for training: three parts, and what it takes to normalise and augment them."""

    name: str
    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    mean: Tensor  # (C, 1, 1), of the training images, in units of 0 to 255
    std: Tensor
    flip: bool  # whether a mirrored image is still of its class: not so for digits
    fingerprint: str  # of every image and label, so that results of other data are never taken for these

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def to(self, device: torch.device | str) -> Data:
        parts = {
            name: getattr(self, name).to(device) for name in ("train", "validation", "test", "mean", "std")
        }
        return replace(self, **parts)

    def normalise(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean).div_(self.std)


def load(
    source: str | Path = "digits",
    *,
    size: int | None = None,
    limit: int | None = None,
    split_seed: int = SPLIT_SEED,
    cache: Path | None = None,
) -> Data:
    """Load a data set by name or folder; the folder's layout is recognised.

    Args:
        source: `"digits"` (scikit-learn's, 1,797 grey images of 8 by 8, no download), or a folder: torchvision's CIFAR10
            or CIFAR100, Tiny-ImageNet as it is distributed, `train/` and `test/` with one folder of images per class, or
            one folder of images per class alone, of which a tenth becomes the test images.
        size: height and width in pixels to bring the images to; default: as they are.
        limit: at most this many training images per class, always the same ones; default: all.
        split_seed: of the random 9:1 splits; the same for all runs, so that a ticket never sees its validation images.
        cache: a folder to keep decoded images in, as decoding takes longer than reading them back; default: none.

    Returns:
        The data, on the CPU, its training images split 9:1 into training and validation (the paper, 4).

    Raises:
        LotteryError: for a source that is neither, a layout that is none of these, a file that is missing, damaged or no
            image, a class with too few images, or images that differ in size.

    Example:
        >>> data = load("digits")
        >>> len(data.train), len(data.validation), len(data.test), data.channels
        (1294, 144, 359, 1)
    """
    for name, value in (("size", size), ("limit", limit)):
        if value is not None and value < 2:
            raise LotteryError(f"{name} must be at least 2, got {value}")
    folder = Path(source)
    if str(source) == "digits":
        name, (train, test, classes) = "digits", _digits()
    elif not folder.is_dir():
        raise LotteryError(f"unknown data set {str(source)!r}: neither 'digits' nor a folder that exists")
    elif cifar := [name for name in CIFAR if _holds(folder, CIFAR[name])]:
        if len(cifar) > 1:
            raise LotteryError(f"{folder} holds {' and '.join(cifar)}: give a folder that holds one of them")
        name, (train, test, classes) = cifar[0].lower(), _cifar(folder, cifar[0])
    else:
        name, (train_files, test_files, classes) = list_folder(folder, limit, split_seed)
        train, test = _decoded(train_files, test_files, size=size, cache=cache)
    if size is not None:
        train, test = _resized(train, size), _resized(test, size)
    if limit is not None:
        train = _limited(train, limit)
    return _prepare(name, train, test, classes, split_seed)


def batches(
    part: Images, data: Data, *, size: int, padding: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled, augmented, normalised batches; what does not fill the last one is left for another epoch.

    Args:
        part: the images to draw from, on the generator's device.
        data: the data set they belong to.
        size: images per batch; all of them where there are fewer.
        padding: how far an image may be shifted, in pixels.
        generator: of the order, the shifts and the flips.

    Yields:
        Normalised images (B, C, H, W) as float32, and labels (B,).

    Example:
        >>> data = load("digits")
        >>> generator = torch.Generator().manual_seed(0)
        >>> sum(len(labels) for _, labels in batches(data.train, data, size=128, padding=1, generator=generator))
        1280
    """
    device = part.labels.device
    order = torch.randperm(len(part), generator=generator, device=device)
    size = min(size, len(part))
    for start in range(0, len(part) - size + 1, size):
        index = order[start : start + size]
        images = part.images.index_select(0, index)  # copies whole images; indexing copies pixel by pixel
        images = augment(images, padding=padding, flip=data.flip, generator=generator)
        yield data.normalise(images), part.labels[index]


def augment(images: Tensor, *, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels, black coming in at the edge, and mirror every other one.

    Args:
        images: (B, C, H, W).
        padding: pixels; 0 shifts nothing.
        flip: whether to mirror.
        generator: of the shifts and the flips, on the images' device.

    Returns:
        Images of the same shape.

    Example:
        >>> image = torch.arange(4).reshape(1, 1, 2, 2)
        >>> torch.equal(augment(image, padding=0, flip=False, generator=torch.Generator()), image)
        True
    """
    count, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4)
    down = right = mirrored = torch.zeros(count, dtype=torch.long, device=device)
    pixels = padded.flatten()
    if padding:
        down, right = torch.randint(2 * padding + 1, (2, count), generator=generator, device=device)
    if flip:
        mirrored = torch.randint(2, (count,), generator=generator, device=device)
        right = torch.where(mirrored == 1, 2 * padding - right, right)
        pixels = torch.cat([pixels, padded.flip(-1).flatten()])
    # each row of each result is a run of pixels: copied as such, many times faster than pixel by pixel
    down, right, mirrored = (each[:, None, None] for each in (down, right, mirrored))
    planes = torch.arange(count * channels, device=device).view(count, channels, 1)
    rows = planes * padded.shape[2] + down + torch.arange(height, device=device)
    starts = mirrored * padded.numel() + rows * padded.shape[3] + right
    return pixels.unfold(0, width, 1).index_select(0, starts.flatten()).view(images.shape)


def _prepare(name: str, train: Images, test: Images, classes: tuple[str, ...], split_seed: int) -> Data:
    digest = hashlib.sha256(f"{split_seed}".encode())
    for part in (train, test):
        digest.update(part.images.contiguous().numpy().tobytes() + part.labels.numpy().tobytes())
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(split_seed))
    held_out = max(1, round(VALIDATION * len(train)))
    train, validation = train[order[held_out:]], train[order[:held_out]]
    if len(train) < 2:
        raise LotteryError(
            f"{name}: {len(train) + len(validation)} training images are too few to train and validate on"
        )
    pixels = train.images.float()
    mean, std = pixels.mean(dim=(0, 2, 3), keepdim=True)[0], pixels.std(dim=(0, 2, 3), keepdim=True)[0]
    return Data(
        name,
        train,
        validation,
        test,
        classes,
        mean,
        std.clamp(min=1.0),
        name != "digits",
        digest.hexdigest()[:16],
    )


def _digits() -> tuple[Images, Images, tuple[str, ...]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (
        torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    )  # they count to 16
    everything = Images(images, torch.from_numpy(digits.target).long())
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = round(DIGITS_TEST * len(everything))
    return everything[order[held_out:]], everything[order[:held_out]], tuple("0123456789")


def _holds(folder: Path, inside: str) -> bool:
    return (folder / inside).is_dir() or folder.name == inside


def _cifar(folder: Path, name: str) -> tuple[Images, Images, tuple[str, ...]]:
    try:
        from torchvision import datasets
    except ImportError:
        raise LotteryError(f"reading {name} needs torchvision: pip install torchvision") from None
    root = folder.parent if folder.name == CIFAR[name] else folder
    try:
        parts = [getattr(datasets, name)(root, train=train) for train in (True, False)]
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise LotteryError(
            f"{root / CIFAR[name]} is not {name} as it is distributed, or is damaged: unpack it anew ({first_line(error)})"
        ) from error
    train, test = (
        Images(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return train, test, tuple(parts[0].classes)


def _limited(part: Images, limit: int) -> Images:
    """At most `limit` images of each class; nothing is left to do where the files were already chosen."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(SPLIT_SEED))
    chosen = [order[part.labels[order] == label][:limit] for label in part.labels.unique()]
    return part[torch.cat(chosen).sort().values]


def _resized(part: Images, size: int) -> Images:
    if part.images.shape[-2:] == (size, size):
        return part
    images = F.interpolate(part.images.float(), (size, size), mode="bilinear", antialias=True)
    return Images(images.round().clamp(0, 255).to(torch.uint8), part.labels)


def _decoded(
    train: Examples, test: Examples, *, size: int | None, cache: Path | None
) -> tuple[Images, Images]:
    """Decode two lists of files, or read what an earlier call decoded from the same files (same path, length and time)."""
    if cache is None:
        return _decode(train, size), _decode(test, size)
    stats = ((file, label, os.stat(file)) for part in (train, test) for file, label in part)
    listing = repr(
        (size, len(train), [(str(file), label, s.st_size, s.st_mtime_ns) for file, label, s in stats])
    )
    path = cache / f"images-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.safetensors"
    try:
        _, groups = load_file(path, "images")
    except LotteryError:  # not there yet, or damaged
        parts = {"train": _decode(train, size), "test": _decode(test, size)}
        groups = {name: {"images": part.images, "labels": part.labels} for name, part in parts.items()}
        save_file(path, "images", {}, groups)
    return Images(**groups["train"]), Images(**groups["test"])


def _decode(examples: Examples, size: int | None) -> Images:
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    fit: Callable = lambda image: (
        image if size is None else ImageOps.fit(image, (size, size), Image.Resampling.BOX)
    )
    arrays = []
    for file, _ in examples:
        try:
            with Image.open(file) as image:
                deep = image.mode in ("I", "F") or image.mode.startswith("I;")
                arrays.append(np.asarray(fit(image.convert("RGB"))))
        except (
            UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError
        ) as error:  # Pillow calls a broken PNG a SyntaxError  # fmt: skip
            raise LotteryError(
                f"{file} is not an image that Pillow can read: remove it or convert it"
            ) from error
        if deep:
            raise LotteryError(
                f"{file} holds more than 8 bits per pixel (mode {image.mode}): convert it to 8 bits"
            )
        if arrays[-1].shape != arrays[0].shape:
            raise LotteryError(
                f"{file} is {arrays[-1].shape[1]} by {arrays[-1].shape[0]} pixels, unlike the first image: give a size"
            )
    return Images(
        torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([y for _, y in examples]),
    )
