"""Functions that a training run calls between steps."""

import dataclasses
from collections.abc import Callable, Mapping

from dalle2_jax.stages.base import Variables


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a run calls besides the train step, in the thread that trains; their time does not count for the rates.

    Attributes:
      log: called at every logged step with the step and its metrics, which metrics.jsonl has too.
      checkpoint: called with the step after the writing of its checkpoint has begun.
      preview: called every ``sample_every`` steps and after the last one, with the averaged variables and the step.
      evaluate: called every ``eval_every`` steps and after the last one, with the averaged variables and the step;
        what it returns is added to that step's metrics. FloatingPointError ends the run as one that diverged.
    """

    log: Callable[[int, Mapping[str, float]], None] | None = None
    checkpoint: Callable[[int], None] | None = None
    preview: Callable[[Variables, int], None] | None = None
    evaluate: Callable[[Variables, int], Mapping[str, float]] | None = None
