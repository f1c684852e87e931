"""The one diffusion stage, by theory, on the prior and the decoder: conditions, drops, guidance, samples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import probe
import pytest

from dalle2_jax import rng, testing
from dalle2_jax.stages import DecoderStage, DiffusionConfig, PriorStage

SIZE = 4


def variant(kind, **fields):
    """A tiny stage with other fields of its network (of its U-Net where it has one inside)."""
    stage = testing.tiny_stage(kind)
    return dataclasses.replace(stage, model=dataclasses.replace(stage.model, **fields))


CLIP_PRIOR = variant("prior", text_input="clip", vocab_size=None, text_width=testing.WIDTH)
CLIP_DECODER = variant("decoder", text_input="clip", text=None, text_width=testing.WIDTH, text_emb_proj=True)
WITH_CLIP = {
    "prior": testing.tiny_stage("prior"),
    "prior of clip's text": CLIP_PRIOR,
    "decoder": testing.tiny_stage("decoder"),
    "decoder of clip's text": CLIP_DECODER,
}


def embeddings(seed=0, size=SIZE):
    generate = np.random.default_rng(seed)
    emb = 0.54 * generate.standard_normal((2, size, testing.EMBED_DIM), np.float32)
    seq = generate.standard_normal((size, testing.CONTEXT_LENGTH, testing.WIDTH), np.float32)
    return {"image_emb": emb[0], "text_emb": emb[1], "text_seq": seq}


# --- prepare ----------------------------------------------------------------------------------


def added(stage, frozen, batch):
    """The shapes that ``prepare`` adds, after checking that it leaves the rest alone."""

    def run(frozen, batch):
        before = dict(batch)
        prepared = stage.prepare(frozen, batch)
        assert batch == before and all(prepared[name] is value for name, value in batch.items())
        return {name: value for name, value in prepared.items() if name not in batch}

    return {name: value.shape for name, value in jax.eval_shape(run, frozen, batch).items()}


@pytest.mark.parametrize("stage", WITH_CLIP.values(), ids=WITH_CLIP)
def test_prepare_adds_what_is_missing_and_overwrites_nothing(stage):
    batch, frozen, ready = testing.tiny_batch(SIZE), testing.tiny_frozen(stage), embeddings()
    emb, seq = (SIZE, testing.EMBED_DIM), (SIZE, testing.CONTEXT_LENGTH, testing.WIDTH)
    reads = {} if stage == WITH_CLIP["decoder"] else {"text_emb": emb, "text_seq": seq}
    assert added(stage, frozen, batch) == {"image_emb": emb, **reads}
    assert added(stage, frozen, batch | {"image_emb": ready["image_emb"]}) == reads
    for name in reads:  # one of the two may be precomputed
        now = added(stage, frozen, batch | {name: ready[name]})
        assert name not in now and now["image_emb"] == emb
        stage.condition(batch | {name: ready[name]} | now)  # nothing that it needs is missing
    assert added(stage, {}, batch | ready) == {}  # then no CLIP is needed


@pytest.mark.parametrize("kind", ["prior", "decoder"])
def test_precomputed_embeddings_are_what_is_learned(kind):
    stage, ready = testing.tiny_stage(kind), embeddings()
    batch = stage.prepare(testing.tiny_frozen(stage), testing.tiny_batch(SIZE) | ready)
    x_0, condition = stage.example({}, rng.root(0), batch)
    np.testing.assert_array_equal(x_0 if kind == "prior" else condition["image_emb"], ready["image_emb"])


# --- drops ------------------------------------------------------------------------------------


def test_conditions_are_dropped_at_their_rates_independently():
    stage, count = probe.Probe(DiffusionConfig("eps", num_steps=10)), 20_000
    loss, outputs = stage.loss(probe.params(0.0, 0.0), {}, {}, rng.root(0), probe.batch(count))
    (drops,) = stage.seen
    assert drops["training"]
    for name, rate in stage.drop_rates.items():
        assert drops[name].shape == (count,) and drops[name].dtype == bool
        assert abs(float(drops[name].mean()) - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    together = np.corrcoef(np.asarray(drops["image"], float), np.asarray(drops["text"], float))[0, 1]
    assert abs(together) < 4 / count**0.5
    assert abs(float(loss) - 1) < 0.05  # a prediction of no noise at all misses by its variance
    assert outputs.stats == {}
    stage.loss(probe.params(), {}, {}, rng.root(1), probe.batch(count))
    assert not np.array_equal(stage.seen[1]["text"], drops["text"])


def test_the_papers_drop_rates():
    assert PriorStage.drop_text == 0.1 and (DecoderStage.drop_image, DecoderStage.drop_text) == (0.1, 0.5)
    assert testing.tiny_stage("prior").drop_rates == {"text": 0.1}
    assert testing.tiny_stage("decoder").drop_rates == {"image": 0.1, "text": 0.5}
    assert variant("decoder", text_input=None, text=None).drop_rates == {"image": 0.1}
    assert testing.tiny_stage("upsampler").drop_rates == {}


# --- samples ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["prior", "decoder"])
def stage(request):
    return testing.tiny_stage(request.param)


TRACES = []


@functools.cache
def sampler(stage, config):
    """``stage.sample`` compiled; each trace adds to TRACES."""

    @jax.jit
    def run(params, keys, condition, scales, eta, absent):
        TRACES.append(stage)
        plan = stage.plan(config, absent=absent, eta=eta if config.name == "ddim" else None)
        return stage.sample_x_0(params, keys, condition, dataclasses.replace(plan, scales=scales))

    return run


def generate(stage, rows=slice(None), seed=0, guidance=3.0, eta=0.5, absent=(), condition_seed=0, config=None):
    """Samples some of four images, with eta > 0 where the sampler has one; ``guidance`` is a scale, or one a part."""
    batch = testing.tiny_batch(SIZE, condition_seed) | embeddings(condition_seed)
    condition = {name: value[rows] for name, value in stage.condition(batch).items()}
    config = dataclasses.replace(stage.sampling, **(config or {}))
    keys = rng.per_image(rng.root(seed), jnp.arange(SIZE, dtype=jnp.int32))[rows]
    absent = {name: jnp.full(keys.shape, name in absent) for name in stage.drop_rates}
    scales = dict(zip(("image", "text"), np.broadcast_to(np.float32(guidance), 2), strict=True))
    arguments = testing.tiny_variables(stage).params, keys, condition, scales, jnp.float32(eta), absent
    return np.asarray(sampler(stage, config)(*arguments))


def close(left, right):
    np.testing.assert_allclose(left, right, atol=1e-5)


def differ(left, right):
    """Every image differs."""
    assert (abs(left - right).reshape(len(left), -1).max(axis=1) > 1e-3).all()


def test_samples_have_their_shape_and_range(stage):
    images = generate(stage)
    side = testing.LOW_SIZE
    assert images.shape == ((SIZE, testing.EMBED_DIM) if stage.name == "prior" else (SIZE, side, side, 3))
    assert images.dtype == np.float32 and np.isfinite(images).all()
    assert stage.sampling.clip_sample is None or abs(images).max() <= 1


def test_an_image_is_the_same_in_any_batch(stage):
    whole = generate(stage)
    close(generate(stage, slice(0, 2)), whole[:2])
    close(generate(stage, slice(2, 4)), whole[2:])


def test_other_numbers_change_the_image_and_compile_nothing(stage):
    first = generate(stage)
    traced = len(TRACES)
    differ(generate(stage, seed=1), first)
    differ(generate(stage, guidance=1.5), first)
    differ(generate(stage, condition_seed=1), first)
    if stage.sampling.name == "ddim":
        differ(generate(stage, eta=0.1), first)
    generate(stage, absent=("text",))
    assert len(TRACES) == traced
    close(generate(stage), first)


def test_guidance_of_one_is_no_guidance(stage):
    close(generate(stage, guidance=1.0), generate(stage, config={"guidance": 1.0}))


def test_guidance_of_zero_is_unconditional(stage):
    nothing = tuple(stage.drop_rates)
    unconditional = generate(stage, absent=nothing)
    close(generate(stage, absent=nothing, condition_seed=1, guidance=-2.0), unconditional)
    close(generate(stage, guidance=0.0), unconditional)
    differ(generate(stage), unconditional)


def test_one_part_of_the_condition_may_be_absent():
    stage = testing.tiny_stage("decoder")
    differ(
        generate(stage, absent=("text",)), generate(stage, absent=("text",), condition_seed=1)
    )  # the image embedding's
    differ(generate(stage, absent=("text",)), generate(stage, absent=("image", "text")))
    differ(generate(stage, absent=("image",)), generate(stage, absent=("image", "text")))


def test_the_decoder_s_image_and_caption_have_each_a_scale():
    """One step from a middle level: what is sampled is affine in what the network says."""
    stage, one_step = testing.tiny_stage("decoder"), {"steps": "t:60", "clip_sample": None}
    plain = {**one_step, "guidance": 1.0}
    alone = [generate(stage, absent=absent, config=plain) for absent in (("image", "text"), ("text",), ())]
    apart = {**one_step, "image_guidance": 2.0, "text_guidance": 5.0}  # a pattern with all three branches
    for image, text in ((3.0, 1.5), (1.5, 4.0)):
        expected = alone[0] + image * (alone[1] - alone[0]) + text * (alone[2] - alone[1])
        np.testing.assert_allclose(
            generate(stage, guidance=(image, text), config=apart), expected, rtol=1e-3, atol=1e-4
        )
    assert all((abs(alone[a] - alone[b]) > 0.01).any() for a, b in ((0, 1), (1, 2)))


# --- precision --------------------------------------------------------------------------------


def in_bfloat16(stage):
    model = stage.model
    if stage.name == "decoder":
        return dataclasses.replace(
            stage, model=dataclasses.replace(model, unet=dataclasses.replace(model.unet, dtype="bfloat16", remat=True))
        )
    return dataclasses.replace(stage, model=dataclasses.replace(model, dtype="bfloat16", remat=True))


@pytest.mark.parametrize("kind", testing.KINDS)
def test_bfloat16_is_inside_alone(kind):
    stage = in_bfloat16(testing.tiny_stage(kind))

    def run(key, variables, batch):
        batch = stage.prepare(testing.tiny_frozen(stage), batch)
        return jax.value_and_grad(stage.loss, has_aux=True)(*variables, {}, key, batch)

    variables = jax.eval_shape(stage.init, jax.random.key(0))
    (loss, outputs), grads = jax.eval_shape(run, jax.random.key(0), variables, testing.tiny_batch(SIZE))
    for leaf in jax.tree.leaves((loss, outputs, grads, variables)):
        assert leaf.dtype == jnp.float32
    assert jax.tree.structure(grads) == jax.tree.structure(variables.params)
