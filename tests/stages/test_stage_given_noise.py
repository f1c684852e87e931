"""A stage's loss and samples with timesteps and noise that are given, and its network alone."""

import jax
import jax.numpy as jnp
import numpy as np
import probe
import pytest
from raised import mentions

from dalle2_jax import diffusion, rng
from dalle2_jax.diffusion import LossHistory
from dalle2_jax.errors import UserError
from dalle2_jax.stages import DiffusionConfig

CONFIG = DiffusionConfig("x0", num_steps=100)


class Whole(probe.Probe):
    """Drops none of its conditions."""

    drop_rates = {"image": 0.0, "text": 0.0}


def test_loss_of_given_timesteps_and_noise():
    stage, batch = Whole(CONFIG), probe.batch(6)
    t, noise = jnp.array([0, 5, 17, 50, 80, 99]), jnp.asarray(probe.batch(6, seed=3)["x"])
    x_0, condition = stage.example({}, rng.root(0), batch)
    x_t = diffusion.q_sample(stage.schedule, x_0, t, noise)
    expected = jnp.square(stage.denoiser(probe.params(), condition)(x_t, t) - x_0).mean()
    losses = [stage.loss(probe.params(), {}, {}, rng.root(key), batch, t=t, noise=noise)[0] for key in (1, 2)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)  # the key is not used
    assert not np.allclose(stage.loss(probe.params(), {}, {}, rng.root(1), batch)[0], expected, rtol=1e-3)


def test_given_timesteps_keep_their_importance():
    """With timesteps sampled by the loss, the weight of a given one is 1 / (T p_t) too."""
    stage = Whole(DiffusionConfig("x0", num_steps=4, timesteps="loss_second_moment"))
    losses = jnp.array([[1.0], [2.0], [3.0], [4.0]]) * jnp.ones((4, 10))
    stats = LossHistory(losses, jnp.full(4, 10))._asdict()
    batch, t, noise = probe.batch(2), jnp.array([0, 3]), jnp.asarray(probe.batch(2, seed=3)["x"])
    plain = Whole(DiffusionConfig("x0", num_steps=4))
    apart = []
    for row in (0, 1):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        given = {"t": t[row : row + 1], "noise": noise[row : row + 1]}
        weighted, _ = stage.loss(probe.params(), stats, {}, rng.root(0), one, **given)
        apart.append(weighted / plain.loss(probe.params(), {}, {}, rng.root(0), one, **given)[0])
    np.testing.assert_allclose(apart, [1 / (4 * 0.1), 1 / (4 * 0.4)], rtol=5e-3)


def test_samples_of_given_noise():
    stage = Whole(CONFIG)
    sampling = type(stage.sampling)("ddpm", steps=4, clip_sample=None)
    condition, x_T = probe.condition(3), jnp.asarray(probe.batch(3, seed=4)["x"])
    noise = jnp.asarray(np.random.default_rng(5).standard_normal((4, 3, probe.DIM), np.float32))

    def generate(seed, **given):
        return stage.sample_x_0(probe.params(), probe.keys(3, seed), condition, stage.plan(sampling, **given))

    given = {"x_T": x_T, "noise": noise}
    np.testing.assert_array_equal(generate(0, **given), generate(1, **given))
    direct = diffusion.sample(
        *(stage.schedule, sampling, "x0", stage.denoiser(probe.params(), condition), probe.keys(3), (probe.DIM,)),
        options=diffusion.SamplingOptions(**given),
    )
    np.testing.assert_allclose(generate(0, **given), direct, rtol=1e-6)
    assert not np.allclose(generate(0, **given), generate(0, x_T=x_T, noise=noise + 1))
    with pytest.raises(UserError, check=mentions("noise", (4, 3, 4), (4, 2, 4))):
        generate(0, x_T=x_T, noise=noise[:, :2])


def test_the_network_alone_goes_without_what_is_absent():
    stage, condition = Whole(CONFIG), probe.condition(3)
    x_t, t = jnp.asarray(probe.batch(3, seed=4)["x"]), jnp.array([0, 5, 99])
    whole = stage.denoiser(probe.params(), condition)(x_t, t)
    absent = {"text": jnp.array([True, False, False])}
    other = stage.denoiser(probe.params(), condition, absent)(x_t, t)
    assert not np.allclose(whole[0], other[0])
    np.testing.assert_array_equal(whole[1:], other[1:])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_table_dtype_is_that_of_the_schedule(dtype):
    schedule = DiffusionConfig(table_dtype=dtype).make_schedule()
    assert schedule.alpha_bar.dtype == schedule.betas.dtype == np.dtype(dtype)
    assert schedule is DiffusionConfig(table_dtype=dtype).make_schedule()  # so that equal configs compile once


def test_default_tables_are_exact():
    assert DiffusionConfig() == DiffusionConfig(table_dtype="float64")
    with pytest.raises(UserError, check=mentions("table_dtype", "'float16'", "float64", "float32")):
        DiffusionConfig(table_dtype="float16")


def test_a_loss_of_given_noise_is_differentiable():
    stage, batch = Whole(CONFIG), probe.batch(4)
    t, noise = jnp.array([0, 5, 17, 99]), jnp.asarray(probe.batch(4, seed=3)["x"])
    slope = jax.grad(lambda params: stage.loss(params, {}, {}, rng.root(0), batch, t=t, noise=noise)[0])(probe.params())
    assert np.abs(slope["kernel"]).min() > 0
