"""Distillation: a student that takes, in each of its steps, several deterministic steps of a teacher.

The teacher takes M steps of DDIM, over the levels i = 0 .. M - 1 of a respaced schedule. The student takes N = M / K:
its levels are every K-th of the teacher's, K - 1, 2 K - 1, .., M - 1, so that both start at the same level. From x_t at
a level i of the student's, the teacher goes to the student's next level, i - K, by K steps (``steppers`` eq. (2), with
eta = 0), in which (x_0, eps) is the teacher's prediction, guided and clipped as it is when the teacher is sampled:

    z_i = x_t,          z_{j-1} = a_{j-1} x_0(z_j, j) + s_{j-1} eps(z_j, j)                    (1)

With (a, s) the rates at i and (a', s') those at i - K, which are (1, 0) in the last step, one step of DDIM leads from
x_t to the same point z' = z_{i-K} if its x_0 is (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2)

    x_0* = (z' - s'/s x_t) / (a' - s'/s a)                                                    (2)

The student is trained to predict it, by the objective of ordinary training (``objective`` eq. (1)-(4)) with the pair
(x_0*, (x_t - a x_0*) / s) in place of (x_0, eps), and t among its own levels. Salimans & Ho halve the number of steps
several times, from K = 2 to K = 2; here K is any number, and the student is trained once. As the teacher's prediction
is guided, one evaluation of the student replaces K guided ones (Meng et al. 2022, arXiv 2210.03142, with one fixed
scale).

By (1), z / s changes in each step by (a_{j-1} / s_{j-1} - a_j / s_j) x_0(z_j, j), so

    x_0* = sum_j w_j x_0(z_j, j),    w_j proportional to a_{j-1} / s_{j-1} - a_j / s_j         (3)

a mean with positive weights (in the last step, of the last x_0 only). A target never leaves the range to which the
teacher's predictions are clipped, so the student may be clipped too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dalle2_jax import rng
from dalle2_jax.diffusion import process, variance
from dalle2_jax.diffusion.objective import Objective, noise_of, squared_error
from dalle2_jax.diffusion.process import Denoised
from dalle2_jax.diffusion.schedule import Schedule
from dalle2_jax.diffusion.steppers import Ddim, DdimRow, Predict
from dalle2_jax.errors import UserError
from dalle2_jax.types import Denoiser, Metrics


@dataclasses.dataclass(frozen=True)
class StudentSteps:
    """The steps of a teacher, and those of its student.

    Attributes:
        teacher: the schedule of the teacher's M steps, respaced.
        student: the schedule of the student's N steps, respaced from the same one.

    Raises:
        UserError: the student's steps are not every K-th of the teacher's, up to the last, for a K above 1.
    """

    teacher: Schedule
    student: Schedule

    def __post_init__(self) -> None:
        all_steps, steps = self.teacher.num_steps, self.student.num_steps
        if steps >= all_steps or all_steps % steps:
            options = ", ".join(str(n) for n in range(1, all_steps) if all_steps % n == 0)
            raise UserError(
                f"the student's {steps} steps must be fewer than the teacher's {all_steps} and divide them: {options}"
            )
        expected = self.teacher.timesteps[self.stride - 1 :: self.stride]
        if not np.array_equal(self.student.timesteps, expected):
            raise UserError(
                f"the student's {steps} steps must be spaced evenly among the teacher's {all_steps} and end with the "
                f"last, as steps '{all_steps}/{steps}' of a teacher of {all_steps} steps do: timesteps "
                f"{', '.join(map(str, expected))}, not {', '.join(map(str, self.student.timesteps))}"
            )

    @property
    def stride(self) -> int:
        """K, the number of the teacher's steps in one of the student's."""
        return self.teacher.num_steps // self.student.num_steps

    def sample_timesteps(self, key: Key[Array, ""], batch: int) -> Int[Array, "B"]:
        """Samples timesteps of the student uniformly."""
        chosen = rng.randint(key, (batch,), 0, self.student.num_steps)
        return jnp.asarray(self.student.timesteps.astype(np.int32))[chosen]


def distillation_target(
    steps: StudentSteps, teacher: Predict, x_t: Float[Array, "B *shape"], t: Int[Array, "B"]
) -> Denoised:
    """Returns (x_0*, eps*), with which one step of DDIM takes x_t to where K steps of the teacher do, eq. (1)-(2).

    Args:
        steps: of teacher and student.
        teacher: the teacher's network as its sampler evaluates it, see ``loop.predictor``: guided and clipped. It gets
            levels whose timesteps are int32[B], and whose rates are of the rank of x_t.
        x_t: the noised examples.
        t: the timestep of each example, one of the student's.
    """
    stride, ndim = steps.stride, x_t.ndim
    number = jnp.searchsorted(jnp.asarray(steps.student.timesteps.astype(np.int32)), t)
    first = stride * (number + 1) - 1  # the student's level, among the teacher's
    stepper = Ddim()
    rows = stepper.rows(steps.teacher)

    def step(z: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
        return stepper.step(teacher, z, _rows_at(rows, first - j, ndim), lambda: jnp.zeros_like(z), ())[0], None

    z, _ = jax.lax.scan(step, x_t, jnp.arange(stride, dtype=first.dtype))
    start, end = steps.teacher, steps.student
    signal, noise = process.at(start.signal_rate, first, ndim), process.at(start.noise_rate, first, ndim)
    # The coefficients of eq. (2) in float64, cast once.
    ratio = end.noise_rate_prev / end.noise_rate
    scale = end.signal_rate_prev - ratio * end.signal_rate
    x_0 = (z - process.at(ratio, number, ndim) * x_t) / process.at(scale, number, ndim)
    return jax.lax.stop_gradient(Denoised(x_0, (x_t - signal * x_0) / noise))


def _rows_at(rows: DdimRow, index: Int[Array, "B"], ndim: int) -> DdimRow:
    """Returns the coefficients of one step for each example, ready to scale a batch."""
    row = jax.tree.map(lambda table: process.at(table, index, ndim), rows)
    return row._replace(level=row.level._replace(timestep=jnp.asarray(rows.level.timestep)[index]))


def distillation_loss(
    schedule: Schedule,
    objective: Objective,
    steps: StudentSteps,
    networks: tuple[Denoiser, Predict],
    x_0: Float[Array, "B *shape"],
    t: Int[Array, "B"],
    key: Key[Array, ""] | None,
    noise: Float[Array, "B *shape"] | None = None,
) -> tuple[Float[Array, "B"], Metrics]:
    """Returns the loss of each example, and the metric "mse" (without weights).

    A learned variance is not trained: DDIM, by which the student is sampled, does not use it.

    Args:
        schedule: the schedule of training, T steps.
        objective: what the student predicts, and the weights of the squared error; its loss is not used.
        steps: of teacher and student.
        networks: the student, and the teacher as `distillation_target` takes it.
        x_0: clean examples, float32.
        t: the timestep of each example, one of the student's.
        key: as in ``objective.training_loss``.
        noise: eps, in place of the key's.
    """
    student, teacher = networks
    x_t = process.q_sample(schedule, x_0, t, noise_of(key, x_0, noise))
    target = distillation_target(steps, teacher, x_t, t)
    prediction, _ = variance.split(objective.variance, student(x_t, t).astype(jnp.float32))
    weighted, mse = squared_error(schedule, objective, prediction, target, t)
    return weighted, {"mse": mse.mean()}
