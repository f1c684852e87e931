"""Single steps by their formulas, then against guided-diffusion's recorded ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import normals, relative_error
from public_recordings import (
    CASES,
    RECORDED,
    assert_each_example_close,
    channels_last,
    recorded_network_with_variance,
    recorded_process,
)
from raised import mentions
from scheduler_recordings import SCHEDULERS
from stepping import SCHEDULES, STEPPERS

from dalle2_jax.diffusion import (
    Ddim,
    Ddpm,
    Heun,
    InverseDdim,
    NoiseStatistics,
    make_schedule,
    predictor,
    respace,
)
from dalle2_jax.diffusion.steppers import DdimRow, InversionRow
from dalle2_jax.errors import UserError

MOMENTS = NoiseStatistics((0.9,) * 1000, 1.0)


def row_at(rows, index):
    return jax.tree.map(lambda table: jnp.asarray(table[index]), rows)


def rounded_as_in_public_code(schedule, rows):
    """The public code takes 1 - alpha_bar' and the like in float32, which leaves 4 digits of it at
    the first steps. Its rounding goes into the rows of DDIM and its inversion here; the exact rows are tested below."""
    if isinstance(rows, InversionRow):
        return rows._replace(noise_rate_next=np.sqrt(1 - np.float32(np.append(schedule.alpha_bar[1:], 0.0))))
    if not isinstance(rows, DdimRow):
        return rows
    alpha_bar, alpha_bar_prev = np.float32(schedule.alpha_bar), np.float32(schedule.alpha_bar_prev)
    fresh = (1 - alpha_bar / alpha_bar_prev) / (1 - alpha_bar)
    return rows._replace(noise_rate_prev=np.sqrt(1 - alpha_bar_prev), fresh=fresh, old=1 - fresh)


@functools.partial(jax.jit, static_argnames=("stepper", "prediction_type", "clip"))
def recorded_step(stepper, prediction_type, clip, x_t, row, noise):
    variance_type = getattr(stepper, "variance", "fixed_small")
    hook = (lambda x_0: jnp.clip(x_0, -1, 1)) if clip else None
    predict = predictor(prediction_type, recorded_network_with_variance(variance_type), hook, variance_type)
    return stepper.step(predict, x_t, row, lambda: noise, stepper.init(x_t))[0]


def assert_steps_equal(expected, case, stepper, prediction_type, clip):
    schedule, t = recorded_process(case)
    rows = rounded_as_in_public_code(schedule, stepper.rows(schedule))
    x_t, noise = channels_last("inputs/x_t"), channels_last("inputs/sample_noise")
    steps = [
        recorded_step(stepper, prediction_type, clip, x_t[b : b + 1], row_at(rows, index), noise[b : b + 1])[0]
        for b, index in enumerate(np.asarray(t))
    ]
    assert_each_example_close(np.moveaxis(np.stack(steps), -1, -3), expected, 1e-5)


GUIDED = {
    "fixed_small": (Ddpm("fixed_small"), "p_sample", RECORDED, "outputs"),
    "fixed_large": (Ddpm("fixed_large"), "p_sample", RECORDED, "outputs"),
    "learned": (Ddpm("learned"), "p_sample", SCHEDULERS, "guided"),
    "learned_range": (Ddpm("learned_range"), "p_sample", SCHEDULERS, "guided"),
    "eta_0": (Ddim(0.0), "ddim_eta0.0", RECORDED, "outputs"),
    "eta_0.5": (Ddim(0.5), "ddim_eta0.5", RECORDED, "outputs"),
    "eta_1": (Ddim(1.0), "ddim_eta1.0", RECORDED, "outputs"),
    "inverse": (InverseDdim(skip_last=False), "ddim_reverse", SCHEDULERS, "guided"),
}


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no_clip"])
@pytest.mark.parametrize("prediction_type", ["eps", "x0"])
@pytest.mark.parametrize("name", GUIDED)
def test_steps_equal_guided_diffusion(name, prediction_type, clip):
    stepper, kind, recorded, root = GUIDED[name]
    variance = getattr(stepper, "variance", "fixed_small")
    cases = ["cosine/25"] if name == "learned" else CASES
    for case in cases:
        path = f"{root}/{case}/{prediction_type}/{variance}/clip{int(clip)}/{kind}"
        assert_steps_equal(recorded[path], case, stepper, prediction_type, clip)


def test_a_whole_run_with_a_learned_variance_equals_guided_diffusion():
    schedule, stepper = respace(make_schedule("cosine", 1000), 25), Ddpm("learned_range")
    rows, x_t = stepper.rows(schedule), channels_last("inputs/x_t")
    noises = np.moveaxis(SCHEDULERS["guided/loop/p_loop_eps_lr_25/noise"], -3, -1)
    expected = np.moveaxis(SCHEDULERS["guided/loop/p_loop_eps_lr_25/trajectory"], -3, -1)
    for turn, (noise, state) in enumerate(zip(noises, expected, strict=True)):
        x_t = recorded_step(stepper, "eps", True, x_t, row_at(rows, 24 - turn), noise)
        assert relative_error(x_t, state) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_ddim_step_is_its_formula_in_float64(case, eta):
    """Song et al. eq. 12 and 16, literally."""
    name, spec = CASES[case]
    schedule = respace(make_schedule(name, 1000), spec)
    stepper, (x_t, x_0, noise) = Ddim(eta), normals((3, 1, 64))
    predict = predictor("x0", lambda x_t, t: x_0)
    exact_x_t, exact_x_0, z = (np.asarray(array, np.float64) for array in (x_t, x_0, noise))
    for index in (1, 2, schedule.num_steps // 2, schedule.num_steps - 1):
        alpha_bar, alpha_bar_prev = schedule.alpha_bar[index], schedule.alpha_bar[index - 1]
        eps = (exact_x_t - np.sqrt(alpha_bar) * exact_x_0) / np.sqrt(1 - alpha_bar)
        sigma = eta * np.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * np.sqrt(1 - alpha_bar / alpha_bar_prev)
        expected = np.sqrt(alpha_bar_prev) * exact_x_0 + np.sqrt(1 - alpha_bar_prev - sigma**2) * eps + sigma * z
        x_prev, _ = stepper.step(predict, x_t, row_at(stepper.rows(schedule), index), lambda: noise, ())
        assert relative_error(x_prev, expected) < 1e-6, index


@pytest.mark.parametrize("case", CASES)
def test_inversion_step_is_its_formula_in_float64(case):
    """Dhariwal & Nichol, appendix F: DDIM with eta = 0 towards the next level; after the last comes pure noise."""
    name, spec = CASES[case]
    schedule = respace(make_schedule(name, 1000), spec)
    stepper, (x_t, eps) = InverseDdim(skip_last=False), normals((2, 1, 64))
    rows, predict = stepper.rows(schedule), predictor("eps", lambda x_t, t: eps)
    exact_x_t, exact_eps = (np.asarray(array, np.float64) for array in (x_t, eps))
    for index in (0, 1, schedule.num_steps // 2):
        alpha_bar, alpha_bar_next = schedule.alpha_bar[index : index + 2]
        x_0 = (exact_x_t - np.sqrt(1 - alpha_bar) * exact_eps) / np.sqrt(alpha_bar)
        expected = np.sqrt(alpha_bar_next) * x_0 + np.sqrt(1 - alpha_bar_next) * exact_eps
        x_next, _ = stepper.step(predict, x_t, row_at(rows, index), None, ())
        assert relative_error(x_next, expected) < 1e-6, index
    np.testing.assert_allclose(stepper.step(predict, x_t, row_at(rows, -1), None, ())[0], eps, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_step_is_its_formula_in_float64(variance, schedule):
    """Ho et al. algorithm 2 with the mean of eq. 7, literally."""
    schedule, stepper = respace(schedule, 50), Ddpm(variance)
    x_t, x_0, noise = normals((3, 1, 64))
    rows, predict = stepper.rows(schedule), predictor("x0", lambda x_t, t: x_0)
    exact_x_t, exact_x_0, z = (np.asarray(array, np.float64) for array in (x_t, x_0, noise))
    for index in (1, 2, 25, 49):
        alpha_bar, alpha_bar_prev = schedule.alpha_bar[index], schedule.alpha_bar[index - 1]
        alpha = alpha_bar / alpha_bar_prev
        mean = np.sqrt(alpha_bar_prev) * (1 - alpha) / (1 - alpha_bar) * exact_x_0
        mean = mean + np.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * exact_x_t
        beta = 1 - alpha
        sigma = np.sqrt(beta * (1 - alpha_bar_prev) / (1 - alpha_bar) if variance == "fixed_small" else beta)
        x_prev, _ = stepper.step(predict, x_t, row_at(rows, index), lambda: noise, ())
        assert relative_error(x_prev, mean + sigma * z) < 1e-6, index


@pytest.mark.parametrize(("raw_large", "raw_small"), [("log", "log"), (1.0, -1.0)], ids=["learned", "learned_range"])
def test_a_network_that_says_a_fixed_variance_gets_it(raw_large, raw_small):
    """beta is encoded as log beta (learned) or 1 (learned_range), beta_tilde as its logarithm or -1."""
    schedule = respace(make_schedule("cosine", 1000), 20)
    learned = "learned" if raw_large == "log" else "learned_range"
    predicted = {"fixed_large": (schedule.betas, raw_large), "fixed_small": (schedule.posterior_variance, raw_small)}
    x_t, x_0, noise = normals((3, 1, 64))
    for fixed, (variance, raw) in predicted.items():
        for index in (1, 2, 10, 19):
            channels = jnp.full_like(x_0, np.log(variance[index]) if raw == "log" else raw)
            steps = []
            for name, output in [(fixed, x_0), (learned, jnp.concatenate([x_0, channels], axis=-1))]:
                predict = predictor("x0", lambda x_t, t, output=output: output, None, name)
                row = row_at(Ddpm(name).rows(schedule), index)
                steps.append(Ddpm(name).step(predict, x_t, row, lambda: noise, ())[0])
            assert relative_error(steps[1], steps[0]) < 1e-5, (fixed, index)


def test_a_learned_variance_is_each_pixels_own():
    schedule, x = respace(make_schedule("cosine", 1000), 20), jnp.zeros((1, 2))
    predict = predictor("x0", lambda x_t, t: jnp.array([[0.0, 0.0, np.log(4.0), np.log(0.25)]]), None, "learned")
    row = row_at(Ddpm("learned").rows(schedule), 5)
    np.testing.assert_allclose(Ddpm("learned").step(predict, x, row, lambda: x + 1, ())[0], [[2.0, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_learned_variance_needs_an_even_number_of_channels(variance):
    predict = predictor("eps", lambda x_t, t: jnp.zeros((1, 3)), None, variance)
    level = row_at(make_schedule("cosine", 10).levels, 5)
    with pytest.raises(UserError, check=mentions(f"'{variance}'", "output channels", 3)):
        predict(jnp.zeros((1, 1)), level)


def test_unknown_variance_offers_the_nearest():
    with pytest.raises(UserError, check=mentions("'fixedlarge'", "'fixed_large'")):
        Ddpm("fixedlarge")


def test_the_analytic_variance_needs_moments():
    with pytest.raises(UserError, check=mentions("'analytic'", "noise_statistics")):
        Ddpm("analytic")


@pytest.mark.parametrize("stepper", [*STEPPERS.values(), Ddpm("analytic", MOMENTS)], ids=[*STEPPERS, "ddpm_analytic"])
def test_last_step_ends_in_x_0_without_noise(stepper):
    schedule, variance = respace(make_schedule("cosine", 1000), 10), getattr(stepper, "variance", "fixed_small")
    copies = 2 if variance in ("learned", "learned_range") else 1
    predict = predictor("x0", lambda x_t, t: jnp.full((1, 3 * copies), 0.25), None, variance)
    x_t = jnp.full((1, 3), 7.0)
    carry = jax.tree.map(lambda leaf: leaf + 3, stepper.init(x_t))
    x_0, _ = stepper.step(predict, x_t, row_at(stepper.rows(schedule), 0), lambda: jnp.full_like(x_t, 1e6), carry)
    np.testing.assert_allclose(x_0, 0.25, rtol=1e-4 if isinstance(stepper, Heun) else 1e-6)


def test_ddim_with_eta_one_adds_the_noise_of_ddpm():
    schedule = respace(make_schedule("cosine", 1000), 10)
    rows = Ddim(1.0).rows(schedule)
    np.testing.assert_allclose(rows.noise_rate_prev * np.sqrt(rows.fresh), Ddpm().rows(schedule).std, rtol=1e-6)
