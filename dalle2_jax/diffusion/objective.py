"""The training objective: the weighted squared error of the prediction, and the variational bound.

With eps ~ N(0, I) for each example, x_t = a_t x_0 + s_t eps, and f the target of the prediction type
(eps, x_0 or v, see ``process``), the simple objective (Ho et al. 2020, arXiv 2006.11239, eq. 14; for x_0
and v: Salimans & Ho 2022, arXiv 2202.00512) is

    L_simple = E_{t, eps} w_t || f(x_0, eps, t) - f_theta(x_t, t) ||^2 / dim                  (1)

with w_t = 1. The prior trains it with x_0 (Ramesh et al. 2022, arXiv 2204.06125, eq. 2), the decoder with eps.
With SNR = alpha_bar_t / (1 - alpha_bar_t), other weights of the error in x_0 are

    snr       min(SNR + 1, c)                (Salimans & Ho, section 4, bounded by max_weight) (2)
    min_snr   min(SNR, gamma)                (Hang et al. 2023, arXiv 2303.09556, section 3.4) (3)
    p2        SNR / (k + SNR)^gamma          (Choi et al. 2022, arXiv 2204.00227, eq. 8)       (4)

The error in eps is sqrt(SNR) times that in x_0, the error in v sqrt(SNR + 1) times; so for a network of
another prediction type the weight is divided by SNR, or by SNR + 1.

Where a schedule ends in pure noise (SNR_{T-1} = 0), eq. (3) and (4) would weight the first step of sampling by 0,
and the network would never be trained there: a weight that vanishes with the SNR does not suit a process that starts
at SNR = 0 (Salimans & Ho, section 4). That step gets the mean weight of the others,

    w_{T-1} = 1 / (T - 1) sum_{t < T-1} w_t        where SNR_{T-1} = 0                        (6)

A network that predicts the variance too (``variance``) is trained on

    L_hybrid = L_simple + vlb_weight T L_vlb         (Nichol & Dhariwal 2021, eq. 16)          (5)

L_vlb (``likelihood`` eq. 3-4) takes the mean as a constant, so it trains only the variance; it is in bits, and
vlb_weight = 1e-3, as in the public code. The "vlb" loss is T L_vlb, mean and all. Both are float32.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dalle2_jax import rng
from dalle2_jax.diffusion import process, variance
from dalle2_jax.diffusion.likelihood import vlb_terms
from dalle2_jax.diffusion.schedule import Schedule
from dalle2_jax.errors import UserError, choose
from dalle2_jax.ranges import Range
from dalle2_jax.types import Denoiser, Metrics

LOSSES = ("mse", "hybrid", "vlb")
WEIGHTINGS = ("none", "snr", "min_snr", "p2")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The prediction type of a network, and its loss.

    Attributes:
        prediction: "eps", "x0" or "v".
        variance: "fixed_small" or "fixed_large", or "learned" or "learned_range" for a network of twice the channels.
        loss: "mse", eq. (1); "hybrid", eq. (5); or "vlb".
        weighting: of the squared error: "none", "snr", "min_snr" or "p2", eq. (2)-(4).
        max_weight: c of "snr".
        gamma: of "min_snr" (5 in its paper) and "p2" (1 in its paper).
        k: of "p2".
        vlb_weight: of "hybrid".

    Raises:
        UserError: an unknown name, or values that do not fit together.
    """

    prediction: str = "eps"
    variance: str = "fixed_small"
    loss: str = "mse"
    weighting: str = "none"
    max_weight: Annotated[float, Range(0, 1_000_000, exclusive_min=True)] = 10.0
    gamma: Annotated[float, Range(0, 1_000, exclusive_min=True)] = 5.0
    k: Annotated[float, Range(0, 1_000_000, exclusive_min=True)] = 1.0
    vlb_weight: Annotated[float, Range(0, 1_000)] = 1e-3

    def __post_init__(self) -> None:
        process.check_prediction(self.prediction)
        choose("variance", self.variance, dict.fromkeys(variance.VARIANCES))
        choose("loss", self.loss, dict.fromkeys(LOSSES))
        choose("weighting", self.weighting, dict.fromkeys(WEIGHTINGS))
        learned = self.variance in variance.LEARNED
        if self.loss == "hybrid" and not learned:
            raise UserError(
                f"loss 'hybrid' trains a learned variance, and {self.variance!r} is not: "
                "use variance 'learned_range', or loss 'mse'"
            )
        if self.loss == "mse" and learned:
            raise UserError(f"loss 'mse' would never train variance {self.variance!r}: use loss 'hybrid'")
        if self.loss == "vlb" and self.weighting != "none":
            raise UserError("loss 'vlb' has its own weights: use weighting 'none'")
        if self.weighting == "snr" and self.prediction == "eps":
            raise UserError("weighting 'snr' is for predictions of x0 and v: use weighting 'min_snr' with eps")

    def check(self, schedule: Schedule) -> None:
        """Raises UserError for a prediction that the schedule does not allow: eps, at a step of pure noise."""
        if self.prediction == "eps" and schedule.alpha_bar[-1] == 0:
            raise UserError("with zero terminal SNR no x_0 follows from the last step's eps: predict 'v' or 'x0'")


@functools.lru_cache
def loss_weights(schedule: Schedule, objective: Objective) -> Float[np.ndarray, "T"]:
    """Returns w_t of eq. (1) for the network's prediction type, from eq. (2)-(4) and (6); all above 0."""
    if objective.weighting == "none":
        return np.ones(schedule.num_steps, np.float32)
    snr = schedule.alpha_bar / (1.0 - schedule.alpha_bar)
    of_x_0 = {
        "snr": lambda: np.minimum(snr + 1.0, objective.max_weight),
        "min_snr": lambda: np.minimum(snr, objective.gamma),
        "p2": lambda: snr / (objective.k + snr) ** objective.gamma,
    }[objective.weighting]()
    over = {"x0": 1.0, "eps": snr, "v": snr + 1.0}[objective.prediction]
    weights = of_x_0 / over
    if snr[-1] == 0 and weights[-1] == 0:
        weights[-1] = weights[:-1].mean()  # eq. (6)
    return weights.astype(np.float32)


def noise_of(
    key: Key[Array, ""] | None, x_0: Float[Array, "B *shape"], given: Float[Array, "B *shape"] | None = None
) -> Float[Array, "B *shape"]:
    """Returns the eps that noises x_0: ``given``, or that of the stream "eps" of ``key``."""
    if given is not None:
        return given
    if key is None:
        raise ValueError("a loss needs a key, or the noise")
    return rng.per_row(jax.random.normal, rng.stream(key, "eps"), x_0.shape).astype(jnp.float32)


def squared_error(
    schedule: Schedule,
    objective: Objective,
    prediction: Float[Array, "B *shape"],
    pair: process.Denoised,
    t: Int[Array, "B"],
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns eq. (1) for each example, with and without the weight w_t.

    Args:
        schedule: of training.
        objective: what is predicted, and the weights.
        prediction: of the network.
        pair: the (x_0, eps) that the network is to predict.
        t: the step of each example.
    """
    target = process.from_x0_eps(schedule, objective.prediction, pair.x_0, pair.eps, t)
    mse = jnp.mean(jnp.square(prediction - target), axis=tuple(range(1, prediction.ndim)))
    return mse * jnp.asarray(loss_weights(schedule, objective))[t], mse


def training_loss(
    schedule: Schedule,
    objective: Objective,
    denoiser: Denoiser,
    x_0: Float[Array, "B *shape"],
    t: Int[Array, "B"],
    key: Key[Array, ""] | None,
    noise: Float[Array, "B *shape"] | None = None,
) -> tuple[Float[Array, "B"], Metrics]:
    """Returns the loss of each example, and the metrics "mse" (without weights) and, with a bound, "vlb" (bits).

    Args:
        schedule: the schedule to train on, T steps.
        objective: what to predict, and the loss.
        denoiser: the network (x_t, ``schedule.timesteps[t]``) -> prediction; the loss is computed in float32.
        x_0: clean examples, float32; with "hybrid" and "vlb" bytes scaled to [-1, 1].
        t: the step of each example.
        key: the key of this call; eps comes from a stream of it. It may be None where ``noise`` is given.
        noise: eps, in place of the key's.
    """
    eps = noise_of(key, x_0, noise)
    x_t = process.q_sample(schedule, x_0, t, eps)
    output = denoiser(x_t, jnp.asarray(schedule.levels.timestep)[t]).astype(jnp.float32)
    prediction, raw = variance.split(objective.variance, output)
    weighted, mse = squared_error(schedule, objective, prediction, process.Denoised(x_0, eps), t)
    metrics = {"mse": mse.mean()}
    if objective.loss == "mse":
        return weighted, metrics
    # The mean is a function of the prediction, whose gradient is stopped: only the variance is trained by the bound.
    fixed = prediction if objective.loss == "vlb" else jax.lax.stop_gradient(prediction)
    pair = process.to_x0_eps(schedule, objective.prediction, fixed, x_t, t)._replace(variance=raw)
    vlb = vlb_terms(schedule, objective.variance, pair, x_0, x_t, t)
    metrics["vlb"] = vlb.mean()
    if objective.loss == "vlb":
        return schedule.num_steps * vlb, metrics
    return weighted + objective.vlb_weight * schedule.num_steps * vlb, metrics
