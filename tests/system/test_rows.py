"""Rows of several calls in one batch give the images that each call gives alone."""

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import ConfigError, UsageError, UserError
from dalle2_jax.system.rows import COMMANDS, until
from dalle2_jax.system.rows.calls import inpaint, interpolate, text2image, text_diff

FEW = {"decoder": {"steps": 2}, "upsampler_1": {"steps": 2}}
READS_TEXT = {**FEW, "prior": {"steps": 2}}
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (20, 20, 3), np.uint8)
MASK = np.zeros((16, 16), bool)
MASK[:8] = True


def finish(made, batch=None):
    """Samples all stages of all rows, in batches of one size, and returns the images."""
    rows, done = list(made.rows), []
    while rows:
        same = [row for row in rows if made.sampler.group(row) == made.sampler.group(rows[0])]
        after = made.sampler.run(same, batch or len(same))
        rows = [row for row in rows if row not in same] + [row for row in after if row.remaining]
        done += [row for row in after if not row.remaining]
    return np.stack([row.pixels for row in done])


CALLS = {
    # command: (arguments of the rows, the same call of System)
    "text2image": ({"prompt": "a red circle"}, lambda s, o: s.text2image("a red circle", **o)),
    "variations": ({"image": IMAGE, "eta": 0.5}, lambda s, o: s.variations(IMAGE, eta=0.5, **o)),
    "reconstruct": ({"image": IMAGE, "steps": 3}, lambda s, o: s.reconstruct(IMAGE, steps=3, **o)),
    "inpaint": (
        {"image": IMAGE, "mask": MASK, "prompt": "a star", "resample": (1, 2)},
        lambda s, o: s.inpaint(IMAGE, MASK, "a star", resample=(1, 2), **o),
    ),
    "interpolate": (
        {"images": [IMAGE, OTHER], "frames": 2, "eta": 0.0},
        lambda s, o: s.interpolate([IMAGE, OTHER], frames=2, eta=0.0, **o),
    ),
    "text_diff": (
        {"image": IMAGE, "captions": ("red circle", "a blue square"), "frames": 2},
        lambda s, o: s.text_diff(IMAGE, "red circle", "a blue square", frames=2, **o),
    ),
}


@pytest.mark.parametrize("command", CALLS)
def test_rows_are_the_images_of_the_call(system, command):
    arguments, call = CALLS[command]
    settings = READS_TEXT if command in ("text2image", "inpaint") else FEW
    options = {"num": 1 if command in ("interpolate", "text_diff") else 2, "seed": 2**32 - 1, **settings}
    made = COMMANDS[command](system, options, **arguments)
    expected = call(system, options)
    # A call embeds and inverts its images in another batch size, so that the last bit of a sum may differ.
    np.testing.assert_allclose(finish(made).astype(int), expected.numpy.astype(int), atol=1)
    ours, theirs = made.provenance, dict(expected.provenance)
    for image, other in zip(ours["pictures"], theirs["pictures"], strict=True):
        assert image.items() <= other.items()  # reconstruct's has the PSNR too
    assert ours["sampling"] == theirs["sampling"]
    assert ours["command"] == command and ours["seed"] == 2**32 - 1


def test_known_pixels_are_those_of_the_image_which_keeps_its_shape(system):
    options = {"num": 1, **READS_TEXT}
    made = inpaint(system, options, image=IMAGE[:12], mask=MASK[:12], prompt="a star")
    expected = system.inpaint(IMAGE[:12], MASK[:12], "a star", **options).numpy
    images = finish(made)
    assert images.shape == expected.shape == (1, 12, 16, 3)
    np.testing.assert_array_equal(images[0, 8:], IMAGE[8:12])
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)


def test_what_is_to_be_avoided_separates_batches(system):
    """Negative captions are the batch's."""
    made, other = (
        text2image(
            system, {"num": 1, "negative": negative, **READS_TEXT, "decoder": {"steps": 2, "guidance": 2.0}}, prompt="a"
        )
        for negative in ("", "blue")
    )
    assert made.sampler.group(made.rows[0]) != other.sampler.group(other.rows[0])


def test_mixed_calls_share_a_batch(system):
    """Rows of other seeds, captions and commands, in any order, at any place of a batch of one size."""
    alone = [text2image(system, {"num": 1, "seed": seed, **READS_TEXT}, prompt=f"no {seed}") for seed in range(3)]
    expected = np.concatenate([finish(call, batch=4) for call in alone])
    together = alone[0]._replace(rows=[call.rows[0] for call in reversed(alone)])
    np.testing.assert_array_equal(finish(together, batch=4)[::-1], expected)


def test_calls_of_other_numbers_share_a_batch(system):
    """Scales of guidance and eta are a row's own; each image is that of `System`, to the last bit."""
    settings = [
        {"decoder": {"steps": 2, "guidance": scale, "eta": eta}, "upsampler_1": {"steps": 2}, "prior": prior}
        for scale, eta, prior in (
            (2.0, 0.0, {"steps": 2, "guidance": 3.0}),
            (5.5, 0.5, {"steps": 2, "guidance": 1.5}),
            (3.0, 1.0, {"steps": 2, "guidance": -1.0}),
        )
    ]
    calls = [text2image(system, {"num": 1, "seed": seed, **each}, prompt="a") for seed, each in enumerate(settings)]
    together = calls[0]._replace(rows=[call.rows[0] for call in reversed(calls)])
    images = finish(together, batch=3)[::-1]
    for seed, each in enumerate(settings):
        np.testing.assert_array_equal(images[seed], system.text2image("a", num=3, seed=seed, **each).numpy[0])
    assert len({image.tobytes() for image in images}) == 3


def test_groups_separate_what_cannot_share_a_program(system):
    plain = text2image(system, {"num": 2, **READS_TEXT}, prompt="a")
    other = text2image(system, {"num": 1, **READS_TEXT, "decoder": {"steps": 2, "guidance": 1.0}}, prompt="a")
    assert plain.sampler.group(plain.rows[0]) == plain.sampler.group(plain.rows[1])
    assert plain.sampler.group(plain.rows[0]) == other.sampler.group(other.rows[0])  # the prior's config is equal
    [decoded, _], [unguided] = plain.sampler.run(plain.rows, 2), other.sampler.run(other.rows, 1)
    assert plain.sampler.group(decoded) != other.sampler.group(unguided)  # one branch instead of two


def test_a_smaller_size_ends_with_its_stage(system):
    made = text2image(system, {"num": 1, **READS_TEXT}, prompt="a")
    small = until(made, 8)
    assert finish(small).shape == (1, 8, 8, 3) and finish(until(made, None)).shape == (1, 16, 16, 3)
    with pytest.raises(ConfigError, check=mentions("100x100", "8x8", "16x16", field="size")):
        until(made, 100)


def test_wrong_arguments(system):
    with pytest.raises(ConfigError, check=mentions(field="decoder.speed")):
        text2image(system, {"decoder": {"speed": 1}}, prompt="a")
    with pytest.raises(UsageError, check=mentions("two", 1)):
        interpolate(system, {}, images=[IMAGE])
    with pytest.raises(ConfigError, check=mentions(field="frames")):
        text_diff(system, {}, image=IMAGE, captions=("a", "b"), frames=1)
    with pytest.raises(UserError, check=mentions(2)):
        inpaint(system, FEW, image=IMAGE, mask=MASK, resample=(5, 2))
