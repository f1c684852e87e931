"""The one diffusion stage behind prior, decoder and upsamplers.

A subclass says what is diffused (``example``), on what it leans (``bind``) and what is dropped in
training (``drop_rates``); the loss, classifier-free guidance and sampling are here, once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dalle2_jax import rng
from dalle2_jax.diffusion import SamplerConfig, Schedule, classifier_free, make_schedule, mse_loss, sample
from dalle2_jax.stages.base import Outputs, Variables
from dalle2_jax.types import Batch, Denoiser, Params

Condition = Mapping[str, jax.Array]
"""What a sample leans on: arrays by name, each with the batch as its first axis."""

Drops = Mapping[str, Bool[Array, "B"]]
"""Which examples go without which part of the condition."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The forward process of a stage and what its network predicts: "eps", "x0" or "v"."""

    schedule: str = "cosine"
    num_steps: int = 1000
    prediction: str = "eps"
    weighting: str = "none"  # or "snr", for x0 and v
    max_weight: float = 10.0  # of "snr"


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SamplerConfig):
    """How a stage is sampled: the sampler, and the scale of classifier-free guidance (1: none)."""

    guidance: float = 1.0

    def split(self) -> tuple["SamplingConfig", dict[str, float]]:
        """Returns what decides the compiled program, and the numbers that the program takes."""
        guided = self.guidance if self.guidance == 1.0 else 2.0
        noisy = float(self.eta > 0) if self.name == "ddim" else 0.0
        program = dataclasses.replace(self, guidance=guided, eta=noisy)
        return program, {"guidance": self.guidance, "eta": self.eta}


@dataclasses.dataclass(frozen=True)
class DiffusionStage:
    """A network under a diffusion objective. See ``stages.base.Stage`` for what training asks."""

    diffusion: DiffusionConfig
    sampling: SamplingConfig
    name: str

    stats: ClassVar[dict] = {}

    # What a subclass says.

    @property
    def borrows(self) -> tuple[str, ...]:
        """Names of the stages whose weights ``prepare`` needs."""
        raise NotImplementedError

    @property
    def drop_rates(self) -> Mapping[str, float]:
        """Share of training examples that go without each part of the condition."""
        raise NotImplementedError

    def init_params(self, key: jax.Array) -> Params:
        """Returns the network's fresh parameters."""
        raise NotImplementedError

    def example(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        """Returns x_0 float32[B, ...] of a prepared batch, and the condition it is drawn from."""
        raise NotImplementedError

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        """Returns the shape of one sample."""
        raise NotImplementedError

    def bind(self, params: Params, condition: Condition, drops: Drops, dropout_key: jax.Array | None) -> Denoiser:
        """Returns the network bound to its parameters and condition; a dropout key means training."""
        raise NotImplementedError

    # What is the same for all.

    @property
    def schedule(self) -> Schedule:
        """The schedule of training, shared with sampling."""
        return make_schedule(self.diffusion.schedule, self.diffusion.num_steps)

    def init(self, key: jax.Array) -> Variables:
        """Returns fresh variables."""
        return Variables(self.init_params(key), {})

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Returns the batch as it is; stages that borrow CLIP add its embeddings."""
        return batch

    def loss(self, params: Params, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Outputs]:
        """Mean squared error of the prediction, parts of the condition dropped at their rates."""
        x_0, condition = self.example(rng.stream(key, "example"), batch)
        drops = {
            name: jax.random.bernoulli(rng.stream(key, f"drop_{name}"), rate, x_0.shape[:1])
            for name, rate in self.drop_rates.items()
        }
        denoiser = self.bind(params, condition, drops, rng.stream(key, "dropout"))
        config, noise_key = self.diffusion, rng.stream(key, "noise")
        losses, metrics = mse_loss(
            self.schedule, config.prediction, denoiser, x_0, noise_key, config.weighting, config.max_weight
        )
        return losses.mean(), Outputs(metrics, stats)

    def sample(
        self,
        params: Params,
        keys: Key[Array, "B"],
        condition: Condition,
        config: SamplingConfig,
        guidance: Float[Array, ""] | float | None = None,
        eta: Float[Array, ""] | float | None = None,
        *,
        absent: Drops | None = None,
        x_T: Float[Array, "B *shape"] | None = None,
    ) -> Float[Array, "B *shape"]:
        """Draws x_0 for each key, float32.

        Args:
          params: usually the average of the weights.
          keys: one an image; it alone decides the noise.
          condition: as ``example`` returns it.
          config: static. Whether there is guidance follows from ``config.guidance``.
          guidance: takes the place of ``config.guidance``; may be traced, so changing it compiles nothing.
          eta: takes the place of ``config.eta`` of DDIM, likewise.
          absent: images that go without a part of the condition (an empty caption), by ``drop_rates``' names.
          x_T: where to start instead of fresh noise.
        """
        batch = keys.shape[0]
        kept = {name: (absent or {}).get(name, jnp.zeros(batch, bool)) for name in self.drop_rates}
        if config.guidance == 1.0 or not self.drop_rates:
            denoiser = self.bind(params, condition, kept, None)
        else:
            # Twice the condition, its second half dropped: both branches in one batched call.
            double = {name: jnp.concatenate([value, value]) for name, value in condition.items()}
            drops = {name: jnp.concatenate([value, jnp.ones(batch, bool)]) for name, value in kept.items()}
            scale = config.guidance if guidance is None else guidance
            denoiser = classifier_free(self.bind(params, double, drops, None), scale)
        return sample(
            self.schedule,
            config,
            self.diffusion.prediction,
            denoiser,
            keys,
            self.sample_shape(condition),
            x_T=x_T,
            eta=eta if config.name == "ddim" else None,
        )
