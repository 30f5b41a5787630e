"""How far a command is: a bar in a terminal or a notebook, lines in a log file. On stderr, as stdout is for results."""

from __future__ import annotations

import sys
import time

from sparsetweaks.lottery.events import EventFiles
from sparsetweaks.lottery.train import Trained

LOG_SECONDS = 10.0  # between the lines of a log file


class Progress:
    """Counts epochs, or runs, and says which stage it is, its accuracy and the time left.

    Args:
        total: how many there are to be.
        unit: of what.
        events: TensorBoard's files to write to as well; default: none.
    """

    def __init__(self, total: int, unit: str, *, events: EventFiles | None = None) -> None:
        from tqdm.auto import tqdm

        self.total, self.unit, self.done, self.counted = total, unit, 0, 0
        self.part = 0.0  # of the run that is under way
        self.shown = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.bar = tqdm(total=total, unit=unit, disable=not self.shown, leave=False)
        self.started = self.logged = time.monotonic()
        self.events = events

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.events is not None:
            self.events.close()

    def epoch(self, trained: Trained) -> None:
        """One more epoch of a training, where epochs are counted, for `on_epoch`."""
        self.counted += 1
        self.done = min(self.done + 1, self.total)
        self._tell(trained)

    def within(self, trained: Trained) -> None:
        """One more epoch of a training, where something else is counted."""
        self.part = trained.epochs / trained.total
        self._tell(trained)

    def _tell(self, trained: Trained) -> None:
        best = f"best in validation {100 * trained.validation:.1f} %"
        text = f"{trained.title}, epoch {trained.epochs} of {trained.total}, {best}"
        if self.shown:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(self.done - self.bar.n)
        elif time.monotonic() - self.logged >= LOG_SECONDS:
            self.line(f"{text}; {self.left()}")
        if self.events is not None:
            self.events(trained)

    def reach(self, done: int) -> None:
        """At least so much is done: what was there already takes no epochs."""
        self.done = max(self.done, min(done, self.total))
        self.bar.update(self.done - self.bar.n)

    def so_far(self, done: int, total: int) -> None:
        """So many runs of so many."""
        self.counted += max(0, done - self.done)
        self.part = self.part if done == self.done else 0.0
        self.done, self.total = done, total
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if not self.shown and (done == total or time.monotonic() - self.logged >= LOG_SECONDS):
            self.line(f"{done} of {total} {self.unit}s; {self.left()}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self.logged = time.monotonic()
        self.bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def left(self) -> str:
        """The time left, by the time it took so far."""
        counted = self.counted + self.part
        if not counted:
            return "time left not known yet"
        seconds = (time.monotonic() - self.started) / counted * (self.total - self.done - self.part)
        return f"{seconds:.0f} s left" if seconds < 90 else f"{seconds / 60:.0f} min left"
