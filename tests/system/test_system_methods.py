"""`System`: every method on a tiny system in memory, what makes two calls equal, and what is rejected."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.diffusion import NoiseStatistics
from dalle2_jax.errors import ConfigError, DataError, SystemWarning, UsageError, UserError
from dalle2_jax.system.editing.geometry import path, positions, slerp, text_direction, weighted_mean
from dalle2_jax.system.images import Images

PROMPT = "a large red circle"
STEPS = {"prior": {"steps": 2}, "decoder": {"steps": 3}, "upsampler_1": {"steps": 2}}


@pytest.fixture(scope="module")
def images(system):
    return system.text2image(PROMPT, num=2, **STEPS)


@pytest.fixture(scope="module")
def image(images):
    return images.numpy[0]


def test_text2image(system, images):
    assert isinstance(images, Images) and images.numpy.shape == (2, 16, 16, 3) and images.captions == (PROMPT,) * 2
    assert (images.numpy[0] != images.numpy[1]).any()
    both = system.text2image([PROMPT, "a small blue star"], num=2, batch_size=3, **STEPS)
    assert len(both) == 4
    assert np.abs(both.numpy[:2].astype(int) - images.numpy).max() <= 1  # another batch size may round another way
    other = system.text2image(PROMPT, num=2, seed=1, **STEPS)
    assert (other.numpy != images.numpy).any()


def test_provenance_generates_the_images_again(system, images):
    recorded = json.loads(json.dumps(images.provenance))
    assert recorded["checkpoints"] == dict.fromkeys(("clip", "prior", "decoder", "upsampler_1"), 7)
    assert (recorded["command"], recorded["clip"], recorded["candidates"]) == ("text2image", "c0ffee", 2)
    prompts = [image["prompt"] for image in recorded["pictures"] if image["sample"] == 0]
    again = system.text2image(
        prompts, num=2, seed=recorded["seed"], candidates=recorded["candidates"], **recorded["sampling"]
    )
    np.testing.assert_array_equal(again.numpy, images.numpy)


def test_threads_give_the_same_images(system, images):
    calls = [{"seed": 0}, {"seed": 1}]
    alone = [system.text2image(PROMPT, num=2, **call, **STEPS).numpy for call in calls]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda call: system.text2image(PROMPT, num=2, **call, **STEPS).numpy, calls))
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(alone[0], images.numpy)


def test_out_receives_what_save_writes(system, images, tmp_path):
    system.text2image(PROMPT, num=2, out=tmp_path / "out", **STEPS)
    images.save(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"0_0.png", "0_1.png", "grid.png", "samples.json"}
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes() for name in names)


def test_nothing_is_printed_unless_asked_for(system, capfd):
    system.text2image(PROMPT, num=1, **STEPS)
    assert capfd.readouterr() == ("", "")
    system.text2image(PROMPT, num=1, progress=True, **STEPS)
    assert "1/1" in capfd.readouterr().err


def test_callback_sees_every_step(system, images):
    seen = []
    watched = system.text2image(PROMPT, num=2, callback=lambda step, x_0: seen.append((step, x_0.shape)), **STEPS)
    assert np.abs(watched.numpy.astype(int) - images.numpy).max() <= 1  # of another program
    sides = [shape for _, shape in seen]
    assert sides == [(2, 8, 8, 3)] * 3 + [(2, 16, 16, 3)] * 2
    assert [step for step, _ in seen] == [1, 2, 3, 1, 2]

    def stop(step, x_0):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        system.text2image(PROMPT, num=2, callback=stop, **STEPS)
    with pytest.raises(ConfigError):
        system.text2image(PROMPT, callback=3)


def test_prior_and_decode_are_the_two_halves(system):
    prompts = [PROMPT, ""]
    emb = system.prior(prompts, seed=3, prior=STEPS["prior"])
    assert emb.shape == (2, 16) and emb.dtype == np.float32
    halves = system.decode(emb, prompts, seed=3, decoder=STEPS["decoder"], upsampler_1=STEPS["upsampler_1"])
    np.testing.assert_array_equal(halves.numpy, system.text2image(prompts, num=1, seed=3, **STEPS).numpy)
    assert system.prior(PROMPT, num=3, prior=STEPS["prior"]).shape == (3, 16)
    assert len(system.decode(emb[0], num=2, decoder=STEPS["decoder"])) == 2


def test_embeddings(system, images):
    emb = system.embed_image(list(images))
    assert emb.shape == (2, 16) and emb.dtype == np.float32
    np.testing.assert_array_equal(emb, system.embed_image(images.numpy))
    np.testing.assert_allclose(np.linalg.norm(emb, axis=1), system.contract.scale, rtol=1e-5)
    text = system.embed_text([PROMPT, "red", PROMPT])
    assert text.shape == (3, 16) and (text[0] == text[2]).all() and (text[0] != text[1]).any()


def test_variations_and_reconstructions(system, image, images):
    fresh = system.variations(image, num=2, decoder=STEPS["decoder"])
    assert len(fresh) == 2 and (fresh.numpy[0] != fresh.numpy[1]).any()
    near = system.variations([image, images[1]], num=1, eta=0.5, decoder=STEPS["decoder"])
    assert len(near) == 2 and near.provenance["sampling"]["decoder"]["eta"] == 0.5
    same = system.variations(image, num=1, eta=0, decoder=STEPS["decoder"])
    again = system.reconstruct(image, steps=3)
    np.testing.assert_array_equal(same.numpy, again.numpy)
    sampling = again.provenance["sampling"]["decoder"]
    assert (sampling["name"], sampling["eta"], sampling["guidance"], sampling["steps"]) == ("ddim", 0.0, 1.0, 3)


def test_inpainting_keeps_what_is_known(system, image):
    mask = np.tile(np.arange(16) >= 8, (16, 1))
    for prompt in (None, PROMPT):
        results = system.inpaint(image, mask, prompt, num=2, resample=(1, 2), decoder=STEPS["decoder"])
        difference = np.abs(results.numpy.astype(int) - image)
        assert difference[:, :, :8].max() <= 1 and difference[:, :, 8:].max() > 1
        assert ("prior" in results.provenance["checkpoints"]) == (prompt is not None)


def test_interpolation_ends_at_both_images(system, images):
    """With eta 0 its ends are the reconstructions of both."""
    frames = system.interpolate(list(images), frames=3, eta=0, decoder=STEPS["decoder"])
    assert [entry["index"] for entry in frames.provenance["pictures"]] == [0, 1, 2]
    decoded = {"steps": 3}
    small = dataclasses.replace(system, stages={k: v for k, v in system.stages.items() if k != "upsampler_1"})
    ends = small.reconstruct(list(images), steps=3).numpy
    between = small.interpolate(list(images), frames=3, eta=0, decoder=decoded).numpy
    assert np.abs(between[[0, 2]].astype(int) - ends).max() <= 1 and (between[1] != between[0]).any()
    fresh = small.interpolate(list(images), frames=3, num=2, decoder=decoded)
    assert len(fresh) == 6 and fresh.columns == 3
    emb = small.embed_image(images.numpy)
    expected = small.decode(emb[:1], num=2, decoder=decoded).numpy
    assert np.abs(fresh.numpy[[0, 3]].astype(int) - expected).max() <= 1  # sample j of frame 0 is sample j of index 0


def test_text_diff_begins_at_the_image(system, image):
    small = dataclasses.replace(system, stages={k: v for k, v in system.stages.items() if k != "upsampler_1"})
    frames = small.text_diff(image, "one two three", "four", frames=3, depth=1.0, decoder=STEPS["decoder"])
    assert np.abs(frames.numpy[0].astype(int) - small.reconstruct(image, steps=3).numpy[0]).max() <= 1
    assert (frames.numpy[2] != frames.numpy[0]).any()
    assert frames.captions == ("0.00", "0.25", "0.50") and frames.provenance["theta"] == 0.5
    with pytest.raises(UserError):
        small.text_diff(image, "red", "red")


def test_slerp():
    """On the unit circle it moves by equal angles; norms are interpolated; nearly parallel vectors are."""
    theta = np.linspace(0, 1, 5)
    a, b = np.array([1.0, 0.0]), np.array([0.0, 3.0])
    points = slerp(a, b, theta)
    np.testing.assert_allclose(np.arctan2(points[:, 1], points[:, 0]), theta * np.pi / 2, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1 + 2 * theta, rtol=1e-6)
    np.testing.assert_allclose(slerp(a, 2 * a, theta)[:, 0], 1 + theta, rtol=1e-6)
    assert slerp(np.ones((2, 3)), np.eye(2, 3), theta).shape == (5, 2, 3)
    with pytest.raises(UserError):
        slerp(a, -a, theta)


def test_a_path_through_several_points():
    """Each point is met once, and neighbours are interpolated by themselves."""
    points = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    way = path(points, 3)
    np.testing.assert_allclose(way[::2], points, atol=1e-6)
    np.testing.assert_allclose(way[:3], slerp(points[0], points[1], np.linspace(0, 1, 3)), atol=1e-6)
    np.testing.assert_allclose(positions(3, 3), [0, 0.5, 1, 1.5, 2])
    assert len(positions(4, 8)) == len(path(np.eye(4), 8)) == 22


def test_weighted_means():
    """Of directions, at the mean norm; negative weights move away; what cancels has no direction."""
    emb = np.array([[2.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(weighted_mean(emb, np.array([1.0, 1.0])), 3 * np.array([1, 1]) / 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(weighted_mean(emb, np.array([1.0, 0.0])), emb[0], rtol=1e-6)
    assert weighted_mean(emb, np.array([1.0, -0.5]))[1] < 0
    with pytest.raises(UsageError):
        weighted_mean(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([1.0, -1.0]))


def test_text_directions():
    after, before = np.array([3.0, 1.0]), np.array([[1.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    np.testing.assert_allclose(text_direction(after, before, 5.0), [5.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(text_direction(after, None, 1.0), after / 10**0.5, rtol=1e-6)
    with pytest.raises(UserError):
        text_direction(after, after[None], 1.0)


def test_long_captions_warn(system):
    with pytest.warns(SystemWarning, match="prompt 1 .* 8 tokens") as warned:
        system.text2image(["red", "word " * 100], num=1, **STEPS)
    assert len(warned) == 2  # the prior's and the decoder's


def test_repr_is_short(system):
    assert len(repr(system).splitlines()) == len(repr(system.stages["decoder"]).splitlines()) == 2
    assert "decoder (step 7)" in repr(system) and len(repr(system.stages["decoder"])) < 300


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"decoder": {"stps": 3}}, "decoder.stps"),
        ({"decoder": {"guidance": 1e9}}, "decoder.guidance"),
        ({"decoder": {"steps": 5000}}, "decoder"),
        ({"decoder": {"steps": 2.5}}, "decoder.steps"),
        ({"decoder": 3}, "decoder"),
        ({"prior": {"variance": "analytic"}}, "prior"),
        ({"upsampler_1": {"text_guidance": 2.0}}, "upsampler_1"),
        ({"upsampler_2": {"steps": 3}}, "upsampler_2"),
        ({"num": 0}, "num"),
        ({"num": 2.0}, "num"),
        ({"seed": -1}, "seed"),
        ({"candidates": 0}, "candidates"),
        ({"negative": "red", "decoder": {"guidance": 1.0}, "prior": {"guidance": 1.0}}, "negative"),
        ({"decoder": {"guidance_order": "text"}}, "decoder"),
        ({"batch_sise": 3}, "batch_sise"),
    ],
)
def test_options_that_are_rejected(system, options, field):
    with pytest.raises(ConfigError, check=mentions(field=field)):
        system.text2image(PROMPT, **options)


def test_unknown_settings_offer_the_nearest(system):
    with pytest.raises(ConfigError, check=mentions("'steps'", field="decoder.stps")):
        system.text2image(PROMPT, decoder={"stps": 3})


def test_inversion_decides_the_sampler(system, image):
    for options in ({"decoder": {"name": "ddpm"}}, {"decoder": {"eta": 0.5}}):
        with pytest.raises(ConfigError) as error:
            system.reconstruct(image, **options)
        assert error.value.field == "decoder." + next(iter(options["decoder"]))
    with pytest.raises(ConfigError) as error:
        system.variations(image, eta=2)
    assert error.value.field == "eta"


def test_calls_that_are_rejected(system, image):
    wrong = [
        (lambda: system.text2image([]), UsageError),
        (lambda: system.text2image(PROMPT, num=100_000, batch_size=1, prior={"steps": 0}), ConfigError),
        (lambda: system.text2image([PROMPT] * 2, num=60_000), UsageError),
        (lambda: system.interpolate([image]), UsageError),
        (lambda: system.interpolate(captions=["red"]), UsageError),
        (lambda: system.interpolate([image] * 2, image_emb="none"), UsageError),
        (lambda: system.mix(), UsageError),
        (lambda: system.mix(image, weights=[1, 2]), UsageError),
        (lambda: system.text_diff(image, [], "red"), UsageError),
        (lambda: system.text2image(PROMPT, image_emb="nothing"), UsageError),
        (lambda: system.interpolate([image] * 2, frames=1), ConfigError),
        (lambda: system.variations(image / 255), DataError),
        (lambda: system.embed_image(image / 255), DataError),
        (lambda: system.decode(np.zeros((1, 3))), UsageError),
        (lambda: system.decode(np.full((1, 16), np.nan)), UsageError),
        (lambda: system.decode(np.ones((2, 16)), ["red"]), UsageError),
        (lambda: system.inpaint(image, np.zeros((16, 16), bool)), DataError),
        (lambda: system.inpaint(image, np.ones((16, 16), bool), resample=(50, 2)), UserError),
    ]
    for call, kind in wrong:
        with pytest.raises(kind):
            call()


def test_a_stage_that_is_not_there(system, image):
    alone = dataclasses.replace(system, stages={"clip": system.stages["clip"]})
    assert alone.embed_text("red").shape == (1, 16)
    for missing, call in (
        ("decoder", lambda: alone.text2image(PROMPT)),
        ("prior", lambda: alone.prior(PROMPT)),
        ("decoder", lambda: alone.variations(image)),
    ):
        with pytest.raises(UserError, check=mentions(f"stage {missing}", f"configs/shapes.py:{missing}")):
            call()


def test_measured_moments_allow_the_analytic_variance(system):
    prior = system.stages["prior"]
    stage = dataclasses.replace(prior.stage, noise_statistics=NoiseStatistics((0.9,) * 100, 1.0))
    measured = dataclasses.replace(system, stages={**system.stages, "prior": dataclasses.replace(prior, stage=stage)})
    emb = measured.prior(PROMPT, prior={"name": "ddpm", "variance": "analytic", "steps": 2})
    assert np.isfinite(emb).all()
