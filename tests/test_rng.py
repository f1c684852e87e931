"""Keys from names and steps: the same for the same words, and different for any other."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax import rng


def bits(key):
    return jax.random.key_data(key).tolist()


def test_a_stream_is_its_name_alone():
    names = ("train", "init", "noise", "x_T", "drop_text")
    streams = [bits(rng.stream(rng.root(3), name)) for name in names]
    assert len({str(stream) for stream in streams}) == len(names)
    assert streams[0] == bits(jax.random.fold_in(jax.random.key(3), zlib.crc32(b"train")))  # resumed runs rely on it
    assert streams[0] != bits(rng.stream(rng.root(4), "train"))


def test_a_step_has_its_own_key_traced_or_not():
    keys = [bits(rng.at_step(rng.root(0), step)) for step in range(4)]
    assert len({str(key) for key in keys}) == 4
    traced = jax.jit(rng.at_step)(rng.root(0), jnp.int32(2))
    assert bits(traced) == keys[2]


def test_an_image_is_the_same_in_any_batch():
    def sample(first, count):
        indices = jnp.arange(first, first + count, dtype=jnp.int32)
        return np.asarray(rng.normal(rng.per_image(rng.root(5), indices), (3, 2)))

    batch = sample(0, 8)
    assert batch.shape == (8, 3, 2) and batch.dtype == np.float32
    np.testing.assert_array_equal(batch[5:], sample(5, 3))
    np.testing.assert_array_equal(batch[5], jax.random.normal(jax.random.fold_in(rng.root(5), 5), (3, 2)))
    assert len(np.unique(batch)) == batch.size


def test_normals_are_normal():
    normals = rng.normal(rng.per_image(rng.root(0), jnp.arange(100, dtype=jnp.int32)), (400,))
    assert abs(float(normals.mean())) < 4 / 200  # four deviations of the mean of 40,000
    assert abs(float(normals.std()) - 1) < 4 / 283
    between = np.corrcoef(np.asarray(normals))[np.triu_indices(100, 1)]
    assert abs(between).max() < 6 / 20  # no two images alike
