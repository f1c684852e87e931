"""Sampling around known pixels: these stay, sampled pixels fit them, and resampling is RePaint's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic_denoisers import denoiser_of, gaussian_law, keys, mixture_law, normals
from raised import mentions

from dalle2_jax.diffusion import (
    SAMPLERS,
    Inpainting,
    SamplerConfig,
    SamplingOptions,
    integrate,
    make_schedule,
    make_stepper,
    predictor,
    resampling,
    respace,
    sample,
)
from dalle2_jax.diffusion.inpainting import one_way
from dalle2_jax.errors import UserError

SCHEDULE = make_schedule("cosine", 1000)
CORRELATION = 0.9
CORRELATED = gaussian_law(np.zeros(2), [[1.0, CORRELATION], [CORRELATION, 1.0]])
MIXTURE = mixture_law([0.3, 0.7], [-1.0, 0.8], [0.4, 0.25])
KNOWN = 1.5
COUNT = 2048


def published_schedule(num_steps, jump_length, jump_n_sample):
    """get_schedule_jump of RePaint's code (Lugmayr et al., appendix): the times that a state goes through."""
    jumps = {j: jump_n_sample - 1 for j in range(0, num_steps - jump_length, jump_length)}
    t, times = num_steps, []
    while t >= 1:
        t = t - 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump_length):
                t = t + 1
                times.append(t)
    return [*times, -1]


@pytest.mark.parametrize(
    ("num_steps", "jump", "times"), [(250, 10, 10), (20, 1, 3), (20, 5, 2), (7, 3, 4), (7, 6, 2), (9, 4, 1)]
)
def test_the_step_plan_is_repaints(num_steps, jump, times):
    """From time t down to t - 1 it takes step t; up from t to t + 1 it adds the noise of step t + 1."""
    published = published_schedule(num_steps, jump, times)
    step_plan = resampling(num_steps, jump, times)
    pairs = list(zip(published[:-1], published[1:], strict=True))
    np.testing.assert_array_equal(step_plan.indices, [max(pair) for pair in pairs])
    np.testing.assert_array_equal(step_plan.renoise, [after > before for before, after in pairs])


def test_without_renoising_the_plan_visits_every_step_once():
    for step_plan in (one_way(5), resampling(5, 2, 1)):
        np.testing.assert_array_equal(step_plan.indices, [4, 3, 2, 1, 0])
        assert not step_plan.renoise.any()
    np.testing.assert_array_equal(one_way(5, ascending=True).indices, [0, 1, 2, 3, 4])


@pytest.mark.parametrize(("jump", "times"), [(0, 2), (10, 2), (11, 2), (-1, 2), (3, 0)])
def test_impossible_resamplings_say_what_to_do(jump, times):
    with pytest.raises(UserError, check=mentions("resampling", "1 to 9", jump, times)):
        resampling(10, jump, times)


def test_renoising_is_the_forward_process():
    """From x_0 = 1 at the cleanest level, climbing to the top gives the law of x_t there, eq. (1) of the process."""
    schedule = respace(SCHEDULE, 10)
    step_plan = resampling(10, 9, 2)
    climbed = int(np.flatnonzero(step_plan.renoise)[-1])
    states = integrate(
        make_stepper(SamplerConfig()),
        schedule,
        predictor("x0", lambda x_t, t: jnp.ones_like(x_t)),
        keys(2),
        normals((2, 20_000)),
        step_plan=step_plan,
        options=SamplingOptions(trajectory=True),
    )
    lowest = np.flatnonzero(~step_plan.renoise[:climbed])[-1]
    at_bottom, at_top = np.asarray(states[lowest]), np.asarray(states[climbed])
    kept = schedule.signal_rate[9] / schedule.signal_rate[0]
    np.testing.assert_allclose((at_top - kept * at_bottom).std(), np.sqrt(1 - kept**2), rtol=0.02)
    np.testing.assert_allclose(at_top.mean(axis=1), kept * at_bottom.mean(axis=1), atol=0.03)
    between = np.asarray(states[climbed - 4])
    kept = schedule.signal_rate[5] / schedule.signal_rate[0]
    np.testing.assert_allclose((between - kept * at_bottom).std(), np.sqrt(1 - kept**2), rtol=0.02)
    np.testing.assert_allclose((between - kept * at_bottom).mean(), 0, atol=0.02)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc"])
def test_renoising_resets_the_history_of_a_multistep_solver(name):
    """The way down from there is that of a solver whose schedule ends there, whatever came before."""
    schedule, stepper = respace(SCHEDULE, "logsnr10"), make_stepper(SamplerConfig(name))
    predict = predictor("v", denoiser_of(SCHEDULE, "v", MIXTURE))
    x_T, step_plan = normals((8, 1)), resampling(10, 4, 2)

    def go(steps, x, step_plan=None):
        return integrate(
            stepper, steps, predict, keys(8), x, step_plan=step_plan, options=SamplingOptions(trajectory=True)
        )

    states = go(schedule, x_T, step_plan)
    tops = np.flatnonzero(step_plan.renoise[:-1] & ~step_plan.renoise[1:])
    np.testing.assert_array_equal(step_plan.indices[tops], [8, 4])
    for top in tops:
        start = step_plan.indices[top]
        restarted = go(respace(schedule, "t:" + ",".join(map(str, schedule.timesteps[: start + 1]))), states[top])
        np.testing.assert_allclose(states[top + 1 : top + 5], restarted[:4], atol=1e-5)


@functools.cache
def around(name, resample):
    """Images (known, sampled) of correlated pixels, the first of them known."""
    inpainting = Inpainting(jnp.full((COUNT, 2), KNOWN), jnp.tile(jnp.array([True, False]), (COUNT, 1)))
    config = SamplerConfig(
        name, steps="logsnr20", variance="fixed_large" if name == "ddpm" else "auto", clip_sample=None
    )
    call = jax.jit(
        lambda keys: sample(
            SCHEDULE,
            config,
            "v",
            denoiser_of(SCHEDULE, "v", CORRELATED),
            keys,
            (2,),
            options=SamplingOptions(inpainting=inpainting, resample=resample),
        )
    )
    return np.asarray(call(keys(COUNT)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_known_pixels_stay_and_sampled_pixels_fit_them(name):
    """Given x the other pixel is N(c x, 1 - c^2), c being the correlation; many small jumps come near."""
    known, samples = around(name, (2, 5)).T
    np.testing.assert_array_equal(known, np.float32(KNOWN))
    np.testing.assert_allclose(samples.mean(), CORRELATION * KNOWN, atol=0.25)
    np.testing.assert_allclose(samples.std(), np.sqrt(1 - CORRELATION**2), atol=0.12)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "unipc"])
def test_resampling_samples_nearer_to_the_conditional_law(name):
    errors = []
    for resample in (None, (2, 5)):
        known, samples = around(name, resample).T
        np.testing.assert_array_equal(known, np.float32(KNOWN))
        errors.append([abs(samples.mean() - CORRELATION * KNOWN), abs(samples.std() - np.sqrt(1 - CORRELATION**2))])
    assert np.all(np.array(errors[1]) < 0.6 * np.array(errors[0]))


def test_known_pixels_keep_their_noise_level_on_the_way():
    """After step i they are the known image noised to the level before it, with fresh noise at each."""
    schedule, image = respace(SCHEDULE, 6), jnp.full((1, 50_000), 0.5)
    states = integrate(
        make_stepper(SamplerConfig()),
        schedule,
        predictor("x0", lambda x_t, t: jnp.zeros_like(x_t)),
        keys(1),
        normals((1, 50_000)),
        options=SamplingOptions(inpainting=Inpainting(image, jnp.ones_like(image, bool)), trajectory=True),
    )
    states = np.asarray(states, np.float64)[:, 0]
    signal, noise = np.sqrt(schedule.alpha_bar_prev)[::-1], np.sqrt(1 - schedule.alpha_bar_prev)[::-1]
    np.testing.assert_allclose(states.mean(axis=1), 0.5 * signal, atol=0.02)
    np.testing.assert_allclose(states.std(axis=1), noise, atol=0.015)
    np.testing.assert_allclose(np.corrcoef(states[:-1]), np.eye(5), atol=0.03)


def test_a_mask_may_have_one_channel_and_its_own_pixels_for_each_image():
    image, mask = normals((3, 4, 4, 2)), jnp.abs(normals((3, 4, 4, 1), seed=1)) < 0.7
    config = SamplerConfig(steps=3, clip_sample=None)
    x_0 = sample(
        SCHEDULE,
        config,
        "x0",
        lambda x_t, t: jnp.full_like(x_t, 9.0),
        keys(3),
        (4, 4, 2),
        options=SamplingOptions(inpainting=Inpainting(image, mask)),
    )
    np.testing.assert_allclose(x_0, np.where(mask, image, 9.0), rtol=1e-6)


@pytest.mark.parametrize("resample", [None, (2, 2)])
def test_an_inpainted_image_is_the_same_in_any_batch(resample):
    image, mask = normals((4, 3)), normals((4, 3), seed=1) > 0

    @jax.jit
    def call(keys, image, mask):
        return sample(
            SCHEDULE,
            SamplerConfig("ddpm", steps=5),
            "v",
            denoiser_of(SCHEDULE, "v", gaussian_law(np.zeros(3), np.eye(3))),
            keys,
            (3,),
            options=SamplingOptions(inpainting=Inpainting(image, mask), resample=resample),
        )

    parts = [call(keys(4)[part], image[part], mask[part]) for part in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(call(keys(4), image, mask), np.concatenate(parts), atol=1e-6)
