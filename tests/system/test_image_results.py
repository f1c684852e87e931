"""`Images`: a sequence, its grid, and what it writes."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from dalle2_jax.system.images import Images

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def images():
    images = [{"file": f"0_{j}.png", "prompt": "red", "index": 0, "sample": j} for j in range(3)]
    return Images(PIXELS, ("red",) * 3, {"command": "text2image", "seed": 5, "pictures": images})


def test_sequence(images):
    assert len(images) == 3 and [np.asarray(image).tolist() for image in images] == PIXELS.tolist()
    assert isinstance(images[-1], Image.Image) and (np.asarray(images[-1]) == PIXELS[-1]).all()
    with pytest.raises(IndexError):
        images[3]
    part = images[1:]
    assert len(part) == 2 and [entry["sample"] for entry in part.provenance["pictures"]] == [1, 2]
    assert repr(images) == "Images(3 of 8x8 by text2image, seed 5)"


def test_grid(images):
    plain = images.grid(columns=2, captions=False)
    assert plain.size == (2 * 8 + 2, 2 * 8 + 2)
    assert (np.asarray(plain)[:8, 10:] == PIXELS[1]).all() and (np.asarray(plain)[10:, :8] == PIXELS[2]).all()
    assert images.grid(columns=1).size[0] < images.grid().size[0]
    shown = Image.open(io.BytesIO(images._repr_png_()))
    assert (np.asarray(shown) == np.asarray(images.grid())).all()


def test_save(images, tmp_path):
    folder = images.save(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"0_0.png", "0_1.png", "0_2.png", "grid.png", "samples.json"}
    for j in range(3):
        assert (np.asarray(Image.open(folder / f"0_{j}.png")) == PIXELS[j]).all()
    assert json.loads((folder / "samples.json").read_text()) == images.provenance
    assert (np.asarray(Image.open(folder / "grid.png")) == np.asarray(images.grid())).all()
