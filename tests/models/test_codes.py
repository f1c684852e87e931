"""Embeddings to codes and back, by theory."""

import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import UserError
from dalle2_jax.models.priors import codes

DEVIATIONS = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.05])


def gaussians(count, seed=0):
    """Examples whose principal axes and deviations are known, and the axes."""
    noise = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(np.random.default_rng(99).standard_normal((8, 8)))
    return (3 + noise.standard_normal((count, 8)) * DEVIATIONS @ axes.T).astype(np.float32), axes


@pytest.fixture(scope="module")
def fitted():
    image_emb, _ = gaussians(4096)
    return image_emb, codes.fit(image_emb, image_emb.sum(axis=1), components=5, buckets=32)


def relative_error(stats, image_emb):
    decoded = codes.decode(stats, codes.encode(stats, image_emb))
    return float(np.mean(np.square(decoded - image_emb)) / np.mean(np.square(image_emb - stats["mean"])))


def test_components_are_the_principal_ones_in_order(fitted):
    image_emb, stats = fitted
    _, axes = gaussians(1)
    np.testing.assert_allclose(np.abs(np.sum(stats["basis"] * axes[:, :5], axis=0)), 1, atol=1e-3)
    np.testing.assert_allclose(stats["basis"].T @ stats["basis"], np.eye(5), atol=1e-6)
    deviations = np.std((image_emb - stats["mean"]) @ stats["basis"], axis=0)
    assert np.all(np.diff(deviations) < 0)
    np.testing.assert_allclose(deviations, DEVIATIONS[:5], rtol=0.05)


def test_every_bucket_is_used_equally_often(fitted):
    image_emb, stats = fitted
    for data, tolerance in ((image_emb, 1), (gaussians(65_536, seed=1)[0], 65_536 / 32 * 0.35)):
        samples = np.asarray(codes.encode(stats, jnp.asarray(data)))
        for component in samples.T:
            assert np.abs(np.bincount(component, minlength=32) - len(data) / 32).max() <= tolerance
    dots = jnp.asarray(image_emb), jnp.ones((4096, 8))
    assert np.abs(np.bincount(codes.encode_dot(stats, *dots), minlength=32) - 128).max() <= 1


def test_round_trip_stays_within_a_bucket(fitted):
    """The error is that of the omitted components and of the buckets, which falls with their number."""
    image_emb, stats = fitted
    fresh, _ = gaussians(4096, seed=1)
    samples = np.asarray(codes.encode(stats, jnp.asarray(fresh)))
    decoded = np.asarray(codes.decode(stats, jnp.asarray(samples)))
    components, back = ((x - stats["mean"]) @ stats["basis"] for x in (fresh, decoded))
    extremes = (image_emb - stats["mean"]) @ stats["basis"]
    for k in range(5):
        edges = np.concatenate([[extremes[:, k].min()], stats["edges"][k], [extremes[:, k].max()]])
        inside = (components[:, k] > edges[0]) & (components[:, k] < edges[-1])
        width = np.diff(edges)[samples[:, k]]
        assert inside.mean() > 0.99
        assert np.all(np.abs(back - components)[inside, k] <= width[inside] + 1e-5)
    left_out = np.square(DEVIATIONS[5:]).sum() / np.square(DEVIATIONS).sum()
    by_buckets = {q: relative_error(codes.fit(image_emb, image_emb[:, 0], 5, q), image_emb) for q in (8, 64, 512)}
    assert left_out < by_buckets[512] < left_out + 5e-4 < by_buckets[64] < 0.01 < by_buckets[8]
    assert relative_error(codes.fit(image_emb, image_emb[:, 0], 8, 512), image_emb) < 5e-4


def test_codes_of_decoded_codes_are_the_same(fitted):
    _, stats = fitted
    samples = jnp.asarray(np.random.default_rng(3).integers(32, size=(256, 5)), jnp.int32)
    np.testing.assert_array_equal(codes.encode(stats, codes.decode(stats, samples)), samples)


def test_larger_means_a_larger_code_and_extremes_saturate(fitted):
    _, stats = fitted
    ladder = stats["mean"] + np.linspace(-1e4, 1e4, 2001, dtype=np.float32)[:, None] * stats["basis"][:, 2]
    climbed = np.asarray(codes.encode(stats, jnp.asarray(ladder)))[:, 2]
    assert np.all(np.diff(climbed) >= 0) and climbed[0] == 0 and climbed[-1] == 31


def test_fit_does_not_depend_on_order_or_scale_of_arithmetic(fitted):
    image_emb, stats = fitted
    order = np.random.default_rng(5).permutation(len(image_emb))
    again = codes.fit(image_emb[order], image_emb.sum(axis=1)[order], 5, 32)
    empty = codes.empty(8, 5, 32)
    for name, value in stats.items():
        assert value.dtype == np.float32 and value.shape == empty[name].shape and empty[name].dtype == np.float32
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-4)


def test_directions_without_variance_are_harmless():
    image_emb, _ = gaussians(256)
    flat = np.concatenate([image_emb, np.ones((256, 1), np.float32)], axis=1)
    stats = codes.fit(flat, flat[:, 0], components=9, buckets=16)
    assert all(np.isfinite(value).all() for value in stats.values())
    np.testing.assert_allclose(codes.decode(stats, codes.encode(stats, jnp.asarray(flat)))[:, -1], 1, atol=1e-5)


def test_components_for_a_share_of_the_variance(fitted):
    image_emb, _ = fitted
    shares = np.cumsum(np.square(DEVIATIONS)) / np.square(DEVIATIONS).sum()
    for count in range(1, 6):
        between = (shares[count - 1] + (shares[count - 2] if count > 1 else 0.0)) / 2
        assert codes.components_needed(image_emb, between) == count
    assert codes.components_needed(image_emb, 0.0) == 1 and codes.components_needed(image_emb, 1.0) == 8


def test_unfit_data():
    image_emb, _ = gaussians(16)
    with pytest.raises(UserError, check=mentions("16 examples", "17 buckets")):
        codes.fit(image_emb, image_emb[:, 0], 5, 17)
    image_emb[3, 2] = np.nan
    with pytest.raises(UserError, check=mentions("embeddings", "not finite")):
        codes.fit(image_emb, image_emb[:, 0], 5, 4)


def test_edges_lie_halfway_between_neighbours_and_centres_are_means():
    line = np.arange(8, dtype=np.float32)[::-1, None]
    stats = codes.fit(line, 2 * line[:, 0], components=1, buckets=4)
    np.testing.assert_allclose(stats["edges"], [[-2, 0, 2]], atol=1e-6)
    np.testing.assert_allclose(stats["centres"], [[-3, -1, 1, 3]], atol=1e-6)
    np.testing.assert_allclose(stats["dot_edges"], [3, 7, 11], atol=1e-6)
    np.testing.assert_array_equal(codes.encode(stats, jnp.asarray(line))[:, 0], [3, 3, 2, 2, 1, 1, 0, 0])
