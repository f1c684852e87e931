"""The loss is zero for the truth, has the value that theory gives, and trains each half of a network on its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analytic_denoisers import gaussian, normals, relative_error
from public_recordings import (
    RECORDED,
    VARIANCES,
    assert_each_example_close,
    channels_last,
    recorded_network_with_variance,
    recorded_process,
)
from raised import mentions

from dalle2_jax import rng
from dalle2_jax.diffusion import (
    Objective,
    from_x0_eps,
    make_schedule,
    q_sample,
    respace,
    to_x0_eps,
    training_loss,
    vlb_terms,
    with_zero_terminal_snr,
)
from dalle2_jax.diffusion.objective import loss_weights
from dalle2_jax.errors import UserError

SCHEDULE = make_schedule("cosine", 100)
KEY = jax.random.key(0)
PREDICTIONS = ["eps", "x0", "v"]
EVERY_TENTH = jnp.arange(5, 100, 10, dtype=jnp.int32)


def bytes_scaled(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape) / 127.5 - 1, jnp.float32)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_truth_costs_nothing(prediction_type):
    x_0 = normals((10, 4, 2))
    truth = gaussian(SCHEDULE, prediction_type, x_0, 0.0)
    loss, metrics = training_loss(SCHEDULE, Objective(prediction_type), truth, x_0, EVERY_TENTH, KEY)
    assert loss.shape == (10,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    np.testing.assert_allclose(metrics["mse"], loss.mean())


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_best_network_for_gaussian_data_leaves_the_conditional_variance(prediction_type):
    """Where x_0 ~ N(0, 1): Var(eps | x_t) = alpha_bar, Var(x_0 | x_t) = 1 - alpha_bar, Var(v | x_t) = 1."""
    t = jnp.repeat(EVERY_TENTH, 4)
    network = gaussian(SCHEDULE, prediction_type, 0.0, 1.0)
    loss, _ = training_loss(SCHEDULE, Objective(prediction_type), network, normals((40, 4096)), t, KEY)
    alpha_bar = SCHEDULE.alpha_bar[np.asarray(EVERY_TENTH)]
    expected = {"eps": alpha_bar, "x0": 1 - alpha_bar, "v": np.ones(10)}[prediction_type]
    np.testing.assert_allclose(loss.reshape(10, 4).mean(axis=1), expected, rtol=0.05)


@pytest.mark.parametrize(("prediction_type", "expected"), [("eps", 1.0), ("x0", 4.0)])
def test_a_network_that_says_nothing_leaves_the_target(prediction_type, expected):
    objective, t = Objective(prediction_type), jnp.arange(100)
    loss, _ = training_loss(SCHEDULE, objective, lambda x_t, t: jnp.zeros_like(x_t), 2 * normals((100, 256)), t, KEY)
    np.testing.assert_allclose(loss.mean(), expected, rtol=0.02)


def test_each_example_has_its_own_loss():
    x_0 = normals((10, 6))

    def wrong_for_some(x_t, t):
        return x_0 + jnp.arange(10, dtype=jnp.float32)[:, None]

    loss, metrics = training_loss(SCHEDULE, Objective("x0"), wrong_for_some, x_0, EVERY_TENTH, KEY)
    np.testing.assert_allclose(loss, np.arange(10) ** 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], 28.5, rtol=1e-5)


def test_network_receives_timesteps_not_indices():
    schedule, seen = respace(SCHEDULE, 5), []

    def denoiser(x_t, t):
        seen.append(t)
        return x_t

    training_loss(schedule, Objective(), denoiser, jnp.zeros((3, 1)), jnp.array([4, 0, 2]), KEY)
    assert seen[0].dtype == jnp.int32
    np.testing.assert_array_equal(seen[0], schedule.timesteps[[4, 0, 2]])


def test_the_key_decides_everything():
    def run(key):
        return training_loss(SCHEDULE, Objective(), lambda x_t, t: x_t, jnp.ones((10, 3)), EVERY_TENTH, key)[0]

    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))


def test_loss_is_float32_for_a_bfloat16_network():
    for objective, channels in [(Objective(), 1), (Objective(variance="learned_range", loss="hybrid"), 2)]:

        def denoiser(x_t, t, channels=channels):
            return jnp.concatenate([x_t] * channels, axis=-1).astype(jnp.bfloat16)

        loss, metrics = training_loss(SCHEDULE, objective, denoiser, jnp.ones((10, 3)), EVERY_TENTH, KEY)
        assert loss.dtype == jnp.float32 and all(value.dtype == jnp.float32 for value in metrics.values())


WEIGHTS_OF_X_0 = {
    "snr": ({"max_weight": 3.0}, lambda snr: np.minimum(snr + 1, 3)),
    "min_snr": ({"gamma": 5.0}, lambda snr: np.minimum(snr, 5)),
    "min_snr of 2": ({"gamma": 2.0}, lambda snr: np.minimum(snr, 2)),
    "p2": ({"gamma": 1.0, "k": 1.0}, lambda snr: snr / (1 + snr)),
    "p2 of 0.5 and 3": ({"gamma": 0.5, "k": 3.0}, lambda snr: snr / (3 + snr) ** 0.5),
}


@pytest.mark.parametrize(
    ("weighting", "prediction_type"),
    [
        (name, conditioning)
        for name in WEIGHTS_OF_X_0
        for conditioning in PREDICTIONS
        if (name, conditioning) != ("snr", "eps")
    ],
)
def test_a_weighting_is_the_same_objective_whatever_is_predicted(weighting, prediction_type):
    """One and the same guess of x_0, predicted as eps, x_0 or v, costs the paper's weight times its squared error."""
    parameters, weight = WEIGHTS_OF_X_0[weighting]
    x_0, wrong, t = normals((10, 8)), 0.3 * normals((10, 8), seed=1), EVERY_TENTH

    def denoiser(x_t, timestep):
        eps = to_x0_eps(SCHEDULE, "x0", x_0 + wrong, x_t, t).eps
        return from_x0_eps(SCHEDULE, prediction_type, x_0 + wrong, eps, t)

    objective = Objective(prediction_type, weighting=weighting.split()[0], **parameters)
    loss, _ = training_loss(SCHEDULE, objective, denoiser, x_0, t, KEY)
    snr = np.exp(SCHEDULE.log_snr[np.asarray(t)])
    np.testing.assert_allclose(loss, weight(snr) * np.square(wrong).mean(axis=1), rtol=2e-4)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_without_a_weighting_every_step_counts_alike(prediction_type):
    np.testing.assert_array_equal(loss_weights(SCHEDULE, Objective(prediction_type)), np.ones(100, np.float32))


@pytest.mark.parametrize("prediction_type", ["x0", "v"])
@pytest.mark.parametrize("weighting", WEIGHTS_OF_X_0)
def test_weights_are_finite_at_pure_noise(weighting, prediction_type):
    objective = Objective(prediction_type, weighting=weighting.split()[0], **WEIGHTS_OF_X_0[weighting][0])
    weights = loss_weights(with_zero_terminal_snr(SCHEDULE), objective)
    assert weights.dtype == np.float32 and np.all(np.isfinite(weights)) and np.all(weights > 0)


@pytest.mark.parametrize("prediction_type", ["x0", "v"])
@pytest.mark.parametrize("weighting", ["min_snr", "p2", "p2 of 0.5 and 3"])
def test_the_step_of_pure_noise_has_the_mean_weight_of_the_others(weighting, prediction_type):
    """The weight that the formula gives at SNR 0 is 0: samples would start from a step that is never trained."""
    objective = Objective(prediction_type, weighting=weighting.split()[0], **WEIGHTS_OF_X_0[weighting][0])
    schedule = with_zero_terminal_snr(SCHEDULE)
    weights = loss_weights(schedule, objective)
    np.testing.assert_allclose(weights[-1], weights[:-1].mean(), rtol=1e-6)
    snr = schedule.alpha_bar[:-1] / (1 - schedule.alpha_bar[:-1])
    expected = WEIGHTS_OF_X_0[weighting][1](snr) / (snr + 1 if prediction_type == "v" else 1)
    np.testing.assert_allclose(weights[:-1], expected, rtol=1e-6)


def test_the_first_step_of_sampling_is_trained():
    """A network with the same output for every image learns at t = T - 1 the best output there: the mean."""
    schedule, t = with_zero_terminal_snr(SCHEDULE), jnp.full(64, 99)
    objective, x_0 = Objective("v", weighting="min_snr"), 3.0 + normals((64, 4))

    def loss(guess):
        return training_loss(schedule, objective, lambda x_t, t: guess + jnp.zeros_like(x_t), x_0, t, KEY)[0].mean()

    weight = loss_weights(schedule, objective)[-1]
    np.testing.assert_allclose(jax.grad(loss)(jnp.float32(0.0)), 2 * weight * x_0.mean(), rtol=1e-4)  # v is -x_0 here


def test_given_noise_takes_the_place_of_the_key_s():
    x_0, noise, seen = normals((10, 3)), normals((10, 3), seed=5), []

    def denoiser(x_t, t):
        seen.append(x_t)
        return jnp.zeros_like(x_t)

    loss, _ = training_loss(SCHEDULE, Objective(), denoiser, x_0, EVERY_TENTH, None, noise)
    np.testing.assert_array_equal(seen[0], q_sample(SCHEDULE, x_0, EVERY_TENTH, noise))
    np.testing.assert_allclose(loss, jnp.square(noise).mean(axis=1), rtol=1e-6)
    samples = jax.random.normal(rng.stream(KEY, "eps"), x_0.shape)
    given, _ = training_loss(SCHEDULE, Objective(), denoiser, x_0, EVERY_TENTH, None, samples)
    np.testing.assert_array_equal(given, training_loss(SCHEDULE, Objective(), denoiser, x_0, EVERY_TENTH, KEY)[0])


def hybrid(prediction_type, variance, **parameters):
    return Objective(prediction_type, variance, "hybrid", **parameters)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_bound_trains_the_variance_alone(prediction_type, variance):
    x_0, t, seen = bytes_scaled((10, 4, 3)), EVERY_TENTH.at[0].set(0), []
    output = jnp.concatenate([x_0 + 0.02 * normals((10, 4, 3), seed=1), 0.5 * normals((10, 4, 3), seed=2)], axis=-1)

    def gradient(objective, output):
        def loss(output):
            def denoiser(x_t, timestep):
                seen.append(x_t)
                return output

            return training_loss(SCHEDULE, objective, denoiser, x_0, t, KEY)[0].sum()

        return jax.grad(loss)(output)

    of_hybrid = gradient(hybrid(prediction_type, variance, weighting="min_snr"), output)
    of_mse = gradient(Objective(prediction_type, weighting="min_snr"), output[..., :3])
    np.testing.assert_array_equal(of_hybrid[..., :3], of_mse)

    pair = to_x0_eps(SCHEDULE, prediction_type, output[..., :3], seen[0], t)

    def bound(raw):
        predicted = pair._replace(variance=raw)
        return 1e-3 * SCHEDULE.num_steps * vlb_terms(SCHEDULE, variance, predicted, x_0, seen[0], t).sum()

    of_bound = jax.grad(bound)(output[..., 3:])
    assert np.all(np.abs(of_bound).max(axis=(1, 2)) > 0)
    assert_each_example_close(of_hybrid[..., 3:], of_bound, 1e-4)


def test_the_whole_bound_trains_the_mean_too():
    x_0, output = bytes_scaled((10, 4, 3)), 0.5 * normals((10, 4, 6), seed=1)
    objective = Objective("v", "learned_range", "vlb")
    slope = jax.grad(lambda out: training_loss(SCHEDULE, objective, lambda *_: out, x_0, EVERY_TENTH, KEY)[0].sum())
    assert np.all(np.abs(slope(output)).reshape(10, -1, 6).max(axis=1) > 0)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_the_bound_is_the_same_whatever_is_predicted(variance):
    x_0, guess, raw = bytes_scaled((10, 4, 3)), 0.5 * normals((10, 4, 3), seed=1), normals((10, 4, 3), seed=2)
    t = EVERY_TENTH.at[0].set(0)
    bounds = []
    for prediction_type in PREDICTIONS:

        def denoiser(x_t, timestep, prediction_type=prediction_type):
            eps = to_x0_eps(SCHEDULE, "x0", guess, x_t, t).eps
            return jnp.concatenate([from_x0_eps(SCHEDULE, prediction_type, guess, eps, t), raw], axis=-1)

        weighted = hybrid(prediction_type, variance, vlb_weight=2.0)
        both, metrics = training_loss(SCHEDULE, weighted, denoiser, x_0, t, KEY)
        whole, _ = training_loss(SCHEDULE, Objective(prediction_type, variance, "vlb"), denoiser, x_0, t, KEY)
        mean_alone, _ = training_loss(
            SCHEDULE,
            Objective(prediction_type),
            lambda x_t, timestep, denoiser=denoiser: denoiser(x_t, timestep)[..., :3],
            x_0,
            t,
            KEY,
        )
        np.testing.assert_allclose(both, mean_alone + 2.0 * whole, rtol=1e-5)
        np.testing.assert_allclose(metrics["vlb"], whole.mean() / SCHEDULE.num_steps, rtol=1e-5)
        bounds.append(whole)
    np.testing.assert_allclose(bounds[1:], [bounds[0]] * 2, rtol=1e-3)


@functools.partial(jax.jit, static_argnames="objective")
def trained(objective, key):
    """500 steps of Adam on a dense layer of eight parameters in bfloat16.

    Returns the parameters, the losses, and (loss, vlb) on other images: untrained, trained, and trained but for
    the variance.
    """
    optimizer, levels = optax.adam(0.02), jnp.linspace(0.0, 1.0, SCHEDULE.num_steps)

    def loss_of(weights, key, count=32):
        keys = jax.random.split(key, 3)
        shades = jax.random.randint(keys[0], (count, 1, 1, 1), 160, 224).astype(jnp.float32) / 127.5 - 1.0
        t = jax.random.randint(keys[1], (count,), 0, SCHEDULE.num_steps)

        def denoiser(x_t, timestep):
            u = jnp.broadcast_to(levels[timestep][:, None, None, None], x_t.shape)
            features = jnp.concatenate([x_t, u, u * x_t, jnp.ones_like(u)], axis=-1)
            return features.astype(jnp.bfloat16) @ weights.astype(jnp.bfloat16)

        x_0 = jnp.broadcast_to(shades, (count, 4, 4, 1))
        loss, metrics = training_loss(SCHEDULE, objective, denoiser, x_0, t, keys[2])
        return loss.mean(), metrics["vlb"]

    def step(carry, key):
        weights, state = carry
        (loss, _), slope = jax.value_and_grad(loss_of, has_aux=True)(weights, key)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(weights, updates), state), loss

    keys, start = jax.random.split(key, 501), jnp.zeros((4, 2))
    (weights, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), keys[1:])
    networks = jnp.stack([start, weights, weights.at[:, 1].set(0.0)])
    return weights, losses, jax.vmap(lambda weights: loss_of(weights, keys[0], 512))(networks)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_bfloat16_network_trains_its_variance_without_a_nan(prediction_type):
    weights, losses, (loss, vlb) = trained(hybrid(prediction_type, "learned_range"), jax.random.key(0))
    assert np.all(np.isfinite(weights)) and np.all(np.isfinite(losses))
    assert loss[1] < 0.7 * loss[0] and vlb[1] < vlb[0]
    assert vlb[1] < vlb[2]  # the variance that it learned is better than none


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"prediction": "x_0"}, ["'x_0'", "'x0'"]),
        ({"variance": "learned_rang"}, ["'learned_rang'", "'learned_range'"]),
        ({"loss": "hybird"}, ["'hybird'", "'hybrid'"]),
        ({"weighting": "snrr"}, ["'snrr'", "'snr'"]),
        ({"loss": "hybrid"}, ["'hybrid'", "'fixed_small'", "'learned_range'", "'mse'"]),
        ({"variance": "learned"}, ["'mse'", "'learned'", "'hybrid'"]),
        ({"loss": "vlb", "weighting": "p2"}, ["'vlb'", "weighting", "'none'"]),
        ({"weighting": "snr"}, ["'snr'", "'min_snr'", "eps"]),
    ],
)
def test_wrong_objectives_say_what_to_do(fields, facts):
    with pytest.raises(UserError, check=mentions(*facts)):
        Objective(**fields)


def test_eps_is_rejected_where_the_last_step_is_pure_noise():
    pure = with_zero_terminal_snr(SCHEDULE)
    with pytest.raises(UserError, check=mentions("zero terminal SNR", "eps", "'v'", "'x0'")):
        Objective("eps").check(pure)
    Objective("v").check(pure), Objective("x0").check(pure), Objective("eps").check(SCHEDULE)


@pytest.fixture
def recorded_noise(monkeypatch):
    """The noise that the public code was given replaces the sampled one."""
    noise = channels_last("inputs/noise")
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype=jnp.float32: noise.reshape(shape))


@pytest.mark.parametrize("prediction_type", ["eps", "x0"])
@pytest.mark.parametrize(("case", "variance"), VARIANCES)
@pytest.mark.numerics
def test_losses_equal_guided_diffusion(case, variance, prediction_type, recorded_noise):
    schedule, t = recorded_process(case)
    network, x_0 = recorded_network_with_variance(variance), channels_last("inputs/x_start")
    learned, steps = variance in ("learned", "learned_range"), schedule.num_steps

    def loss(**fields):
        return training_loss(schedule, Objective(prediction_type, variance, **fields), network, x_0, t, KEY)[0]

    whole = loss(loss="vlb")
    ours = {
        "mse": loss(loss="hybrid", vlb_weight=1 / steps) if learned else loss(),
        "rescaled_mse": loss(loss="hybrid", vlb_weight=1e-3) if learned else loss(),
        "kl": whole / steps,
        "rescaled_kl": whole,
    }
    for name, value in ours.items():
        # The public code subtracts log-variances from -1, which leaves 3e-7 bits of float32's rounding.
        rounding = 3e-7 * {"mse": 1, "rescaled_mse": 1e-3 * steps, "kl": 1, "rescaled_kl": steps}[name]
        expected = RECORDED[f"outputs/{case}/{prediction_type}/{variance}/loss_{name}/loss"]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=rounding)


def test_gradient_of_the_hybrid_loss_equals_guided_diffusion(recorded_noise):
    schedule, t = recorded_process("cosine/none")
    x_0, output = channels_last("inputs/x_start"), channels_last("inputs/hybrid_grad/model_output")
    objective = hybrid("eps", "learned_range")
    slope = jax.grad(lambda out: training_loss(schedule, objective, lambda *_: out, x_0, t, KEY)[0].sum())(output)
    expected = channels_last("outputs/hybrid_grad/d_loss_sum")
    assert_each_example_close(slope[..., :3], expected[..., :3], 1e-6)
    assert relative_error(slope, expected) < 1e-5
    # Towards noise the slope is a small difference, of which the recording has rounded the last digits.
    assert_each_example_close(slope[..., 3:], expected[..., 3:], 3e-4)
