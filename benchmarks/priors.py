"""What each choice of the two priors does to images of shapes, and what cached keys and values save: JSON and tables.

    python benchmarks/priors.py --system runs/demo

Every row changes one setting of a prior; the decoder is the same, and has the same captions and noise. A row has the
share of images that show everything their caption says, its difference from the first row of its prior in points, and
the cosine between sampled and true image embeddings. The last row is the autoregressive prior's difference from the
diffusion prior. Without a stage ``ar_prior`` only the diffusion prior is measured.

The second table times the autoregressive prior's network (Ramesh et al. 2022, section 2.2) at 319 codes with and
without cached keys and values, and has the largest difference between the logits of both. Its width is small, so that
it runs on a laptop; weights are random.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import measured
import numpy as np
from measured import HeldOut

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.data.synthetic.scene_reader import matches
from dalle2_jax.errors import UsageError
from dalle2_jax.evaluation.figures import Figure, mean_of, share_of
from dalle2_jax.models.priors.ar_prior import ArPriorConfig, ArPriorNetwork
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.system.cascade import PRIORS
from dalle2_jax.system.system import System, load
from dalle2_jax.workdir.folder import StageFolder

CODES, POSITIONS, BUCKETS, CAPTION = 319, 384, 1024, 256
"""Codes, positions, values of a code and tokens of a caption of the paper's autoregressive prior (App. C, Table 3)."""

MAX_LOGIT_DIFFERENCE = 1e-5


class Row(NamedTuple):
    """A setting of a prior.

    Attributes:
      prior: "diffusion" or "ar".
      title: of the row.
      settings: fields of the prior's section ``sampling``.
      candidates: embeddings sampled for each image; None for the prior's own number.
    """

    prior: str
    title: str
    settings: dict[str, Any]
    candidates: int | None = None


ROWS = (
    Row("diffusion", "two samples, the closer to the caption kept (default)", {}),
    Row("diffusion", "one sample", {}, 1),
    Row("diffusion", "guidance 2", {"guidance": 2.0}),
    Row("diffusion", "guidance 4", {"guidance": 4.0}),
    Row("ar", "guidance 1, dot product of the upper half, two samples (default)", {}),
    Row("ar", "one sample, as in the paper", {}, 1),
    Row("ar", "guidance 1.5", {"guidance": 1.5}),
    Row("ar", "guidance 2", {"guidance": 2.0}),
    Row("ar", "guidance 4", {"guidance": 4.0}),
    Row("ar", "dot product of all quantiles", {"dot_quantile": 0.0}),
    Row("ar", "dot product above quantile 0.7", {"dot_quantile": 0.7}),
    Row("ar", "dot product above quantile 0.85", {"dot_quantile": 0.85}),
    Row("ar", "dot product above quantile 0.95", {"dot_quantile": 0.95}),
    Row("ar", "four samples, the closest to the caption kept", {}, 4),
)
"""The first row of each prior is its default."""


class Result(NamedTuple):
    """What a row gives for each caption.

    Attributes:
      correct: whether the image shows everything that the caption says.
      cosine: between the sampled and the true image embedding.
    """

    correct: np.ndarray
    cosine: np.ndarray


# --- the priors of a system -----------------------------------------------------------------


def measure_row(row: Row, system: System, data: HeldOut, options: argparse.Namespace) -> Result:
    """Samples embeddings and images for all captions under the settings of a row."""
    shared = {"seed": options.seed, "batch_size": 64}
    emb = system.prior(data.captions, prior=row.settings, candidates=row.candidates, **shared)
    images = system.decode(emb, data.captions, progress=True, **shared).numpy
    judged = zip(measured.read_all(images), data.scenes, data.captions, strict=True)
    correct = np.asarray([matches(*each)["all"] for each in judged])
    pairs = [unit(emb), unit(system.embed_image(list(data.images)))]
    return Result(correct, np.einsum("ne,ne->n", *pairs))


def unit(rows: np.ndarray) -> np.ndarray:
    """Returns rows of norm 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def difference(one: Result, other: Result) -> Figure:
    """Returns the mean difference of both in points, over the same captions."""
    return mean_of(100.0 * (one.correct.astype(np.float64) - other.correct))


def measure_system(options: argparse.Namespace) -> str:
    """Returns the table of all settings of the priors that a system has. UsageError if it has none."""
    lines = ["| prior | n | images correct | difference, points | cosine to the true embedding |", "| --- " * 5 + "|"]
    defaults: dict[str, Result] = {}
    trained = [kind for kind in PRIORS if StageFolder(options.system, PRIORS[kind]).latest_step() is not None]
    if not trained:
        raise UsageError(f"{options.system} has no prior: train one, or give another system")
    for prior in trained:
        system = load(options.system, stages=("clip", PRIORS[prior], "decoder"))
        data = measured.held_out(system, options.num)
        for row in (row for row in ROWS if row.prior == prior):
            result = measure_row(row, system, data, options)
            base = defaults.setdefault(prior, result)
            figures = {"all": share_of(result.correct), "cosine_image": mean_of(result.cosine)}
            figures |= {} if base is result else {"difference": difference(result, base)}
            about = {"prior": prior, "row": row.title, "system": measured.shown_system(options.system)}
            measured.emit("priors", figures, **about)
            lines.append(cells(f"{prior}: {row.title}", figures))
    if len(defaults) == 2:
        apart = {"difference": difference(defaults["ar"], defaults["diffusion"])}
        measured.emit("priors", apart, row="ar less diffusion")
        lines.append(cells("ar, default, less diffusion, default", apart))
    return "\n".join(lines) + "\n"


def cells(title: str, figures: dict[str, Figure]) -> str:
    """Returns a line of the table."""
    shown = [str(figures[name]) if name in figures else "-" for name in ("all", "difference", "cosine_image")]
    return f"| {title} | {next(iter(figures.values())).n} | " + " | ".join(shown) + " |"


# --- cached keys and values -----------------------------------------------------------------


def network(width: int, layers: int) -> tuple[ArPriorNetwork, Any, dict[str, jax.Array]]:
    """Returns a network of the paper's sequence lengths with random weights, and a prefix for one caption."""
    text = TextConfig(BUCKETS, CAPTION, width, layers, width // 32, activation="gelu")
    config = ArPriorConfig(text, width, layers, width // 32, POSITIONS, CODES, CODES, BUCKETS)
    model, keys = ArPriorNetwork(config), iter(jax.random.split(jax.random.key(0), 4))
    prefix = {
        "dot": jnp.full(1, BUCKETS - 1, jnp.int32),
        "text_emb": jax.random.normal(next(keys), (1, CODES)),
        "text": jax.random.randint(next(keys), (1, CAPTION), 1, BUCKETS, jnp.int32),
        "mask": jnp.ones((1, CAPTION), bool),
    }
    params = jax.jit(model.init)(next(keys), jnp.zeros((1, CODES), jnp.int32), **prefix)["params"]
    kernel = 0.1 * jax.random.normal(
        next(keys), params["out_proj"]["kernel"].shape
    )  # zeros would make all logits equal
    return model, {"params": {**params, "out_proj": {**params["out_proj"], "kernel": kernel}}}, prefix


def make_samplers(model: ArPriorNetwork) -> dict[str, Callable]:
    """Returns greedy samplers of all codes: (variables, prefix) -> (codes int32[K], logits float32[K, Q])."""

    def cached(variables: Any, prefix: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def advance(carry, index):
            logits, past = carry
            code = logits.argmax(axis=-1).astype(jnp.int32)
            return model.apply(variables, past, code, index, method=ArPriorNetwork.step), (code[0], logits[0])

        start = model.apply(variables, **prefix, method=ArPriorNetwork.encode_prefix)
        (logits, _), (codes, before) = jax.lax.scan(advance, start, jnp.arange(CODES - 1))
        last = logits.argmax(axis=-1).astype(jnp.int32)
        return jnp.concatenate([codes, last]), jnp.concatenate([before, logits])

    def uncached(variables: Any, prefix: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def advance(codes, index):
            logits = model.apply(variables, codes, **prefix)[0, index]
            return codes.at[0, index].set(logits.argmax().astype(jnp.int32)), logits

        codes, logits = jax.lax.scan(advance, jnp.zeros((1, CODES), jnp.int32), jnp.arange(CODES))
        return codes[0], logits

    return {"cached": jax.jit(cached), "uncached": jax.jit(uncached)}


def measure_cache(width: int, layers: int, repeats: int) -> str:
    """Returns the table of seconds to sample all codes of one embedding with and without a cache."""
    model, variables, prefix = network(width, layers)
    samplers = make_samplers(model)
    codes, logits = samplers["cached"](variables, prefix)
    expected = jax.jit(model.apply)(variables, codes[None], **prefix)[0]
    apart = float(jnp.abs(logits - expected).max())
    seconds = {
        name: common.median_seconds(lambda sampler=sampler: sampler(variables, prefix), repeats, warm_up=1)[1]
        for name, sampler in samplers.items()
    }
    ratio = seconds["uncached"] / seconds["cached"]
    settings = {"width": width, "layers": layers, "codes": CODES, "seconds": seconds}
    common.emit(benchmark="priors", measure="cache", speed_up=ratio, max_logit_difference=apart, **settings)
    lines = [
        f"| {CODES} codes, {layers} layers of width {width}, one caption | cached | uncached | ratio |",
        "| --- " * 4 + "|",
        f"| seconds | {seconds['cached']:.3g} | {seconds['uncached']:.3g} | {ratio:.1f} |",
        f"\nLargest difference of logits between both: {apart:.1e} (limit {MAX_LOGIT_DIFFERENCE:.0e}).",
    ]
    return "\n".join(lines) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    example = "python benchmarks/priors.py --system runs/demo"
    parser = measured.make_parser("priors", "Measures both priors.", example)
    parser.add_argument("--num", type=args.positive_int, default=256, help="captions (default %(default)s)")
    parser.add_argument(
        "--width", type=args.positive_int, default=256, help="of the timed network (default %(default)s)"
    )
    parser.add_argument(
        "--layers", type=args.positive_int, default=4, help="of the timed network (default %(default)s)"
    )
    parser.add_argument("--repeats", type=args.positive_int, default=3, help="of each timing (default %(default)s)")
    return parser


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    measured.publish("priors", measure_system(options), options.page)
    measured.publish("cache", measure_cache(options.width, options.layers, options.repeats), options.page)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
