"""Exports a system, or its CLIP, in the layouts of other libraries."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dalle2_jax.errors import choose
from dalle2_jax.pretrained import find_system
from dalle2_jax.system.load import load_system
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights.clip.open_clip import export_open_clip
from dalle2_jax.weights.clip.openai import export_openai
from dalle2_jax.weights.clip.transformers import export_hf
from dalle2_jax.weights.karlo.export import TrainedStage, export_diffusers
from dalle2_jax.weights.kinds import EXPORT_DTYPES, FORMS
from dalle2_jax.weights.stage_writer import Trees, write_folder

_DTYPES: Mapping[str, Any] = dict(zip(EXPORT_DTYPES, (np.float32, ml_dtypes.bfloat16, np.float16), strict=True))


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Attributes:
        path: the folder that was written.
        stages: names of the exported stages.
    """

    path: Path
    stages: tuple[str, ...]


def export(
    system: str | os.PathLike[str], out: str | os.PathLike[str], *, form: str = "diffusers", dtype: str = "float32"
) -> ExportReport:
    """Writes the averaged weights of a system, or of its CLIP, in the layout of another library.

    The folder appears under its name only when it is complete, with the digests of its files.

    Args:
        system: folder of the system, or the name of a system that comes with the package.
        out: folder to create.
        form: "diffusers" for an UnCLIPPipeline of all stages; "hf_clip" (transformers), "openai_clip" or "open_clip"
            for the CLIP.
        dtype: dtype of the tensors, "float32", "bfloat16" or "float16".

    Raises:
        WeightsError: the other library has no such networks; the message names the stage and the property.
        WeightsError: the system cannot be loaded.
        UsageError: an unknown form or dtype.
    """
    write, names = choose("form", form, _WRITERS)
    array_dtype = choose("dtype", dtype, _DTYPES)
    members = load_system(find_system(system), make_mesh(MeshConfig()), names)
    stages = {
        name: TrainedStage(each.stage, Trees(each.variables.params, each.variables.stats), each.tokenizer)
        for name, each in members.items()
    }
    path = Path(out).expanduser()
    write_folder(path, lambda folder: write(folder, stages, array_dtype))
    return ExportReport(path, tuple(members))


def _hf_clip(folder: Path, stages: Mapping[str, TrainedStage], dtype: Any) -> None:
    clip = stages["clip"]
    export_hf(folder, clip.stage.model, clip.trees, clip.tokenizer, dtype, clip.stage.preprocessing)


def _openai_clip(folder: Path, stages: Mapping[str, TrainedStage], dtype: Any) -> None:
    export_openai(folder / "clip.safetensors", stages["clip"].stage.model, stages["clip"].trees, dtype)


def _open_clip(folder: Path, stages: Mapping[str, TrainedStage], dtype: Any) -> None:
    export_open_clip(folder, stages["clip"].stage.model, stages["clip"].trees, dtype)


Writer = Callable[[Path, Mapping[str, TrainedStage], Any], None]

_CLIP = ("clip",)
_WRITERS: Mapping[str, tuple[Writer, tuple[str, ...]]] = dict(
    zip(
        FORMS,
        ((export_diffusers, ()), (_hf_clip, _CLIP), (_openai_clip, _CLIP), (_open_clip, _CLIP)),
        strict=True,
    )
)
"""For each form the function that writes it, and the stages that it needs; () for all stages of the system."""
