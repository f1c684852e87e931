"""Single steps against guided-diffusion's recorded p_sample and ddim_sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import normals, relative_error
from public_recordings import CASES, RECORDED, recorded_network

from dalle2_jax.diffusion import Ddim, Ddpm, make_schedule, predictor, respace
from dalle2_jax.diffusion.steppers import DdimRow
from dalle2_jax.types import UserError


def rounded_as_in_public_code(schedule, row):
    """The public code takes 1 - alpha_bar' and the like in float32, which leaves 4 digits of it at
    the first steps. Its rounding goes into the row here; the exact rows are tested below."""
    if not isinstance(row, DdimRow):
        return row
    alpha_bar, alpha_bar_prev = np.float32(schedule.alpha_bar), np.float32(schedule.alpha_bar_prev)
    fresh = (1 - alpha_bar / alpha_bar_prev) / (1 - alpha_bar)
    return row._replace(noise_rate_prev=np.sqrt(1 - alpha_bar_prev), fresh=fresh, kept=1 - fresh)


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no_clip"])
@pytest.mark.parametrize("prediction_type", ["eps", "x0"])
@pytest.mark.parametrize("case", CASES)
def test_steps_equal_guided_diffusion(case, prediction_type, clip):
    name, spec = CASES[case]
    schedule = respace(make_schedule(name, 1000), spec)
    predict = predictor(prediction_type, recorded_network, (lambda x_0: jnp.clip(x_0, -1, 1)) if clip else None)
    recorded = f"outputs/{case}/{prediction_type}"
    steppers = {f"{variance}/clip{int(clip)}/p_sample": Ddpm(variance) for variance in ("fixed_small", "fixed_large")}
    steppers |= {f"fixed_small/clip{int(clip)}/ddim_eta{eta}": Ddim(eta) for eta in (0.0, 0.5, 1.0)}
    for path, stepper in steppers.items():
        rows = rounded_as_in_public_code(schedule, stepper.rows(schedule))
        expected = RECORDED[f"{recorded}/{path}"]

        @jax.jit
        def step(x_t, row, noise, stepper=stepper):
            return stepper.step(predict, x_t, row, lambda: noise, stepper.init(x_t))[0]

        for b, index in enumerate(RECORDED[f"inputs/{case}/t"]):
            x_t, noise = (jnp.asarray(RECORDED[f"inputs/{name}"][b : b + 1]) for name in ("x_t", "sample_noise"))
            x_prev = step(x_t, jax.tree.map(lambda table, index=index: table[index], rows), noise)
            assert relative_error(x_prev[0], expected[b]) < 1e-5, (path, index)


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
        row = jax.tree.map(lambda table, index=index: jnp.asarray(table[index]), stepper.rows(schedule))
        x_prev, _ = stepper.step(predict, x_t, row, lambda: noise, stepper.init(x_t))
        assert relative_error(x_prev, expected) < 1e-6, index


def test_unknown_variance_offers_the_nearest():
    with pytest.raises(UserError, match="did you mean 'fixed_large'"):
        Ddpm("fixedlarge")


@pytest.mark.parametrize("stepper", [Ddpm("fixed_small"), Ddpm("fixed_large"), Ddim(0.0), Ddim(1.0)], ids=str)
def test_last_step_ends_in_x_0_without_noise(stepper):
    schedule = respace(make_schedule("cosine", 1000), 10)
    predict = predictor("x0", lambda x_t, t: jnp.full_like(x_t, 0.25))
    row = jax.tree.map(lambda table: jnp.asarray(table[0]), stepper.rows(schedule))
    x_t = jnp.full((1, 3), 7.0)
    x_0, _ = stepper.step(predict, x_t, row, lambda: jnp.full_like(x_t, 1e6), stepper.init(x_t))
    np.testing.assert_allclose(x_0, 0.25, rtol=1e-6)


def test_ddim_with_eta_one_adds_the_noise_of_ddpm():
    schedule = respace(make_schedule("cosine", 1000), 10)
    rows = Ddim(1.0).rows(schedule)
    np.testing.assert_allclose(rows.noise_rate_prev * np.sqrt(rows.fresh), Ddpm().rows(schedule).std, rtol=1e-6)
