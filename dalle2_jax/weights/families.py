"""The public families: what a file or folder is, asked of each family's module in turn."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dalle2_jax.types import UserError, choose
from dalle2_jax.weights import clip, glide, guided, karlo, karlo_files, laion, priors
from dalle2_jax.weights.component import Component, Hints, Source
from dalle2_jax.weights.rules import Rule
from dalle2_jax.weights.tensors import SAFETENSORS_SUFFIX, TORCH_SUFFIXES

Recogniser = Callable[[Source], list[Component]]

KINDS: Mapping[str, tuple[Recogniser, ...]] = {
    "karlo": (karlo.recognise, karlo_files.recognise),
    "kandinsky": (priors.recognise,),
    "eclipse": (priors.recognise,),
    "laion": (laion.recognise,),
    "glide": (glide.recognise,),
    "adm": (guided.recognise,),
    **{kind: (partial(clip.recognise, kind=kind),) for kind in clip.KINDS},
}
"""What a user may say that a file or folder is."""

_ANY = (*dict.fromkeys(each for some in list(KINDS.values())[:-3] for each in some), clip.recognise)


class Found(NamedTuple):
    """What was found at a path, and the files there in which nothing was."""

    components: list[Component]
    unknown: list[Path]


def recognise(path: Path, kind: str = "auto", hints: Hints = Hints()) -> Found:
    """Returns what a file holds, or a folder: as a whole, or else each file of weights in it.

    Args:
        path: of the file or folder.
        kind: of `KINDS`, or "auto".
        hints: what a user knows of it.

    Raises:
        UserError: nothing there is known here, or what is known is damaged.
    """
    recognisers = _ANY if kind == "auto" else choose("kind of weights", kind, {"auto": (), **KINDS})
    found = _first(recognisers, Source.open(path, hints))
    unknown: list[Path] = []
    if not found and path.is_dir():
        for file in sorted(each for each in path.iterdir() if each.suffix in (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)):
            parts = _first(recognisers, Source.open(file, hints))
            found += parts
            unknown += [] if parts else [file]
    if not found:
        what = "none of the families known here" if kind == "auto" else f"no {kind} checkpoint"
        raise UserError(f"{path} is {what} (known are {', '.join(KINDS)})")
    return Found(found, unknown)


def _first(recognisers: tuple[Recogniser, ...], source: Source) -> list[Component]:
    return next(filter(None, (each(source) for each in recognisers)), [])


def parameters(component: Component) -> int:
    """Returns the number of a component's parameters and statistics."""
    return sum(_size(component, rule) for rule in (*component.params, *component.stats))


def _size(component: Component, rule: Rule) -> int:
    count = 0
    for key in rule.keys:
        size = 1
        for side in component.tensors[key].shape if key in component.tensors else ():
            size *= side
        count += size
    return count


_EMBEDDED = ("out_proj/bias", "null_image_emb", "transformer/blocks/attn/ln_out/scale")
"""Leaves that have the image embedding's width: of a prior, of a decoder, of LAION's prior."""


def embedding_width(component: Component) -> int | None:
    """Returns how wide the CLIP embeddings are that a component makes or takes; None where it takes none."""
    if component.stage == "clip":
        return component.config["model"]["embed_dim"]
    for rule in component.params:
        if rule.path in _EMBEDDED and rule.keys[0] in component.tensors:
            return component.tensors[rule.keys[0]].shape[-1]
    return None
