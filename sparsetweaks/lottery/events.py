"""TensorBoard's event files: a folder of curves per training, from whatever process trains it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sparsetweaks.lottery.config import LotteryError
from sparsetweaks.lottery.train import Trained


class EventFiles:
    """Writes loss and best validation accuracy after each epoch; an `on_epoch` that can be sent to other processes.

    Args:
        folder: for a folder per training, named after it.

    Raises:
        LotteryError: when TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise LotteryError('event files need tensorboard: pip install "sparsetweaks[tensorboard]"')
        self.folder, self._writers = folder, {}  # type: Path, dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_writers": {}}

    def __call__(self, trained: Trained) -> None:
        from torch.utils.tensorboard import SummaryWriter

        name = "".join(c if c.isalnum() else "-" for c in trained.title)
        if name not in self._writers:
            self._writers[name] = SummaryWriter(str(self.folder / name))
        for tag, value in (("loss", trained.loss), ("best in validation", trained.validation)):
            self._writers[name].add_scalar(tag, value, trained.epochs)
        self._writers[name].flush()  # a training that is killed keeps its curve
        if trained.epochs == trained.total:
            self._writers.pop(name).close()

    def close(self) -> None:
        """Close the files of trainings that did not come to their end."""
        while self._writers:
            self._writers.popitem()[1].close()
