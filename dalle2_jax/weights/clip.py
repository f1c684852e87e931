"""Every public form of CLIP, in and out."""

from dalle2_jax.weights import clip_hf, clip_open, clip_openai
from dalle2_jax.weights.clip_hf import export_hf
from dalle2_jax.weights.clip_open import export_open_clip
from dalle2_jax.weights.clip_openai import export_openai
from dalle2_jax.weights.component import Component, Source

__all__ = ["KINDS", "export_hf", "export_open_clip", "export_openai", "recognise"]

KINDS = ("openai_clip", "open_clip", "hf_clip")
"""What a user may say that a file or folder is."""


def recognise(source: Source, kind: str = "auto") -> list[Component]:
    """Returns the CLIP, or the tower of one, that a file or folder holds; [] where it is something else.

    Args:
        source: what is looked at.
        kind: of `KINDS`, or "auto". It decides where two are possible: a state dict that OpenAI or OpenCLIP may have
            made, a folder with the files of both OpenCLIP and transformers.

    Raises:
        UserError: it is a CLIP, and damaged or with parts that are not known here.
    """
    transformers = clip_hf.recognise(source) if kind in ("auto", "hf_clip") else []
    if transformers or kind == "hf_clip":
        return transformers
    return clip_open.recognise(source) or clip_openai.recognise(source, kind)
