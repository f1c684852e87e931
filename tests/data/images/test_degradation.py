"""The degradations against theory: the effect of each step on images with a known result, and its frequency."""

import collections
import dataclasses
import pickle

import cv2
import numpy as np
import pytest
from raised import mentions
from streams import text_stream

from dalle2_jax.data import ShapesSource, fixed_batch, prepare
from dalle2_jax.data.images import decoding, degradation
from dalle2_jax.data.images.degradation import RECIPES
from dalle2_jax.errors import UserError
from dalle2_jax.types import DEGRADATIONS, Degrading

BSR, LIGHT = (RECIPES[name] for name in DEGRADATIONS)
PLAIN = dataclasses.replace(BSR, slots=(), halve_rate=0.0)
BOTH = pytest.mark.parametrize("recipe", [BSR, LIGHT], ids=DEGRADATIONS)


def photo(side=32, seed=0):
    """Returns a smooth random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def flat(side=32, colour=(200, 120, 40)):
    return np.full((side, side, 3), colour, np.uint8)


def ramp(side=64):
    """Returns an image in [0, 1]: red grows by the row, green by the column; blue is 0.5."""
    positions = np.arange(side, dtype=np.float32) / side
    return np.stack(
        [*np.meshgrid(positions, positions, indexing="ij"), np.full((side, side), 0.5, np.float32)], axis=-1
    )


# --- complete recipes -----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("factor", "shape"), [(4, (48, 32)), (2, (16, 24)), (4, (8, 8))])
def test_the_result_is_uint8_of_the_requested_size(recipe, factor, shape):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    for _ in range(20):
        small = degradation.degrade(image, factor, recipe, rng)
        assert small.dtype == np.uint8 and small.shape == (shape[0] // factor, shape[1] // factor, 3)


@BOTH
def test_equal_generators_give_equal_images_and_others_do_not(recipe):
    image, results = photo(), {}
    for seed in [*range(6)] * 2:
        small = degradation.degrade(image, 4, recipe, np.random.default_rng(seed))
        np.testing.assert_array_equal(results.setdefault(seed, small), small)
    assert len({small.tobytes() for small in results.values()}) == 6
    np.testing.assert_array_equal(image, photo())  # the input is not modified


@BOTH
def test_without_noise_a_flat_image_stays_flat(recipe):
    """Kernels sum to 1, resizes preserve constants; JPEG changes a block's mean by half a quantiser step at most."""
    noiseless, rng = dataclasses.replace(recipe, noise=(0, 0)), np.random.default_rng(0)
    for _ in range(60):
        small = degradation.degrade(flat(), 4, noiseless, rng)
        assert np.ptp(small, axis=(0, 1)).max() == 0
        assert np.abs(small[0, 0].astype(int) - (200, 120, 40)).max() <= 10


def test_only_noise_makes_flat_images_rough_in_the_light_variant():
    rng = np.random.default_rng(0)
    widths = [degradation.treated(flat(), 4, LIGHT, rng).std(axis=(0, 1)).max() * 255 for _ in range(60)]
    assert 0.5 < max(widths) <= 2.4  # two levels; noise before the downsampling is averaged out


def test_degradation_does_not_shift_or_permute_the_image():
    """The mean over many samples is the image: rows, columns and channels are neither shifted nor exchanged."""
    image, rng = np.rint(ramp() * 255).astype(np.uint8)[:, :32], np.random.default_rng(0)
    mean = np.mean([degradation.treated(image, 4, BSR, rng) for _ in range(300)], axis=0)
    expected = cv2.resize(image, (8, 16), interpolation=cv2.INTER_AREA) / 255
    inside = slice(5, -5), slice(3, -3)
    np.testing.assert_allclose(mean[inside], expected[inside], atol=0.015)  # a row is 1 / 16 of the range


def test_an_empty_recipe_is_a_plain_resize():
    image, rng = photo(), np.random.default_rng(0)
    plain = [
        cv2.resize(image.astype(np.float32) / 255, (8, 8), interpolation=kind).clip(0, 1)
        for kind in degradation.INTERPOLATIONS
    ]
    samples = [degradation.treated(image, 4, PLAIN, rng) for _ in range(90)]
    found = collections.Counter(next(i for i in range(3) if np.array_equal(one, plain[i])) for one in samples)
    assert {*found} == {0, 1, 2} and min(found.values()) > 15


def test_a_quarter_of_the_images_is_halved_first_with_every_interpolation(monkeypatch):
    halved, seen, rng = degradation._halved, [], np.random.default_rng(0)
    monkeypatch.setattr(degradation, "_halved", lambda *args: seen.append(halved(*args)) or seen[-1])
    for _ in range(400):
        degradation.treated(photo(), 4, dataclasses.replace(BSR, slots=()), rng)
    assert abs(len(seen) / 400 - 0.25) < 4 * (0.1875 / 400) ** 0.5
    assert len({one.tobytes() for one in seen}) == 3  # at factor 2, linear and area interpolation agree
    degradation.treated(photo(), 2, dataclasses.replace(BSR, halve_rate=1.0), rng)
    assert len(seen) < 130  # only images of factor 4 are halved


def test_steps_occur_in_every_order_with_downsampling_after_the_resize():
    rng, slots = np.random.default_rng(0), ("blur", "resize", "noise")
    orders = collections.Counter(tuple(degradation.order(slots, rng)) for _ in range(1200))
    assert len(orders) == 12 and min(orders.values()) > 60  # 4! / 2, each 100 times
    for steps in orders:
        assert sorted(steps) == ["blur", "noise", "resize", "shrink"]
        assert steps.index("resize") < steps.index("shrink")
    assert collections.Counter(degradation.order(BSR.slots, rng))["blur"] == 2
    assert collections.Counter(degradation.order(LIGHT.slots, rng))["blur"] == 1


@BOTH
def test_every_step_occurs_with_the_probability_of_the_recipe(recipe, monkeypatch):
    """Counts resizes by their branch, JPEGs and their qualities, kinds of blur and noise."""
    counts, qualities = collections.Counter(), collections.Counter()

    def spy(name, note):
        original = getattr(degradation, name)

        def counted(*args, **kwargs):
            note(args, kwargs)
            return original(*args, **kwargs)

        monkeypatch.setattr(degradation, name, counted)

    spy("strided", lambda args, _: counts.update(["strided"]))
    spy("gaussian_kernel", lambda _, names: counts.update([*names] or ["round"]))
    spy("_jpeg", lambda args, _: qualities.update([args[1]]))
    rng, image, times = np.random.default_rng(0), photo(16), 1500
    for _ in range(times):
        degradation.degrade(image, 4, recipe, rng)
    blurs = recipe.slots.count("blur") * times

    def near(count, trials, rate):
        return abs(count - trials * rate) < 4.5 * (trials * rate * (1 - rate)) ** 0.5

    assert counts["angle"] + counts["round"] == blurs and near(counts["angle"], blurs, 0.5)
    assert near(counts["strided"], times, 1 - recipe.resize_rate) and counts["strided"] == counts["centre"]
    assert near(qualities.total() - times, times, 0.9)
    lowest, highest = recipe.quality
    assert min(qualities) == lowest and max(qualities) == highest and len(qualities) == highest - lowest + 1


# --- steps ----------------------------------------------------------------------------------


def variances(kernel):
    """Returns the kernel's variances in x and y and their covariance, in pixels^2."""
    positions = np.arange(len(kernel)) - len(kernel) // 2
    x, y = positions[None, :], positions[:, None]
    return [(kernel * part).sum() for part in (x * x, y * y, x * y)]


def test_a_kernel_has_the_requested_variances():
    kernel = degradation.gaussian_kernel(31, 9.0, 2.0, angle=np.pi / 6)
    cosine, sine = np.cos(np.pi / 6), np.sin(np.pi / 6)
    expected = [9 * cosine**2 + 2 * sine**2, 9 * sine**2 + 2 * cosine**2, (9 - 2) * cosine * sine]
    np.testing.assert_allclose(variances(kernel), expected, rtol=1e-3)
    np.testing.assert_allclose(kernel.sum(), 1, rtol=1e-5)
    point = degradation.gaussian_kernel(7, 1e-17, 1e-3, angle=1.0)  # narrower than a pixel
    assert point[3, 3] == 1 and point.sum() == 1
    assert degradation.gaussian_kernel(6, 1.0, 1.0).shape == (7, 7)


@BOTH
@pytest.mark.parametrize("factor", [2, 4])
def test_kernels_have_the_sizes_and_standard_deviations_of_the_recipe(recipe, factor):
    rng = np.random.default_rng(0)
    kernels = [degradation.blur_kernel(factor, recipe, rng) for _ in range(800)]
    assert {len(kernel) for kernel in kernels} == {size | 1 for size in (*recipe.isotropic, *recipe.anisotropic)}
    widths = np.array([np.linalg.eigvalsh([[x, xy], [xy, y]])[::-1] for x, y, xy in map(variances, kernels)])
    longer = widths[:, 0] > widths[:, 1] + 1e-3
    assert widths.min() > -1e-6 and 300 < longer.sum() < 440  # half of the kernels are anisotropic
    bounds = (4 + factor) * recipe.width, ((2 + 0.2 * factor) * recipe.width) ** 2
    for widest, bound in zip((widths[longer].max(), widths[~longer].max()), bounds, strict=True):
        assert 0.8 * bound < widest <= 1.001 * bound


def test_a_point_kernel_is_the_identity_and_edges_are_mirrored():
    image = ramp(16)
    np.testing.assert_allclose(degradation.filtered(image, np.ones((1, 1), np.float32)), image)
    mean = degradation.filtered(image, np.full((1, 3), 1 / 3, np.float32))
    np.testing.assert_allclose(mean[:, 0], (image[:, 0] + 2 * image[:, 1]) / 3, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_strided_samples_are_centred_in_their_blocks(factor, sigma):
    """A Gaussian preserves a ramp, so the samples are the means of the blocks, even for sigma below one pixel."""
    small, image = degradation.strided(ramp(), factor, sigma), ramp()
    blocks = image.reshape(64 // factor, factor, 64 // factor, factor, 3).mean(axis=(1, 3))
    inside = slice(16 // factor, -16 // factor)
    assert small.shape == blocks.shape
    np.testing.assert_allclose(small[inside, inside], blocks[inside, inside], atol=1e-4)


def test_resize_factors_range_from_one_to_twice_the_factor():
    rng, always = np.random.default_rng(0), dataclasses.replace(BSR, resize_rate=1.0)
    image = np.zeros((160, 80, 3), np.float32)
    sizes = np.array([degradation._resize(image, 4, always, rng).shape[:2] for _ in range(400)])
    assert 20 <= sizes[:, 0].min() < 24 and 150 < sizes[:, 0].max() <= 160
    assert np.abs(sizes[:, 0] - 2 * sizes[:, 1]).max() <= 1
    np.testing.assert_allclose((160 / sizes[:, 0]).mean(), 4.5, atol=0.5)  # the divisor is uniform, not the size
    assert degradation._resize(np.zeros((2, 2, 3), np.float32), 4, always, rng).size


def kinds_of_noise(levels, count, side=48):
    rng, kinds = np.random.default_rng(0), collections.defaultdict(list)
    for _ in range(count):
        field = degradation.noise((side, side), levels, rng) * 255
        if field.shape[2] == 1:
            kinds["grey"].append(field)
        else:
            correlation = np.corrcoef(field.reshape(-1, 3).T)[np.triu_indices(3, 1)]
            kinds["colour" if np.abs(correlation).max() < 0.1 else "correlated"].append(field)
    return kinds


def test_noise_has_three_kinds_and_the_requested_levels():
    kinds = kinds_of_noise((2, 25), 600)
    shares = {name: len(field) / 600 for name, field in kinds.items()}
    for name, share in {"grey": 0.4, "colour": 0.4, "correlated": 0.2}.items():
        assert abs(shares[name] - share) < 0.08, shares
    for name in ("grey", "colour"):
        levels = [field.std() for field in kinds[name]]
        assert 1.9 < min(levels) < 3.2 and 23.5 < max(levels) < 25.8
        assert abs(np.mean(levels) - 13.5) < 2.2
    deviations = np.array([field.reshape(-1, 3).std(axis=0) for field in kinds["correlated"]])
    assert (
        deviations.max() < 25.8 and deviations.max() > 15
    )  # variances are weighted means of D, so below the square of the highest level
    correlations = [np.corrcoef(field.reshape(-1, 3).T).min() for field in kinds["correlated"]]
    assert min(correlations) > -0.1  # correlations are magnitudes: channels are never anticorrelated


def test_noise_of_level_zero_is_zero():
    rng = np.random.default_rng(0)
    assert all(not degradation.noise((4, 4), (0, 0), rng).any() for _ in range(20))


def test_jpeg_errors_grow_at_lower_quality_and_channels_keep_their_order():
    image = photo(64).astype(np.float32) / 255
    errors = [np.abs(degradation._jpeg(image, quality) / 255 - image).mean() for quality in (30, 60, 95)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02
    red = degradation._jpeg(flat(16, (255, 0, 0)).astype(np.float32) / 255, 95)
    assert np.abs(red.astype(int) - (255, 0, 0)).max() < 5


# --- the stream -----------------------------------------------------------------------------

SOURCE = ShapesSource("train", 32, max_objects=2, num_examples=40)
DEGRADING = Degrading("bsr", 32, 16, 4)


def stream(**others):
    return text_stream(SOURCE, None, 2, 4, seed=3, degrading=DEGRADING, **others)


def test_a_stream_pairs_each_crop_with_its_low_resolution_image():
    noiseless = {**RECIPES, "bsr": dataclasses.replace(PLAIN, quality=(100, 100))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(degradation, "RECIPES", noiseless)
        batches = [next(each) for each in [stream()] for _ in range(8)]
    for batch in batches:
        assert {name: (rows.shape, rows.dtype.name) for name, rows in batch.items()} == {
            "image": ((4, 16, 16, 3), "uint8"),
            "low_res": ((4, 4, 4, 3), "uint8"),
        }
        for crop, small in zip(batch["image"], batch["low_res"], strict=True):
            assert np.abs(decoding.fit(crop, 4).astype(int) - small).mean() < 32  # degraded from the same crop
    differing = np.mean([np.ptp(batch["image"].astype(int), axis=(1, 2)).max() > 0 for batch in batches])
    assert differing > 0.5


def test_crops_cover_every_position():
    positions = np.arange(32, dtype=np.uint8)
    image = np.stack([*np.meshgrid(positions, positions, indexing="ij"), np.zeros((32, 32), np.uint8)], axis=-1)
    rng = np.random.default_rng(0)
    corners = np.array([degradation.pair(image, DEGRADING, rng)["image"][0, 0, :2] for _ in range(300)])
    for column in corners.T:
        assert {*column.tolist()} == {*range(17)}


def test_a_resumed_stream_degrades_like_the_uninterrupted_one():
    uninterrupted = [next(each) for each in [stream()] for _ in range(6)]
    for resumed in (stream(), stream(num_threads=0)):
        resumed.set_state(pickle.loads(pickle.dumps({"global_next_index": 12})))
        for batch in uninterrupted[3:]:
            again = next(resumed)
            for name, rows in batch.items():
                np.testing.assert_array_equal(again[name], rows)


def test_degradation_of_fixed_batches_depends_only_on_the_index():
    source = prepare(SOURCE, degrading=DEGRADING)
    one, _ = fixed_batch(source, [3, 1, 5])
    other, _ = fixed_batch(source, [5, 3])
    for name in ("image", "low_res"):
        np.testing.assert_array_equal(one[name][[2, 0]], other[name])
    assert one["low_res"].shape == (3, 4, 4, 3)


def test_images_of_another_size_are_rejected():
    larger = dataclasses.replace(DEGRADING, image_size=64)
    with pytest.raises(UserError, check=mentions("'bsr'", 64, 32, "config.data.resolution=64")):
        prepare(SOURCE, degrading=larger)


def test_every_degradation_that_a_config_may_name_has_a_recipe():
    assert tuple(RECIPES) == DEGRADATIONS
