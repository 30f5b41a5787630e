from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from sparsetweaks.lottery.data import Data, load


@pytest.fixture(scope="session")
def digits() -> Data:
    """A part of the digits: enough to train on, in no time."""
    data = load("digits")
    return replace(data, train=data.train[:256], validation=data.validation[:64], test=data.test[:64])


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of coloured images, six to train on and three to test on, of different sizes."""
    folder = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cold", "warm")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(60, (3,), generator=generator).tolist()
                colour = (noise[0] + 190 * label, noise[1], noise[2] + 190 * (1 - label))
                Image.new("RGB", (10 + i, 12), colour).save(folder / part / name / f"{i}.png")
    return folder
