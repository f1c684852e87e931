"""Karlo-tiny, imported, draws what diffusers drew: every network, every step, and whole runs from recorded noises.

The measured errors are printed at the end of the run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from karlo_recordings import FOLDER, VARIATIONS, apart, error, exact_rows, karlo, recorded, run

from dalle2_jax import rng
from dalle2_jax.models.clip import Clip

PROMPTS = ["a photo of a red panda eating noodles", "an oil painting of a lighthouse at dawn, zebra!"]
GUIDED, PLAIN, VARIED = FOLDER / "parity.npz", FOLDER / "parity_noguidance.npz", VARIATIONS / "parity_iv.npz"

NETWORK, STEP = 1e-5, 1e-4
WHOLE, MEAN = 2e-3, 2e-5
"""The bounds: of a network's output, relative to its largest; of one step; of a whole run, at most and on average."""


@pytest.fixture(scope="module")
def theirs():
    return recorded(GUIDED)


@pytest.fixture(scope="module")
def batch(theirs):
    """The prompts, tokenised and read by what was imported."""
    clip, prior = karlo()["clip"], karlo()["prior"]
    tokens, mask = clip.component.tokenizer.encode(PROMPTS, 77)
    return jax.jit(prior.stage.read)(clip.variables, {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)})


# --- networks -------------------------------------------------------------------------------


def test_captions_are_read_as_theirs(theirs, batch, within):
    np.testing.assert_array_equal(batch["tokens"], theirs["text/input_ids"])
    np.testing.assert_array_equal(batch["mask"], theirs["text/attention_mask"] > 0)
    np.testing.assert_array_equal(batch["null_mask"], theirs["text/uncond_attention_mask"] > 0)
    for ours, name in (("text_emb", "text_embeds"), ("text_seq", "last_hidden_state")):
        within(f"text encoder, {name}", error(batch[ours], theirs[f"text/{name}"]), NETWORK)
        within(f"text encoder, {name} of nothing", error(batch[f"null_{ours}"], theirs[f"text/uncond_{name}"]), NETWORK)


def test_pictures_are_read_as_theirs(within):
    stage, variables, component = karlo()["clip"]
    varied = recorded(VARIED)
    config = component.config["model"]
    mean, std = (np.asarray(config[f"image_{name}"]).reshape(1, 1, 1, 3) for name in ("mean", "std"))
    picture = jnp.asarray(2 * (np.asarray(varied["pixel_values"], np.float64) * std + mean) - 1, jnp.float32)
    embedded = stage.network.apply({"params": variables.params}, picture, method=Clip.encode_image)
    within("image encoder", error(embedded, varied["image_embeds"]), NETWORK)


def told(member, theirs, batch):
    """The stage's network told nothing in the first half of the batch, and the prompts in the second."""
    stage, variables, _ = member
    embedded = {**batch, "image_emb": theirs["prior/image_embeds"]}
    condition = jax.tree.map(lambda value: jnp.concatenate([value, value]), stage.condition(embedded))
    absent = dict.fromkeys(stage.drop_rates, jnp.array([True, True, False, False]))
    return jax.jit(lambda x, t: stage.bind(variables.params, condition, absent, None)(x, t))


def test_the_prior_says_what_theirs_says(theirs, batch, within):
    out = told(karlo()["prior"], theirs, batch)(theirs["prior_fwd/x"], theirs["prior_fwd/t"])
    within("prior", error(out, theirs["prior_fwd/out"]), NETWORK)


def test_the_decoder_says_what_theirs_says(theirs, batch, within):
    out = told(karlo()["decoder"], theirs, batch)(theirs["decoder_fwd/x"], theirs["decoder_fwd/t"])
    within("decoder", error(out, theirs["decoder_fwd/out"]), NETWORK)


def test_both_upsamplers_say_what_theirs_say(theirs, within):
    stage, variables, _ = karlo()["upsampler_1"]
    apply = jax.jit(stage.network.apply)
    for name, params in (("first", variables.params), ("last", variables.stats["last"])):
        out = apply({"params": params}, theirs["sr_fwd/x"], theirs["sr_fwd/t"])
        within(f"super-resolution, {name}", error(out, theirs[f"sr_fwd/out_{name}"]), NETWORK)


def test_small_pictures_are_enlarged_as_theirs(theirs, within):
    stage = karlo()["upsampler_1"].stage
    enlarged = stage.condition(theirs["sr/image_small"])["low_res"]
    within("bicubic enlargement", error(enlarged, theirs["sr/image_upscaled"]), NETWORK)


# --- steps and runs -------------------------------------------------------------------------


def embeddings(x):
    """Out of the prior's whitened space."""
    stats = karlo()["prior"].variables.stats
    return stats["mean"][None] + stats["std"][None] * x


def noises(theirs, stage):
    """What was drawn for a stage."""
    return theirs[f"{stage}/init_noise"], theirs[f"{stage}/step_noise"]


def draw(told, theirs, counts, guidance, image_emb=None):
    """Runs the cascade; returns the last x of the prior, the decoder and the upsampler."""
    prior, decoder, upsampler = (karlo()[name] for name in ("prior", "decoder", "upsampler_1"))
    ends = {}
    if image_emb is None:
        condition = prior.stage.condition(told)
        ends["prior"] = run("prior", guidance[0]).whole(condition, counts[0], *noises(theirs, "prior"))
        image_emb = embeddings(ends["prior"])
    condition = decoder.stage.condition({**told, "image_emb": image_emb})
    ends["decoder"] = run("decoder", guidance[1]).whole(condition, counts[1], *noises(theirs, "decoder"))
    condition = upsampler.stage.condition(jnp.clip(ends["decoder"], -1, 1))
    ends["sr"] = run("upsampler_1", 1.0).whole(condition, counts[2], *noises(theirs, "sr"))
    return ends


def hold(within, name, ends, theirs, pictures):
    """Holds a whole run to its bounds."""
    for stage, x in ends.items():
        if f"{stage}/latents" in theirs:
            most, mean = apart(x, theirs[f"{stage}/latents"][-1])
            within(f"{name}, {stage}", most, WHOLE)
            within(f"{name}, {stage}, on average", mean, MEAN)
    most, mean = apart(jnp.clip(ends["sr"] * 0.5 + 0.5, 0, 1), pictures)
    within(f"{name}, pictures", most, WHOLE)
    within(f"{name}, pictures, on average", mean, MEAN)


def test_the_guided_run_is_theirs(theirs, batch, within):
    ends = draw(batch, theirs, (25, 25, 7), (4.0, 8.0))
    most, _ = apart(embeddings(ends["prior"]), theirs["prior/image_embeds"])
    within("guided run, image embeddings", most, WHOLE)
    hold(within, "guided run", ends, theirs, theirs["pipeline/images_nhwc01"])


def test_the_unguided_run_is_theirs(batch, within):
    plain = recorded(PLAIN)
    hold(within, "unguided run", draw(batch, plain, (5, 5, 3), (1.0, 1.0)), plain, plain["pipeline/images_nhwc01"])


def test_variations_of_a_picture_are_theirs(batch, within):
    varied = recorded(VARIED)
    nothing = {name: batch[f"null_{name}"][:1] for name in ("text_emb", "text_seq", "mask")}
    nothing |= {name: batch[name][:1] for name in ("null_text_emb", "null_text_seq", "null_mask")}
    ends = draw(nothing, varied, (0, 10, 7), (0.0, 8.0), varied["image_embeds"])
    hold(within, "variations", ends, varied, varied["images_nhwc01"])


STAGES = {"prior": ("prior", 4.0, 25), "decoder": ("decoder", 8.0, 25), "sr": ("upsampler_1", 1.0, 7)}
"""A stage's name there: its name here, its guidance and its steps."""


def condition_of(name, theirs, batch):
    """What a stage is told, all of it as recorded."""
    stage = karlo()[name].stage
    if name == "upsampler_1":
        return stage.condition(theirs["sr/image_small"])
    return stage.condition({**batch, "image_emb": theirs["prior/image_embeds"]})


@pytest.mark.parametrize("stage", STAGES)
def test_each_step_from_where_theirs_was(theirs, batch, stage, within):
    name, guidance, steps = STAGES[stage]
    latents, condition = theirs[f"{stage}/latents"], condition_of(name, theirs, batch)
    ours = run(name, guidance).forced(condition, steps, *noises(theirs, stage), latents)
    within(f"{steps} steps of {stage}, apart", apart(ours, latents)[0], STEP)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_exact_coefficients_differ_from_theirs_at_the_last_step(theirs, batch, stage, within):
    """Ours are computed in float64, theirs in float32: at t = 0 their weight of x_0 is 0.99947, so 5e-4 of x_0 apart.

    Before that, steps agree to 2e-4. A run from the same noises ends within 5e-3, up to the decoder; what the
    upsampler makes of 2e-3 at t = 999, where x_0 is 2e4 times as far from x_t, is another pixel here and there.
    """
    name, guidance, steps = STAGES[stage]
    latents, condition = theirs[f"{stage}/latents"], condition_of(name, theirs, batch)
    ours = run(name, guidance).forced(condition, steps, *noises(theirs, stage), latents, exact_rows)
    differences = jnp.abs(ours - latents).reshape(steps, -1).max(axis=1)
    bound = karlo()[name].stage.sampling.clip  # of x_0
    within(f"exact coefficients, {stage}, t > 0", float(differences[:-1].max()), 2e-4 * bound)
    within(f"exact coefficients, {stage}, t = 0", float(differences[-1]), 6e-4 * bound)
    whole = run(name, guidance).whole(condition, steps, *noises(theirs, stage), exact_rows)
    within(f"exact coefficients, {stage}, whole run", apart(whole, latents[-1])[0], 5e-3)


def test_a_stage_draws_by_these_steps(theirs):
    """The steps above, with the exact coefficients and a key's own noises, are those of the sampling loop."""
    stage, variables, _ = karlo()["upsampler_1"]
    condition, steps = stage.condition(theirs["sr/image_small"]), "t:0,250,500"
    keys = rng.per_image(rng.root(0), jnp.arange(2, dtype=jnp.int32))
    shape = stage.sample_shape(condition)
    x_T = rng.normal(jax.vmap(lambda key: rng.stream(key, "x_T"))(keys), shape)
    own = jax.vmap(lambda key: rng.stream(key, "noise"))(keys)
    fed = [rng.normal(jax.vmap(lambda key, turn=turn: rng.at_step(key, turn))(own), shape) for turn in (2, 1)]
    config = dataclasses.replace(stage.sampling, steps=steps)
    drawn = jax.jit(lambda: stage.draw(variables, keys, condition, config, {}))()
    expected = run("upsampler_1", 1.0).whole(condition, steps, x_T, fed, exact_rows)
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
