"""Image preprocessing of published CLIPs: fields are applied, or rejected by their names."""

import json

import numpy as np
import pytest
from clips import FIXTURES, stage_of
from PIL import Image
from raised import mentions

from dalle2_jax.data.images.decoding import preprocess
from dalle2_jax.models.clip import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from dalle2_jax.types import Preprocessing
from dalle2_jax.weights.clip import transformers
from dalle2_jax.weights.clip.processor import (
    processor_file,
    read_preprocess_cfg,
    read_processor,
    released_processor,
)
from dalle2_jax.weights.component import Source, merge_parts
from dalle2_jax.weights.config_files import FieldError, Section, WeightsWarning

VARIATIONS = FIXTURES / "karlo_tiny_iv"
FILE = json.loads((VARIATIONS / "feature_extractor" / "preprocessor_config.json").read_text())
SIDE = 32
OWN = Preprocessing("bicubic", "shortest", SIDE, SIDE)


def read(without=(), **fields):
    content = {**{name: value for name, value in FILE.items() if name not in without}, **fields}
    return read_processor(Section(content, "preprocessor_config.json"), SIDE)


def values(processor, image):
    """Returns the network's input for an image: resized, cropped, rescaled and normalised, channels last."""
    levels = preprocess(image, processor.preprocessing, SIDE) / 255
    return (levels - np.array(processor.mean)) / np.array(processor.std)


def test_values_match_those_recorded_from_transformers():
    recorded = np.load(VARIATIONS / "parity_iv.npz")
    ours = values(read(), recorded["image_u8"])
    np.testing.assert_allclose(ours, recorded["pixel_values"][0].transpose(1, 2, 0), atol=1e-6)


def test_an_imported_tower_has_its_preprocessing():
    parts = [*transformers.detect(Source.open(FIXTURES / "karlo_tiny" / "text_encoder"))]
    parts += transformers.detect(Source.open(VARIATIONS / "image_encoder"))
    stage = stage_of(merge_parts(parts)["clip"])
    assert stage.preprocessing == OWN and stage.model.image_mean == CLIP_IMAGE_MEAN


OLDER = {"size": SIDE, "crop_size": SIDE, "feature_extractor_type": "CLIPFeatureExtractor"}
APPLIED = {
    # case: (fields, the preprocessing they describe)
    "as published today": ({}, OWN),
    "as published in 2022": (OLDER, OWN),
    "lanczos": ({"resample": 1}, Preprocessing("lanczos", "shortest", SIDE, SIDE)),
    "bilinear": ({"resample": 2}, Preprocessing("bilinear", "shortest", SIDE, SIDE)),
    "squashed": ({"size": {"height": SIDE, "width": SIDE}}, Preprocessing("bicubic", "exact", SIDE, SIDE)),
    "squashed and not cropped": (
        {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
        Preprocessing("bicubic", "exact", SIDE, SIDE),
    ),
    "cropped from a larger one": ({"size": {"shortest_edge": 40}}, Preprocessing("bicubic", "shortest", 40, SIDE)),
    "null": ({"size": None, "crop_size": None, "do_resize": None}, OWN),
}


@pytest.mark.parametrize("case", APPLIED)
def test_fields_are_applied(case):
    fields, expected = APPLIED[case]
    assert read(**fields).preprocessing == expected


def test_missing_fields_have_the_values_of_the_released_clips():
    assert read(without=FILE) == released_processor(SIDE, "floor") == (OWN, CLIP_IMAGE_MEAN, CLIP_IMAGE_STD)


@pytest.mark.parametrize(
    ("fields", "scale", "mean", "std"),
    [
        ({"rescale_factor": 1 / 127.5}, 1 / 127.5, CLIP_IMAGE_MEAN, CLIP_IMAGE_STD),
        ({"do_rescale": False}, 1.0, CLIP_IMAGE_MEAN, CLIP_IMAGE_STD),
        ({"do_normalize": False}, 1 / 255, 0.0, 1.0),
        ({"do_normalize": False, "rescale_factor": 0.5}, 0.5, 0.0, 1.0),
    ],
)
def test_values_are_rescaled(fields, scale, mean, std):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    levels = preprocess(image, OWN, SIDE).astype(np.float64) * scale
    np.testing.assert_allclose(values(read(**fields), image), (levels - np.array(mean)) / np.array(std), rtol=1e-9)


REJECTED = {
    # field: invalid values
    "do_resize": (False, "yes"),
    "resample": (0, 4, 5, 7, True, "bicubic", [3]),
    "size": (0, "224", {"shortest_edge": -1}, {"height": 8, "width": 9}, {"longest_edge": 9}, 10**30),
    "crop_size": (16, 64, {"height": 32, "width": 31}, {"height": 32}, 1.5),
    "do_center_crop": (False, 1),
    "do_rescale": ("no",),
    "rescale_factor": (0, -1, "1/255", [1]),
    "image_mean": ([1, 2], 0.5),
    "image_std": ([0, 1, 1], [1e300] * 3),
    "image_processor_type": ("SiglipImageProcessor", 3),
    "use_square_size": (True,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, some in REJECTED.items() for value in some])
def test_unsupported_values_are_rejected(field, value):
    with pytest.raises(FieldError) as caught:
        read(**{field: value})
    assert caught.value.path == "preprocessor_config.json"
    assert caught.value.field == field or caught.value.field.startswith(f"{field}.")


def test_unknown_fields_cause_a_warning():
    assert read(do_convert_rgb=True, processor_class="CLIPProcessor", new_thing=None).preprocessing == OWN
    with pytest.warns(WeightsWarning, match="preprocessor_config.json.*new_thing 3"):
        read(new_thing=3)


def test_export_inverts_import():
    for how in (OWN, Preprocessing("lanczos", "exact", SIDE, SIDE), Preprocessing("bilinear", size=40, crop=SIDE)):
        file = processor_file(how, SIDE, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert read_processor(Section(json.loads(json.dumps(file)), ""), SIDE)[0] == how
    assert read_processor(Section(processor_file(Preprocessing(size=9), SIDE, (0,) * 3, (1,) * 3), ""), SIDE)[0] == OWN


def test_the_preprocessing_of_openclip():
    def cfg(**fields):
        return read_preprocess_cfg(Section(fields, "open_clip_config.json", "preprocess_cfg."), SIDE)

    own = released_processor(SIDE)
    assert cfg() == own and own.preprocessing.crop_rounding == "even"
    squashed = cfg(size=[SIDE, SIDE], interpolation="bilinear", resize_mode="squash", mode="RGB", fill_color=0)
    assert squashed.preprocessing == Preprocessing("bilinear", "exact", SIDE, SIDE, "even")
    for field, value in (("size", 33), ("size", [32, 64]), ("interpolation", "random"), ("resize_mode", "longest")):
        with pytest.raises(FieldError, check=mentions(field=f"preprocess_cfg.{field}")):
            cfg(**{field: value})
    with pytest.raises(FieldError, check=mentions(field="preprocess_cfg.mode")):
        cfg(mode="L")


def test_a_portrait_image_is_cropped_as_by_openai():
    image = np.random.default_rng(0).integers(0, 256, (71, 45, 3), dtype=np.uint8)
    resized = Image.fromarray(image).resize((SIDE, int(SIDE * 71 / 45)), Image.Resampling.BICUBIC)
    top = round((resized.height - SIDE) / 2)
    expected = np.asarray(resized.crop((0, top, SIDE, top + SIDE)))
    np.testing.assert_array_equal(preprocess(image, released_processor(SIDE).preprocessing, SIDE), expected)
