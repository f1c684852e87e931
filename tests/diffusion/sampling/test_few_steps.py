"""The output of every sampler on Gaussian data in few steps, with the perfect denoiser and its default spacing."""

import functools

import jax
import numpy as np
import pytest
from raised import mentions
from stepping import SCHEDULES

from dalle2_jax.diffusion import (
    SAMPLERS,
    Heun,
    SamplerConfig,
    make_stepper,
    predictor,
    respace,
    steps_of,
)
from dalle2_jax.errors import UserError

STD = 0.5


@functools.partial(jax.jit, static_argnames="name")
def step(name, x_t, row, carry):
    """One step of a batch of one, without noise, under the perfect denoiser of N(0, STD^2)."""
    level = row.predictor.level if name == "unipc" else row.level

    def predict(x_t, level):
        a, s = level.signal_rate, level.noise_rate
        gain = a * STD**2 / (a**2 * STD**2 + s**2)
        return predictor("x0", lambda x, t: gain * x)(x_t, level)

    assert level.timestep.shape == ()
    return make_stepper(SamplerConfig(name)).step(predict, x_t, row, lambda: 0.0 * x_t, carry)


def walked(name, schedule, x_T):
    """Takes x_T through the steps of a respaced schedule."""
    stepper = make_stepper(SamplerConfig(name))
    rows, x_t = stepper.rows(schedule), jax.numpy.full((1, 1), x_T, jax.numpy.float32)
    carry = stepper.init(x_t)
    for index in range(schedule.num_steps - 1, -1, -1):
        x_t, carry = step(name, x_t, jax.tree.map(lambda table, index=index: table[index], rows), carry)
    return float(x_t[0, 0])


def spread(name, schedule, steps):
    """The standard deviation of samples of data N(0, STD^2): all samplers are linear on them."""
    kept = steps_of(schedule, SamplerConfig(name, steps))
    # x_T is N(0, 1) whatever the first level: as in sampling.
    return abs(walked(name, kept, 1.0))


DETERMINISTIC = [name for name in SAMPLERS if name not in ("ddpm", "dpmpp_2m_sde")]


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid", "linear"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_plain_number_of_steps_does_not_spread_gaussian_data(name, schedule):
    """10 even steps of cosine gave "heun" 7.4 in place of 0.5; of the others none is 3 times too wide at any count."""
    for steps in (5, 7, 10, 20):
        ratio = spread(name, SCHEDULES[schedule], steps) / STD
        assert 0.4 < ratio < 3, (steps, ratio)
    assert spread(name, SCHEDULES[schedule], 50) / STD == pytest.approx(1, abs=0.16)


@pytest.mark.parametrize("schedule", ["cosine", "sigmoid", "linear"])
def test_heun_in_ten_steps_keeps_the_spread(schedule):
    assert spread("heun", SCHEDULES[schedule], 10) / STD == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("spec", ["10", "ddim10", "t:0,5,300,999", "logsnr4", "logsnr10", "karras7"])
def test_growth_is_what_heun_makes_of_gaussian_data(spec):
    kept = respace(SCHEDULES["cosine"], spec)
    x_T = float(np.hypot(kept.signal_rate[-1] * STD, kept.noise_rate[-1]))  # x_t is sampled at its level
    assert Heun(2).growth(kept, STD) == pytest.approx(abs(walked("heun", kept, x_T)) / STD, rel=2e-3)


def test_a_plain_number_is_even_in_log_snr_for_heun_alone():
    for name in SAMPLERS:
        for schedule in (SCHEDULES["cosine"], SCHEDULES["linear"]):
            wanted = "logsnr12" if name == "heun" else 12
            assert steps_of(schedule, SamplerConfig(name, 12)) is respace(schedule, wanted)
            assert steps_of(schedule, SamplerConfig(name, "karras12")) is respace(schedule, "karras12")


@pytest.mark.parametrize("spec", [2, 3, "5,5", "t:0,500,999"])
def test_steps_that_are_too_far_apart_for_heun_are_rejected(spec):
    with pytest.raises(UserError, check=mentions(f"'{spec}'", "'heun'", "'logsnr10'", "'dpmpp_2m'")):
        steps_of(SCHEDULES["cosine"], SamplerConfig("heun", spec))
    steps_of(SCHEDULES["cosine"], SamplerConfig("euler", spec))
