"""Folders of images in the layouts in which they are distributed: which files there are, and of which class each is."""

from __future__ import annotations

import random
from pathlib import Path

from sparsetweaks.lottery.config import LotteryError

TEST = 0.1  # of a folder without a split of its own
SPLIT_SEED = 0  # one split for all runs, so that a ticket never sees its validation images under another seed
Examples = list[tuple[Path, int]]  # an image file and its label
Listed = tuple[Examples, Examples, tuple[str, ...]]  # to train on, to test on, and the names of the classes


def list_folder(folder: Path, limit: int | None, split_seed: int) -> tuple[str, Listed]:
    """The files of a folder, by whichever layout it has.

    Args:
        folder: Tiny-ImageNet as it is distributed, `train/` and `test/` with one folder of images per class, or one folder
            of images per class alone, of which a tenth becomes the test images.
        limit: at most this many training images per class, always the same ones; default: all.
        split_seed: of the choice of that tenth.

    Returns:
        A name for the data set; and training files, test files and classes.

    Raises:
        LotteryError: for another layout, a missing file or folder, or a class with too few images.
    """
    if (folder / "val" / "val_annotations.txt").is_file():
        return "tiny-imagenet", _tiny_imagenet(folder, limit)
    name = folder.resolve().name
    if (folder / "train").is_dir() or (folder / "test").is_dir():
        return name, _class_folders(folder, limit)
    return name, _one_folder(folder, limit, split_seed)


def _class_folders(folder: Path, limit: int | None) -> Listed:
    """`train/<class>/*` and `test/<class>/*`; the classes are those of `train`."""
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise LotteryError(
                f"{folder} has no folder {part!r}: an image folder holds train/<class>/ and test/<class>/"
            )
    classes = _classes(folder / "train")
    for entry in sorted((folder / "test").iterdir()):
        if _visible(entry) and entry.name not in classes:
            raise LotteryError(
                f"{entry} is no class of the training images: {folder / 'train'} has none of that name"
            )
    train = [
        (file, label)
        for label, name in enumerate(classes)
        for file in _sample(_enough(folder / "train" / name, 2), limit)
    ]
    test = [(file, label) for label, name in enumerate(classes) for file in _files(folder / "test" / name)]
    return train, test, classes


def _one_folder(folder: Path, limit: int | None, seed: int) -> Listed:
    """`<class>/*`, a random tenth of each class for testing."""
    classes = _classes(folder)
    train: Examples = []
    test: Examples = []
    for label, name in enumerate(classes):
        files = _enough(folder / name, 3)
        random.Random(seed).shuffle(files)
        held_out = max(1, round(TEST * len(files)))
        test += [(file, label) for file in sorted(files[:held_out])]
        train += [(file, label) for file in _sample(sorted(files[held_out:]), limit)]
    return train, test, classes


def _tiny_imagenet(folder: Path, limit: int | None) -> Listed:
    """As distributed: its test labels were never published, so its validation images are the test set, as is usual."""
    if not (folder / "train").is_dir():
        raise LotteryError(
            f"{folder} has val/val_annotations.txt but no folder 'train': unpack Tiny-ImageNet anew"
        )
    classes = _classes(folder / "train")
    label_of = {name: label for label, name in enumerate(classes)}
    train = [
        (file, label)
        for name, label in label_of.items()
        for file in _sample(_enough(folder / "train" / name / "images", 2), limit)
    ]
    annotations = folder / "val" / "val_annotations.txt"
    test: Examples = []
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split("\t")
        if not line.strip():
            continue
        if len(fields) < 2 or fields[1] not in label_of:
            raise LotteryError(
                f"{annotations}, line {number}, is not 'image<TAB>class of train/<TAB>...': {line!r}"
            )
        file = folder / "val" / "images" / fields[0]
        if not file.is_file():
            raise LotteryError(
                f"{file} is missing, which {annotations.name} names: unpack Tiny-ImageNet anew"
            )
        test.append((file, label_of[fields[1]]))
    if not test:
        raise LotteryError(f"{annotations} names no images: unpack Tiny-ImageNet anew")
    return train, test, classes


def _classes(folder: Path) -> tuple[str, ...]:
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if _visible(entry) and entry.is_dir()))
    if len(classes) < 2:
        raise LotteryError(
            f"{folder} holds {len(classes)} class folders; at least 2 are needed. Understood are CIFAR-10 and CIFAR-100 "
            "as torchvision has them, Tiny-ImageNet as it is distributed, train/<class>/ and test/<class>/, or <class>/"
        )
    return classes


def _enough(folder: Path, count: int) -> list[Path]:
    files = _files(folder)
    if len(files) < count:
        needs = "to train and to validate" if count == 2 else "to train, to validate and to test"
        images = "one image" if len(files) == 1 else f"{len(files)} images"
        raise LotteryError(f"{folder} holds {images}; at least {count} are needed, {needs} on")
    return files


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise LotteryError(f"{folder} is missing: every class of the training images needs a folder there")
    files = sorted(entry for entry in folder.iterdir() if _visible(entry))
    if not files:
        raise LotteryError(f"{folder} holds no images")
    for file in files:
        if file.is_dir():
            raise LotteryError(
                f"{file} is a folder, where images of one class were looked for: is the layout another?"
            )
    return files


def _sample(files: list[Path], limit: int | None) -> list[Path]:
    """All files of a class, or a random choice that is always the same."""
    if limit is None or limit >= len(files):
        return files
    return sorted(random.Random(SPLIT_SEED).sample(files, limit))


def _visible(entry: Path) -> bool:
    return not entry.name.startswith(".")
