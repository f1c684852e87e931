"""The imported Karlo-tiny equals diffusers: every network, every step, and complete runs from recorded noises.

The measured errors are printed at the end of the run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from karlo_recordings import (
    FOLDER,
    VARIATIONS,
    error,
    exact_rows,
    in_float32,
    karlo,
    max_and_mean_difference,
    recorded,
    run,
)

from dalle2_jax import rng
from dalle2_jax.models.clip import Clip
from dalle2_jax.stages.upsampler import Networks

PROMPTS = ["a photo of a red panda eating noodles", "an oil painting of a lighthouse at dawn, zebra!"]
GUIDED, PLAIN, VARIED = FOLDER / "parity.npz", FOLDER / "parity_noguidance.npz", VARIATIONS / "parity_iv.npz"

NETWORK, STEP = 1e-5, 1e-4
RUN, MEAN = 2e-3, 2e-5
"""Error bounds: of a network's output, relative to its maximum; of one step; of a complete run, maximum and mean."""


@pytest.fixture(scope="module")
def theirs():
    return recorded(GUIDED)


@pytest.fixture(scope="module")
def batch(theirs):
    """Returns the prompts, tokenised and encoded by the imported CLIP."""
    clip, prior = karlo()["clip"], karlo()["prior"]
    tokens, mask = clip.component.tokenizer.encode(PROMPTS, 77)
    return jax.jit(prior.stage.prepare_captions)(
        clip.variables, {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}
    )


# --- networks -------------------------------------------------------------------------------


def test_text_states_equal_the_recorded(theirs, batch, within):
    np.testing.assert_array_equal(batch["tokens"], theirs["text/input_ids"])
    np.testing.assert_array_equal(batch["mask"], theirs["text/attention_mask"] > 0)
    np.testing.assert_array_equal(batch["null_mask"], theirs["text/uncond_attention_mask"] > 0)
    for ours, name in (("text_emb", "text_embeds"), ("text_seq", "last_hidden_state")):
        within(f"text encoder, {name}", error(batch[ours], theirs[f"text/{name}"]), NETWORK)
        within(f"text encoder, {name} of nothing", error(batch[f"null_{ours}"], theirs[f"text/uncond_{name}"]), NETWORK)


def test_image_embeddings_equal_the_recorded(within):
    stage, variables, component = karlo()["clip"]
    varied = recorded(VARIED)
    config = component.config["model"]
    mean, std = (np.asarray(config[f"image_{name}"]).reshape(1, 1, 1, 3) for name in ("mean", "std"))
    image = jnp.asarray(2 * (np.asarray(varied["pixel_values"], np.float64) * std + mean) - 1, jnp.float32)
    embedded = stage.network.apply({"params": variables.params}, image, method=Clip.encode_image)
    within("image encoder", error(embedded, varied["image_embeds"]), NETWORK)


def conditioned(loaded, theirs, batch):
    """Returns a stage's network, unconditional in the first half of the batch, with the prompts in the second."""
    stage, variables, _ = loaded
    embedded = {**batch, "image_emb": theirs["prior/image_embeds"]}
    condition = jax.tree.map(lambda value: jnp.concatenate([value, value]), stage.condition(embedded))
    absent = dict.fromkeys(stage.drop_rates, jnp.array([True, True, False, False]))
    return jax.jit(lambda x, t: stage.bind(variables.params, condition, absent, None)(x, t))


def test_the_prior_equals_the_recorded(theirs, batch, within):
    out = conditioned(karlo()["prior"], theirs, batch)(theirs["prior_fwd/x"], theirs["prior_fwd/t"])
    within("prior", error(out, theirs["prior_fwd/out"]), NETWORK)


def test_the_decoder_equals_the_recorded(theirs, batch, within):
    out = conditioned(karlo()["decoder"], theirs, batch)(theirs["decoder_fwd/x"], theirs["decoder_fwd/t"])
    within("decoder", error(out, theirs["decoder_fwd/out"]), NETWORK)


def test_both_upsamplers_equal_the_recorded(theirs, within):
    stage, variables, _ = karlo()["upsampler_1"]
    apply = jax.jit(stage.network.apply)
    for name, params in (("first", variables.params), ("last", variables.stats["last"])):
        out = apply({"params": params}, theirs["sr_fwd/x"], theirs["sr_fwd/t"])
        within(f"super-resolution, {name}", error(out, theirs[f"sr_fwd/out_{name}"]), NETWORK)


def test_resized_low_resolution_images_equal_the_recorded(theirs, within):
    stage = karlo()["upsampler_1"].stage
    enlarged = stage.low_res_condition(theirs["sr/image_small"])["low_res"]
    within("bicubic enlargement", error(enlarged, theirs["sr/image_upscaled"]), NETWORK)


# --- steps and runs -------------------------------------------------------------------------


def embeddings(x):
    """Returns embeddings from the prior's whitened space."""
    stats = karlo()["prior"].variables.stats
    return stats["mean"][None] + stats["std"][None] * x


def noises(theirs, stage):
    """Returns the recorded noise of a stage."""
    return theirs[f"{stage}/init_noise"], theirs[f"{stage}/step_noise"]


def run_cascade(conditioning, theirs, counts, guidance, image_emb=None):
    """Runs the cascade; returns the last x of the prior, the decoder and the upsampler."""
    prior, decoder, upsampler = (karlo()[name] for name in ("prior", "decoder", "upsampler_1"))
    ends = {}
    if image_emb is None:
        condition = prior.stage.condition(conditioning)
        ends["prior"] = run("prior", guidance[0]).free_running(condition, counts[0], *noises(theirs, "prior"))
        image_emb = embeddings(ends["prior"])
    condition = decoder.stage.condition({**conditioning, "image_emb": image_emb})
    ends["decoder"] = run("decoder", guidance[1]).free_running(condition, counts[1], *noises(theirs, "decoder"))
    condition = upsampler.stage.low_res_condition(jnp.clip(ends["decoder"], -1, 1))
    ends["sr"] = run("upsampler_1", 1.0).free_running(condition, counts[2], *noises(theirs, "sr"))
    return ends


def assert_run_within(within, name, ends, theirs, images):
    """Asserts the bounds of a complete run."""
    for stage, x in ends.items():
        if f"{stage}/latents" in theirs:
            maximum, mean = max_and_mean_difference(x, theirs[f"{stage}/latents"][-1])
            within(f"{name}, {stage}", maximum, RUN)
            within(f"{name}, {stage}, on average", mean, MEAN)
    maximum, mean = max_and_mean_difference(jnp.clip(ends["sr"] * 0.5 + 0.5, 0, 1), images)
    within(f"{name}, images", maximum, RUN)
    within(f"{name}, images, on average", mean, MEAN)


def test_the_guided_run_equals_the_recorded(theirs, batch, within):
    ends = run_cascade(batch, theirs, (25, 25, 7), (4.0, 8.0))
    maximum, _ = max_and_mean_difference(embeddings(ends["prior"]), theirs["prior/image_embeds"])
    within("guided run, image embeddings", maximum, RUN)
    assert_run_within(within, "guided run", ends, theirs, theirs["pipeline/images_nhwc01"])


def test_the_unguided_run_equals_the_recorded(batch, within):
    plain = recorded(PLAIN)
    assert_run_within(
        within, "unguided run", run_cascade(batch, plain, (5, 5, 3), (1.0, 1.0)), plain, plain["pipeline/images_nhwc01"]
    )


def test_image_variations_equal_the_recorded(batch, within):
    varied = recorded(VARIED)
    unconditional = {name: batch[f"null_{name}"][:1] for name in ("text_emb", "text_seq", "mask")}
    unconditional |= {name: batch[name][:1] for name in ("null_text_emb", "null_text_seq", "null_mask")}
    ends = run_cascade(unconditional, varied, (0, 10, 7), (0.0, 8.0), varied["image_embeds"])
    assert_run_within(within, "variations", ends, varied, varied["images_nhwc01"])


STAGES = {"prior": ("prior", 4.0, 25), "decoder": ("decoder", 8.0, 25), "sr": ("upsampler_1", 1.0, 7)}
"""Name of a stage in the recordings: name in the system, guidance and steps."""


def condition_of(name, theirs, batch):
    """Returns the recorded condition of a stage."""
    stage = karlo()[name].stage
    if name == "upsampler_1":
        return stage.low_res_condition(theirs["sr/image_small"])
    return stage.condition({**batch, "image_emb": theirs["prior/image_embeds"]})


@pytest.mark.parametrize("stage", STAGES)
def test_each_step_from_the_recorded_state(theirs, batch, stage, within):
    name, guidance, steps = STAGES[stage]
    latents, condition = theirs[f"{stage}/latents"], condition_of(name, theirs, batch)
    ours = run(name, guidance).teacher_forced(condition, steps, *noises(theirs, stage), latents)
    within(f"{steps} steps of {stage}, max difference", max_and_mean_difference(ours, latents)[0], STEP)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_with_float32_tables_and_given_noise_equals_the_recorded(theirs, batch, stage, within):
    """The sampling loop itself: ``diffusion.table_dtype`` "float32", x_T and the noises of all steps given."""
    name, guidance, steps = STAGES[stage]
    stage_in_float32, condition = in_float32(karlo()[name].stage), condition_of(name, theirs, batch)
    config = dataclasses.replace(stage_in_float32.sampling, guidance=guidance, steps=steps)
    x_T, fresh = noises(theirs, stage)
    keys = rng.per_image(rng.root(0), jnp.arange(2, dtype=jnp.int32))

    def sample(variables, x_T, fresh):
        params, stats = variables
        params = Networks(params, stats["last"]) if name == "upsampler_1" else params
        return stage_in_float32.sample_x_0(params, keys, condition, stage_in_float32.plan(config, x_T=x_T, noise=fresh))

    samples = jax.jit(sample, compiler_options={"xla_backend_optimization_level": 0})(
        karlo()[name].variables, x_T, fresh
    )
    maximum, mean = max_and_mean_difference(samples, theirs[f"{stage}/latents"][-1])
    within(f"{stage} with float32 tables", maximum, RUN)
    within(f"{stage} with float32 tables, on average", mean, MEAN)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_exact_coefficients_differ_at_the_last_step(theirs, batch, stage, within):
    """Coefficients in float64 and float32 differ at t = 0, where the float32 weight of x_0 is 0.99947: 5e-4 of x_0.

    Earlier steps agree to 2e-4. Complete runs from the same noises agree to 5e-3 for prior and decoder. The
    upsampler is excluded: it amplifies a difference of 2e-3 at t = 999 by 2e4, so single pixels differ.
    """
    name, guidance, steps = STAGES[stage]
    latents, condition = theirs[f"{stage}/latents"], condition_of(name, theirs, batch)
    ours = run(name, guidance).teacher_forced(condition, steps, *noises(theirs, stage), latents, exact_rows)
    differences = jnp.abs(ours - latents).reshape(steps, -1).max(axis=1)
    bound = karlo()[name].stage.sampling.clip_sample  # bound of x_0
    within(f"exact coefficients, {stage}, t > 0", float(differences[:-1].max()), 2e-4 * bound)
    within(f"exact coefficients, {stage}, t = 0", float(differences[-1]), 6e-4 * bound)
    free = run(name, guidance).free_running(condition, steps, *noises(theirs, stage), exact_rows)
    within(f"exact coefficients, {stage}, complete run", max_and_mean_difference(free, latents[-1])[0], 5e-3)


def test_the_steps_of_this_file_equal_those_of_the_sampling_loop(theirs):
    """The steps of `Run`, with exact coefficients and noises from the keys, equal those of the sampling loop."""
    stage, variables, _ = karlo()["upsampler_1"]
    condition, steps = stage.low_res_condition(theirs["sr/image_small"]), "t:0,250,500"
    keys = rng.per_image(rng.root(0), jnp.arange(2, dtype=jnp.int32))
    shape = stage.sample_shape(condition)
    x_T = rng.normal(jax.vmap(lambda key: rng.stream(key, "x_T"))(keys), shape)
    own = jax.vmap(lambda key: rng.stream(key, "noise"))(keys)
    fed = [rng.normal(jax.vmap(lambda key, step=step: rng.at_step(key, step))(own), shape) for step in (2, 1)]
    config = dataclasses.replace(stage.sampling, steps=steps)
    samples = jax.jit(lambda: stage.sample(variables, keys, condition, stage.plan(config)))()
    expected = run("upsampler_1", 1.0).free_running(condition, steps, x_T, fed, exact_rows)
    np.testing.assert_allclose(samples, expected, atol=1e-4)
