"""Every stepper and every schedule, and steps taken one by one: each stepper compiles once for all schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax.diffusion import (
    Ddim,
    Ddpm,
    DpmSolver,
    Heun,
    UniPc,
    make_schedule,
    predictor,
    respace,
    shifted,
    with_zero_terminal_snr,
)
from dalle2_jax.diffusion.variance import LEARNED

PREDICTIONS = ("eps", "x0", "v")

SCHEDULES = {name: make_schedule(name, 1000) for name in ("linear", "scaled_linear", "cosine", "sigmoid")}
SCHEDULES["shifted"] = shifted(SCHEDULES["cosine"], 2.0)
SCHEDULES["zero_terminal_snr"] = with_zero_terminal_snr(SCHEDULES["cosine"])

ODE_STEPPERS = {
    "ddim": Ddim(0.0),
    "euler": Heun(1),
    "heun": Heun(2),
    "dpmpp_2m": DpmSolver(2),
    "dpmpp_3m": DpmSolver(3),
    "unipc": UniPc(),
}
STEPPERS = {
    **ODE_STEPPERS,
    "ddim_eta_0.5": Ddim(0.5),
    "ddim_eta_1": Ddim(1.0),
    "ddpm_small": Ddpm("fixed_small"),
    "ddpm_large": Ddpm("fixed_large"),
    "ddpm_learned": Ddpm("learned"),
    "ddpm_learned_range": Ddpm("learned_range"),
    "dpmpp_2m_sde": DpmSolver(2, stochastic=True),
}


def combinations(stepper):
    """Yields the (name of a schedule, its schedule, its possible predictions) that a stepper can sample."""
    for name, schedule in SCHEDULES.items():
        if schedule.alpha_bar[-1] > 0:
            yield name, schedule, PREDICTIONS
        elif not isinstance(stepper, Heun):
            yield name, schedule, ("x0", "v")


@functools.partial(jax.jit, static_argnames=("stepper", "law"))
def _step(stepper, law, rates, x_t, row, noise, carry):
    """One step of a batch in three parts, whose networks predict eps, x_0 and v; a learned variance is raw 0."""
    variance_type = getattr(stepper, "variance", "fixed_small")

    def denoiser(prediction_type, x_t, t):
        signal_rate, noise_rate = (rate[t][:, None] for rate in rates)
        x_0 = law(x_t, signal_rate, noise_rate)
        eps = (x_t - signal_rate * x_0) / noise_rate
        prediction = {"eps": eps, "x0": x_0, "v": signal_rate * eps - noise_rate * x_0}[prediction_type]
        copies = [jnp.zeros_like(prediction)] if variance_type in LEARNED else []
        return jnp.concatenate([prediction, *copies], axis=-1)

    def predict(x_t, level):
        pairs = [
            predictor(name, functools.partial(denoiser, name), None, variance_type)(part, level)
            for name, part in zip(PREDICTIONS, jnp.split(x_t, len(PREDICTIONS)), strict=True)
        ]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pairs)

    return stepper.step(predict, x_t, row, lambda: noise, carry)


def walk(stepper, schedule, steps, law, x_T, noises=None):
    """Takes x_T [B, D] through a respacing, its i-th step with noises[i]: x_0 by prediction type, float64 [B, D]."""
    kept = respace(schedule, steps)
    rows = stepper.rows(kept)
    rates = jnp.float32(schedule.signal_rate), jnp.float32(schedule.noise_rate)
    x_t = jnp.concatenate([jnp.float32(x_T)] * len(PREDICTIONS))
    carry = stepper.init(x_t)
    for turn in range(kept.num_steps):
        noise = np.zeros_like(x_T) if noises is None else noises[turn]
        row = jax.tree.map(lambda table, index=kept.num_steps - 1 - turn: table[index], rows)
        x_t, carry = _step(stepper, law, rates, x_t, row, np.concatenate([np.float32(noise)] * len(PREDICTIONS)), carry)
    return dict(zip(PREDICTIONS, np.split(np.asarray(x_t, np.float64), len(PREDICTIONS)), strict=True))
