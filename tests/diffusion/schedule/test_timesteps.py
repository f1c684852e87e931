"""Drawing timesteps more often where the loss is large changes no expectation; the history is a plain ring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_recordings import RECORDED

from dalle2_jax.diffusion import LossHistory, empty_history, record, sample_timesteps
from dalle2_jax.diffusion.timesteps import HISTORY, UNIFORM, probabilities

STEPS = 8


def full_history(losses):
    """The history of a network whose loss is losses[t], always."""
    places = np.broadcast_to(np.asarray(losses, np.float32)[:, None], (len(losses), HISTORY))
    return LossHistory(jnp.asarray(places), jnp.full(len(losses), HISTORY, jnp.int32))


def test_without_a_history_every_step_is_as_likely_and_counts_as_much():
    t, weight = sample_timesteps(jax.random.key(0), 20_000, STEPS)
    assert t.dtype == jnp.int32
    np.testing.assert_allclose(np.bincount(t, minlength=STEPS) / 20_000, 1 / STEPS, atol=0.01)
    np.testing.assert_array_equal(weight, np.ones(20_000))


def test_steps_are_sampled_by_their_probabilities():
    history = full_history(np.arange(1, STEPS + 1))
    t, weight = sample_timesteps(jax.random.key(0), 50_000, STEPS, history)
    p = probabilities(history)
    assert t.dtype == jnp.int32
    np.testing.assert_allclose(np.bincount(t, minlength=STEPS) / 50_000, p, atol=0.008)
    np.testing.assert_allclose(weight, 1 / (STEPS * np.asarray(p)[t]), rtol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_weighted_loss_is_unbiased(seed):
    """Whatever the history says, E[weight L] is the mean of L over the steps: even of losses it never saw."""
    numbers = np.random.default_rng(seed)
    history, losses = full_history(numbers.lognormal(0, 2, STEPS)), numbers.lognormal(0, 1, STEPS)
    t, weight = sample_timesteps(jax.random.key(seed), 400_000, STEPS, history)
    weighted = np.float64(weight) * losses[t]
    np.testing.assert_allclose(weighted.mean(), losses.mean(), atol=4 * weighted.std() / 400_000**0.5)


def test_a_history_that_is_right_leaves_no_variance():
    """p is proportional to the loss, so every weighted loss is the mean, but for the share that stays uniform."""
    losses = np.arange(1.0, STEPS + 1)
    t, weight = sample_timesteps(jax.random.key(0), 1000, STEPS, full_history(losses))
    np.testing.assert_allclose(weight * losses[t], losses.mean(), rtol=10 * UNIFORM)


def test_probabilities_are_the_root_of_the_second_moment():
    losses = np.random.default_rng(0).lognormal(0, 1, (STEPS, HISTORY)).astype(np.float32)
    root = np.sqrt(np.mean(np.float64(losses) ** 2, axis=1))
    history = LossHistory(jnp.asarray(losses), jnp.full(STEPS, HISTORY, jnp.int32))
    for uniform in (UNIFORM, 0.2):
        expected = (1 - uniform) * root / root.sum() + uniform / STEPS
        np.testing.assert_allclose(probabilities(history, uniform), expected, rtol=1e-5)


def test_no_step_is_forgotten():
    p = probabilities(full_history([1.0] + [0.0] * (STEPS - 1)))
    np.testing.assert_allclose(p[1:], UNIFORM / STEPS, rtol=1e-5)


def test_losses_that_are_all_zero_are_no_reason_to_prefer_a_step():
    np.testing.assert_allclose(probabilities(full_history(np.zeros(STEPS))), 1 / STEPS, rtol=1e-6)


def test_probabilities_stay_uniform_until_the_last_step_has_its_losses():
    """All steps but one are full, then that one gets the losses it lacks, one by one."""
    history = empty_history(STEPS, 3)
    np.testing.assert_allclose(probabilities(history), 1 / STEPS, rtol=1e-6)
    for _ in range(5):
        others = jnp.arange(1, STEPS)
        history = record(history, others, others.astype(jnp.float32))
    for _ in range(3):
        np.testing.assert_allclose(probabilities(history), 1 / STEPS, rtol=1e-6)
        history = record(history, jnp.array([0]), jnp.array([100.0]))
    assert probabilities(history)[0] > 0.7


@pytest.mark.parametrize(("steps", "length", "batch"), [(4, 3, 2), (4, 3, 16), (2, 4, 32), (8, 10, 64), (1, 2, 5)])
def test_recording_is_a_plain_ring_however_often_a_step_comes(steps, length, batch):
    numbers = np.random.default_rng(0)
    ring, written = [[0.0] * length for _ in range(steps)], [0] * steps
    history, compiled = empty_history(steps, length), jax.jit(record)
    for _ in range(12):
        t, losses = numbers.integers(0, steps, batch), numbers.random(batch).astype(np.float32)
        for step, loss in zip(t, losses, strict=True):
            ring[step][written[step] % length] = loss
            written[step] += 1
        history = compiled(history, jnp.asarray(t, jnp.int32), jnp.asarray(losses))
        np.testing.assert_array_equal(history.losses, np.array(ring, np.float32))
        np.testing.assert_array_equal(history.counts, written)


def test_losses_of_a_bfloat16_network_are_kept_in_float32():
    history = record(empty_history(STEPS), jnp.array([3]), jnp.array([0.5], jnp.bfloat16))
    assert history.losses.dtype == jnp.float32 and history.losses[3, 0] == 0.5


def test_probabilities_equal_guided_diffusion():
    """Eighty losses of six steps in batches of eight; a history of three, a uniform share of 0.01."""
    history = empty_history(6, 3)
    batches = RECORDED["inputs/lsm/ts"].reshape(10, 8), RECORDED["inputs/lsm/losses"].reshape(10, 8)
    for t, losses, expected in zip(*batches, RECORDED["outputs/lsm/weights_after_each_8"], strict=True):
        history = record(history, jnp.asarray(t, jnp.int32), jnp.asarray(losses, jnp.float32))
        np.testing.assert_allclose(probabilities(history, 0.01), expected / expected.sum(), rtol=1e-5)
    assert np.ptp(expected) > 0.1  # the last are no longer uniform
