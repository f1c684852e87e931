"""Image preprocessing of published CLIPs: transformers' preprocessor_config.json and OpenCLIP's preprocess_cfg.

Both describe how an image is resized and cropped (`Preprocessing`), and how its values u in 0..255 are normalised:

    (u * rescale_factor - mean) / std

Networks here normalise u / 255. For another rescale_factor f, mean and std are therefore divided by 255 f.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dalle2_jax.errors import shown
from dalle2_jax.models.clip import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD
from dalle2_jax.types import Preprocessing
from dalle2_jax.weights.config_files import Known, Section

PROCESSOR_FILE = "preprocessor_config.json"

_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the supported resampling filters."""

_PROCESSOR = Known(
    (
        *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
        *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    ),
    {"use_square_size": False},
    r"image_processor_type|feature_extractor_type|processor_class|do_convert_rgb|_valid_processor_keys|_name_or_path"
    r"|return_tensors|data_format|input_data_format|device|disable_grouping|default_to_square|auto_map|do_pad|pad_size",
)
_PREPROCESS = Known(("size", "mean", "std", "interpolation", "resize_mode"), {"mode": "RGB"}, "fill_color")

Triple = tuple[float, float, float]


class Processor(NamedTuple):
    """Preprocessing of CLIP's images.

    Attributes:
        preprocessing: how they are resized and cropped.
        mean: mean of each channel of images in [0, 1].
        std: standard deviation of each channel.
    """

    preprocessing: Preprocessing
    mean: Triple = CLIP_IMAGE_MEAN
    std: Triple = CLIP_IMAGE_STD


def released_processor(side: int, rounding: str = "even") -> Processor:
    """Returns the preprocessing of the released CLIPs: bicubic resize of the shorter side, then a central square.

    Args:
        side: side of the image tower's input, in pixels.
        rounding: rounding of an odd margin: "even" in OpenAI's and OpenCLIP's code (torchvision's CenterCrop),
            "floor" in transformers.
    """
    return Processor(Preprocessing("bicubic", "shortest", side, side, rounding))


def read_processor(section: Section, side: int) -> Processor:
    """Reads preprocessor_config.json of a CLIPImageProcessor, or of the older CLIPFeatureExtractor.

    Args:
        section: the file.
        side: side of the image tower's input, in pixels.

    Raises:
        FieldError: images are resized, cropped or normalised in an unsupported way.
    """
    section.check(_PROCESSOR)
    for name in ("image_processor_type", "feature_extractor_type"):
        kind = section.optional_string(name)
        if kind is not None and not kind.startswith("CLIP"):
            raise section.error(name, f"{shown(kind)} is not supported: it must be CLIPImageProcessor")
    if not section.boolean("do_resize", True):
        raise section.error("do_resize", "False is not supported: images may have any size")
    number = section.content.get("resample", 3)
    if type(number) is not int or number not in _FILTERS:
        known = ", ".join(f"{each} ({name})" for each, name in _FILTERS.items())
        raise section.error("resample", f"{shown(number)} is not supported: it must be one of {known}")
    resize, size = _size(section, side)
    crop, crops = size, section.boolean("do_center_crop", True)
    if crops:
        crop = _square(section, "crop_size", side)
    elif resize == "shortest":
        raise section.error("do_center_crop", "False is only supported if size is a square")
    if crop > size:
        raise section.error("crop_size", f"{crop} is larger than size, {size}: padding is not supported")
    if crop != side:
        raise section.error("crop_size" if crops else "size", f"{crop} is not the image tower's image_size, {side}")
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if section.boolean("do_normalize", True):
        mean, std = normalisation(section, ("image_mean", "image_std"))
    factor = section.number("rescale_factor", 1 / 255, least=1e-9) if section.boolean("do_rescale", True) else 1.0
    if abs(255 * factor - 1) > 1e-6:
        mean, std = (_triple(value / (255 * factor) for value in values) for values in (mean, std))
    return Processor(Preprocessing(_FILTERS[number], resize, size, crop), mean, std)


def _size(section: Section, side: int) -> tuple[str, int]:
    """Returns (resize mode "shortest" or "exact", size in pixels)."""
    value = section.content.get("size")
    if isinstance(value, Mapping) and "shortest_edge" not in value:
        return "exact", _square(section, "size", side)
    if isinstance(value, Mapping):
        return "shortest", section.section("size").positive_int("shortest_edge")
    return "shortest", section.positive_int("size", side) if value is not None else side


def _square(section: Section, name: str, side: int) -> int:
    """Returns the side of a square, given as a number or as equal height and width; ``side`` if it is missing."""
    value = section.content.get(name)
    if value is None:
        return side
    if not isinstance(value, Mapping):
        return section.positive_int(name)
    height, width = (section.section(name).positive_int(edge) for edge in ("height", "width"))
    if height != width:
        raise section.error(name, f"{shown(dict(value))} is not supported: height and width must be equal")
    return height


def read_preprocess_cfg(section: Section, side: int) -> Processor:
    """Reads preprocess_cfg of open_clip_config.json; arguments and errors as `read_processor`."""
    section.check(_PREPROCESS)
    filters = ("bicubic", "bilinear")
    interpolation = section.string("interpolation", filters, "bicubic")
    mode = section.string("resize_mode", ("shortest", "squash"), "shortest")
    size = section.content.get("size")
    sides = section.positive_ints("size") if size is not None else [side]
    if {*sides} != {side} or len(sides) > 2:
        raise section.error("size", f"{shown(size)} is not the image tower's image_size, {side}")
    how = Preprocessing(interpolation, "exact" if mode == "squash" else "shortest", side, side, "even")
    return Processor(how, *normalisation(section, ("mean", "std")))


def normalisation(section: Section, names: tuple[str, str]) -> tuple[Triple, Triple]:
    """Returns the mean and standard deviation with which images in [0, 1] are normalised; by default OpenAI's.

    Args:
        section: the section that holds them.
        names: names of the two fields.

    Raises:
        FieldError: one of them is not three numbers, or a standard deviation is not positive.
    """
    usual = zip(names, (CLIP_IMAGE_MEAN, CLIP_IMAGE_STD), strict=True)
    found = [section.content.get(name, values) for name, values in usual]
    for name, values in zip(names, found, strict=True):
        numbers = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != 3 or (name == names[1] and min(values) <= 0) or max(map(abs, values)) > 1e9:
            raise section.error(name, f"must be three numbers (positive ones for a std), got {shown(values)}")
    mean, std = map(_triple, found)
    return mean, std


def _triple(values: Iterable[float]) -> Triple:
    red, green, blue = map(float, values)
    return red, green, blue


def processor_file(how: Preprocessing, side: int, mean: Triple, std: Triple) -> dict[str, Any]:
    """Returns preprocessor_config.json of transformers' CLIPImageProcessor.

    A CLIP that was trained here on area-resized images is exported with bicubic, the closest filter of transformers.
    """
    numbers = {name: number for number, name in _FILTERS.items()}
    own = how.resample in numbers
    size = how.size or side if own else side
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size} if how.resize == "shortest" else {"height": size, "width": size},
        "resample": numbers[how.resample] if own else numbers["bicubic"],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
