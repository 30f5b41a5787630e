from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.data import augment, batches, load


def test_digits_are_split_without_overlap_and_always_the_same() -> None:
    data, again = load("digits"), load("digits")
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert torch.equal(data.train.images, again.train.images)
    assert data.fingerprint == again.fingerprint
    assert sorted(set(data.train.labels.tolist())) == list(range(10))
    assert not data.flip  # a mirrored 2 is no 2


def test_normalised_training_images_have_mean_0_and_deviation_1() -> None:
    data = load("digits")
    images = data.normalise(data.train.images)
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3


def test_image_folder_is_decoded_resized_and_labelled(image_folder: Path) -> None:
    data = load(image_folder, size=8)
    assert data.classes == ("cold", "warm")
    assert data.train.images.shape == (11, 3, 8, 8)  # one of 12 validates
    assert data.test.images.dtype == torch.uint8
    warm = data.test.images[data.test.labels == 1].float().mean(dim=(0, 2, 3))
    assert warm[0] > 150 > warm[2]  # red, not blue: the channels are in order
    assert data.flip


def test_limit_takes_a_fixed_part_of_each_class(image_folder: Path) -> None:
    data, again = load(image_folder, size=8, limit=3), load(image_folder, size=8, limit=3)
    everything = torch.cat([data.train.labels, data.validation.labels])
    assert torch.bincount(everything).tolist() == [3, 3]
    assert len(data.test) == 6
    assert data.fingerprint == again.fingerprint != load(image_folder, size=8).fingerprint


def test_limit_and_size_work_for_digits() -> None:
    data = load("digits", size=12, limit=5)
    assert data.train.images.shape[-1] == 12
    assert len(data.train) + len(data.validation) == 50


def test_cache_is_read_back_and_renewed_when_a_file_changes(image_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load(image_folder, size=8, cache=cache)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    assert load(image_folder, size=8, cache=cache).fingerprint == first.fingerprint
    assert file.stat().st_mtime_ns == written
    Image.new("RGB", (10, 12), "white").save(image_folder / "train" / "cold" / "0.png")
    assert load(image_folder, size=8, cache=cache).fingerprint != first.fingerprint
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_cache_is_decoded_anew(image_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load(image_folder, size=8, cache=cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert load(image_folder, size=8, cache=cache).fingerprint == first.fingerprint


def test_tiny_imagenet_layout(image_folder: Path) -> None:
    for name in ("cold", "warm"):
        folder = image_folder / "train" / name
        (folder / "images").mkdir()
        for file in list(folder.glob("*.png")):
            file.rename(folder / "images" / file.name)
    (image_folder / "test").rename(
        image_folder / "given"
    )  # the distribution's own test images have no labels
    (image_folder / "val" / "images").mkdir(parents=True)
    lines = []
    for name in ("warm", "cold"):
        (image_folder / "given" / name / "0.png").rename(image_folder / "val" / "images" / f"{name}.png")
        lines.append(f"{name}.png\t{name}\t0\t0\t9\t9")
    (image_folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    data = load(image_folder, size=8)
    assert data.name == "tiny-imagenet"
    assert data.test.labels.tolist() == [1, 0]
    assert data.test.images[0, 0].float().mean() > data.test.images[1, 0].float().mean()


def test_cifar10_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = load(tmp_path)
    assert (data.name, len(data.train) + len(data.validation), len(data.test)) == ("cifar10", 20, 4)
    assert data.train.images.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "train" / "cold" / "notes.txt").write_text("hello"), "notes.txt is not an image"),
        (lambda f: [p.unlink() for p in (f / "train" / "cold").iterdir()], "cold holds no images"),
        (lambda f: (f / "test").rename(f / "elsewhere"), "has no folder 'test'"),
        (lambda f: (f / "test" / "cold").rename(f / "cold"), "cold is missing"),
        (lambda f: (f / "train" / "cold").rename(f / "cold"), "holds 1 class folders; at least 2"),
        (lambda f: (f / "test" / "lukewarm").mkdir(), "lukewarm is no class"),
    ],
)
def test_broken_image_folders_are_named(image_folder: Path, break_it, message: str) -> None:
    break_it(image_folder)
    with pytest.raises(LotteryError, match=message):
        load(image_folder, size=8)


def test_images_of_different_sizes_ask_for_a_size(image_folder: Path) -> None:
    with pytest.raises(LotteryError, match="unlike the first image: give a size"):
        load(image_folder)


def test_hidden_files_are_ignored(image_folder: Path) -> None:
    (image_folder / "train" / "cold" / ".DS_Store").write_bytes(b"x")
    assert len(load(image_folder, size=8).train) == 11


@pytest.mark.parametrize("source", ["mnist", "no/such/folder"])
def test_unknown_data_sets_are_named(source: str) -> None:
    with pytest.raises(LotteryError, match=f"unknown data set '{source}'"):
        load(source)


def test_shift_moves_whole_images_and_fills_with_black() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3).repeat(64, 1, 1, 1)
    shifted = augment(image, padding=1, flip=False, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image[0, 0], (1, 1, 1, 1))
    windows = {tuple(padded[i : i + 3, j : j + 3].flatten().tolist()) for i in range(3) for j in range(3)}
    assert {tuple(each.flatten().tolist()) for each in shifted} == windows  # all nine, and nothing else


def test_flip_mirrors_about_half_of_the_images() -> None:
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).reshape(1, 1, 2, 2).repeat(1000, 1, 1, 1)
    flipped = augment(image, padding=0, flip=True, generator=torch.Generator().manual_seed(0))
    assert 450 < int((flipped[:, 0, 0, 0] == 2).sum()) < 550
    assert {tuple(each.flatten().tolist()) for each in flipped} == {(1, 2, 3, 4), (2, 1, 4, 3)}


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (7, 3, 9, 13)])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_images_come_out_as_if_one_by_one(shape: tuple[int, ...], padding: int, flip: bool) -> None:
    images = torch.randint(256, shape, dtype=torch.uint8)
    before = images.clone()
    augmented = augment(images, padding=padding, flip=flip, generator=torch.Generator().manual_seed(3))
    assert torch.equal(images, before)
    draws, (count, _, height, width) = torch.Generator().manual_seed(3), shape
    down, right = torch.zeros(2, count, dtype=torch.long)
    if padding:
        down, right = torch.randint(2 * padding + 1, (2, count), generator=draws)
    mirrored = torch.randint(2, (count,), generator=draws) if flip else torch.zeros(count)
    for i in range(count):
        padded = torch.nn.functional.pad(images[i], (padding,) * 4)
        one = padded[:, down[i] : down[i] + height, right[i] : right[i] + width]
        assert torch.equal(augmented[i], one.flip(-1) if mirrored[i] else one)


def test_normalising_leaves_the_images_alone() -> None:
    data = load("digits")
    pixels = data.test.images.float()
    before = pixels.clone()
    data.normalise(pixels)
    assert torch.equal(pixels, before)


def test_batches_depend_on_their_generator_alone() -> None:
    data, state = load("digits"), torch.get_rng_state()
    first, second = (
        torch.cat(
            [images for images, _ in batches(data.train, data, size=64, padding=1, generator=generator)]
        )
        for generator in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------- layouts and damage


@pytest.fixture
def one_folder(tmp_path: Path) -> Path:
    """Two classes of eleven images each, without a split."""
    folder = tmp_path / "flowers"
    for label, name in enumerate(("daisy", "rose")):
        (folder / name).mkdir(parents=True)
        for i in range(11):
            Image.new("RGB", (8, 8), (200 * label, i, 20 * i)).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_without_a_split_is_split_by_seed(one_folder: Path) -> None:
    data, again, other = (load(one_folder, split_seed=seed) for seed in (0, 0, 1))
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 2)
    assert sorted(data.test.labels.tolist()) == [0, 1]  # a tenth of each class
    assert torch.equal(data.test.images, again.test.images)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    pixels = [part.images.flatten(1) for part in (data.train, data.validation, data.test)]
    everything = torch.cat(pixels)
    assert len(everything.unique(dim=0)) == len(everything) == 22  # no image is in two parts


def test_the_seed_of_the_split_chooses_the_validation_images() -> None:
    one, other = load("digits"), load("digits", split_seed=1)
    assert not torch.equal(one.validation.images, other.validation.images)
    assert torch.equal(one.test.images, other.test.images)
    assert one.fingerprint != other.fingerprint  # a ticket of one is none of the other


@pytest.mark.parametrize(
    ("name", "inside"), [("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python")]
)
def test_damaged_cifar_is_named(tmp_path: Path, name: str, inside: str) -> None:
    pytest.importorskip("torchvision")
    (tmp_path / inside).mkdir()
    (tmp_path / inside / "data_batch_1").write_bytes(b"half")
    for folder in (tmp_path, tmp_path / inside):
        with pytest.raises(
            LotteryError, match=rf"{inside} is not {name} as it is distributed, or is damaged"
        ):
            load(folder)


def test_two_data_sets_in_one_folder_are_refused(tmp_path: Path) -> None:
    for inside in ("cifar-10-batches-py", "cifar-100-python"):
        (tmp_path / inside).mkdir()
    with pytest.raises(LotteryError, match="holds CIFAR10 and CIFAR100: give a folder that holds one"):
        load(tmp_path)


def test_images_of_more_than_8_bits_are_refused(image_folder: Path) -> None:
    file = image_folder / "train" / "cold" / "0.png"
    Image.fromarray(np.full((12, 10), 40_000, dtype=np.uint16)).save(file)
    with pytest.raises(LotteryError, match=rf"{file} holds more than 8 bits per pixel \(mode I;16\)"):
        load(image_folder, size=8)


def test_cifar100_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 4)):
        labels = list(range(4)) * (count // 4)
        batch = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "fine_labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"fine_label_names": [f"c{i}" for i in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    for given in (tmp_path, folder):
        data = load(given)
        assert (data.name, len(data.classes), data.train.images.shape) == ("cifar100", 100, (36, 3, 32, 32))


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    """The official layout: boxes beside the images, words and wnids, and test images without labels."""
    root, generator = tmp_path / "tiny-imagenet-200", torch.Generator().manual_seed(0)
    lines = []
    for label, name in enumerate(("n01443537", "n01629819")):
        images = root / "train" / name / "images"
        images.mkdir(parents=True)
        (root / "val" / "images").mkdir(parents=True, exist_ok=True)
        (images.parent / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t63\t63\n")
        for i in range(6):
            noise = torch.randint(50, (64, 64, 3), generator=generator, dtype=torch.uint8) + 150 * label
            mode = "L" if i == 0 else "RGB"  # some of its images are grey
            Image.fromarray(noise.numpy()).convert(mode).save(images / f"{name}_{i}.JPEG")
        Image.new("RGB", (64, 64), (160 * label,) * 3).save(root / "val" / "images" / f"val_{label}.JPEG")
        lines.append(f"val_{label}.JPEG\t{name}\t0\t32\t44\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(reversed(lines)) + "\n")
    (root / "test" / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("n01443537\nn01629819\n")
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    return root


def test_tiny_imagenet_as_it_is_distributed(tiny_imagenet: Path) -> None:
    data = load(tiny_imagenet)
    assert (data.name, data.classes) == ("tiny-imagenet", ("n01443537", "n01629819"))
    assert data.train.images.shape == (11, 3, 64, 64)
    assert data.test.labels.tolist() == [1, 0]
    assert data.test.images[0].float().mean() > 100 > data.test.images[1].float().mean()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "val" / "images" / "val_1.JPEG").unlink(),
            r"val_1.JPEG is missing, which val_annotations",
        ),
        (
            lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn9\t0\n"),
            "line 1, is not 'image",
        ),
        (lambda f: (f / "val" / "val_annotations.txt").write_text("\n"), "names no images"),
        (lambda f: (f / "train").rename(f / "trian"), "no folder 'train': unpack Tiny-ImageNet anew"),
        (lambda f: (f / "train" / "n01443537" / "images").rename(f / "gone"), "images is missing"),
        (
            lambda f: (f / "train" / "n01443537" / "images" / "n01443537_3.JPEG").write_bytes(
                b"\xff\xd8 half"
            ),
            "not an image",
        ),
    ],
)
def test_damaged_tiny_imagenet_is_named(tiny_imagenet: Path, damage, message: str) -> None:
    damage(tiny_imagenet)
    with pytest.raises(LotteryError, match=message):
        load(tiny_imagenet)


def test_a_class_with_one_image_is_named(image_folder: Path, one_folder: Path) -> None:
    for i in range(1, 6):
        (image_folder / "train" / "cold" / f"{i}.png").unlink()
    with pytest.raises(
        LotteryError, match="cold holds one image; at least 2 are needed, to train and to validate on"
    ):
        load(image_folder, size=8)
    for i in range(2, 11):
        (one_folder / "rose" / f"{i}.png").unlink()
    with pytest.raises(
        LotteryError, match="rose holds 2 images; at least 3 are needed, to train, to validate and"
    ):
        load(one_folder)


def test_a_layout_that_is_none_of_these_is_told_what_is_understood(tmp_path: Path, one_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        LotteryError, match=r"holds 0 class folders; at least 2 are needed\. Understood are CIFAR-10"
    ):
        load(tmp_path / "empty")
    deep = tmp_path / "deep"
    for name in ("a", "b"):
        (deep / name / "more" / "images").mkdir(parents=True)
    with pytest.raises(LotteryError, match="more is a folder, where images of one class were looked for"):
        load(deep)


@pytest.mark.parametrize("where", [0.5, 0.99])
def test_a_cache_with_a_flipped_bit_is_decoded_anew(image_folder: Path, tmp_path: Path, where: float) -> None:
    first = load(image_folder, size=8, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1
    file.write_bytes(content)
    assert load(image_folder, size=8, cache=tmp_path / "cache").fingerprint == first.fingerprint


def test_a_png_with_a_broken_chunk_is_named(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    broken = tmp_path / "a" / "0.png"
    content = bytearray(broken.read_bytes())
    second = content.find(b"IDAT", content.find(b"IDAT") + 4)
    assert second > 0
    content[second] = 0xFF
    broken.write_bytes(content)
    with pytest.raises(LotteryError, match=r"0\.png is not an image that Pillow can read"):
        load(tmp_path)
