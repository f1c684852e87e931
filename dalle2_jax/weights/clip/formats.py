"""Detects which public format of CLIP a file or folder has."""

from dalle2_jax.weights.clip import open_clip, openai, transformers
from dalle2_jax.weights.component import Component, Source


def detect(source: Source, kind: str = "auto") -> list[Component]:
    """Returns the CLIP, or the tower of one, in a file or folder; [] if there is none.

    Args:
        source: the file or folder.
        kind: one of ``kinds.CLIP_KINDS``, or "auto". It decides ambiguous cases: a state dict that OpenAI or OpenCLIP
            may have written, and a folder with the files of both OpenCLIP and transformers.

    Raises:
        WeightsError: it is a CLIP, but damaged or of an unsupported architecture.
    """
    found = transformers.detect(source) if kind in ("auto", "hf_clip") else []
    if found or kind == "hf_clip":
        return found
    return open_clip.detect(source) or openai.detect(source, kind)
