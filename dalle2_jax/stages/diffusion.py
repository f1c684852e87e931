"""The diffusion stage that prior, decoder and upsamplers inherit from.

A subclass defines the data (``example``), the network and its conditioning (``bind``) and the parts of the condition
that are dropped in training (``drop_rates``); the loss, classifier-free guidance and sampling are defined here.

A stage with a ``teacher`` is a distilled one (``diffusion.distillation``): a student of the same network, whose
``frozen`` has the variables of the teacher under the stage's own name. ``teacher`` is how the teacher is sampled, and
``sampling`` how the student is: by DDIM, in its own few steps, without guidance.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dalle2_jax import diffusion, rng
from dalle2_jax.diffusion import LossHistory, NoiseStatistics, Objective, SamplingOptions, Schedule, StudentSteps
from dalle2_jax.diffusion.steppers import Predict
from dalle2_jax.diffusion.timesteps import SAMPLERS as TIMESTEP_SAMPLERS
from dalle2_jax.diffusion.variance import LEARNED
from dalle2_jax.errors import UserError, choose
from dalle2_jax.ranges import DiffusionSteps, Range
from dalle2_jax.stages.base import Outputs, StageDefaults, Variables
from dalle2_jax.stages.sampling import (
    Condition,
    Drops,
    SamplingConfig,
    SamplingPlan,
    check_student,
    make_plan,
    student_steps,
)
from dalle2_jax.types import Batch, Denoiser, Metrics, Params


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(Objective):
    """The forward process of a stage, and the training objective.

    Attributes:
      schedule: name of the noise schedule, see ``diffusion.make_schedule``.
      num_steps: T.
      zero_terminal_snr: whether the schedule is stretched to end in pure noise (``diffusion.with_zero_terminal_snr``).
      resolution_shift: side of the images over the side that the schedule was designed for (``diffusion.shifted``).
      timesteps: sampling of training timesteps, "uniform" or "loss_second_moment" (``diffusion.timesteps``).
      table_dtype: dtype in which the tables of the schedule are computed: "float64", or "float32" as in diffusers
        (``diffusion.in_float32``).

    The other fields are those of `Objective`.
    """

    schedule: str = "cosine"
    num_steps: DiffusionSteps = 1000
    zero_terminal_snr: bool = False
    resolution_shift: Annotated[float, Range(0.001, 1_000)] = 1.0
    timesteps: str = "uniform"
    table_dtype: str = "float64"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("table_dtype", self.table_dtype, dict.fromkeys(("float64", "float32")))
        choose("timesteps", self.timesteps, dict.fromkeys(TIMESTEP_SAMPLERS))
        self.check(self.make_schedule())

    def make_schedule(self) -> Schedule:
        """Returns the schedule of training; the same object for equal configurations."""
        schedule = diffusion.make_schedule(self.schedule, self.num_steps)
        if self.resolution_shift != 1.0:
            schedule = diffusion.shifted(schedule, self.resolution_shift)
        if self.zero_terminal_snr:
            schedule = diffusion.with_zero_terminal_snr(schedule)
        return diffusion.in_float32(schedule) if self.table_dtype == "float32" else schedule


@dataclasses.dataclass(frozen=True)
class DiffusionStage(StageDefaults):
    """A network with a diffusion objective; it implements ``stages.base.Stage``.

    Attributes:
      diffusion: the forward process and the objective.
      sampling: how the stage is sampled unless a call says otherwise.
      name: of the stage.
      noise_statistics: measured after training, for sampling with variance "analytic".
      teacher: how the teacher of a distilled stage is sampled; None for a stage that is trained on data alone.
    """

    diffusion: DiffusionConfig
    sampling: SamplingConfig
    name: str
    noise_statistics: NoiseStatistics | None = dataclasses.field(default=None, kw_only=True)
    teacher: SamplingConfig | None = dataclasses.field(default=None, kw_only=True)

    # A subclass defines these.

    @property
    def inputs(self) -> tuple[str, ...]:
        """See `Stage`."""
        raise NotImplementedError

    @property
    def conditioned_on(self) -> tuple[str, ...]:
        """Names of the stages that make the condition."""
        return ()

    @property
    def drop_rates(self) -> Mapping[str, float]:
        """Share of training examples for which each part of the condition is dropped, by name."""
        raise NotImplementedError

    def init_params(self, key: jax.Array) -> Params:
        """Returns initial parameters of the network."""
        raise NotImplementedError

    def example(self, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        """Returns x_0 float32[B, ...] of a prepared batch, and its condition.

        Args:
          stats: the stage's statistics.
          key: of the random crops and corruptions.
          batch: a prepared batch.
        """
        raise NotImplementedError

    def condition(self, batch: Batch) -> Condition:
        """Returns the condition of a prepared batch for sampling, without the random corruptions of training."""
        raise NotImplementedError

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        """Returns the shape of one sample."""
        raise NotImplementedError

    def bind(self, params: Params, condition: Condition, drops: Drops, dropout_key: jax.Array | None) -> Denoiser:
        """Returns the network bound to its parameters and condition; with a dropout key, in training mode."""
        raise NotImplementedError

    # These are the same for all.

    @property
    def requires(self) -> tuple[str, ...]:
        """The stages that make the condition, and the teacher, which has the stage's own name."""
        return (*self.conditioned_on, *(() if self.teacher is None else (self.name,)))

    @property
    def diffusion_steps(self) -> int:
        """T of the forward process."""
        return self.diffusion.num_steps

    @property
    def inpainting_network(self) -> bool:
        """Whether the network has known pixels as additional input."""
        return False

    def prepare_captions(self, clip: Variables | None, batch: Batch) -> Batch:
        """Returns the batch with the text features that the network uses, computed by CLIP where they are missing."""
        return batch

    @property
    def sampling_in_training(self) -> SamplingConfig:
        """How an unfinished stage is sampled: as ``sampling`` states, without statistics measured after training."""
        analytic = self.sampling.variance == "analytic"
        return dataclasses.replace(self.sampling, variance="auto") if analytic else self.sampling

    @property
    def schedule(self) -> Schedule:
        """The schedule of training, shared with sampling."""
        return self.diffusion.make_schedule()

    def init(self, key: jax.Array) -> Variables:
        """Returns initial variables."""
        return Variables(self.init_params(key), self.init_stats())

    def init_stats(self) -> Params:
        """Returns the initial statistics: the loss history of importance-sampled timesteps, where they are used."""
        return diffusion.empty_history(self.diffusion.num_steps)._asdict() if self._importance else {}

    @property
    def _importance(self) -> bool:
        return self.diffusion.timesteps == "loss_second_moment" and self.teacher is None

    @property
    def student_steps(self) -> StudentSteps:
        """The steps of a distilled stage and of its teacher. UserError if they do not fit, or there is no teacher."""
        if self.teacher is None:
            raise UserError(f"stage {self.name} is not distilled: it has no teacher")
        return student_steps(self.schedule, self.teacher, self.sampling)

    def check_sampling(self, config: SamplingConfig) -> None:
        """Raises UserError for a configuration that this stage cannot be sampled with.

        It may have too many steps, need noise statistics that were not measured, or guide by a part of the condition
        that was never dropped in training. A distilled stage has its own steps and its teacher's guidance.
        """
        if self.teacher is not None:
            check_student(self.name, self.schedule, self.sampling, config)
        stepper = diffusion.make_stepper(config, None, self.diffusion.variance, self.noise_statistics)
        stepper.rows(diffusion.steps_of(self.schedule, config))
        if config.guidance != 1.0 and not self.drop_rates:
            raise UserError(f"stage {self.name} was trained without dropping its condition: it has no guidance")
        for name, scale in (("image", config.image_guidance), ("text", config.text_guidance)):
            if scale is not None and name not in self.drop_rates:
                raise UserError(f"stage {self.name} was trained without dropping {name}: it has no {name}_guidance")

    def check_channels(self, in_channels: int, out_channels: int, field: str) -> None:
        """Raises UserError unless a network has the output channels for its prediction of ``in_channels`` channels."""
        required = in_channels * (2 if self.diffusion.variance in LEARNED else 1)
        if out_channels != required:
            raise UserError(
                f"stage {self.name} with variance {self.diffusion.variance!r} "
                f"needs {field} {required}, not {out_channels}"
            )

    def loss(
        self,
        params: Params,
        stats: Params,
        frozen: Mapping[str, Variables],
        key: Key[Array, ""],
        batch: Batch,
        *,
        t: Int[Array, "B"] | None = None,
        noise: Float[Array, "B *shape"] | None = None,
    ) -> tuple[jax.Array, Outputs]:
        """Returns the mean of the objective over the batch, with parts of the condition dropped at their rates.

        The objective of a distilled stage is ``diffusion.distillation_loss``; the teacher lacks the same parts.
        ``t`` and ``noise`` (eps) replace those from the key; everything else random still comes from the key.
        """
        x_0, condition = self.example(stats, rng.stream(key, "example"), batch)
        drops = {
            name: rng.bernoulli(rng.stream(key, f"drop_{name}"), rate, x_0.shape[:1])
            for name, rate in self.drop_rates.items()
        }
        denoiser = self.bind(params, condition, drops, rng.stream(key, "dropout"))
        config, noise_key = self.diffusion, rng.stream(key, "noise")
        history = LossHistory(*(stats[name] for name in LossHistory._fields)) if self._importance else None
        t, weights = self._timesteps(rng.stream(noise_key, "t"), x_0.shape[0], history, t)
        if self.teacher is None:
            losses, metrics = diffusion.training_loss(self.schedule, config, denoiser, x_0, t, noise_key, noise)
        else:
            networks = denoiser, self._teacher(self.teacher, frozen[self.name].params, condition, drops)
            losses, metrics = diffusion.distillation_loss(
                self.schedule, config, self.student_steps, networks, x_0, t, noise_key, noise
            )
        if history:
            stats = {**stats, **diffusion.record(history, t, jax.lax.stop_gradient(losses))._asdict()}
        quartiles = diffusion.quartile_losses(t, config.num_steps, losses, weights)
        return (losses * weights).mean(), Outputs({**metrics, **quartiles}, stats)

    def _timesteps(
        self, key: Key[Array, ""], batch: int, history: LossHistory | None, given: Int[Array, "B"] | None
    ) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        """Returns the timesteps to train on, and the weight of each; those of a distilled stage are its own steps."""
        if given is not None:
            return given, diffusion.importance(given, self.diffusion.num_steps, history)
        if self.teacher is not None:
            return self.student_steps.sample_timesteps(key, batch), jnp.ones(batch)
        return diffusion.sample_timesteps(key, batch, self.diffusion.num_steps, history)

    def _teacher(self, config: SamplingConfig, params: Params, condition: Condition, drops: Drops) -> Predict:
        """Returns the teacher's network as its sampler evaluates it: guided, and clipped or thresholded."""
        guided = self._guided(params, condition, self.plan(config, absent=drops))
        clip = diffusion.thresholding(config.threshold, config.clip_sample, config.quantile)
        return diffusion.predictor(self.diffusion.prediction, guided, clip, self.diffusion.variance)

    def plan(
        self, config: SamplingConfig | None = None, *, absent: Drops | None = None, **options: Any
    ) -> SamplingPlan:
        """Returns the plan of `sample`.

        Args:
          config: how to sample; ``sampling`` of the stage by default.
          absent: examples that lack a part of the condition (an empty caption), by the names of ``drop_rates``.
          **options: fields of ``diffusion.SamplingOptions``: ``x_T``, ``noise``, ``inpainting``, ...
        """
        config = self.sampling if config is None else config
        return make_plan(config, tuple(self.drop_rates), absent or {}, SamplingOptions(**options))

    def sample(
        self, variables: Variables, keys: Key[Array, "B"], condition: Condition, plan: SamplingPlan
    ) -> Float[Array, "B *shape"]:
        """Samples one example a key, in the space of the stage's data.

        Args:
          variables: usually the averaged weights, and the statistics.
          keys: one an example; the noise depends on nothing else.
          condition: as ``example`` returns it.
          plan: as `plan` returns it.

        Returns:
          float32[B, *shape]; with ``trajectory`` float32[steps, B, *shape].
        """
        return self.sample_x_0(variables.params, keys, condition, plan)

    def sample_x_0(
        self, params: Any, keys: Key[Array, "B"], condition: Condition, plan: SamplingPlan
    ) -> Float[Array, "B *shape"]:
        """Samples x_0 as ``example`` returns it: in the space in which the network was trained."""
        return diffusion.sample(
            self.schedule,
            plan.config,
            self.diffusion.prediction,
            self._guided(params, condition, plan),
            keys,
            self.sample_shape(condition),
            variance_type=self.diffusion.variance,
            options=dataclasses.replace(plan.options, noise_statistics=self.noise_statistics),
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
        """Returns the x_T from which DDIM without guidance samples x_0 (``diffusion.invert``)."""
        denoiser = self.denoiser(params, condition, absent)
        prediction, variance = self.diffusion.prediction, self.diffusion.variance
        return diffusion.invert(
            self.schedule, steps, prediction, denoiser, x_0, variance_type=variance, skip_last=skip_last
        )

    def _guided(self, params: Any, condition: Condition, plan: SamplingPlan) -> Denoiser:
        """Returns the network under guidance; only the branches with a non-zero weight are evaluated."""
        given = self._drops(condition, plan.absent)
        if plan.branches == (len(plan.parts),):
            return self.bind(params, condition, given, None)

        def branch(k: int) -> tuple[Condition, Drops]:
            """Returns the condition and drops of branch k, which has the first k parts of the condition."""
            present = plan.parts[:k]
            drops = {name: drop if name in present else jnp.ones_like(drop) for name, drop in given.items()}
            if plan.negative is None or "text" in present or "text" not in given:
                return condition, drops
            return plan.negative, {**drops, "text": jnp.zeros_like(given["text"])}

        condition, drops = jax.tree.map(lambda *rows: jnp.concatenate(rows), *(branch(k) for k in plan.branches))
        return diffusion.guided(
            self.bind(params, condition, drops, None),
            [plan.scales[name] for name in plan.parts],
            plan.branches,
            self.diffusion.num_steps,
            plan.config.scale_schedule,
            self.diffusion.variance in LEARNED,
        )

    def bits_per_dim(self, params: Params, keys: Key[Array, "B"], x_0: jax.Array, condition: Condition) -> Metrics:
        """Returns the bound of ``diffusion.bits_per_dim`` for images, with the full condition."""
        return diffusion.bits_per_dim(
            self.schedule,
            self.diffusion.prediction,
            self.diffusion.variance,
            self.denoiser(params, condition),
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
            self.diffusion.prediction, self.denoiser(params, condition), None, self.diffusion.variance
        )
        return jnp.mean(jnp.square(predict(x_t, self.schedule.level_at(t)).eps))

    def denoiser(self, params: Params, condition: Condition, absent: Drops | None = None) -> Denoiser:
        """Returns the network bound to its parameters and condition: (x_t, t) -> prediction, without guidance.

        t is a timestep of training, int32[B]. Parts of the condition are dropped only where ``absent`` is true.

        Raises:
          UserError: the stage is distilled, so that its network does not predict x_0.
        """
        if self.teacher is not None:
            raise UserError(
                f"stage {self.name} is distilled: its network predicts where several steps lead, so it has no "
                "inversion, likelihood or noise statistics; use the system that it was distilled from"
            )
        return self.bind(params, condition, self._drops(condition, absent or {}), None)

    def _drops(self, condition: Condition, absent: Drops) -> Drops:
        """Returns ``absent`` for every part of the condition, false where it does not name a part."""
        if not self.drop_rates:
            return {}
        batch = jax.tree.leaves(condition)[0].shape[0]
        return {name: absent.get(name, jnp.zeros(batch, bool)) for name in self.drop_rates}
