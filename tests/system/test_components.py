"""Principal components of embeddings, and reconstructions from them."""

import dataclasses
import json

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.system.editing.components import FILE, Components
from dalle2_jax.system.editing.similarity import MAX_PSNR, psnr
from dalle2_jax.workdir.folder import StageFolder

DECODER = {"decoder": {"steps": 3}}


@pytest.fixture(scope="module")
def emb(system):
    """Embeddings of twelve images of 16 dimensions, so of rank 11 at most."""
    return system.embed_image(np.random.default_rng(0).integers(256, size=(12, 16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def components(emb):
    return Components.of(emb.mean(axis=0), np.cov(emb, rowvar=False), len(emb))


@pytest.fixture
def stored(system, components, tmp_path):
    """The system in a folder with the components; without an upsampler."""
    components.write(StageFolder(tmp_path, "clip"), 7)
    stages = {name: stage for name, stage in system.stages.items() if name != "upsampler_1"}
    return dataclasses.replace(system, path=tmp_path, stages=stages)


def test_projections_keep_ever_more_of_the_variance(components, emb):
    errors = [np.square(components.project(emb, k) - emb).sum() for k in range(1, components.rank + 1)]
    assert components.rank == 11 and all(np.diff(errors) < 0) and errors[-1] < 1e-6 * np.square(emb).sum()
    left = [components.variances[k:].sum() * (len(emb) - 1) for k in range(1, components.rank + 1)]
    np.testing.assert_allclose(errors[:-1], left[:-1], rtol=1e-3)
    np.testing.assert_allclose(components.project(components.project(emb, 4), 4), components.project(emb, 4), atol=1e-5)
    assert components.needed(1e-9) == 1 and components.needed(1.0) <= components.rank
    enough = components.needed(0.9)
    shares = np.cumsum(components.variances) / components.variances.sum()
    assert shares[enough - 1] >= 0.9 > shares[enough - 2]


@pytest.mark.parametrize("count", [0, 12, -1, 2.0, True])
def test_counts_beyond_the_rank_are_rejected(components, emb, count):
    with pytest.raises(ConfigError, check=mentions("components", 11, field="components")):
        components.project(emb, count)


def test_stored_components_are_read_again(components, stored):
    again = Components.read(StageFolder(stored.path, "clip"), 7, 16)
    for name in ("mean", "variances", "basis", "n"):
        np.testing.assert_array_equal(getattr(again, name), getattr(components, name))


@pytest.mark.parametrize(
    ("field", "value"),
    [("step", 8), ("mean", "AAAA"), ("basis", 3), ("variances", "?"), ("n", None), ("mean", "AADAfw==" * 16)],
)
def test_damaged_components_are_rejected(stored, field, value):
    file = stored.path / "clip" / FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(UserError, check=mentions(FILE, "--measures components")):
        Components.read(StageFolder(stored.path, "clip"), 7, 16)


def test_reconstructions_from_components(stored, components, emb):
    """All images of a seed begin with the same noise, and all components are the embedding itself."""
    image = np.random.default_rng(0).integers(256, size=(12, 16, 16, 3), dtype=np.uint8)[:2]
    images = stored.reconstruct(image, components=[2, 5, 11], **DECODER)
    assert images.columns == 3 and len(images) == 6 and images.provenance["components"] == [2, 5, 11]
    whole = stored.decode(emb[0], decoder={"steps": 3, "name": "ddim", "eta": 0.0, "guidance": 1.0})
    assert np.abs(images.numpy[2].astype(int) - whole.numpy[0]).max() <= 2
    assert (images.numpy[0] != images.numpy[1]).any() and "5 components" in images.captions[4]
    with pytest.raises(ConfigError, check=mentions(field="components")):
        stored.reconstruct(image, components=[12])


def test_what_was_not_measured(system, emb, tmp_path):
    bare = dataclasses.replace(system, path=tmp_path)
    with pytest.raises(UserError, check=mentions("--measures components", tmp_path / "clip")):
        bare.reconstruct(np.zeros((16, 16, 3), np.uint8), components=[2])


def test_reconstructions_are_compared(stored):
    image = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)

    def distance(images, others):
        return np.abs(images.astype(float) - others).mean(axis=(1, 2, 3))

    images = stored.reconstruct(image, lpips=distance, **DECODER)
    [about] = images.provenance["pictures"]
    assert about["psnr"] == psnr(images.numpy[0], image)
    assert about["lpips"] == distance(images.numpy, image[None])[0]
    assert f"{about['psnr']:.1f} dB" in images.captions[0]


def test_psnr():
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black) == MAX_PSNR and psnr(black, black + np.uint8(255)) == 0
    np.testing.assert_allclose(psnr(black, black + np.uint8(1)), 20 * np.log10(255))
