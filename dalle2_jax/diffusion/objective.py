"""The training objective: how far a network's prediction is from the truth.

With t ~ U{0 .. T-1} and eps ~ N(0, I) drawn for each example, x_t = a_t x_0 + s_t eps, and f the
target of the prediction type (eps, x_0 or v, see ``process``), the simple objective
(Ho et al. 2020, arXiv 2006.11239, eq. 14; for x_0 and v: Salimans & Ho 2022, arXiv 2202.00512) is

    L_simple = E_{t, eps} || f(x_0, eps, t) - f_theta(x_t, t) ||^2 / dim                      (1)

The prior trains it with x_0 (Ramesh et al. 2022, arXiv 2204.06125, eq. 2), the decoder with eps.

Over x_0, (1) looks at the noisy steps, where the layout is decided, and hardly at the clean ones, where
edges are. The weight "snr" (the "SNR + 1" of Salimans & Ho 2022, section 4), bounded by c,

    w_t = min(alpha_bar_t / (1 - alpha_bar_t) + 1, c)                                         (2)

of the error in x_0 looks at both; without the bound it is the loss in v. A network that predicts v
gets w_t over alpha_bar_t / (1 - alpha_bar_t) + 1, which is the same objective.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dalle2_jax import rng
from dalle2_jax.diffusion import process
from dalle2_jax.diffusion.schedule import Schedule
from dalle2_jax.types import Denoiser, Metrics, UsageError, choose

WEIGHTINGS = ("none", "snr")


@functools.lru_cache
def loss_weights(
    schedule: Schedule, prediction_type: str, weighting: str, max_weight: float
) -> Float[np.ndarray, "T"]:
    """Returns the weight of each step's squared error: all 1 for "none", eq. (2) for "snr".

    Raises:
        UsageError: an unknown weighting, or "snr" with eps, where it would be unbounded at the noisiest steps.
    """
    choose("weighting", weighting, dict.fromkeys(WEIGHTINGS))
    if weighting == "none":
        return np.ones(schedule.num_steps, np.float32)
    if prediction_type == "eps":
        raise UsageError("weighting 'snr' is for predictions of x0 and v: use weighting 'none' with eps")
    whole = schedule.alpha_bar / (1.0 - schedule.alpha_bar) + 1.0
    over = whole if prediction_type == "v" else 1.0
    return (np.minimum(whole, max_weight) / over).astype(np.float32)


def mse_loss(
    schedule: Schedule,
    prediction_type: str,
    denoiser: Denoiser,
    x_0: Float[Array, "B *shape"],
    key: Key[Array, ""],
    weighting: str = "none",
    max_weight: float = 10.0,
) -> tuple[Float[Array, "B"], Metrics]:
    """Returns the weighted loss of each example, eq. (1), and the mean without weights as the metric "mse".

    Args:
        schedule: the schedule to train on, T steps.
        prediction_type: "eps", "x0" or "v"; UserError on another.
        denoiser: the network, told ``schedule.timesteps[t]``; what it returns is compared in float32.
        x_0: clean examples, float32.
        key: the key of this call; t and eps are drawn from streams of it.
        weighting: "none" or "snr", eq. (2), whose bound is ``max_weight``.
    """
    t = jax.random.randint(rng.stream(key, "t"), x_0.shape[:1], 0, schedule.num_steps)
    eps = jax.random.normal(rng.stream(key, "eps"), x_0.shape, jnp.float32)
    x_t = process.q_sample(schedule, x_0, t, eps)
    target = process.from_x0_eps(schedule, prediction_type, x_0, eps, t)
    prediction = denoiser(x_t, jnp.asarray(schedule.levels.timestep)[t]).astype(jnp.float32)
    loss = jnp.mean(jnp.square(prediction - target), axis=tuple(range(1, x_0.ndim)))
    weights = jnp.asarray(loss_weights(schedule, prediction_type, weighting, max_weight))
    return loss * weights[t], {"mse": loss.mean()}
