"""The training objective: how far a network's prediction is from the truth.

With t ~ U{0 .. T-1} and eps ~ N(0, I) drawn for each example, x_t = a_t x_0 + s_t eps, and f the
target of the prediction type (eps, x_0 or v, see ``process``), the simple objective
(Ho et al. 2020, arXiv 2006.11239, eq. 14; for x_0 and v: Salimans & Ho 2022, arXiv 2202.00512) is

    L_simple = E_{t, eps} || f(x_0, eps, t) - f_theta(x_t, t) ||^2 / dim                      (1)

The prior trains it with x_0 (Ramesh et al. 2022, arXiv 2204.06125, eq. 2), the decoder with eps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dalle2_jax import rng
from dalle2_jax.diffusion import process
from dalle2_jax.diffusion.schedule import Schedule
from dalle2_jax.types import Denoiser, Metrics


def mse_loss(
    schedule: Schedule,
    prediction_type: str,
    denoiser: Denoiser,
    x_0: Float[Array, "B *shape"],
    key: Key[Array, ""],
) -> tuple[Float[Array, "B"], Metrics]:
    """Returns the loss of each example, eq. (1), and its mean as the metric "mse".

    Args:
        schedule: the schedule to train on, T steps.
        prediction_type: "eps", "x0" or "v"; UserError on another.
        denoiser: the network, told ``schedule.timesteps[t]``; what it returns is compared in float32.
        x_0: clean examples, float32.
        key: the key of this call; t and eps are drawn from streams of it.
    """
    t = jax.random.randint(rng.stream(key, "t"), x_0.shape[:1], 0, schedule.num_steps)
    eps = jax.random.normal(rng.stream(key, "eps"), x_0.shape, jnp.float32)
    x_t = process.q_sample(schedule, x_0, t, eps)
    target = process.from_x0_eps(schedule, prediction_type, x_0, eps, t)
    prediction = denoiser(x_t, jnp.asarray(schedule.levels.timestep)[t]).astype(jnp.float32)
    loss = jnp.mean(jnp.square(prediction - target), axis=tuple(range(1, x_0.ndim)))
    return loss, {"mse": loss.mean()}
