"""Traces of chosen train steps, for TensorBoard's profile plugin, XProf or Perfetto."""

import contextlib
import dataclasses
import pathlib
import re
import warnings
from collections.abc import Iterator

import jax

from dalle2_jax.errors import SystemWarning, UsageError, shown
from dalle2_jax.types import Metrics


@dataclasses.dataclass(frozen=True)
class Profile:
    """The steps that are traced.

    Attributes:
      first: number of the first one, counted from 1 for the first step of this process; that one compiles.
      last: of the last one.

    Raises:
      UsageError: ``first`` is below 1 or above ``last``.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise UsageError(f"profile {self.first},{self.last} must be FIRST,LAST with 1 <= FIRST <= LAST")

    @classmethod
    def parse(cls, words: str) -> "Profile":
        """Returns the profile FIRST,LAST. UsageError if the words are none."""
        found = re.fullmatch(r"(\d{1,9}),(\d{1,9})", words, re.ASCII)
        if found is None:
            raise UsageError(f"--profile {shown(words)} must be FIRST,LAST, two numbers of steps, as in 10,12")
        return cls(int(found[1]), int(found[2]))


class Tracer:
    """Traces the steps of a profile. A context that ends a trace which is still open."""

    def __init__(self, profile: Profile | None, folder: pathlib.Path):
        self._profile, self._folder = profile, folder
        self._steps, self._open = 0, False

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *error: object) -> None:
        if self._open:
            self._stop()
        elif self._profile is not None and self._steps < self._profile.first:
            first = self._profile.first
            warnings.warn(f"profile: the run ended after {self._steps} steps, before step {first}", SystemWarning, 2)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Runs one step in the trace if it is one of the profile's.

        Args:
          number: of the step in the run, which names it in the trace.
        """
        self._steps += 1
        if self._profile is not None and self._steps == self._profile.first:
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        if not self._open:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def finish(self, metrics: Metrics) -> None:
        """Ends the trace after its last step, when the devices have finished it.

        Args:
          metrics: of the step.
        """
        if self._open and self._profile is not None and self._steps == self._profile.last:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        self._open = False
        jax.profiler.stop_trace()
