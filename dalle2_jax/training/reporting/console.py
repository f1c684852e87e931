"""What a training run prints: a banner, a progress bar, and lines above the bar."""

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping

import jax
import tqdm

from dalle2_jax.errors import SystemWarning

INTERVAL, INTERVAL_IN_FILES = 0.1, 10.0
"""Minimal seconds between two updates of the bar, in a terminal and in a file."""


def progress(title: str, unit: str, shown: bool = True) -> tqdm.tqdm:
    """Returns a bar of unknown length, shown by process 0. A context manager."""
    hidden = not shown or jax.process_index() != 0
    return tqdm.tqdm(desc=title, unit=unit, dynamic_ncols=True, file=sys.stdout, disable=hidden)


class Console:
    """Prints the progress of a run. A context manager.

    Args:
      title: of the bar: the stage's name.
      step: the last finished step.
      total_steps: of the run.
      shown: whether anything is printed. Only process 0 prints.
    """

    def __init__(self, title: str, step: int, total_steps: int, shown: bool = True):
        self._title, self._step, self._total = title, step, total_steps
        self._active, self._shown = jax.process_index() == 0, shown
        self._bar: tqdm.tqdm | None = None

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._active and self._shown:
            tqdm.tqdm.write(line, file=sys.stdout)

    def warn(self, line: str) -> None:
        """Prints a line about a problem above the bar; without a bar it is a Python warning."""
        if self._active and self._shown:
            self.note(line)
        elif self._active:
            warnings.warn(line, SystemWarning, stacklevel=2)

    @contextlib.contextmanager
    def compiling(self, first: bool) -> Iterator[None]:
        """Prints how long the first step takes to compile, in a block that runs it, and then shows the bar.

        Args:
          first: whether this is the first step; otherwise nothing is done.
        """
        if not first:
            yield
            return
        self.note(f"{self._title}: compiling the first step ...")
        start = time.perf_counter()
        yield
        self.note(f"{self._title}: compiled in {time.perf_counter() - start:.1f} s")
        if self._active and self._shown:
            self._bar = tqdm.tqdm(
                total=self._total,
                initial=self._step,
                desc=self._title,
                unit="step",
                dynamic_ncols=True,
                file=sys.stdout,
                mininterval=INTERVAL if sys.stdout.isatty() else INTERVAL_IN_FILES,
            )

    def advance(self, step: int) -> None:
        """Moves the bar to the last finished step."""
        if self._bar is not None and step > self._bar.n:
            self._bar.update(step - self._bar.n)

    def show_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the loss and the rate of a logged step on the bar, and moves it there."""
        if self._bar is not None:
            rate = f"{metrics['examples_per_second']:.0f} img/s"
            self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}, {rate}", refresh=False)
            self.advance(step)
