import numpy as np
import pytest

from dalle2_jax.data.synthetic import polygons
from dalle2_jax.data.synthetic.polygons import SHAPES


@pytest.mark.parametrize("side", [32, 50, 64, 256, 1500])
@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_and_centroid_of_the_polygon(side, shape):
    radius, x, y = 0.215, 0.5 + 3 / 512, 0.5 - 5 / 512
    patch, top, left = polygons.coverage(shape, radius, x, y, side)
    assert patch.min() >= 0 and patch.max() <= 1
    assert patch.sum() == pytest.approx(polygons.AREAS[shape] * (radius * side) ** 2, rel=0.015)
    rows, columns = np.indices(patch.shape) + 0.5
    centre = [((columns + left) * patch).sum() / patch.sum() / side, ((rows + top) * patch).sum() / patch.sum() / side]
    expected = np.array([x, y]) + radius * np.array(polygons.CENTROIDS[shape])
    np.testing.assert_allclose(centre, expected, atol=3.7e-4)


def test_areas_of_known_polygons():
    assert polygons.AREAS["circle"] == pytest.approx(np.pi, rel=1e-3)
    assert polygons.AREAS["square"] == pytest.approx(1.72**2)
    assert polygons.AREAS["triangle"] == pytest.approx(1.8)
    assert polygons.CENTROIDS["triangle"] == pytest.approx((0, 0.2))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_within_their_extent_and_patches_are_read_only(shape):
    patch, top, left = polygons.coverage(shape, 0.25, 0.5, 0.5, 256)
    rows, columns = np.nonzero(patch)
    for places, start in ((rows, top), (columns, left)):
        assert np.abs(places + start + 0.5 - 128).max() <= polygons.EXTENT * 64 + 1
    with pytest.raises(ValueError, match="read-only"):
        patch[0, 0] = 1
