"""Images that begin with a given one: around its known pixels, from its embedding, from its own noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cascade import assert_same, batch_sharding, differ, member, mesh_of

from dalle2_jax.diffusion import Inpainting
from dalle2_jax.system import Cascade, Request, Settings

PROMPT = "a large red circle"
REQUESTS = [Request(PROMPT, 0, j) for j in range(3)]


@pytest.fixture(scope="module")
def members():
    kinds = {"clip": "clip_vit", "prior": "prior", "decoder": "decoder", "upsampler_1": "upsampler"}
    return {name: member(kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def image():
    """A soft image uint8[16, 16, 3], and at the decoder's 8x8."""
    ramp = np.linspace(60, 200, 16)
    large = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], np.full((16, 16), 90.0)], axis=-1)
    return large.astype(np.uint8), large.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3)).astype(np.uint8)


def cascade_of(members, **sampling):
    settings = {name: one.stage.sampling for name, one in members.items() if name != "clip"}
    for name, fields in sampling.items():
        settings[name] = dataclasses.replace(settings[name], **fields)
    mesh = mesh_of(1)
    return Cascade(members, Settings(0, settings), batch_sharding(mesh), mesh.size)


def collected(samples):
    return {(r.index, r.sample): one for r, one in samples}


def variations(cascade, requests, batch_size, given, inverted, skip_last=True):
    """From the embeddings of given images, and from their own noise if ``inverted``."""
    emb = np.asarray(cascade.embed_images(given["clip"]))
    x_T = cascade.invert(given["decoder"], emb, "", batch_size, skip_last) if inverted else None
    return collected(cascade.decode(requests, batch_size, emb, x_T))


def known_of(image, where=lambda side: side // 2):
    """The left half is known, at both sizes."""
    sizes = {"upsampler_1": image[0], "decoder": image[1]}
    masks = {name: np.arange(len(one))[None, None, :, None] < where(len(one)) for name, one in sizes.items()}
    floats = {name: jnp.asarray(one[None] / 127.5 - 1, jnp.float32) for name, one in sizes.items()}
    return {name: Inpainting(floats[name], np.tile(masks[name], (1, len(one), 1, 1))) for name, one in sizes.items()}


def test_known_pixels_stay_and_the_others_are_sampled(members, image):
    samples = collected(cascade_of(members).inpaint(REQUESTS, 1, known_of(image)))
    assert list(samples) == [(0, j) for j in range(3)]
    for one in samples.values():
        assert np.abs(one[:, :8].astype(int) - image[0][:, :8]).max() <= 1
        assert differ(one[:, 8:], image[0][:, 8:])
    assert differ(samples[0, 0][:, 8:], samples[0, 1][:, 8:])


def test_what_is_known_reaches_the_decoder(members, image):
    """Another left half of the small image alone makes another right half of the large one."""
    cascade, known = cascade_of(members), known_of(image)
    other = {**known, "decoder": known["decoder"]._replace(image=-known["decoder"].image)}
    one, another = (collected(cascade.inpaint(REQUESTS[:1], 1, given))[0, 0] for given in (known, other))
    assert differ(one[:, 8:], another[:, 8:])


def test_resampling_and_the_batch_size(members, image):
    """Jumps change the images; the batch size does not."""
    cascade, known = cascade_of(members), known_of(image)
    plain = collected(cascade.inpaint(REQUESTS, 1, known))
    jumping = collected(cascade.inpaint(REQUESTS, 1, known, (1, 2)))
    assert differ(plain[0, 0][:, 8:], jumping[0, 0][:, 8:])
    assert_same(collected(cascade.inpaint(REQUESTS, 3, known)), plain)


def test_an_embedding_takes_the_place_of_the_prior(members, image):
    """And then no prior is needed."""
    cascade, known = cascade_of(members), known_of(image)
    without = cascade_of({name: one for name, one in members.items() if name != "prior"})
    emb = without.embed_images(image[0][None])
    assert emb.shape == (1, members["clip"].stage.model.embed_dim) and without.candidates is None
    one, prior = (collected(c.inpaint(REQUESTS, 1, known, None, e)) for c, e in ((without, emb), (cascade, None)))
    assert differ(one[0, 0], prior[0, 0])


@pytest.fixture(scope="module")
def at_sizes(image):
    """Two images, the second the first upside down."""
    return {name: np.stack([one, one[::-1]]) for name, one in zip(("clip", "decoder"), image, strict=True)}


def calm(member):
    """A decoder whose prediction changes little with its input, as a trained one's does from step to step."""
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 1e-4 * leaf if "conv_out" in jax.tree_util.keystr(path) else leaf, member.variables
    )
    return dataclasses.replace(member, variables=variables)


FINE = {"name": "ddim", "steps": 20, "guidance": 1.0, "clip_sample": None}


@pytest.fixture(scope="module")
def small(members):
    """CLIP and a calm decoder: one program for each way to begin."""
    return {"clip": members["clip"], "decoder": calm(members["decoder"])}


def test_inverted_noise_samples_the_image_again(small, at_sizes):
    """Without guidance and eta; each from its own. With eta another, and from fresh noise another again."""
    requests = [Request("", i, 0) for i in range(2)]
    again = variations(cascade_of(small, decoder=FINE), requests, 2, at_sizes, True)
    for i in range(2):
        far = np.abs(again[i, 0].astype(int) - at_sizes["decoder"][i]).mean()
        assert far < 12, far
        assert np.abs(again[i, 0].astype(int) - at_sizes["decoder"][1 - i]).mean() > 2 * far
    whole = variations(cascade_of(small, decoder=FINE), requests, 2, at_sizes, True, False)
    eta = variations(cascade_of(small, decoder={**FINE, "eta": 1.0}), requests, 2, at_sizes, True)
    fresh = variations(cascade_of(small, decoder=FINE), requests, 2, at_sizes, False)
    images = [samples[0, 0] for samples in (again, whole, eta, fresh)]
    assert all(differ(one, other) for k, one in enumerate(images) for other in images[:k])


def test_variations_of_each_image(members, at_sizes):
    """From its own embedding and key: the order changes nothing."""
    cascade = cascade_of({name: members[name] for name in ("clip", "decoder")}, decoder=FINE)
    requests = [Request("", i, j) for i in range(2) for j in range(2)]
    samples = variations(cascade, requests, 2, at_sizes, False)
    assert_same(variations(cascade, requests[::-1], 2, at_sizes, False), samples)
    swapped = {name: images[::-1] for name, images in at_sizes.items()}
    assert differ(variations(cascade, requests, 2, swapped, False)[0, 0], samples[0, 0])


def test_image_sizes(members):
    sizes = {name: one.stage.image_size for name, one in members.items()}
    assert sizes == {"clip": None, "prior": None, "decoder": 8, "upsampler_1": 16}
