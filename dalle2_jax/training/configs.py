"""The sections of a config that describe a run and its optimizer.

Systems are loaded without the libraries that train them, so this module imports none of them.
"""

import dataclasses
from typing import Annotated

from dalle2_jax.errors import choose
from dalle2_jax.ranges import BelowOne, Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Seed
from dalle2_jax.training.reporting.trackers import TRACKERS

HOST = "pinned_host"
"""The kind of memory of a device's host from and to which the device copies directly."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The length of a run and how often it reports.

    Attributes:
      seed: of the parameters, the order of the data, and the noise.
      total_steps: after which the run ends.
      batch_size: examples per step, over all devices.
      log_every: steps between two lines of metrics.jsonl.
      checkpoint_every: steps between two checkpoints; the last step has one too.
      keep_checkpoints: how many of the newest checkpoints stay on disk.
      sample_every: steps between two previews; 0 for none.
      eval_every: steps between two evaluations on split "val"; 0 for none.
      workers: processes that prepare batches; 0 prepares them in a thread.
      tracker: a service that gets the metrics too, a key of `trackers.TRACKERS`; "" for none.

    Raises:
      UsageError: an unknown tracker.
    """

    seed: Seed = 0
    total_steps: NonNegativeInt = 1000  # 0 for an imported stage, which was not trained here
    batch_size: Annotated[int, Range(1, 10_000_000)] = 64
    log_every: PositiveInt = 50
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    sample_every: NonNegativeInt = 0
    eval_every: NonNegativeInt = 0
    workers: Annotated[int, Range(0, 1_000)] = 0
    tracker: str = ""

    def __post_init__(self) -> None:
        if self.tracker:
            choose("tracker", self.tracker, TRACKERS)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer of one stage.

    Attributes:
      lr: the learning rate after warm-up.
      warmup_steps: steps of linear warm-up; see `warmup_steps` for runs that are shorter.
      schedule: "constant", or "cosine" to zero at the last step.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, times the learning rate.
      clip_norm: maximal global norm of the gradients; 0 turns clipping off.
      ema_decay: largest decay of the averaged weights, see `ema_update`.
      sam_rho: rho of sharpness-aware minimisation, see `sharpness`; 0 turns it off. The paper's CLIP has 0.1.
      sam_batch: examples of a replica, which has a perturbation of its own; 0 is one perturbation for the batch. The
        paper's CLIP has 64.
      name: "adamw", or "adafactor" (Shazeer & Stern 2018, arXiv 1804.04235), whose second moment of a matrix is
        stored as one row and one column; or "muon", see `optim`.
      mu_dtype: dtype in which the first moment is stored, "float32" or "bfloat16".
      ema_memory: where the averaged weights are stored, "device" or "pinned_host", the memory of the host.
      accumulate: number of micro-batches in which the gradients of a batch are computed, see `accumulation`.
    """

    lr: Annotated[float, Range(0, 1_000, exclusive_min=True)] = 1e-4
    warmup_steps: NonNegativeInt = 0
    schedule: str = "constant"
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    eps: Fraction = 1e-8
    weight_decay: Annotated[float, Range(0, 1_000)] = 0.0
    clip_norm: NonNegativeFloat = 1.0
    ema_decay: BelowOne = 0.9999
    sam_rho: Annotated[float, Range(0, 1_000)] = 0.0
    sam_batch: NonNegativeInt = 0
    accumulate: Annotated[int, Range(1, 1_000_000)] = 1
    name: str = "adamw"
    mu_dtype: str = "float32"
    ema_memory: str = "device"

    def __post_init__(self) -> None:
        choose("name", self.name, dict.fromkeys(("adamw", "adafactor", "muon")))
        choose("ema_memory", self.ema_memory, dict.fromkeys(("device", HOST)))
