"""Measures of generated images over the features of a network, and over CLIP's embeddings.

Figures over FID's Inception are called FID, KID and IS; those over any other network have its name, as in FD-VGG16.
"""

import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8

from dalle2_jax import data
from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.evaluation import distances, intervals, references
from dalle2_jax.evaluation.context import Context
from dalle2_jax.evaluation.distances import Statistics
from dalle2_jax.evaluation.features import FeatureNetwork
from dalle2_jax.evaluation.figures import SHUFFLED, Figure, Figures, mean_of, share_of
from dalle2_jax.evaluation.references import origin_of

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1_000
"""Subsets of published KIDs; of fewer images each subset has half of them."""

_HALVES = "two halves of the real images"

_CANDIDATES = 10
"""Training images that LPIPS compares with each sample, those of the nearest features."""

_NEIGHBOURS = 5
"""Neighbour that gives the radius of density and coverage, as in Naeem et al. 2020."""

_SPLITS = 10
"""Splits of the Inception score."""

MAX_TRAINING = 50_000
"""Training images that samples are compared with."""


def named_networks(context: Context) -> tuple[FeatureNetwork, ...]:
    """Returns the networks that the user names. ConfigError if there are none, with the command that imports one."""
    if not context.networks:
        raise ConfigError(
            "features is not set: import a network with `dalle2 weights import auto FILE runs/features`, and name its "
            "folder with --features",
            "features",
        )
    return context.networks


def _generated(context: Context, network: FeatureNetwork, num: int) -> Float32[np.ndarray, "N D"]:
    return context.samples(num).features(network, num)


def _real(context: Context, network: FeatureNetwork, num: int) -> Float32[np.ndarray, "N D"]:
    """Returns the features of the real images, computed once for all measures."""

    def make() -> np.ndarray:
        return references.real_features(network, context.source, context.real_indices(num), context.options.progress)

    return context.once(("real", network.name, network.fingerprint, num), make)


def frechet(context: Context, num: int) -> Figures:
    """Returns the Fréchet distance to the real images, or to the statistics of ``reference``.

    The baseline is the distance between two halves of the real images, which sampling error alone causes.
    """
    figures: Figures = {}
    for network in named_networks(context):
        generated = _generated(context, network, num)
        origin = origin_of(network, context.size)
        if context.options.reference is not None:
            reference, real = Statistics.load(context.options.reference, origin), None
        else:
            real = _real(context, network, num)
            reference = Statistics.of(real, origin)
        distances.check_count(min(num, reference.n), network.dims)
        value = distances.frechet_distance(Statistics.of(generated, origin), reference)
        figure = Figure(value, num, distances.frechet_interval(generated, reference, real))
        if real is not None and len(real) // 2 > network.dims:
            halves = [Statistics.of(real[start::2], origin) for start in (0, 1)]
            figure = figure.compared(Figure(distances.frechet_distance(*halves), len(real) // 2), _HALVES)
        figures[network.measure_name("FD")] = figure
    return figures


def check_frechet(context: Context, num: int) -> None:
    """Raises UserError for fewer images than features, or networks that do not fit the reference."""
    for network in named_networks(context):
        distances.check_count(num, network.dims)
        if context.options.reference is not None:
            Statistics.load(context.options.reference, origin_of(network, context.size))


def kid(context: Context, num: int) -> Figures:
    """Returns the kernel distance to the real images; the baseline is that between two halves of them."""
    figures: Figures = {}
    for network in named_networks(context):
        generated, real = _generated(context, network, num), _real(context, network, num)
        figure = _kid(generated, real)
        if len(real) >= 8:
            figure = figure.compared(_kid(real[::2], real[1::2]), _HALVES)
        figures[network.measure_name("KID")] = figure
    return figures


def _kid(a: np.ndarray, b: np.ndarray) -> Figure:
    n = min(len(a), len(b))
    size = min(KID_SUBSET_SIZE, max(2, n // 2))
    value, values = distances.kid(a, b, KID_SUBSETS, size)
    return Figure(value, n, distances.kid_interval(values, size, n))


def check_kid(context: Context, num: int) -> None:
    """Raises UserError for fewer than four images, or without a network."""
    named_networks(context)
    if num < 4:
        raise ConfigError(f"num must be at least 4 for KID, got {num}", "num")


def inception_score(context: Context, num: int) -> Figures:
    """Returns the Inception score; the baseline is that of the real images."""
    figures: Figures = {}
    for network in named_networks(context):
        found, real = (
            _score(np.asarray(network.logits_of(features)))
            for features in (_generated(context, network, num), _real(context, network, num))
        )
        figures[network.measure_name("IS")] = found.compared(real, "real images")
    return figures


def _score(logits: np.ndarray) -> Figure:
    """Returns the mean score of the splits, with the interval of that mean."""
    value, scores = distances.inception_score(logits, min(_SPLITS, max(1, len(logits) // 2)))
    return Figure(value, len(logits), intervals.of_mean(scores))


def check_inception_score(context: Context, num: int) -> None:
    """Raises UserError for a network without classes."""
    for network in named_networks(context):
        if network.classify is None:
            raise UserError(f"{network.name} has no classes: the Inception score needs a network that classifies")


def precision_recall(context: Context, num: int) -> Figures:
    """Returns precision, recall, density and coverage of the features."""
    figures: Figures = {}
    for network in named_networks(context):
        generated, real = _generated(context, network, num), _real(context, network, num)
        found = distances.precision_recall(real, generated)
        covered = distances.density_coverage(real, generated, min(_NEIGHBOURS, num - 1))
        shares = {
            "precision": (found.precision, num),
            "recall": (found.recall, len(real)),
            "coverage": (covered.coverage, len(real)),
        }
        for name, (value, count) in shares.items():
            figures[network.measure_name(name)] = Figure(value, count, intervals.wilson(value, count), share=True)
        figures[network.measure_name("density")] = mean_of(covered.densities)
    return figures


def check_precision_recall(context: Context, num: int) -> None:
    """Raises UserError for too few images, or without a network."""
    named_networks(context)
    if num <= 3:
        raise ConfigError(f"num must be at least 4 for precision and recall, got {num}", "num")


def cmmd(context: Context, num: int) -> Figures:
    """Returns CMMD to the real images; the baseline is that between two halves of them."""
    network = context.clip_network
    generated, real = context.samples(num).features(network, num), _real(context, network, num)
    figure = Figure(distances.cmmd(generated, real), num, distances.cmmd_interval(generated, real))
    if len(real) >= 4:
        halves = Figure(distances.cmmd(real[::2], real[1::2]), len(real) // 2)
        figure = figure.compared(halves, _HALVES)
    return {"CMMD": figure}


def check_cmmd(context: Context, num: int) -> None:
    """Raises UserError for a single image, or without a CLIP."""
    context.clip_network  # noqa: B018
    if num < 2:
        raise ConfigError(f"num must be at least 2 for CMMD, got {num}", "num")


def clip_score(context: Context, num: int) -> Figures:
    """Returns the mean of 100 cos between images and captions; the baseline is that of shuffled captions."""
    image_emb = context.samples(num).features(context.clip_network, num)
    text_emb = context.clip.embed_text(context.captions(num))
    score = mean_of(distances.clip_score(image_emb, text_emb))
    if num > 1:
        score = score.compared(mean_of(distances.clip_score(image_emb, np.roll(text_emb, 1, axis=0))), SHUFFLED)
    return {"CLIP score": score}


def check_clip(context: Context, num: int) -> None:
    """Raises UserError without a CLIP."""
    context.clip_network  # noqa: B018


def memorisation(context: Context, num: int) -> Figures:
    """Returns the mean distance of samples to the nearest training image; the baseline is that of held-out images.

    Samples that are nearer to training images than held-out images are have been memorised in part. With LPIPS the
    distance is that of the nearest of the `_CANDIDATES` images with the nearest features, else the cosine distance of
    the features. "nearer" is the share of samples that are nearer than nine in ten held-out images.
    """
    figures: Figures = {}
    train = context.open("decoder", "train", context.size)
    samples, held_out = context.samples(num).images(num), _images(context.source, context.indices(num))
    for network in named_networks(context):
        candidates = range(min(len(train), MAX_TRAINING))
        known = references.real_features(network, train, candidates, context.options.progress)
        real = references.real_features(network, context.source, context.indices(num))
        ours = _nearest(context, _generated(context, network, num), samples, known, train)
        theirs = _nearest(context, real, held_out, known, train)
        label = "LPIPS" if context.lpips is not None else network.measure_name("cosine")
        figures[f"{label}_to_nearest"] = mean_of(ours).compared(mean_of(theirs), "held-out images")
        limit = np.quantile(theirs, 0.1)
        figures[f"{label}_nearer"] = share_of(ours < limit).compared(share_of(theirs < limit), "held-out images")
    return figures


def check_memorisation(context: Context, num: int) -> None:
    """Raises UserError without a network, or without training data."""
    named_networks(context)
    if not context.divided:
        raise ConfigError("data in memory have no split train to compare samples with: give a path", "data")
    if context.split == "train":
        raise ConfigError("split must not be train, whose images are those that samples are compared with", "split")


def _images(source: data.Source, indices: list[int]) -> UInt8[np.ndarray, "N H W 3"]:
    return np.concatenate([*references.chunks(source, indices)])


def _nearest(
    context: Context,
    features: Float[np.ndarray, "N D"],
    images: UInt8[np.ndarray, "N H W 3"],
    known: Float[np.ndarray, "M D"],
    train: data.Source,
) -> Float64[np.ndarray, "N"]:
    """Returns the distance of each image to the nearest training image."""
    if context.lpips is None:
        return distances.nearest(features, known).distances[:, 0]
    found = distances.nearest(features, known, min(_CANDIDATES, len(known)))
    chosen, places = np.unique(found.indices, return_inverse=True)
    found = found._replace(indices=places.reshape(found.indices.shape))
    return distances.rerank(found, images, _images(train, chosen.tolist()), context.lpips).distances[:, 0]
