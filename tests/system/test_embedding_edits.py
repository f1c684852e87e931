"""Mixtures, interpolations and text differences; captions without a prior; captions that guidance moves away from."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from raised import mentions

from dalle2_jax.errors import ConfigError, UsageError, UserError
from dalle2_jax.system.editing.similarity import root_mean_square
from dalle2_jax.system.inputs import square

PROMPT = "a large red circle"
STEPS = {"prior": {"steps": 2}, "decoder": {"steps": 3}}
DECODER = {"decoder": {"steps": 3}}


@pytest.fixture(scope="module")
def small(system):
    """Without an upsampler."""
    return dataclasses.replace(system, stages={k: v for k, v in system.stages.items() if k != "upsampler_1"})


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0)
    return list(noise.integers(256, size=(3, 16, 16, 3), dtype=np.uint8))


def same(a, b):
    """Up to the rounding of another batch size."""
    return np.abs(a.astype(int) - b).max() <= 1


def redness(images, others):
    """A distance of images: the difference of their mean red."""
    return np.abs(images[..., 0].mean(axis=(1, 2)) - others[..., 0].mean(axis=(1, 2)))


# --- captions without a prior --------------------------------------------------------------------


def test_captions_without_a_prior(small):
    """Figure 8: the text embedding in place of the image embedding, or the caption alone."""
    text = small.text2image(PROMPT, image_emb="text", num=1, **DECODER)
    alone = small.text2image(PROMPT, image_emb="none", num=1, **DECODER)
    np.testing.assert_array_equal(text.numpy, small.decode(small.embed_text(PROMPT), PROMPT, **DECODER).numpy)
    np.testing.assert_array_equal(alone.numpy, small.decode(None, PROMPT, **DECODER).numpy)
    assert (text.numpy != alone.numpy).any()
    for images, name in ((text, "text"), (alone, "none")):
        assert images.provenance["image_emb"] == name and "prior" not in images.provenance["checkpoints"]
    with pytest.raises(ConfigError, check=mentions(field="prior")):
        small.text2image(PROMPT, image_emb="none", **STEPS)


def test_inpainting_without_a_prior(small, images):
    mask = np.tile(np.arange(16) >= 8, (16, 1))
    results = [small.inpaint(images[0], mask, PROMPT, image_emb=name, num=1, **DECODER) for name in ("text", "none")]
    assert (results[0].numpy != results[1].numpy).any()
    assert all("prior" not in result.provenance["checkpoints"] for result in results)


# --- guidance ------------------------------------------------------------------------------------


def test_text_comes_first_in_the_other_order(small):
    """With image_guidance 0 guidance is by the caption only, and the image embedding has no influence."""
    emb = small.embed_text(["one", "two three"])
    by_text = {"decoder": {"steps": 3, "guidance_order": "text,image", "image_guidance": 0.0, "text_guidance": 3.0}}
    first, second = (small.decode(e, PROMPT, **by_text).numpy for e in emb)
    np.testing.assert_array_equal(first, second)
    alone = small.decode(None, PROMPT, decoder={"steps": 3, "text_guidance": 3.0})
    assert same(first, alone.numpy)
    by_image = {"decoder": {**by_text["decoder"], "guidance_order": "image,text"}}
    assert (small.decode(emb[0], PROMPT, **by_image).numpy != small.decode(emb[1], PROMPT, **by_image).numpy).any()


def test_a_negative_caption_takes_the_place_of_none(small):
    emb = small.embed_text(PROMPT)
    options = {"decoder": {"steps": 3, "guidance": 3.0}}
    plain, other, third = (
        small.decode(emb, PROMPT, negative=text, **options).numpy for text in ("", "four five", "six")
    )
    assert (plain != other).any() and (other != third).any()
    assert small.decode(emb, PROMPT, negative="six", **options).provenance["negative"] == "six"
    # With text_guidance 1 and image_guidance 1 nothing is guided; with the caption as its own negative, neither.
    unguided = small.decode(emb, PROMPT, decoder={"steps": 3, "guidance": 1.0}).numpy
    itself = {"decoder": {"steps": 3, "image_guidance": 1.0, "text_guidance": 5.0}}
    assert same(small.decode(emb, PROMPT, negative=PROMPT, **itself).numpy, unguided)


def test_a_negative_caption_reaches_the_prior(small):
    plain, other = (small.prior(PROMPT, negative=text, prior={"steps": 2}) for text in ("", "four five"))
    assert (plain != other).any()
    itself = small.prior(PROMPT, negative=PROMPT, prior={"steps": 2, "guidance": 5.0})
    np.testing.assert_allclose(itself, small.prior(PROMPT, prior={"steps": 2, "guidance": 1.0}), atol=1e-4)


# --- mixtures ------------------------------------------------------------------------------------


def test_one_image_mixed_is_that_image(small, images):
    mixed = small.mix(images[0], num=2, **DECODER)
    assert same(mixed.numpy, small.variations(images[0], num=2, **DECODER).numpy)
    only = small.mix(images[:2], weights=[0, 2], num=2, **DECODER)
    assert same(only.numpy, small.variations(images[1], num=2, **DECODER).numpy)


def test_mixtures_of_images_and_captions(small, images):
    mixed = small.mix(images[:2], [PROMPT], weights=[1, 0.5, -0.3], num=1, **STEPS)
    about = mixed.provenance
    assert (about["weights"], about["caption"]) == ([1, 0.5, -0.3], [PROMPT])
    assert about["checkpoints"].keys() == {"clip", "prior", "decoder"}
    assert mixed.captions[0].endswith(f"-0.3 {PROMPT}")
    text = small.mix(images[:2], PROMPT, weights=[1, 0.5, -0.3], num=1, image_emb="text", **DECODER)
    assert (text.numpy != mixed.numpy).any() and "prior" not in text.provenance["checkpoints"]


@pytest.mark.parametrize("weights", [[0, 0], [1, np.nan], [1, 1e9], [1, "2"], [True, 1]])
def test_weights_that_are_rejected(small, images, weights):
    with pytest.raises(ConfigError, check=mentions(field="weights")):
        small.mix(images[:2], weights=weights)


def test_weights_that_cancel_each_other(small, images):
    with pytest.raises(UsageError):
        small.mix([images[0], images[0]], weights=[1, -1])


# --- sequences -----------------------------------------------------------------------------------


def test_a_path_through_three_images(small, images):
    """Its points are the reconstructions of all three."""
    frames = small.interpolate(images, frames=3, eta=0, **DECODER)
    assert frames.captions == ("0.00", "0.50", "1.00", "1.50", "2.00")
    assert same(frames.numpy[::2], small.reconstruct(images, steps=3).numpy)


def test_from_an_image_to_a_caption_and_between_captions(small, images):
    captions = [PROMPT, "four five"]
    between = small.interpolate(captions=captions, frames=3, **STEPS)
    emb = small.prior(captions, prior=STEPS["prior"])
    assert same(between.numpy[0], small.decode(emb[0], **DECODER).numpy[0])
    assert between.provenance["caption"] == captions and "prior" in between.provenance["checkpoints"]
    onward = small.interpolate(images[0], PROMPT, frames=3, eta=0, image_emb="text", **DECODER)
    assert same(onward.numpy[0], small.reconstruct(images[0], steps=3).numpy[0])
    assert (onward.numpy[2] != onward.numpy[0]).any()
    with pytest.raises(ConfigError, check=mentions(field="eta")):
        small.interpolate(captions=captions, eta=0)


def test_even_paths(small, images):
    """They go through the same points as paths of equal rotations, in steps that differ no more."""
    shared = {"frames": 4, "eta": 0, "batch_size": 3, **DECODER}
    plain, even = (small.interpolate(images, even=each, **shared) for each in (False, True))
    assert same(even.numpy[[0, 3, 6]], plain.numpy[[0, 3, 6]]) and even.provenance["even"] is True
    for leg in (slice(0, 4), slice(3, 7)):
        steps = [root_mean_square(each.numpy[leg][:-1], each.numpy[leg][1:]) for each in (plain, even)]
        assert steps[1].max() / steps[1].mean() <= steps[0].max() / steps[0].mean()
    places = [record["place"] for record in even.provenance["pictures"]]
    assert places == sorted(places) and [places[0], places[3], places[6]] == [0, 1, 2]
    assert even.captions == tuple(f"{place:.2f}" for place in places)
    by_red = small.interpolate(images, even=redness, **shared)
    assert [record["place"] for record in by_red.provenance["pictures"]] != places
    with pytest.raises(ConfigError, check=mentions(64, field="frames")):
        small.interpolate(images, even=True, frames=65)


def test_even_paths_of_fresh_noise(small, images):
    """All frames of a sequence have the same noise, and sequences have others."""
    even = small.interpolate(images[:2], frames=3, num=2, even=True, **DECODER)
    plain = small.interpolate(images[:2], frames=3, num=2, **DECODER)
    assert same(even.numpy[[0, 2, 3, 5]], plain.numpy[[0, 2, 3, 5]])


def test_depth_of_text_diffs(small, images):
    """The paper's inversion, to the end of the schedule, is depth 1; less of it changes less of the image."""
    image, shared = images[0], {"frames": 2, "decoder": {"steps": 3}}
    whole, default = (small.text_diff(image, "four", PROMPT, **depth, **shared) for depth in ({"depth": 1.0}, {}))
    assert same(whole.numpy[0], small.reconstruct(image, steps=3).numpy[0])
    apart = [np.abs(result.numpy[0].astype(int) - square(image, 8)).mean() for result in (default, whole)]
    assert apart[0] < apart[1]
    assert default.provenance["depth"] == 0.2 and default.provenance["sampling"]["decoder"]["steps"].startswith("t:0,")
    for depth in (0, 1.5, True):
        with pytest.raises(ConfigError, check=mentions(field="depth")):
            small.text_diff(image, "four", PROMPT, depth=depth)
    with pytest.raises(ConfigError, check=mentions(field="depth")):
        small.text_diff(image, "four", PROMPT, whole_inversion=True)


def test_captions_of_text_diffs(small, images):
    """By default rotated frames have the caption of what the image becomes, and that at rotation 0 has none."""
    shared = {"frames": 2, "depth": 1.0, **DECODER}
    default = small.text_diff(images[0], "four", PROMPT, **shared).numpy
    silent = small.text_diff(images[0], "four", PROMPT, prompt="", **shared).numpy
    assert same(default[0], silent[0]) and not same(default[1], silent[1])
    decoder = dataclasses.replace(small.stages["decoder"], tokenizer=None)
    unread = dataclasses.replace(small, stages={**small.stages, "decoder": decoder})
    assert same(unread.text_diff(images[0], "four", PROMPT, **shared).numpy, silent)


def test_text_diff_over_a_range_and_without_a_base(small, images):
    image = images[0]
    frames = small.text_diff(image, "four", PROMPT, theta=(0.25, 0.5), frames=2, **DECODER)
    whole = small.text_diff(image, "four", PROMPT, frames=3, **DECODER)
    assert frames.captions == ("0.25", "0.50") and same(frames.numpy, whole.numpy[1:])
    bases = [None, "", ["four", "five"], "four"]
    results = [small.text_diff(image, base, PROMPT, frames=2, **DECODER) for base in bases]
    assert len({result.numpy[1].tobytes() for result in results}) == 4
    assert [result.provenance.get("from") for result in results] == bases
    for theta in ((0.5, 0.25), (0.1, 2), (0.1, 0.2, 0.3)):
        with pytest.raises(ConfigError, check=mentions(field="theta")):
            small.text_diff(image, "four", PROMPT, theta=theta)


def test_animations(small, images, tmp_path):
    """Sequences are shown next to each other, forwards and backwards."""
    frames = small.interpolate(images[:2], frames=3, num=2, **DECODER)
    for name, boomerang, count in (("a.webp", True, 4), ("b.gif", False, 3)):
        written = frames.animate(tmp_path / name, fps=10, boomerang=boomerang)
        with Image.open(io.BytesIO(written.read_bytes())) as animation:
            assert (animation.n_frames, animation.width > animation.height) == (count, True)
    for name, fps in (("a.mp4", 8), ("a.gif", 0)):
        with pytest.raises(UsageError):
            frames.animate(tmp_path / name, fps=fps)


def test_decoders_without_image_embeddings(small, images):
    stage = small.stages["decoder"].stage
    model = dataclasses.replace(stage.model, image_emb_dim=None)
    decoder = dataclasses.replace(small.stages["decoder"], stage=dataclasses.replace(stage, model=model))
    without = dataclasses.replace(small, stages={**small.stages, "decoder": decoder})
    for call in (
        lambda: without.mix(images[0]),
        lambda: without.interpolate(images[:2]),
        lambda: without.text_diff(images[0], "one", "two"),
        lambda: without.reconstruct(images[0]),
        lambda: without.text2image(PROMPT, image_emb="text"),
    ):
        with pytest.raises(UserError):
            call()
