"""The degradations against theory: what each step does to pictures whose answer is known, and how often it does it."""

import collections
import dataclasses
import pickle

import cv2
import numpy as np
import pytest

from dalle2_jax.data import ShapesSource, degradation, fixed_batch, images, make_stream
from dalle2_jax.data.degradation import RECIPES
from dalle2_jax.types import DEGRADATIONS, Degrading, UserError

BSR, LIGHT = (RECIPES[name] for name in DEGRADATIONS)
PLAIN = dataclasses.replace(BSR, slots=(), halve_rate=0.0)
BOTH = pytest.mark.parametrize("recipe", [BSR, LIGHT], ids=DEGRADATIONS)


def photo(side=32, seed=0):
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def flat(side=32, colour=(200, 120, 40)):
    return np.full((side, side, 3), colour, np.uint8)


def ramp(side=64):
    """Red grows by the row, green by the column, in [0, 1]; blue is a half."""
    place = np.arange(side, dtype=np.float32) / side
    return np.stack([*np.meshgrid(place, place, indexing="ij"), np.full((side, side), 0.5, np.float32)], axis=-1)


# --- whole ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("factor", "shape"), [(4, (48, 32)), (2, (16, 24)), (4, (8, 8))])
def test_the_result_is_uint8_and_as_small_as_asked_for(recipe, factor, shape):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*shape, 3), np.uint8)
    for _ in range(20):
        small = degradation.degrade(picture, factor, recipe, rng)
        assert small.dtype == np.uint8 and small.shape == (shape[0] // factor, shape[1] // factor, 3)


@BOTH
def test_equal_generators_give_equal_pictures_and_others_do_not(recipe):
    picture, draws = photo(), {}
    for seed in [*range(6)] * 2:
        small = degradation.degrade(picture, 4, recipe, np.random.default_rng(seed))
        np.testing.assert_array_equal(draws.setdefault(seed, small), small)
    assert len({small.tobytes() for small in draws.values()}) == 6
    np.testing.assert_array_equal(picture, photo())  # what is given is not written on


@BOTH
def test_without_noise_a_flat_picture_stays_flat(recipe):
    """Kernels sum to 1, resizes keep constants, and JPEG a block's mean to half a step of its quantiser."""
    silent, rng = dataclasses.replace(recipe, noise=(0, 0)), np.random.default_rng(0)
    for _ in range(60):
        small = degradation.degrade(flat(), 4, silent, rng)
        assert np.ptp(small, axis=(0, 1)).max() == 0
        assert np.abs(small[0, 0].astype(int) - (200, 120, 40)).max() <= 10


def test_noise_alone_makes_the_light_variants_flat_pictures_rough():
    rng = np.random.default_rng(0)
    spread = [degradation.treated(flat(), 4, LIGHT, rng).std(axis=(0, 1)).max() * 255 for _ in range(60)]
    assert 0.5 < max(spread) <= 2.4  # two levels; before the shrinking there is less of it


def test_a_picture_keeps_its_place():
    """Over many draws the mean is the picture: nothing moves it, or exchanges its rows and columns or its channels."""
    picture, rng = np.rint(ramp() * 255).astype(np.uint8)[:, :32], np.random.default_rng(0)
    mean = np.mean([degradation.treated(picture, 4, BSR, rng) for _ in range(300)], axis=0)
    wanted = cv2.resize(picture, (8, 16), interpolation=cv2.INTER_AREA) / 255
    inside = slice(5, -5), slice(3, -3)
    np.testing.assert_allclose(mean[inside], wanted[inside], atol=0.015)  # a row is 1 / 16


def test_with_nothing_to_do_it_is_a_plain_resize():
    picture, rng = photo(), np.random.default_rng(0)
    plain = [
        cv2.resize(picture.astype(np.float32) / 255, (8, 8), interpolation=kind).clip(0, 1)
        for kind in degradation.INTERPOLATIONS
    ]
    drawn = [degradation.treated(picture, 4, PLAIN, rng) for _ in range(90)]
    found = collections.Counter(next(i for i in range(3) if np.array_equal(one, plain[i])) for one in drawn)
    assert {*found} == {0, 1, 2} and min(found.values()) > 15


def test_a_quarter_of_the_pictures_is_halved_first_in_both_ways(monkeypatch):
    halved, seen, rng = degradation._halved, [], np.random.default_rng(0)
    monkeypatch.setattr(degradation, "_halved", lambda *args: seen.append(halved(*args)) or seen[-1])
    for _ in range(400):
        degradation.treated(photo(), 4, dataclasses.replace(BSR, slots=()), rng)
    assert abs(len(seen) / 400 - 0.25) < 4 * (0.1875 / 400) ** 0.5
    assert len({one.tobytes() for one in seen}) == 3  # at a half, linear and area are the same
    degradation.treated(photo(), 2, dataclasses.replace(BSR, halve_rate=1.0), rng)
    assert len(seen) < 130  # of factor 4 alone


def test_steps_come_in_every_order_with_the_shrinking_after_the_resize():
    rng, slots = np.random.default_rng(0), ("blur", "resize", "noise")
    orders = collections.Counter(tuple(degradation.order(slots, rng)) for _ in range(1200))
    assert len(orders) == 12 and min(orders.values()) > 60  # 4! / 2, each 100 times
    for drawn in orders:
        assert sorted(drawn) == ["blur", "noise", "resize", "shrink"]
        assert drawn.index("resize") < drawn.index("shrink")
    assert collections.Counter(degradation.order(BSR.slots, rng))["blur"] == 2
    assert collections.Counter(degradation.order(LIGHT.slots, rng))["blur"] == 1


@BOTH
def test_every_step_is_taken_as_often_as_the_recipe_says(recipe, monkeypatch):
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
    rng, picture, times = np.random.default_rng(0), photo(16), 1500
    for _ in range(times):
        degradation.degrade(picture, 4, recipe, rng)
    blurs = recipe.slots.count("blur") * times

    def near(count, trials, rate):
        return abs(count - trials * rate) < 4.5 * (trials * rate * (1 - rate)) ** 0.5

    assert counts["angle"] + counts["round"] == blurs and near(counts["angle"], blurs, 0.5)
    assert near(counts["strided"], times, 1 - recipe.resize_rate) and counts["strided"] == counts["centre"]
    assert near(qualities.total() - times, times, 0.9)
    lowest, highest = recipe.quality
    assert min(qualities) == lowest and max(qualities) == highest and len(qualities) == highest - lowest + 1


# --- steps ----------------------------------------------------------------------------------


def moments(kernel):
    """Returns the kernel's variances in x and y and their covariance, in pixels^2."""
    place = np.arange(len(kernel)) - len(kernel) // 2
    x, y = place[None, :], place[:, None]
    return [(kernel * part).sum() for part in (x * x, y * y, x * y)]


def test_a_kernel_has_the_variances_it_is_made_of():
    kernel = degradation.gaussian_kernel(31, 9.0, 2.0, angle=np.pi / 6)
    cosine, sine = np.cos(np.pi / 6), np.sin(np.pi / 6)
    wanted = [9 * cosine**2 + 2 * sine**2, 9 * sine**2 + 2 * cosine**2, (9 - 2) * cosine * sine]
    np.testing.assert_allclose(moments(kernel), wanted, rtol=1e-3)
    np.testing.assert_allclose(kernel.sum(), 1, rtol=1e-5)
    point = degradation.gaussian_kernel(7, 1e-17, 1e-3, angle=1.0)  # narrower than a pixel
    assert point[3, 3] == 1 and point.sum() == 1
    assert degradation.gaussian_kernel(6, 1.0, 1.0).shape == (7, 7)


@BOTH
@pytest.mark.parametrize("factor", [2, 4])
def test_kernels_have_the_sizes_and_widths_of_the_recipe(recipe, factor):
    rng = np.random.default_rng(0)
    kernels = [degradation.blur_kernel(factor, recipe, rng) for _ in range(800)]
    assert {len(kernel) for kernel in kernels} == {size | 1 for size in (*recipe.isotropic, *recipe.anisotropic)}
    spread = np.array([np.linalg.eigvalsh([[x, xy], [xy, y]])[::-1] for x, y, xy in map(moments, kernels)])
    longer = spread[:, 0] > spread[:, 1] + 1e-3
    assert spread.min() > -1e-6 and 300 < longer.sum() < 440  # half of them are longer than wide
    bounds = (4 + factor) * recipe.width, ((2 + 0.2 * factor) * recipe.width) ** 2
    for widest, bound in zip((spread[longer].max(), spread[~longer].max()), bounds, strict=True):
        assert 0.8 * bound < widest <= 1.001 * bound


def test_filtering_by_a_point_changes_nothing_and_mirrors_the_edge():
    picture = ramp(16)
    np.testing.assert_allclose(degradation.filtered(picture, np.ones((1, 1), np.float32)), picture)
    mean = degradation.filtered(picture, np.full((1, 3), 1 / 3, np.float32))
    np.testing.assert_allclose(mean[:, 0], (picture[:, 0] + 2 * picture[:, 1]) / 3, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_every_nth_pixel_is_taken_about_the_middle_of_its_block(factor, sigma):
    """A Gaussian keeps a ramp, so the samples are the blocks' means; narrower than a pixel, it falls between pixels."""
    small, picture = degradation.strided(ramp(), factor, sigma), ramp()
    blocks = picture.reshape(64 // factor, factor, 64 // factor, factor, 3).mean(axis=(1, 3))
    inside = slice(16 // factor, -16 // factor)
    assert small.shape == blocks.shape
    np.testing.assert_allclose(small[inside, inside], blocks[inside, inside], atol=1e-4)


def test_resizes_are_from_none_to_twice_the_factor():
    rng, always = np.random.default_rng(0), dataclasses.replace(BSR, resize_rate=1.0)
    picture = np.zeros((160, 80, 3), np.float32)
    sizes = np.array([degradation._resize(picture, 4, always, rng).shape[:2] for _ in range(400)])
    assert 20 <= sizes[:, 0].min() < 24 and 150 < sizes[:, 0].max() <= 160
    assert np.abs(sizes[:, 0] - 2 * sizes[:, 1]).max() <= 1
    np.testing.assert_allclose((160 / sizes[:, 0]).mean(), 4.5, atol=0.5)  # the divisor is uniform, not the size
    assert degradation._resize(np.zeros((2, 2, 3), np.float32), 4, always, rng).size


def kinds_of_noise(levels, draws, side=48):
    rng, kinds = np.random.default_rng(0), collections.defaultdict(list)
    for _ in range(draws):
        drawn = degradation.noise((side, side), levels, rng) * 255
        if drawn.shape[2] == 1:
            kinds["grey"].append(drawn)
        else:
            correlation = np.corrcoef(drawn.reshape(-1, 3).T)[np.triu_indices(3, 1)]
            kinds["colour" if np.abs(correlation).max() < 0.1 else "correlated"].append(drawn)
    return kinds


def test_noise_is_of_three_kinds_and_of_the_levels_asked_for():
    kinds = kinds_of_noise((2, 25), 600)
    shares = {name: len(drawn) / 600 for name, drawn in kinds.items()}
    for name, share in {"grey": 0.4, "colour": 0.4, "correlated": 0.2}.items():
        assert abs(shares[name] - share) < 0.08, shares
    for name in ("grey", "colour"):
        levels = [drawn.std() for drawn in kinds[name]]
        assert 1.9 < min(levels) < 3.2 and 23.5 < max(levels) < 25.8
        assert abs(np.mean(levels) - 13.5) < 2.2
    stacked = np.array([drawn.reshape(-1, 3).std(axis=0) for drawn in kinds["correlated"]])
    assert stacked.max() < 25.8 and stacked.max() > 15  # variances are means of D's, below the greatest level's
    correlations = [np.corrcoef(drawn.reshape(-1, 3).T).min() for drawn in kinds["correlated"]]
    assert min(correlations) > -0.1  # magnitudes: channels never oppose


def test_noise_of_level_nought_is_none():
    rng = np.random.default_rng(0)
    assert all(not degradation.noise((4, 4), (0, 0), rng).any() for _ in range(20))


def test_jpeg_is_worse_at_less_quality_and_keeps_red_red():
    picture = photo(64).astype(np.float32) / 255
    errors = [np.abs(degradation._jpeg(picture, quality) / 255 - picture).mean() for quality in (30, 60, 95)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02
    red = degradation._jpeg(flat(16, (255, 0, 0)).astype(np.float32) / 255, 95)
    assert np.abs(red.astype(int) - (255, 0, 0)).max() < 5


# --- the stream -----------------------------------------------------------------------------

SOURCE = ShapesSource("train", 32, max_objects=2, num_examples=40)
ASKED = Degrading("bsr", 32, 16, 4)


def stream(**others):
    return make_stream(SOURCE, None, 2, 4, seed=3, degrading=ASKED, **others)


def test_a_streams_crops_come_with_their_small_pictures():
    silent = {**RECIPES, "bsr": dataclasses.replace(PLAIN, quality=(100, 100))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(degradation, "RECIPES", silent)
        batches = [next(each) for each in [stream()] for _ in range(8)]
    for batch in batches:
        assert {name: (rows.shape, rows.dtype.name) for name, rows in batch.items()} == {
            "image": ((4, 16, 16, 3), "uint8"),
            "low_res": ((4, 4, 4, 3), "uint8"),
        }
        for crop, small in zip(batch["image"], batch["low_res"], strict=True):
            assert np.abs(images.fit(crop, 4).astype(int) - small).mean() < 32  # the crop's own
    differing = np.mean([np.ptp(batch["image"].astype(int), axis=(1, 2)).max() > 0 for batch in batches])
    assert differing > 0.5


def test_crops_are_cut_from_everywhere():
    place = np.arange(32, dtype=np.uint8)
    picture = np.stack([*np.meshgrid(place, place, indexing="ij"), np.zeros((32, 32), np.uint8)], axis=-1)
    rng = np.random.default_rng(0)
    corners = np.array([degradation.pair(picture, ASKED, rng)["image"][0, 0, :2] for _ in range(300)])
    for column in corners.T:
        assert {*column.tolist()} == {*range(17)}


def test_a_resumed_stream_degrades_as_the_whole_one():
    whole = [next(each) for each in [stream()] for _ in range(6)]
    for resumed in (stream(), stream(num_threads=0)):
        resumed.set_state(pickle.loads(pickle.dumps({"global_next_index": 12})))
        for batch in whole[3:]:
            again = next(resumed)
            for name, rows in batch.items():
                np.testing.assert_array_equal(again[name], rows)


def test_fixed_batches_are_degraded_by_index_alone():
    one, _ = fixed_batch(SOURCE, None, 2, [3, 1, 5], ASKED)
    other, _ = fixed_batch(SOURCE, None, 2, [5, 3], ASKED)
    for name in ("image", "low_res"):
        np.testing.assert_array_equal(one[name][[2, 0]], other[name])
    assert one["low_res"].shape == (3, 4, 4, 3)


def test_pictures_of_another_size_are_refused():
    larger = dataclasses.replace(ASKED, image_size=64)
    wanted = "'bsr' cuts crops from pictures of 64 pixels, and the data's have 32: set config.data.resolution=64"
    for make in (
        lambda: make_stream(SOURCE, None, 2, 4, seed=0, degrading=larger),
        lambda: fixed_batch(SOURCE, None, 2, [0], larger),
    ):
        with pytest.raises(UserError, match=wanted):
            make()


def test_every_name_that_a_stage_may_ask_for_has_a_recipe():
    assert tuple(RECIPES) == DEGRADATIONS
