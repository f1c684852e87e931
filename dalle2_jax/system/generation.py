"""Runs the stages of one call and collects its images. The only module of the face that depends on `Cascade`."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float, UInt8

import dalle2_jax
from dalle2_jax.data.images.decoding import preprocess
from dalle2_jax.diffusion import Inpainting
from dalle2_jax.errors import SystemWarning
from dalle2_jax.files import write_png
from dalle2_jax.stages import ClipStage, EmbeddingContract, images
from dalle2_jax.system.cascade import Cascade, Request, Settings
from dalle2_jax.system.images import Images
from dalle2_jax.system.inputs import InputImage, square
from dalle2_jax.system.loaded_stage import LoadedStage
from dalle2_jax.system.options import Options, check_negative, sampling_configs
from dalle2_jax.training.sharding import batch_sharding

NO_IMAGE_EMB = "this system's decoder reads no image embedding: use text2image or inpaint"
"""Error of a method that needs an image embedding."""

IMAGE_STAGES = ("decoder", "upsampler_1", "upsampler_2")
"""The stages that generate images."""

Describe = Callable[[Request, UInt8[np.ndarray, "H W 3"]], tuple[str, Mapping[str, Any]]]
"""Returns the caption of an image, and what the provenance has of it in addition, as JSON types."""

Sampled = Iterator[tuple[Request, UInt8[np.ndarray, "H W 3"]]]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a method of `System` that generates images.

    Attributes:
      command: the method's name.
      system: the workdir.
      stages: the loaded stages that the call uses.
      mesh: where they run.
      options: of the call.
      inputs: arguments of the call for the provenance; those that are None are omitted.
    """

    command: str
    system: Path
    stages: Mapping[str, LoadedStage]
    mesh: jax.sharding.Mesh
    options: Options
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def with_inputs(self, **inputs: Any) -> "Call":
        """Returns the call with more arguments for the provenance."""
        return dataclasses.replace(self, inputs={**self.inputs, **inputs})

    def requests(self, prompts: Sequence[str]) -> list[Request]:
        """Returns ``num`` requests for each prompt.

        Raises:
          UsageError: they are too many.
        """
        self.options.check_count(len(prompts))
        return [Request(prompt, i, j) for i, prompt in enumerate(prompts) for j in range(self.options.num)]


class Generator(Cascade):
    """The cascade of a call."""

    def __init__(self, call: Call):
        self.call = call
        self.sampling = sampling_configs(call.stages, call.options.settings)
        check_negative(call.stages, call.options.negative, self.sampling)
        settings = Settings(call.options.seed, self.sampling, call.options.candidates, call.options.negative)
        super().__init__(call.stages, settings, batch_sharding(call.mesh), call.mesh.size)

    def decoder_input(self, inputs: Sequence[InputImage]) -> UInt8[np.ndarray, "N H W 3"]:
        """Returns the central square of images, at the decoder's size."""
        return self.squares(inputs, self._side("decoder"))

    def output_sized(self, inputs: Sequence[InputImage]) -> UInt8[np.ndarray, "N H W 3"]:
        """Returns the central square of images, at the size of generated images."""
        return self.squares(inputs, self.output_side)

    @property
    def output_side(self) -> int:
        """Side of generated images, in pixels."""
        return self._side(self.last_stage)

    @property
    def last_stage(self) -> str:
        """Name of the stage whose images are the result."""
        return [name for name in IMAGE_STAGES if name in self.call.stages][-1]

    @staticmethod
    def squares(inputs: Sequence[InputImage], side: int) -> UInt8[np.ndarray, "N S S 3"]:
        """Returns the central square of images, at a size."""
        return np.stack([square(image.pixels, side) for image in inputs])

    def known(self, image: InputImage, regenerated: np.ndarray) -> dict[str, Inpainting]:
        """Returns the part of an image that inpainting keeps, at the size of each stage.

        A pixel of a smaller size is kept only if none of it is regenerated.

        Args:
          image: the image.
          regenerated: bool[H, W], where it is regenerated.
        """
        mask = np.where(regenerated[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=2)
        known = {}
        for name in (name for name in IMAGE_STAGES if name in self.call.stages):
            side = self._side(name)
            pixels = jnp.asarray(square(image.pixels, side)[None])
            known[name] = Inpainting(images.to_float(pixels), jnp.asarray(square(mask, side)[None][..., :1] == 0))
        return known

    def _side(self, name: str) -> int:
        """Returns the side of the images that a stage generates."""
        return cast(int, self.call.stages[name].stage.image_size)


def clip_input(clip: LoadedStage, inputs: Sequence[InputImage]) -> UInt8[np.ndarray, "N S S 3"]:
    """Returns images resized and cropped as a CLIP does it, by the preprocessing of its embedding contract."""
    side = cast(ClipStage, clip.stage).model.tower.image_size
    how = cast(EmbeddingContract, clip.contract).preprocessing
    return np.stack([preprocess(image.pixels, how, side) for image in inputs])


def text2image(call: Call, prompts: Sequence[str]) -> Images:
    """Generates images for captions; an empty caption is unconditional."""
    generator, requests = Generator(call), call.requests(prompts)
    warn_of_truncation(call.stages, prompts)
    sampled = generator.text2image(requests, call.options.batch_size, call.options.callback)
    return collect(generator, requests, sampled, [request.prompt for request in requests])


def decode(call: Call, image_emb: Float[np.ndarray, "N E"] | None, prompts: Sequence[str]) -> Images:
    """Generates images for image embeddings, each with its prompt; for prompts alone without embeddings."""
    generator, requests = Generator(call), call.requests(prompts)
    warn_of_truncation(call.stages, prompts)
    sampled = generator.decode(requests, call.options.batch_size, image_emb, callback=call.options.callback)
    return collect(generator, requests, sampled, [request.prompt for request in requests])


def warn_of_truncation(stages: Mapping[str, LoadedStage], prompts: Sequence[str]) -> None:
    """Warns of prompts that have more tokens than a stage reads."""
    for name, member in stages.items():
        if member.tokenizer is None or name == "clip":
            continue
        for i in member.tokenizer.truncated(prompts, member.context_length):
            limit = f"the {name}'s {member.context_length} tokens"
            warnings.warn(f"prompt {i} is longer than {limit}; its end is not read", SystemWarning, stacklevel=4)


def collect(
    generator: Generator,
    requests: Sequence[Request],
    sampled: Sampled,
    captions: Sequence[str] | Describe,
    columns: int | None = None,
) -> Images:
    """Generates all images of a call; saves each as soon as it is generated if the options name a folder.

    Args:
      generator: of the call.
      requests: one for each image.
      sampled: what the generator yields for them.
      captions: one for each image, or a function of the request and the image.
      columns: of the grid; None makes a row of each caption's images, of at least four.
    """
    options = generator.call.options
    out = None if options.out is None else Path(options.out).expanduser()
    bar = tqdm.tqdm(sampled, total=len(requests), desc="sampling", unit="image", disable=not options.progress)
    pixels, texts, details = [], [], []
    for request, image in bar:
        if out is not None:
            write_png(out / file_name(request), image)
        text, about = captions(request, image) if callable(captions) else (captions[len(pixels)], {})
        pixels.append(image)
        texts.append(text)
        details.append(about)
    columns = columns or max(options.num, 4)
    recorded = provenance(generator, requests)
    for record, about in zip(recorded["pictures"], details, strict=True):
        record |= about
    collected = Images(np.stack(pixels), tuple(texts), recorded, columns)
    if out is not None:
        collected.save_summary(out)
    return collected


def file_name(request: Request) -> str:
    """Returns the name of an image's file."""
    return f"{request.index}_{request.sample}.png"


def provenance(generator: Generator, requests: Sequence[Request]) -> dict[str, Any]:
    """Returns all that is needed to generate each image again, as JSON types."""
    call = generator.call
    clip = call.stages.get("clip")
    return {
        "command": call.command,
        **{name: value for name, value in call.inputs.items() if value is not None},
        "system": str(call.system),
        "clip": clip and clip.contract and clip.contract.clip,
        "checkpoints": {name: member.step for name, member in call.stages.items()},
        "seed": call.options.seed,
        "candidates": generator.candidates,
        **({"negative": call.options.negative} if call.options.negative else {}),
        "sampling": {name: dataclasses.asdict(config) for name, config in generator.sampling.items()},
        "versions": {"dalle2_jax": dalle2_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
        "pictures": [
            {"file": file_name(r), "prompt": r.prompt, "index": r.index, "sample": r.sample} for r in requests
        ],
    }
