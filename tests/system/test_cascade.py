"""The cascade, of stages with random weights: an image depends on the intended inputs and on nothing else."""

import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import rng, testing
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.system import Cascade, LoadedStage, Request, Settings, programs
from dalle2_jax.training.sharding import batch_sharding

PROMPTS = ["a large red circle", "", "a small blue square above a star"]
REQUESTS = [Request(prompt, i, j) for i, prompt in enumerate(PROMPTS) for j in range(2)]


def random_variables(stage):
    """Returns variables with no layer silent, of shapes alone: nothing is compiled to make them."""
    noise = np.random.default_rng(0)

    def fill(path, leaf):
        values = noise.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "kernel":
            return values / np.float32(np.prod(leaf.shape[:-1])) ** 0.5
        return 1 + 0.1 * values if path[-1].key == "scale" else 0.1 * values

    variables = jax.tree_util.tree_map_with_path(fill, jax.eval_shape(stage.init, rng.root(0)))
    return jax.tree.map(jnp.asarray, variables)


def member(kind):
    """Returns a tiny stage as if it had been loaded."""
    stage = testing.tiny_stage(kind)
    contract = EmbeddingContract("c0ffee", testing.EMBED_DIM) if kind != "upsampler" else None
    return LoadedStage(stage, random_variables(stage), 10, contract, testing.WordTokenizer(), testing.CONTEXT_LENGTH)


@pytest.fixture(scope="module")
def members():
    kinds = {"clip": "clip_vit", "prior": "prior", "decoder": "decoder", "upsampler_1": "upsampler"}
    return {name: member(kind) for name, kind in kinds.items()}


def mesh_of(devices):
    return jax.make_mesh(
        (devices, 1, 1),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )


def generate(members, requests=REQUESTS, batch_size=4, seed=0, devices=1, candidates=None, **sampling):
    """Returns the images by (index, sample)."""
    settings = {name: one.stage.sampling for name, one in members.items() if name != "clip"}
    for name, fields in sampling.items():
        settings[name] = dataclasses.replace(settings[name], **fields)
    mesh = mesh_of(devices)
    on_mesh = {
        name: dataclasses.replace(one, variables=jax.device_put(one.variables, jax.sharding.NamedSharding(mesh, P())))
        for name, one in members.items()
    }
    cascade = Cascade(on_mesh, Settings(seed, settings, candidates), batch_sharding(mesh), mesh.size)
    return {(r.index, r.sample): image for r, image in cascade.text2image(requests, batch_size)}


P = jax.sharding.PartitionSpec


def assert_same(some, others):
    """One level of 255 apart at most: another batch size may sum in another order."""
    assert some.keys() == others.keys()
    for name, image in some.items():
        np.testing.assert_allclose(image.astype(int), others[name].astype(int), atol=1, err_msg=str(name))


def differ(one, other):
    return np.abs(one.astype(int) - other.astype(int)).max() > 8


@pytest.fixture(scope="module")
def images(members):
    return generate(members)


def test_images(images):
    """In the order asked for, of the upsampler's size, and no two alike."""
    assert list(images) == [(r.index, r.sample) for r in REQUESTS]
    assert all(one.shape == (16, 16, 3) and one.dtype == np.uint8 for one in images.values())
    names = list(images)
    assert all(differ(images[a], images[b]) for k, a in enumerate(names) for b in names[:k])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_changes_nothing(members, images, batch_size):
    """They were sampled by fours, the last batch of two filled up: what fills it is not returned."""
    assert_same(generate(members, batch_size=batch_size), images)


def test_same_seed_same_images(members, images):
    again = generate(members)
    assert all(np.array_equal(again[name], images[name]) for name in images)
    other = generate(members, seed=1)
    assert all(differ(other[name], images[name]) for name in images)


@pytest.mark.sharding
def test_device_count_changes_nothing(members, images):
    assert_same(generate(members, batch_size=2, devices=8), images)


def test_an_image_is_independent_of_its_batch(members, images):
    """Sample 1 of prompt 2 is the same without the others, and in another order."""
    alone = generate(members, [Request(PROMPTS[2], 2, 1)])
    assert_same(alone, {(2, 1): images[2, 1]})
    assert_same(generate(members, REQUESTS[::-1]), {name: images[name] for name in images})


def test_an_image_depends_on_its_index_and_prompt(members, images):
    """Another index, sample or caption is another image."""
    moved = generate(members, [Request(PROMPTS[0], 3, 0), Request(PROMPTS[0], 0, 2), Request(PROMPTS[2], 0, 0)])
    assert all(differ(one, images[0, 0]) for one in moved.values())


def test_settings_reach_their_stage(members, images):
    """Each stage's own guidance, steps, sampler and eta make other images."""
    for change in (
        {"prior": {"guidance": 6.0}},
        {"decoder": {"image_guidance": 6.0, "text_guidance": 1.0}},
        {"decoder": {"eta": 1.0}},
        {"decoder": {"name": "ddpm"}},
        {"upsampler_1": {"steps": 2}},
    ):
        changed = generate(members, REQUESTS[:1], batch_size=1, **change)
        assert differ(changed[0, 0], images[0, 0]), change


def test_without_upsampler(members):
    small = generate({name: one for name, one in members.items() if name != "upsampler_1"}, REQUESTS[:2])
    assert all(one.shape == (testing.LOW_SIZE, testing.LOW_SIZE, 3) for one in small.values())


FUNCTIONS = (programs.sample_embeddings, programs.sample_images, programs.request_keys)


def programs_made():
    """How often each was compiled."""
    return [function._cache_size() for function in FUNCTIONS]


def test_one_program_a_stage(members):
    """Short last batches, other seeds, eta, and guidance that needs the same branches compile nothing."""
    generate(members)
    before = programs_made()
    generate(members, REQUESTS[:5], seed=7, decoder={"eta": 0.7, "guidance": 3.5}, prior={"guidance": 1.5})
    generate(members, decoder={"image_guidance": 4.0, "text_guidance": 4.0}, upsampler_1={"eta": 0.2})
    assert programs_made() == before
    generate(members, decoder={"steps": 2})  # this must
    assert programs_made() == [before[0], before[1] + 1, *before[2:]]


def test_one_program_for_all_scales_apart(members):
    """Each part's scale reaches the network: swapping the two numbers gives another image."""
    one = generate(members, REQUESTS[:4], decoder={"image_guidance": 6.0, "text_guidance": 2.0})
    before = programs_made()
    other = generate(members, REQUESTS[:4], decoder={"image_guidance": 2.0, "text_guidance": 6.0})
    assert programs_made() == before
    assert differ(one[0, 0], other[0, 0])


# --- the prior's embeddings -----------------------------------------------------------------


def caption_batch(captions):
    tokens, mask = testing.WordTokenizer().encode(captions, testing.CONTEXT_LENGTH)
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}


def embeddings(members, captions, candidates, absent=None, guidance=2.0):
    """Returns what ``sample_embeddings`` returns for keys 0, 1, ..."""
    prior, size = members["prior"], len(captions)
    config = dataclasses.replace(prior.stage.sampling, guidance=guidance)
    drop = jnp.zeros(size, bool) if absent is None else jnp.asarray(absent)
    keys = rng.per_image(rng.root(3), jnp.arange(size, dtype=jnp.int32))
    plan = prior.stage.plan(config, absent={"text": drop})
    clip, batch = members["clip"].variables, caption_batch(captions)
    return programs.sample_embeddings(prior.stage, candidates, prior.variables, clip, keys, batch, plan)


def test_the_closer_candidate_is_kept(members):
    """Both candidates are sampled one by one; the one with the larger dot product with z_t is returned."""
    captions = [f"caption {i} of many" for i in range(12)]
    prior, clip = members["prior"], members["clip"]
    batch = caption_batch(captions)
    conditioning = clip.stage.encode_text(clip.variables, batch)
    condition = prior.stage.condition({**batch, **conditioning})
    keys = rng.per_image(rng.root(3), jnp.arange(len(captions), dtype=jnp.int32))
    split = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    samples = [prior.stage.sample(prior.variables, split[:, c], condition, prior.stage.plan()) for c in (0, 1)]
    length = [jnp.linalg.norm(one, axis=1, keepdims=True) for one in samples]
    both = jnp.stack([one / norm * prior.stage.clip.embedding.scale for one, norm in zip(samples, length, strict=True)])
    closeness = jnp.einsum("cbe,be->cb", both, conditioning["text_emb"])
    best = closeness.argmax(axis=0)
    assert {*best.tolist()} == {0, 1}  # or the test would not tell "the first" from "the closer"
    kept = embeddings(members, captions, candidates=2)
    np.testing.assert_allclose(kept, both[best, jnp.arange(len(captions))], rtol=1e-4, atol=1e-4)


def test_embeddings_are_in_the_contract_s_space(members):
    samples = embeddings(members, PROMPTS, candidates=1)
    scale = members["prior"].stage.clip.embedding.scale
    np.testing.assert_allclose(jnp.linalg.norm(samples, axis=1), scale, rtol=1e-5)


def test_empty_prompt_is_unconditional(members):
    """What is absent is not read: no caption and no guidance changes the embedding; without, both do."""
    absent = [True, True]
    samples = embeddings(members, ["one caption", "two"], 1, absent)
    np.testing.assert_allclose(samples, embeddings(members, ["another", ""], 1, absent), atol=1e-5)
    np.testing.assert_allclose(samples, embeddings(members, ["another", ""], 1, absent, guidance=9.0), atol=1e-4)
    conditioning = embeddings(members, ["one caption", "two"], 1)
    assert np.abs(conditioning - samples).max() > 0.01
    assert np.abs(conditioning - embeddings(members, ["another", ""], 1)).max() > 0.01


def test_empty_prompt_reaches_the_decoder(members):
    """For "" the decoder is conditioned on the image embedding only; for other captions on both."""
    decoder, clip = members["decoder"], members["clip"]
    keys = rng.per_image(rng.root(5), jnp.arange(2, dtype=jnp.int32))
    emb = jnp.ones((2, testing.EMBED_DIM))

    def samples(captions, absent):
        batch = {**caption_batch(captions), "image_emb": emb}
        plan = decoder.stage.plan(absent={"text": jnp.asarray(absent)})
        return programs.sample_images(decoder.stage, decoder.variables, clip.variables, keys, batch, plan)

    one, other = samples(["one caption", "x"], [True, False]), samples(["another", "x"], [True, False])
    np.testing.assert_allclose(one, other, atol=1e-5)
    kept = samples(["one caption", "x"], [False, False])
    assert np.abs(kept[0] - one[0]).max() > 0.01
    np.testing.assert_allclose(kept[1], one[1], atol=1e-5)


def test_spaces_are_an_empty_prompt(members):
    blank, empty = (generate(members, [Request(prompt, 0, 0)])[0, 0] for prompt in ("  ", ""))
    np.testing.assert_array_equal(blank, empty)


# --- callbacks and threads ------------------------------------------------------------------


def with_callback(members, callback):
    """Returns an image by (index, sample), generated with a callback."""
    settings = {name: one.stage.sampling for name, one in members.items() if name != "clip"}
    cascade = Cascade(members, Settings(0, settings), batch_sharding(mesh_of(1)), 1)
    return {(r.index, r.sample): image for r, image in cascade.text2image(REQUESTS[:2], 2, callback)}


def test_a_callback_gets_the_predicted_image_of_every_step(members):
    """The last prediction of each stage is its image; the images are those without a callback."""
    seen = []
    images = with_callback(members, lambda step, x_0: seen.append((step, x_0)))
    assert [(step, x_0.shape) for step, x_0 in seen] == [
        (step, (2, side, side, 3)) for side in (8, 16) for step in (1, 2, 3)
    ]
    assert_same(images, with_callback(members, None))
    np.testing.assert_allclose(seen[-1][1][1].astype(int), images[0, 1].astype(int), atol=1)
    before = programs_made()
    with_callback(members, lambda step, x_0: None)  # another callback compiles nothing
    assert programs_made() == before


def test_an_error_of_a_callback_is_raised(members):
    with pytest.raises(ZeroDivisionError):
        with_callback(members, lambda step, x_0: 1 // 0)


def test_threads_generate_the_images_of_one(members):
    """Two cascades at a time, with their own callbacks."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        steps = [], []
        jobs = [pool.submit(with_callback, members, lambda step, _, own=own: own.append(step)) for own in steps]
        one, other = (job.result() for job in jobs)
    assert steps == ([1, 2, 3, 1, 2, 3],) * 2
    for name, image in with_callback(members, None).items():
        np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_allclose(one[name].astype(int), image.astype(int), atol=1)
