"""Quality against network evaluations for every sampler, as JSON lines, a table and a plot; and what samplers cost.

    pip install 'matplotlib>=3.9'
    python benchmarks/samplers.py --system runs/demo --docs docs

Two measures. On a mixture of Gaussians in the plane, whose perfect denoiser is known, the sliced Wasserstein distance
between samples and data, over what two sets of data are apart. On the decoder of ``--system`` (of ``shapes``), the
share of images, read at the decoder's size, that show everything their caption says.

The third part times the whole sampler against as many evaluations of the network alone, in the same loop.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from functools import partial

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import common
import jax
import jax.numpy as jnp
import numpy as np

from dalle2_jax import compilation, data, diffusion, rng
from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config import sources
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.diffusion import SamplerConfig
from dalle2_jax.evaluation.attributes import attribute_accuracy
from dalle2_jax.evaluation.bound import noise_statistics
from dalle2_jax.evaluation.intervals import in_percent, wilson
from dalle2_jax.files import write_atomically
from dalle2_jax.stages import SamplingConfig, images
from dalle2_jax.system import LoadedStage, load
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.workdir.folder import StageFolder

EVALUATIONS = (5, 10, 20, 50, 250)
SAMPLERS: dict[str, dict] = {
    "ddpm, fixed_small": {"name": "ddpm", "variance": "fixed_small"},
    "ddpm, fixed_large": {"name": "ddpm", "variance": "fixed_large"},
    "ddpm, analytic": {"name": "ddpm", "variance": "analytic"},
    "ddim": {"name": "ddim"},
    "ddim, eta 1": {"name": "ddim", "eta": 1.0},
    "euler, logsnr": {"name": "euler", "spacing": "logsnr"},
    "heun, logsnr": {"name": "heun", "spacing": "logsnr"},
    "dpmpp_2m, logsnr": {"name": "dpmpp_2m", "spacing": "logsnr"},
    "dpmpp_2m, karras": {"name": "dpmpp_2m", "spacing": "karras"},
    "dpmpp_3m, logsnr": {"name": "dpmpp_3m", "spacing": "logsnr"},
    "dpmpp_2m_sde, logsnr": {"name": "dpmpp_2m_sde", "spacing": "logsnr"},
    "unipc, logsnr": {"name": "unipc", "spacing": "logsnr"},
}
"""Fields of the sampler's config; without a spacing the steps are even in t."""
MODES, SPREAD, POINTS, DIRECTIONS = 8, 0.06, 16_384, 64


def config_fields(title: str, evaluations: int) -> dict:
    """Returns a sampler's config with the steps that so many evaluations allow; Heun's takes two in all but one."""
    fields = dict(SAMPLERS[title])
    spacing = fields.pop("spacing", "")
    return {**fields, "steps": f"{spacing}{(evaluations + 1) // 2 if fields['name'] == 'heun' else evaluations}"}


def runs() -> Iterator[tuple[str, int, dict]]:
    """Yields each sampler's title, evaluations and fields of its config."""
    for title, fields in SAMPLERS.items():
        for evaluations in EVALUATIONS if fields["name"] in ("ddpm", "ddim") else EVALUATIONS[:-1]:
            if fields["name"] == "heun" and evaluations == EVALUATIONS[0]:
                continue  # its 3 steps are rejected: too far apart
            yield title, evaluations, config_fields(title, evaluations)


# --- the mixture ----------------------------------------------------------------------------


def centres() -> np.ndarray:
    """Modes on a circle, float64[MODES, 2]."""
    angles = 2 * np.pi * np.arange(MODES) / MODES
    return 0.8 * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def mixture_denoiser(schedule: diffusion.Schedule) -> Callable:
    """Returns E[x_0 | x_t] of the mixture: each mode's own, weighted by how likely it is."""
    means = jnp.asarray(centres(), jnp.float32)
    signal, noise = (jnp.asarray(rate, jnp.float32) for rate in (schedule.signal_rate, schedule.noise_rate))

    def denoiser(x_t, t):
        a, s = signal[t][:, None, None], noise[t][:, None, None]
        variance = a**2 * SPREAD**2 + s**2
        apart = x_t[:, None, :] - a * means[None]
        likely = jax.nn.softmax(-0.5 * jnp.sum(apart**2, axis=2) / variance[:, :, 0], axis=1)
        best = means[None] + a * SPREAD**2 / variance * apart
        return jnp.sum(likely[:, :, None] * best, axis=1)

    return denoiser


def mixture_points(seed: int) -> np.ndarray:
    """Returns points of the mixture, float64[POINTS, 2]."""
    random = np.random.default_rng(seed)
    return centres()[random.integers(MODES, size=POINTS)] + SPREAD * random.standard_normal((POINTS, 2))


def sliced_wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the mean Wasserstein-1 distance over directions of the plane."""
    angles = np.pi * np.arange(DIRECTIONS) / DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.abs(np.sort(one @ directions, axis=0) - np.sort(other @ directions, axis=0)).mean())


def mixture_statistics(schedule: diffusion.Schedule) -> diffusion.NoiseStatistics:
    """Measures what Analytic-DPM needs, on the mixture."""
    denoiser, x_0 = mixture_denoiser(schedule), jnp.asarray(mixture_points(3), jnp.float32)

    @jax.jit
    def power(t):
        times = jnp.full(POINTS, t, jnp.int32)
        eps = jax.random.normal(jax.random.fold_in(jax.random.key(3), t), x_0.shape)
        x_t = diffusion.q_sample(schedule, x_0, times, eps)
        pair = diffusion.to_x0_eps(schedule, "x0", denoiser(x_t, times), x_t, times)
        return jnp.mean(pair.eps**2)

    powers = jax.lax.map(power, jnp.arange(schedule.num_steps))
    return diffusion.NoiseStatistics(tuple(map(float, powers)), float((x_0**2).mean()))


def measure_mixture() -> dict[tuple[str, int], float]:
    """Returns the distance of each sampler, over that of two sets of data."""
    schedule = diffusion.make_schedule("cosine", 1000)
    denoiser = mixture_denoiser(schedule)
    options = diffusion.SamplingOptions(noise_statistics=mixture_statistics(schedule))
    keys = rng.per_image(rng.root(0), jnp.arange(POINTS))
    floor = sliced_wasserstein(mixture_points(1), mixture_points(2))
    distances = {}
    for title, evaluations, fields in runs():
        config = SamplerConfig(**fields)
        sampler = jax.jit(
            lambda keys, config=config: diffusion.sample(schedule, config, "x0", denoiser, keys, (2,), options=options)
        )
        distance = sliced_wasserstein(np.asarray(sampler(keys), np.float64), mixture_points(1)) / floor
        distances[title, evaluations] = distance
        common.emit(benchmark="samplers", data="mixture", sampler=title, evaluations=evaluations, distance=distance)
    return distances


# --- the decoder of shapes ------------------------------------------------------------------


def decoder_inputs(members: dict[str, LoadedStage], source: data.Source, count: int) -> tuple[dict, jax.Array]:
    """Returns the decoder's condition, of embeddings that the prior samples from captions, and a key an image."""
    clip, prior, decoder = (members[name] for name in ("clip", "prior", "decoder"))
    batch, _ = data.fixed_batch(data.prepare(source, clip.tokenizer, clip.context_length), range(count))
    batch = {**batch, **clip.stage.encode_text(clip.variables, batch)}
    keys = rng.per_image(rng.root(0), jnp.arange(count))
    prior_keys = jax.vmap(lambda key: rng.stream(key, "prior"))(keys)
    condition = prior.stage.condition(batch)
    sampled = jax.jit(lambda: prior.stage.sample(prior.variables, prior_keys, condition, prior.stage.plan()))()
    image_emb = prior.stage.clip.embedding.apply(sampled / prior.stage.clip.embedding.scale)
    return decoder.stage.condition({**batch, "image_emb": image_emb}), keys


def measure_decoder(
    members: dict[str, LoadedStage], experiment: Experiment, count: int
) -> dict[tuple[str, int], float]:
    """Returns the share of images that show all their caption says, for each sampler."""
    source = sources.open_source(experiment.data, "val")
    condition, keys = decoder_inputs(members, source, count)
    moments = noise_statistics(members, "decoder", sources.open_source(experiment.data, "train"), 16, 1)
    stage = dataclasses.replace(
        members["decoder"].stage, noise_statistics=diffusion.NoiseStatistics(tuple(moments["eps"]), moments["x_0"])
    )
    params = members["decoder"].variables.params
    scenes, captions = zip(*((source.scene(i), source.caption(i)) for i in range(count)), strict=True)
    rates = {}
    for title, evaluations, fields in runs():
        sampling = SamplingConfig(guidance=stage.sampling.guidance, **fields)
        sampler = jax.jit(
            lambda params, sampling=sampling: stage.sample_x_0(params, keys, condition, stage.plan(sampling))
        )
        generated = np.asarray(images.to_uint8(sampler(params)))
        rate = attribute_accuracy(generated, scenes, captions)["matched"]["all"]
        rates[title, evaluations] = rate
        common.emit(benchmark="samplers", data="shapes", sampler=title, evaluations=evaluations, all=rate)
    return rates


def measure_overhead(members: dict[str, LoadedStage], experiment: Experiment, repeats: int) -> dict[str, float]:
    """Returns each sampler's time over that of the network alone, evaluated as often in a loop of its own.

    Both sample 32 images under guidance, so that the network sees 64.
    """
    condition, keys = decoder_inputs(members, sources.open_source(experiment.data, "val"), 32)
    stage, params = members["decoder"].stage, members["decoder"].variables.params
    evaluations = 20
    drops = {name: jnp.zeros(64, bool) for name in stage.drop_rates}

    @jax.jit
    def network(params, x):
        double = jax.tree.map(lambda value: jnp.concatenate([value, value]), condition)
        denoiser = stage.bind(params, double, drops, None)
        times = jnp.arange(evaluations, dtype=jnp.int32)
        return jax.lax.scan(lambda x, t: (denoiser(x, jnp.full(64, t)), None), x, times)[0]

    x = jnp.concatenate([rng.normal(keys, stage.sample_shape(condition))] * 2)
    ratios = {}
    for title, fields in SAMPLERS.items():
        if fields.get("variance") == "analytic":
            continue  # the same program as the other variances
        sampling = SamplingConfig(guidance=2.0, **config_fields(title, evaluations))
        sampler = jax.jit(
            lambda params, sampling=sampling: stage.sample_x_0(params, keys, condition, stage.plan(sampling))
        )
        # Turn by turn, so that what else the machine does meets both alike.
        pairs = [
            [
                common.median_seconds(run, 1, warm_up=1)[1]
                for run in (partial(sampler, params), partial(network, params, x))
            ]
            for _ in range(repeats)
        ]
        ratios[title] = float(np.median([sampler / alone for sampler, alone in pairs]))
        common.emit(benchmark="samplers", data="overhead", sampler=title, evaluations=evaluations, ratio=ratios[title])
    return ratios


# --- what is shown --------------------------------------------------------------------------


def table(title: str, figures: dict[tuple[str, int], float], form: Callable[[float], str]) -> str:
    """Returns figures as a table in Markdown, a sampler a line."""
    lines = [f"| {title} | " + " | ".join(map(str, EVALUATIONS)) + " |", "| --- |" + " --- |" * len(EVALUATIONS)]
    for sampler in SAMPLERS:
        cells = (form(figures[sampler, n]) if (sampler, n) in figures else "-" for n in EVALUATIONS)
        lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, mixture: dict[tuple[str, int], float], shapes: dict[tuple[str, int], float]) -> None:
    """Plots both measures against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for index, sampler in enumerate(SAMPLERS):
        line = {"label": sampler, "marker": "o", "markersize": 3, "color": f"C{index % 10}", "linewidth": 1.2}
        line["linestyle"] = "--" if index >= 10 else "-"
        taken = [n for n in EVALUATIONS if (sampler, n) in mixture]
        left.plot(taken, [mixture[sampler, n] for n in taken], **line)
        right.plot(taken, [100 * shapes[sampler, n] for n in taken], **line)
    for axes, label in ((left, "sliced Wasserstein distance over that of data"), (right, "images all right, %")):
        axes.set_xscale("log")
        axes.set_xticks(EVALUATIONS, map(str, EVALUATIONS))
        axes.set_xlabel("network evaluations")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    left.set_yscale("log")
    left.set_title("a mixture of Gaussians, perfect denoiser")
    right.set_title("the decoder of shapes")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs the command line."""
    parser = args.make_parser(
        "python benchmarks/samplers.py", "Measures every sampler.", __doc__.splitlines()[3].strip()
    )
    parser.add_argument("--system", type=pathlib.Path, required=True, help="a system trained on shapes")
    parser.add_argument("--num", type=args.positive_int, default=128, help="images (default %(default)s)")
    parser.add_argument("--repeats", type=args.positive_int, default=7, help="of each timing (default %(default)s)")
    parser.add_argument("--docs", type=pathlib.Path, help="folder for samplers.md and samplers.png")
    options: argparse.Namespace = parser.parse_args()
    compilation.enable_compilation_cache()
    members = load.load_system(options.system, make_mesh(MeshConfig()), ("clip", "prior", "decoder"))
    experiment = stored_experiment(StageFolder(options.system, "decoder"))
    ratios = measure_overhead(members, experiment, options.repeats)
    mixture, shapes = measure_mixture(), measure_decoder(members, experiment, options.num)
    costs = "".join(f"| {sampler} | {ratio:.3f} |\n" for sampler, ratio in ratios.items())
    text = (
        table("distance over that of data, by evaluations", mixture, "{:.2f}".format)
        + "\n"
        + table(
            f"images all right, n = {options.num}, by evaluations",
            shapes,
            lambda share: in_percent(share, wilson(share, options.num)),
        )
        + "\n| time over that of the network alone | 20 evaluations |\n| --- | --- |\n"
        + costs
    )
    print(text)
    if options.docs:
        write_atomically(options.docs / "samplers.md", "# Samplers, measured\n\n" + text)
        plot(options.docs / "samplers.png", mixture, shapes)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
