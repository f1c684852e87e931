"""The one diffusion stage behind prior, decoder and upsamplers.

A subclass says what is diffused (``example``), on what it leans (``bind``) and what is dropped in
training (``drop_rates``); the loss, classifier-free guidance and sampling are here, once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dalle2_jax import diffusion, rng
from dalle2_jax.diffusion import Course, LossHistory, NoiseMoments, Objective, SamplerConfig, Schedule
from dalle2_jax.diffusion.timesteps import SAMPLERS as TIMESTEP_SAMPLERS
from dalle2_jax.diffusion.variance import LEARNED
from dalle2_jax.stages.base import Outputs, Variables
from dalle2_jax.types import Batch, Denoiser, Metrics, Params, UserError, choose

Condition = Mapping[str, jax.Array]
"""What a sample leans on: arrays by name, each with the batch as its first axis."""

Drops = Mapping[str, Bool[Array, "B"]]
"""Which examples go without which part of the condition."""


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(Objective):
    """The forward process of a stage, what its network predicts of it, and on what it is trained.

    ``schedule`` and ``num_steps`` are ``diffusion.make_schedule``'s; ``resolution_shift`` is the side of the pictures
    over the side the schedule was made for (``diffusion.shifted``). ``timesteps`` is "uniform" or
    "loss_second_moment" (``diffusion.timesteps``). The rest is `Objective`'s.
    """

    schedule: str = "cosine"
    num_steps: int = 1000
    zero_terminal_snr: bool = False
    resolution_shift: float = 1.0
    timesteps: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("timesteps", self.timesteps, dict.fromkeys(TIMESTEP_SAMPLERS))
        self.check(self.make_schedule())

    def make_schedule(self) -> Schedule:
        """Returns the schedule of training; the same object for equal configurations."""
        schedule = diffusion.make_schedule(self.schedule, self.num_steps)
        if self.resolution_shift != 1.0:
            schedule = diffusion.shifted(schedule, self.resolution_shift)
        return diffusion.with_zero_terminal_snr(schedule) if self.zero_terminal_snr else schedule


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SamplerConfig):
    """How a stage is sampled: the sampler, and classifier-free guidance (``diffusion.guidance``).

    ``guidance`` is the scale of all that the stage is told (1: none); ``image_guidance`` and ``text_guidance`` take its
    place for a part. The rest says how scales change over the steps.
    """

    guidance: float = 1.0
    image_guidance: float | None = None
    text_guidance: float | None = None
    guidance_schedule: str = "constant"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.course

    @property
    def course(self) -> Course:
        """How scales change over the steps."""
        return Course(self.guidance_schedule, self.guidance_interval, self.guidance_rescale)

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each part that a stage may be told."""
        parts = {"image": self.image_guidance, "text": self.text_guidance}
        return {name: self.guidance if scale is None else scale for name, scale in parts.items()}

    def split(self) -> tuple["SamplingConfig", dict[str, Any]]:
        """Returns what decides the compiled program, and the numbers that the program takes.

        Scales that are 0, 1 or equal spare branches of the network, so that is part of the program.
        """
        stand_ins = {0.0: 0.0, 1.0: 1.0}
        for scale in self.scales.values():
            stand_ins.setdefault(scale, 2.0 + len(stand_ins))
        image, text = (stand_ins[scale] for scale in self.scales.values())
        program = dataclasses.replace(self, guidance=1.0, image_guidance=image, text_guidance=text, eta=0.0)
        return program, {"scales": self.scales, "eta": self.eta}


@dataclasses.dataclass(frozen=True)
class DiffusionStage:
    """A network under a diffusion objective. See ``stages.base.Stage`` for what training asks."""

    diffusion: DiffusionConfig
    sampling: SamplingConfig
    name: str
    moments: NoiseMoments | None = dataclasses.field(default=None, kw_only=True)  # measured once it is trained

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

    def example(self, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        """Returns x_0 float32[B, ...] of a prepared batch, and the condition it is drawn from.

        ``stats`` are the stage's, of which some say how x_0 lies in the batch's space.
        """
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
        return self.diffusion.make_schedule()

    def init(self, key: jax.Array) -> Variables:
        """Returns fresh variables."""
        return Variables(self.init_params(key), self.init_stats())

    def init_stats(self) -> Params:
        """Returns the first statistics: the losses by which timesteps are drawn, if they are."""
        return diffusion.empty_history(self.diffusion.num_steps)._asdict() if self._importance else {}

    @property
    def _importance(self) -> bool:
        return self.diffusion.timesteps == "loss_second_moment"

    def check_sampling(self, config: SamplingConfig) -> None:
        """Raises UserError where this stage cannot be sampled so: steps, moments or scales that it does not have."""
        stepper = diffusion.make_stepper(config, None, self.diffusion.variance, self.moments)
        stepper.rows(diffusion.respace(self.schedule, config.steps))
        if config.guidance != 1.0 and not self.drop_rates:
            raise UserError(f"stage {self.name} was not trained to go without what it is told: it has no guidance")
        for name, scale in (("image", config.image_guidance), ("text", config.text_guidance)):
            if scale is not None and name not in self.drop_rates:
                raise UserError(f"stage {self.name} was not trained to go without {name}: it has no {name}_guidance")

    def check_channels(self, in_channels: int, out_channels: int, field: str) -> None:
        """Raises UserError unless a network's output has room for what it predicts of so many channels."""
        wanted = in_channels * (2 if self.diffusion.variance in LEARNED else 1)
        if out_channels != wanted:
            raise UserError(
                f"stage {self.name} with variance {self.diffusion.variance!r} "
                f"needs {field} {wanted}, not {out_channels}"
            )

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Returns the batch as it is; stages that borrow CLIP add its embeddings."""
        return batch

    def loss(self, params: Params, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Outputs]:
        """The objective's mean over the batch, parts of the condition dropped at their rates."""
        x_0, condition = self.example(stats, rng.stream(key, "example"), batch)
        drops = {
            name: jax.random.bernoulli(rng.stream(key, f"drop_{name}"), rate, x_0.shape[:1])
            for name, rate in self.drop_rates.items()
        }
        denoiser = self.bind(params, condition, drops, rng.stream(key, "dropout"))
        config, noise_key = self.diffusion, rng.stream(key, "noise")
        history = LossHistory(*(stats[name] for name in LossHistory._fields)) if self._importance else None
        t, weights = diffusion.draw(rng.stream(noise_key, "t"), x_0.shape[0], config.num_steps, history)
        losses, metrics = diffusion.training_loss(self.schedule, config, denoiser, x_0, t, noise_key)
        if history:
            stats = {**stats, **diffusion.record(history, t, jax.lax.stop_gradient(losses))._asdict()}
        return (losses * weights).mean(), Outputs(metrics, stats)

    def sample(
        self,
        params: Params,
        keys: Key[Array, "B"],
        condition: Condition,
        config: SamplingConfig,
        scales: Mapping[str, Float[Array, ""] | float] | None = None,
        eta: Float[Array, ""] | float | None = None,
        *,
        absent: Drops | None = None,
        x_T: Float[Array, "B *shape"] | None = None,
        **around: Any,
    ) -> Float[Array, "B *shape"]:
        """Draws x_0 for each key, float32.

        Args:
          params: usually the average of the weights.
          keys: one an image; it alone decides the noise.
          condition: as ``example`` returns it.
          config: static. Which branches of the network guidance needs follows from its scales.
          scales: take the place of ``config.scales``; may be traced, so changing them compiles nothing.
          eta: takes the place of ``config.eta`` of DDIM, likewise.
          absent: images that go without a part of the condition (an empty caption), by ``drop_rates``' names.
          x_T: where to start instead of fresh noise.
          **around: ``hook``, ``inpainting`` and ``resample`` of ``diffusion.sample``.
        """
        return diffusion.sample(
            self.schedule,
            config,
            self.diffusion.prediction,
            self._guided(params, condition, config, scales, absent or {}),
            keys,
            self.sample_shape(condition),
            variance_type=self.diffusion.variance,
            x_T=x_T,
            eta=eta if config.name == "ddim" else None,
            moments=self.moments,
            **around,
        )

    def invert(
        self,
        params: Params,
        x_0: Float[Array, "B *shape"],
        condition: Condition,
        steps: int | str,
        skip_last: bool = True,
        absent: Drops | None = None,
    ) -> Float[Array, "B *shape"]:
        """Returns the x_T from which ``sample`` by DDIM, without guidance, draws x_0 (``diffusion.invert``)."""
        denoiser = self.bind(params, condition, self._drops(condition, absent or {}), None)
        prediction, variance = self.diffusion.prediction, self.diffusion.variance
        return diffusion.invert(
            self.schedule, steps, prediction, denoiser, x_0, variance_type=variance, skip_last=skip_last
        )

    def draw(
        self,
        variables: Variables,
        keys: Key[Array, "B"],
        condition: Condition,
        config: SamplingConfig,
        scalars: Mapping[str, Any],
        absent: Bool[Array, "B"] | None = None,
        **around: Any,
    ) -> Float[Array, "B *shape"]:
        """As ``sample``, in the cascade's words for any stage.

        Args:
          variables: the averaged weights, and the statistics beside them.
          scalars: those of ``config.split``; none stands for the config's own.
          absent: which pictures go without a caption; of no matter to a stage that reads none.
        """
        drops = {"text": absent} if absent is not None and "text" in self.drop_rates else None
        return self.sample(variables.params, keys, condition, config, **scalars, absent=drops, **around)

    def _guided(
        self,
        params: Params,
        condition: Condition,
        config: SamplingConfig,
        scales: Mapping[str, Float[Array, ""] | float] | None,
        absent: Drops,
    ) -> Denoiser:
        """Returns the network under guidance, only those of its branches computed that have a weight."""
        names = tuple(self.drop_rates)
        kept, static = self._drops(condition, absent), config.scales
        computed = diffusion.branches([static[name] for name in names], config.course)
        if computed == (len(names),):
            return self.bind(params, condition, kept, None)
        repeated = {name: jnp.concatenate([value] * len(computed)) for name, value in condition.items()}
        # Branch k is told the first k parts.
        drops = {
            name: jnp.concatenate([kept[name] if place < k else jnp.ones_like(kept[name]) for k in computed])
            for place, name in enumerate(names)
        }
        return diffusion.guided(
            self.bind(params, repeated, drops, None),
            [(static if scales is None else scales)[name] for name in names],
            computed,
            self.diffusion.num_steps,
            config.course,
            self.diffusion.variance in LEARNED,
        )

    def bits_per_dim(self, params: Params, keys: Key[Array, "B"], x_0: jax.Array, condition: Condition) -> Metrics:
        """Returns the bound of ``diffusion.bits_per_dim`` for pictures, nothing dropped."""
        return diffusion.bits_per_dim(
            self.schedule,
            self.diffusion.prediction,
            self.diffusion.variance,
            self._whole(params, condition),
            x_0,
            keys,
        )

    def noise_power(
        self, params: Params, key: Key[Array, ""], x_0: jax.Array, condition: Condition, t: Int[Array, ""]
    ) -> Float[Array, ""]:
        """Returns the mean of eps_theta(x_t, t)^2 over examples and dimensions (``diffusion.variance``, eq. 6)."""
        noise = jax.random.normal(key, x_0.shape)
        times = jnp.full(x_0.shape[:1], t, jnp.int32)
        x_t = diffusion.q_sample(self.schedule, x_0, times, noise)
        predict = diffusion.predictor(
            self.diffusion.prediction, self._whole(params, condition), None, self.diffusion.variance
        )
        return jnp.mean(jnp.square(predict(x_t, self.schedule.level_at(t)).eps))

    def _whole(self, params: Params, condition: Condition) -> Denoiser:
        """The network told everything."""
        return self.bind(params, condition, self._drops(condition, {}), None)

    def _drops(self, condition: Condition, absent: Drops) -> Drops:
        """What each example goes without: ``absent``, where it says so of a part."""
        if not self.drop_rates:
            return {}
        batch = jax.tree.leaves(condition)[0].shape[0]
        return {name: absent.get(name, jnp.zeros(batch, bool)) for name in self.drop_rates}
