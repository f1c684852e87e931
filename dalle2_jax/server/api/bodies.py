"""The parameters of requests: their types and ranges, and how they become a `Task`.

OpenAI's names and limits where it has them. The settings of sampling (``seed``, ``decoder``, ...) are those of
`SampleOptions`.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dalle2_jax.errors import UsageError, choose
from dalle2_jax.server.api.errors import ApiError, invalid
from dalle2_jax.system.editing.frames import DEPTH
from dalle2_jax.system.options import SampleOptions

MAX_PROMPT, MAX_IMAGES, MAX_FRAMES = 1_000, 10, 32

STAGES = ("prior", "decoder", "upsampler_1", "upsampler_2")

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def _check_text(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("has control characters, or is not valid Unicode")
    return text


Text = Annotated[str, Field(max_length=MAX_PROMPT), AfterValidator(_check_text)]
"""A caption, which may be empty."""

Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT), AfterValidator(_check_text)]

Encoded = Annotated[str, Field(min_length=1, description="an image file in base64, or a data URL")]

Settings = dict[str, int | float | str | bool | None | list[float]]
"""Settings of a stage."""

Fraction = Annotated[float, Field(ge=0, le=1)]


class Body(BaseModel):
    """What every request that generates images has."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, max_length=200, description="the name of a system; the first one by default")
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="images, or sequences of frames")
    size: str | None = Field(None, max_length=20, description="as 64x64; the system's largest by default")
    resize: bool = Field(False, description="whether sizes that the system does not generate are resampled")
    response_format: Literal["url", "b64_json"] = "url"
    user: str | None = Field(None, max_length=512)
    quality: Literal["standard", "auto"] | None = Field(None, description="accepted for OpenAI's clients")
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="a random one by default; it is in the answer")
    candidates: int | None = Field(None, ge=1, le=16, description="embeddings that the prior samples for each image")
    prior: Settings | None = Field(None, max_length=20, description="settings of sampling of a stage")
    decoder: Settings | None = Field(None, max_length=20)
    upsampler_1: Settings | None = Field(None, max_length=20)
    upsampler_2: Settings | None = Field(None, max_length=20)


class Generation(Body):
    """``POST /v1/images/generations``."""

    prompt: Prompt


class Edit(Body):
    """``POST /v1/images/edits``, besides its files ``image`` and ``mask``."""

    prompt: Prompt


class Variation(Body):
    """``POST /v1/images/variations``, besides its file ``image``."""


class Background(Body):
    """What requests under ``/dalle2`` have in addition."""

    background: bool = Field(False, description="whether the answer is a job at once, and the images are fetched later")
    previews: bool = Field(False, description="whether the job reports each step with the predicted image")


class Text2Image(Background):
    """``POST /dalle2/text2image``."""

    prompt: Prompt


class Variations(Background):
    """``POST /dalle2/variations``: images with the embedding of an image (Ramesh et al. 2022, section 3.1)."""

    image: Encoded
    prompt: Text = ""
    eta: Fraction | None = Field(None, description="from the image's own noise: 0 reconstructs it, 1 varies most")


class Reconstruct(Background):
    """``POST /dalle2/reconstruct``: an image from its embedding and the noise that DDIM inversion finds."""

    image: Encoded
    prompt: Text = ""
    steps: int | None = Field(None, ge=1)


class Inpaint(Background):
    """``POST /dalle2/inpaint``: the transparent part of the mask, or of the image without one, is regenerated."""

    image: Encoded
    mask: Encoded | None = None
    prompt: Prompt | None = None
    resample: tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=10)]] | None = None


class Interpolate(Background):
    """``POST /dalle2/interpolate``: images between two (section 3.2)."""

    images: Annotated[list[Encoded], Field(min_length=2, max_length=2)]
    frames: int = Field(8, ge=2, le=MAX_FRAMES)
    eta: Fraction | None = None
    prompt: Text = ""


class TextDiff(Background):
    """``POST /dalle2/text_diff``: an image changed by the difference between two captions (section 3.3)."""

    image: Encoded
    before: Prompt
    after: Prompt
    frames: int = Field(8, ge=2, le=MAX_FRAMES)
    theta: Fraction = 0.5
    depth: Annotated[float, Field(gt=0, le=1)] = Field(
        DEPTH, description="share of the noise schedule that is inverted; small ones keep outlines and places"
    )
    prompt: Text | None = Field(None, description="a caption of all frames; by default ``after``")


class Embed(BaseModel):
    """``POST /dalle2/embed``: CLIP embeddings of captions and images."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=200)
    texts: Annotated[list[Text], Field(max_length=64)] = []
    images: Annotated[list[Encoded], Field(max_length=2)] = []


COMMANDS: Mapping[str, type[Background]] = {
    "text2image": Text2Image,
    "variations": Variations,
    "reconstruct": Reconstruct,
    "inpaint": Inpaint,
    "interpolate": Interpolate,
    "text_diff": TextDiff,
}

M = TypeVar("M", bound=BaseModel)


def parse_json(content: bytes) -> dict[str, Any]:
    """Returns the JSON object of a request. ApiError (400) if it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise invalid("the request is not valid JSON", None, "invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("the request must be a JSON object", None, "invalid_json")
    return value


def read_body(model: type[M], fields: Mapping[str, Any], strict: bool = True) -> M:
    """Returns the checked parameters of a request.

    Args:
      model: the class of the parameters.
      fields: name -> value.
      strict: whether values have their JSON types; form fields are text.

    Raises:
      ApiError: 400, with the name of the first parameter that is wrong.
    """
    for name in fields:
        try:
            choose("parameter", name, model.model_fields)
        except UsageError as error:
            raise invalid(str(error), name[:100], "unknown_parameter") from None
    try:
        _check_unicode(fields)
        return model.model_validate_json(json.dumps(fields), strict=True) if strict else model.model_validate(fields)
    except (ValidationError, ValueError, RecursionError) as error:
        raise _from_validation(error) from None


def _check_unicode(fields: Mapping[str, Any]) -> None:
    """Raises ApiError (400) for text that cannot be encoded: JSON's escapes may be halves of surrogate pairs."""
    for name, value in fields.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise invalid(f"{name} has text that is not valid Unicode", name) from None


def _from_validation(error: Exception) -> ApiError:
    if not isinstance(error, ValidationError):
        return invalid("the request has values that cannot be read", None, "invalid_json")
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int)]
    param = place[0] if place else None
    code = "missing_parameter" if first["type"] == "missing" else "invalid_value"
    return invalid(f"{'.'.join(place[:2]) or 'the request'}: {first['msg']}", param, code)


def form_fields(pairs: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields of a form with the settings of stages: ``decoder={"steps": 20}`` or ``decoder[steps]=20``."""
    fields: dict[str, Any] = {}
    for name, text in pairs.items():
        stage, bracket, setting = name.partition("[")
        if stage in STAGES and bracket and setting.endswith("]"):
            fields.setdefault(stage, {})[setting[:-1]] = _literal(text)
        elif name in STAGES:
            fields[name] = _literal(text)
        else:
            fields[name] = text
    return fields


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def side_of(size: str | None) -> int | None:
    """Returns the side of a square size such as "256x256". ApiError (400) for any other."""
    if size is None or size == "auto":
        return None
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", size, re.ASCII)
    if not found or found[1] != found[2]:
        raise invalid(f"size {size[:20]!r} must be a square such as 64x64", "size", "invalid_size")
    return int(found[1])


def sample_options(body: Body, seed: int, max_steps: int) -> SampleOptions:
    """Returns the options of sampling of a request.

    Raises:
      ApiError: 400, a stage has more steps than the server allows.
    """
    options: SampleOptions = {"num": body.n, "seed": seed, "candidates": body.candidates}
    for stage in STAGES:
        settings: dict[str, Any] | None = getattr(body, stage)
        if settings:
            _check_steps(settings, stage, max_steps)
            interval = settings.get("guidance_interval")
            if isinstance(interval, list):
                settings = {**settings, "guidance_interval": tuple(interval)}
            options[stage] = settings
    return options


def _check_steps(settings: Mapping[str, Any], stage: str, max_steps: int) -> None:
    """Raises ApiError if ``steps``, a number or a respacing such as "logsnr20" or "10,10,5", exceed the limit."""
    numbers = [int(number) for number in re.findall(r"\d{1,9}", str(settings.get("steps", "")))]
    if sum(numbers) > max_steps:
        raise invalid(f"{stage}.steps are more than the {max_steps} that this server allows", f"{stage}.steps")
