"""What a stage is trained on: its schedule, its variance, and the timesteps, whose history outlives an interruption."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe import DIM, Probe, batch, condition, keys, params
from raised import mentions

from dalle2_jax import diffusion, rng, testing
from dalle2_jax.diffusion import NoiseStatistics
from dalle2_jax.diffusion.timesteps import HISTORY, UNIFORM
from dalle2_jax.errors import UserError
from dalle2_jax.stages import DiffusionConfig, SamplingConfig
from dalle2_jax.training.loop import Job, RunConfig, train
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh, shard_batch
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.claim import claim
from dalle2_jax.workdir.folder import StageFolder

# --- schedules ------------------------------------------------------------------------------


def test_a_config_decides_the_schedule():
    plain = DiffusionConfig("v", schedule="sigmoid", num_steps=64)
    assert plain.make_schedule() is diffusion.make_schedule("sigmoid", 64)
    shifted = dataclasses.replace(plain, resolution_shift=4.0)
    change = shifted.make_schedule().log_snr - plain.make_schedule().log_snr
    np.testing.assert_allclose(change, -2 * np.log(4.0))
    ends = [dataclasses.replace(config, zero_terminal_snr=True).make_schedule() for config in (plain, shifted)]
    assert [schedule.alpha_bar[-1] for schedule in ends] == [0, 0]
    assert ends[1] is diffusion.with_zero_terminal_snr(shifted.make_schedule()) is not ends[0]


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_stage_samples_from_pure_noise(prediction):
    """With zero terminal SNR nothing of x_T is in the first x_0, and every number stays finite."""
    config = DiffusionConfig(prediction, num_steps=20, zero_terminal_snr=True)
    stage = Probe(config, SamplingConfig("ddpm", steps=20, clip_sample=3.0))
    samples = stage.sample_x_0(params(), keys(2), condition(2), stage.plan())
    assert np.isfinite(samples).all()
    (loss, _), grads = jax.value_and_grad(stage.loss, has_aux=True)(params(), {}, {}, rng.root(0), batch(64))
    assert np.isfinite(loss) and np.isfinite(grads["kernel"]).all()


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"prediction": "eps", "zero_terminal_snr": True}, ["zero terminal SNR", "'v'", "'x0'"]),
        ({"resolution_shift": 0.0}, ["resolution_shift", 0.0]),
        ({"num_steps": 0}, ["noise schedule", 1, 0]),
        ({"timesteps": "importance"}, ["timesteps", "'importance'", "uniform"]),
        ({"variance": "learned_range"}, ["'mse'", "'learned_range'", "use loss 'hybrid'"]),
        ({"loss": "hybrid"}, ["'hybrid'", "'fixed_small'", "'learned_range'", "'mse'"]),
    ],
)
def test_impossible_configs_say_what_to_do(fields, facts):
    with pytest.raises(UserError, check=mentions(*facts)):
        DiffusionConfig(**fields)


# --- a learned variance ---------------------------------------------------------------------

LEARNED = {"variance": "learned_range", "loss": "hybrid"}


def learning(kind):
    """A tiny stage that learns its variance."""
    stage = testing.tiny_stage(kind)
    diffused = dataclasses.replace(stage.diffusion, **LEARNED)
    if kind == "upsampler":
        return dataclasses.replace(stage, diffusion=diffused, model=dataclasses.replace(stage.model, out_channels=6))
    unet = dataclasses.replace(stage.model.unet, out_channels=6)
    return dataclasses.replace(stage, diffusion=diffused, model=dataclasses.replace(stage.model, unet=unet))


@pytest.mark.parametrize("kind", ["decoder", "upsampler"])
def test_stages_of_images_learn_their_variance(kind):
    stage = learning(kind)

    def run(key, variables, frozen, batch):
        return jax.value_and_grad(stage.loss, has_aux=True)(*variables, frozen, key, stage.prepare(frozen, batch))

    variables = jax.eval_shape(stage.init, rng.root(0))
    arguments = rng.root(0), variables, testing.tiny_frozen(stage), testing.tiny_batch(2)
    (loss, outputs), grads = jax.eval_shape(run, *arguments)
    assert loss.shape == () and {"mse", "vlb"} < {*outputs.metrics}
    assert jax.tree.structure(grads) == jax.tree.structure(variables.params)

    def generate(params, frozen, batch):
        _, conditioning = stage.example({}, rng.root(0), stage.prepare(frozen, batch))
        return stage.sample_x_0(params, keys(2), conditioning, stage.plan())

    assert jax.eval_shape(generate, variables.params, *arguments[2:]).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("kind", ["decoder", "upsampler"])
def test_channels_that_do_not_fit_are_rejected(kind):
    stage = learning(kind)
    field = "model.unet.out_channels" if kind == "decoder" else "model.out_channels"
    plain = testing.tiny_stage(kind)
    with pytest.raises(UserError, check=mentions(f"stage {plain.name}", "'learned_range'", field, 6, 3)):
        dataclasses.replace(plain, diffusion=stage.diffusion)
    with pytest.raises(UserError, check=mentions(f"stage {plain.name}", "'fixed_small'", field, 3, 6)):
        dataclasses.replace(stage, diffusion=plain.diffusion)


def test_the_prior_learns_no_variance():
    prior = testing.tiny_stage("prior")
    with pytest.raises(UserError, check=mentions("'hybrid'", "prior", "'mse'", "'fixed_small'")):
        dataclasses.replace(prior, diffusion=dataclasses.replace(prior.diffusion, **LEARNED))


def test_the_bound_trains_the_variance_and_not_the_mean():
    """The gradient of the mean's gain is that of the squared error alone; the bound is computed separately."""
    hybrid, squared = Probe(DiffusionConfig("x0", num_steps=100, **LEARNED)), Probe()

    def gradient(stage):
        (loss, outputs), grads = jax.value_and_grad(stage.loss, has_aux=True)(params(), {}, {}, rng.root(0), batch(32))
        return loss, outputs.metrics, grads["kernel"]

    (loss, metrics, grads), (plain, plain_metrics, plain_grads) = gradient(hybrid), gradient(squared)
    np.testing.assert_allclose(grads, plain_grads, rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], plain_metrics["mse"], rtol=1e-6)
    np.testing.assert_allclose(loss - plain, 1e-3 * 100 * metrics["vlb"], rtol=1e-3)


# --- moments --------------------------------------------------------------------------------


def test_analytic_samples_take_the_moments_of_the_stage():
    """Noise of the power 1 leaves no doubt about x_0, so the variance is the small one; less of it leaves some."""
    config = SamplingConfig("ddpm", steps=5, clip_sample=None)
    analytic = dataclasses.replace(config, variance="analytic")

    def samples(config, statistics=None):
        stage = Probe(noise_statistics=statistics)
        return np.asarray(stage.sample_x_0(params(), keys(2), condition(2), stage.plan(config)))

    np.testing.assert_array_equal(samples(analytic, NoiseStatistics((1.0,) * 100, 1.0)), samples(config))
    assert np.abs(samples(analytic, NoiseStatistics((0.2,) * 100, 1.0)) - samples(config)).max() > 1e-2
    Probe(noise_statistics=NoiseStatistics((1.0,) * 100, 1.0)).check_sampling(analytic)
    with pytest.raises(UserError, check=mentions("50 timesteps", "noise_statistics")):
        Probe(noise_statistics=NoiseStatistics((1.0,) * 50, 1.0)).check_sampling(analytic)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_noise_power_is_of_eps_whatever_is_predicted(prediction):
    """A network that says 0: eps is then 0, x_t / s, or s x_t."""
    stage, t, x_0 = Probe(DiffusionConfig(prediction, num_steps=100)), 30, 0.5 * jnp.ones((4096, DIM))
    power = stage.noise_power(params(0.0, 0.0), rng.root(0), x_0, condition(4096), jnp.int32(t))
    signal, noise = stage.schedule.signal_rate[t], stage.schedule.noise_rate[t]
    of_x_t = (0.5 * signal) ** 2 + noise**2
    expected = {"eps": 0.0, "x0": of_x_t / noise**2, "v": of_x_t * noise**2}[prediction]
    np.testing.assert_allclose(power, expected, rtol=0.03)
    assert not np.any(stage.seen[0]["text"]) and not stage.seen[0]["training"]  # nothing is dropped


# --- timesteps ------------------------------------------------------------------------------

COUNT, T = 4000, 6
UNEVEN = DiffusionConfig("x0", num_steps=T, weighting="min_snr", timesteps="loss_second_moment")
"""Losses of very different size: the squared error has another weight at each of six steps."""


def full_history(losses):
    """A history that has seen, of each step, one loss again and again."""
    losses = jnp.broadcast_to(jnp.asarray(losses, jnp.float32)[:, None], (T, HISTORY))
    return diffusion.LossHistory(losses, jnp.full(T, HISTORY, jnp.int32))._asdict()


def test_the_history_is_the_stage_s_statistics():
    stats = Probe(UNEVEN).init(rng.root(0)).stats
    assert stats["losses"].shape == (T, HISTORY) and stats["counts"].shape == (T,)
    assert not np.any(stats["losses"]) and not np.any(stats["counts"])
    assert Probe().init(rng.root(0)).stats == {}


@pytest.mark.parametrize("known", [False, True], ids=["at first", "later"])
def test_a_step_s_losses_are_recorded_without_importance_weights(known):
    """The loss is the mean of what is recorded, each over T times the probability of its timestep."""
    stage, skewed = Probe(UNEVEN), np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])
    stats = full_history(skewed) if known else stage.init(rng.root(0)).stats
    loss, outputs = stage.loss(params(), stats, {}, rng.root(1), batch(9))
    counts = np.asarray(outputs.stats["counts"] - stats["counts"])
    written = [row[:count] for row, count in zip(np.asarray(outputs.stats["losses"]), counts, strict=True)]
    kept = [row[count:] for row, count in zip(np.asarray(outputs.stats["losses"]), counts, strict=True)]
    assert counts.sum() == 9 and counts.max() > 1
    assert all((row == was).all() for row, was in zip(kept, skewed if known else np.zeros(T), strict=True))
    shares = (1 - UNIFORM) * skewed / skewed.sum() + UNIFORM / T if known else np.full(T, 1 / T)
    expected = sum(row.sum() / (T * share) for row, share in zip(written, shares, strict=True)) / 9
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_timesteps_are_sampled_by_their_losses_and_the_mean_loss_stays():
    """Equation 1 of ``diffusion.timesteps``: shares follow the losses, and their weights take it out again."""
    skewed = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])
    stage, rows = Probe(UNEVEN), batch(COUNT)
    loss, outputs = jax.jit(stage.loss)(params(), full_history(skewed), {}, rng.root(0), rows)
    shares = (np.asarray(outputs.stats["counts"]) - HISTORY) / COUNT
    expected = (1 - UNIFORM) * skewed / skewed.sum() + UNIFORM / T
    np.testing.assert_allclose(shares, expected, atol=4 * (0.25 / COUNT) ** 0.5)
    uniform, _ = jax.jit(Probe(dataclasses.replace(UNEVEN, timesteps="uniform")).loss)(
        params(), {}, {}, rng.root(0), rows
    )
    np.testing.assert_allclose(loss, uniform, rtol=0.1)


@pytest.mark.sharding
def test_eight_devices_keep_the_history_of_one():
    """The share of each step, and which losses are its last, do not depend on where the examples lie."""
    stage, mesh, rows = Probe(UNEVEN), make_mesh(MeshConfig()), batch(64)
    step = jax.jit(stage.loss)
    loss, outputs = step(params(), full_history(np.arange(1.0, T + 1)), {}, rng.root(2), rows)
    spread, there = step(params(), full_history(np.arange(1.0, T + 1)), {}, rng.root(2), shard_batch(rows, mesh))
    np.testing.assert_array_equal(there.stats["counts"], outputs.stats["counts"])
    np.testing.assert_allclose(there.stats["losses"], outputs.stats["losses"], rtol=1e-5)
    np.testing.assert_allclose(spread, loss, rtol=1e-5)


class Rows:
    """A stream of the probe's batches, each of its own number."""

    def __init__(self):
        self.number = 0

    def __next__(self):
        self.number += 1
        return batch(16, self.number)

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]

    def close(self):
        pass


def job(root, total_steps):
    """Trains the probe, with a checkpoint every eight steps."""
    folder, stage = StageFolder(root, "probe"), Probe(UNEVEN)
    claim(folder, {"name": "probe"}, None)
    run = RunConfig(total_steps=total_steps, batch_size=16, log_every=8, checkpoint_every=8)
    return Job(run, stage, {}, make_optimizer(OptimConfig(lr=1e-2), 16), 0.9, Rows(), make_mesh(MeshConfig()), folder)


def test_a_resumed_run_remembers_its_losses(tmp_path):
    """Bit for bit, through a checkpoint made when every timestep was known; and sampling reads them back."""
    whole, half = train(job(tmp_path / "whole", 16)), train(job(tmp_path / "halves", 8))
    assert half.stats["counts"].min() >= HISTORY and half.stats["counts"].sum() == 8 * 16
    resumed = train(job(tmp_path / "halves", 16))
    assert whole.stats["counts"].sum() == 16 * 16
    assert np.abs(np.diff(whole.stats["counts"] - half.stats["counts"])).max() > 16  # no longer sampled alike
    jax.tree.map(np.testing.assert_array_equal, resumed.trees(), whole.trees())
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), whole)
    checkpoints = Checkpoints(StageFolder(tmp_path / "halves", "probe"))
    restored = checkpoints.restore({"ema": abstract.ema, "stats": abstract.stats}).trees
    jax.tree.map(np.testing.assert_array_equal, restored, {"ema": whole.ema, "stats": whole.stats})
