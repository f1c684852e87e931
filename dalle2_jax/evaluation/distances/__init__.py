"""Measures of generated images: pure functions of features, logits, embeddings or images.

| function | source | distance of |
| --- | --- | --- |
| `frechet_distance` | Heusel et al. 2017 | two sets, as Gaussians; FID over Inception's features |
| `kid`, `cmmd` | Bińkowski et al. 2018, Jayasumana et al. 2024 | two sets, of any distribution |
| `inception_score` | Salimans et al. 2016 | none: classes of one set |
| `precision_recall`, `density_coverage` | Kynkäänniemi et al. 2019, Naeem et al. 2020 | two sets, as manifolds |
| `clip_score`, `clip_s` | Radford et al. 2021, Hessel et al. 2021 | an image and its caption |
| `nearest`, `rerank` | - | an image and training images |
| `perceptual_distances`, `rank_concepts` | - | an image and real images of named concepts |

Features are float[N, D] of any precision; sums are float64. None of the functions holds a matrix of N x N, so that
memory is bounded for any N. Results do not depend on the order of rows, except for seeded subsets (`kid`) and splits
(`inception_score`).
"""

from dalle2_jax.evaluation.distances.clip_score import clip_s, clip_score
from dalle2_jax.evaluation.distances.concepts import ConceptRanks, perceptual_distances, rank_concepts
from dalle2_jax.evaluation.distances.frechet import check_count, frechet_distance, frechet_interval
from dalle2_jax.evaluation.distances.inception_score import inception_score
from dalle2_jax.evaluation.distances.kernel import cmmd, cmmd_interval, kid, kid_interval
from dalle2_jax.evaluation.distances.manifold import (
    DensityCoverage,
    PrecisionRecall,
    density_coverage,
    precision_recall,
)
from dalle2_jax.evaluation.distances.moments import Moments, Origin, Statistics
from dalle2_jax.evaluation.distances.neighbors import Neighbors, nearest, rerank

__all__ = [
    "ConceptRanks",
    "DensityCoverage",
    "Moments",
    "Neighbors",
    "Origin",
    "PrecisionRecall",
    "Statistics",
    "check_count",
    "clip_s",
    "clip_score",
    "cmmd",
    "cmmd_interval",
    "density_coverage",
    "frechet_distance",
    "frechet_interval",
    "inception_score",
    "kid",
    "kid_interval",
    "nearest",
    "perceptual_distances",
    "precision_recall",
    "rank_concepts",
    "rerank",
]
