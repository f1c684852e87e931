"""Measures of a system's CLIP: retrieval, zero-shot classification, linear probe (Radford et al. 2021, section 3), and
binding."""

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from dalle2_jax import data
from dalle2_jax.errors import ConfigError, DataError, UserError
from dalle2_jax.evaluation import examples
from dalle2_jax.evaluation.context import Context, unit
from dalle2_jax.evaluation.distances.moments import Moments
from dalle2_jax.evaluation.figures import Figure, Figures, share_of
from dalle2_jax.evaluation.registry import MEASURES
from dalle2_jax.system.editing.components import Components
from dalle2_jax.workdir.folder import StageFolder

RANKS = (1, 5, 10)
"""k of recall@k."""

TEMPLATES = ("{}", "a {}", "an image of a {}", "a photo of a {}")
"""Captions of a class; its text embedding is the mean over them (Radford et al. 2021, section 3.1.4)."""

SHAPES_TEMPLATES = ("a small {}", "a large {}")
"""Captions of a class of shapes, those of the grammar."""

MAX_CLASSES = 10_000
"""Classes of a classification, and examples whose classes are known to it in addition to those that are measured."""

RETAINED = (90, 95, 99)
"""Percentages of the variance of embeddings."""

PROBED = 4
"""Training examples of the linear probe for each example that it is measured on, where the data have as many."""

EXCHANGED = ("colour", "shape", "size", "place")
"""What captions exchange between two objects, see ``ShapesSource.contrasts``."""

_INVERSE_REGULARISATION = 3.16
"""C of the logistic regression, of scikit-learn's convention; 0.316 per example of the paper at its sizes."""


def retrieval(context: Context, num: int) -> Figures:
    """Measures how often an image's own caption is among the k nearest of N, and the reverse (recall@k)."""
    found = context.embedded(num)
    similarity = found.image_emb @ found.text_emb.T
    figures: Figures = {}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        for k in (k for k in RANKS if k < len(scores) or k == 1):
            chance = Figure(min(1.0, k / len(scores)), len(scores), share=True)
            figures[f"{name}_at_{k}"] = share_of(own_rank(scores) < k).compared(chance, "chance")
    return figures


def own_rank(similarity: Float[np.ndarray, "N N"]) -> Int[np.ndarray, "N"]:
    """Returns the rank from 0 of the diagonal in each row; of equal values the diagonal is the last."""
    own = np.diagonal(similarity)[:, None]
    others = ~np.eye(len(similarity), dtype=bool)
    return ((similarity >= own) & others).sum(axis=1)


def binding(context: Context, num: int) -> Figures:
    """Measures how often an image is closer to its caption than to the one that exchanges what belongs to two objects.

    Both captions have the same words but for the relation, so that an encoder of words without their order finds half
    of them (Ramesh et al. 2022, section 7, on binding). ``all`` counts the images that are closer to their caption than
    to every exchanged one; its chance depends on how many there are.

    Raises:
      UserError: the data are not scenes of ``shapes`` with two objects, or too few.
    """
    source = _two_objects(context)
    contrasts = ((index, source.contrasts(index)) for index in range(len(source)))
    chosen = dict(itertools.islice((one for one in contrasts if one[1]), num))
    if num > len(chosen):
        raise UserError(f"num {num} is more than the {len(chosen)} scenes of two objects in {source}: reduce num")
    texts = [text for index, others in chosen.items() for text in (source.caption(index), *others.values())]
    text_emb = iter(unit(context.system.embed_text(texts)))
    image_emb = examples.embed_images(context.system, source, list(chosen))
    nearer: dict[str, list[bool]] = {name: [] for name in EXCHANGED}
    nearest: list[bool] = []
    for emb, others in zip(image_emb, chosen.values(), strict=True):
        own = emb @ next(text_emb)
        hits = {name: bool(own > emb @ next(text_emb)) for name in others}
        for name, hit in hits.items():
            nearer[name].append(hit)
        nearest.append(all(hits.values()))
    shares = {name: share_of(hits) for name, hits in nearer.items() if hits}
    half = {name: Figure(0.5, share.n, share=True) for name, share in shares.items()}
    return {name: share.compared(half[name], "chance") for name, share in shares.items()} | {"all": share_of(nearest)}


def check_binding(context: Context, num: int) -> None:
    """Raises UserError unless the data are scenes of ``shapes`` with two objects, and enough of them."""
    examples.check_count(num, _two_objects(context))


def _two_objects(context: Context) -> data.ShapesSource:
    source = context.clip_source
    if not isinstance(source, data.ShapesSource) or source.max_objects == 1:
        raise UserError(
            f"binding is measured on generated shapes of two objects (max_objects=2), the data are {source}"
        )
    return source


def zero_shot(context: Context, num: int) -> Figures:
    """Measures how often the text embedding of an image's class is the nearest of all classes."""
    source = context.clip_source
    examples.check_count(num, source)
    indices = range(num)
    labels = classes_of(context, source, indices)
    names = sorted({*labels, *classes_of(context, source, range(min(len(source), MAX_CLASSES)))})
    given = context.options.templates
    templates = given or (SHAPES_TEMPLATES if isinstance(source, data.ShapesSource) else TEMPLATES)
    class_emb = unit(
        np.mean([unit(context.system.embed_text([t.replace("{}", name) for name in names])) for t in templates], axis=0)
    )
    similarity = examples.embed_images(context.system, source, indices) @ class_emb.T
    own = np.asarray([names.index(label) for label in labels])
    figures: Figures = {}
    for k in (k for k in (1, 5) if k < len(names)):
        hits = _nearest(similarity, own, k)
        chance = Figure(k / len(names), num, share=True)
        figures[f"top_{k}"] = share_of(hits).compared(chance, f"chance of {len(names)} classes")
    return figures


def _nearest(similarity: Float[np.ndarray, "N K"], own: Int[np.ndarray, "N"], k: int) -> Bool[np.ndarray, "N"]:
    values = similarity[np.arange(len(own)), own][:, None]
    return (similarity > values).sum(axis=1) < k


def linear_probe(context: Context, num: int) -> Figures:
    """Measures how often logistic regression on the image embeddings finds the class.

    It is trained on split "train". Where that is the split that is measured, or the data have no splits, it is trained
    on the examples after the measured ones.
    """
    source = context.clip_source
    examples.check_count(num, source)
    apart = context.divided and context.split != "train"
    train, first = (context.open("clip", "train"), 0) if apart else (source, num)
    training = range(first, min(len(train), first + PROBED * num))
    if not len(training):
        raise DataError(f"num {num} leaves no other example of split train to train the probe on: reduce num")
    labels, known = classes_of(context, source, range(num)), classes_of(context, train, training)
    if len({*known}) < 2:
        raise DataError(f"the linear probe needs examples of two classes, and {len(training)} of {train} have one")
    probe = LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=1_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        probe.fit(_scaled(examples.embed_images(context.system, train, training)), known)
    read = probe.predict(_scaled(examples.embed_images(context.system, source, range(num))))
    most = max({*known}, key=known.count)
    common = share_of([label == most for label in labels])
    return {"accuracy": share_of(np.equal(read, labels)).compared(common, "the most common class")}


def components(context: Context, num: int) -> Figures:
    """Measures the principal components of image embeddings, and stores them with CLIP for ``reconstruct``.

    The figures are the numbers of components that retain 90, 95 and 99 % of the variance, and the rank.

    Raises:
      UserError: fewer than two examples, or embeddings that do not vary.
    """
    source = context.open("clip", context.options.split or MEASURES["components"].split)
    num = num if context.options.num is not None else min(num, len(source))
    examples.check_count(num, source)
    images, clip, moments = source.select(("image",)), context.stage("clip"), Moments()
    for start in range(0, num, examples.CHUNK):
        indices = range(start, min(num, start + examples.CHUNK))
        moments.update(context.system.embed_image(images.fetch(indices)["image"]))
    statistics = moments.statistics()
    found = Components.of(statistics.mean, statistics.covariance, num)
    if not found.variances[0] > 0:
        raise UserError(f"the embeddings of {num} images do not vary: they have no principal components")
    found.write(StageFolder(context.system.path, "clip"), clip.step)
    figures: Figures = {f"components_{percent}": Figure(found.needed(percent / 100), num) for percent in RETAINED}
    return {**figures, "rank": Figure(found.rank, num)}


def _scaled(emb: np.ndarray) -> np.ndarray:
    """Returns unit embeddings with unit variance per dimension on average, as the regularisation assumes."""
    return emb * np.float32(emb.shape[1] ** 0.5)


def classes_of(context: Context, source: data.Source, indices: Sequence[int]) -> list[str]:
    """Returns the class of each example: the field that the user names, or the object of shapes.

    Raises:
      ConfigError: no field is named.
      DataError: the records have no such field, or there are too few or too many classes.
    """
    name = context.options.label or ("object" if isinstance(source, data.ShapesSource) else None)
    if name is None:
        known = ", ".join(examples.record_fields(source, 0)) or "none"
        raise ConfigError(f"label is not set: name the field that is the class (the data have: {known})", "label")
    labels = examples.fields(source, indices, name)
    if not 1 < len({*labels}) <= MAX_CLASSES:
        found = len({*labels})
        raise DataError(f"field {name!r} has {found} classes in {len(labels)} examples: classification needs 2 or more")
    return labels
