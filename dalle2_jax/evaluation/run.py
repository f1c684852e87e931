"""`evaluate`: measures a system by name, over samples that are generated once and stored.

    evaluation = evaluate("shapes", ["attributes", "retrieval"], num=64, out="runs/shapes-measures")
    print(evaluation.table())

``registry.MEASURES`` has what each measure needs, `FUNCTIONS` what computes it.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

from dalle2_jax import lock
from dalle2_jax.errors import ConfigError
from dalle2_jax.evaluation import guidance, registry
from dalle2_jax.evaluation.context import Context
from dalle2_jax.evaluation.features import FeatureNetwork
from dalle2_jax.evaluation.figures import Evaluation, Figures
from dalle2_jax.evaluation.measures import captions, clip, images, likelihood, prior
from dalle2_jax.evaluation.options import EvaluateOptions, Options, make_options
from dalle2_jax.evaluation.registry import CASCADE, MEASURES, PRIOR, PROTOCOLS, STAGE
from dalle2_jax.pretrained import find_system
from dalle2_jax.pretrained.download import fetch_system
from dalle2_jax.system import load
from dalle2_jax.system.system import System
from dalle2_jax.system.system import load as load_system

SHOWN = 30
"""Images of the grid."""


class Functions(NamedTuple):
    """A measure's functions of the context and the number of examples.

    Attributes:
      measure: returns the figures.
      check: raises UserError for what cannot be measured, before anything is generated; None if there is nothing.
    """

    measure: Callable[[Context, int], Figures]
    check: Callable[[Context, int], None] | None = None


def _check_shapes(context: Context, num: int) -> None:
    captions.shapes_of(context)


def _check_stage(context: Context, num: int) -> None:
    likelihood.stage_of(context)


FUNCTIONS: Mapping[str, Functions] = {
    "attributes": Functions(captions.attributes, _check_shapes),
    "digits": Functions(captions.digits, captions.check_digits),
    "emoji": Functions(captions.emoji, captions.check_emoji),
    "retrieval": Functions(clip.retrieval),
    "binding": Functions(clip.binding, clip.check_binding),
    "zero_shot": Functions(clip.zero_shot),
    "linear_probe": Functions(clip.linear_probe),
    "components": Functions(clip.components),
    "prior": Functions(prior.prior, prior.check_prior),
    "ablation": Functions(prior.ablation, prior.check_ablation),
    "fd": Functions(images.frechet, images.check_frechet),
    "kid": Functions(images.kid, images.check_kid),
    "inception_score": Functions(images.inception_score, images.check_inception_score),
    "precision_recall": Functions(images.precision_recall, images.check_precision_recall),
    "cmmd": Functions(images.cmmd, images.check_cmmd),
    "clip_score": Functions(images.clip_score, images.check_clip),
    "memorisation": Functions(images.memorisation, images.check_memorisation),
    "bits_per_dim": Functions(likelihood.bits_per_dim, _check_stage),
    "noise_statistics": Functions(likelihood.noise_statistics, _check_stage),
}
"""The functions of each measure of ``registry.MEASURES``."""

OWN_DATA = ("digits", "components", "bits_per_dim", "noise_statistics")
"""Measures that read no captions of the data, or open the data of their stage."""

CLIP_FEATURES = ("cmmd", "clip_score", "ablation")
"""Measures that compare CLIP's embeddings of samples."""


def evaluate(
    system: str | os.PathLike[str] | System, measures: Sequence[str] = (), **options: Unpack[EvaluateOptions]
) -> Evaluation:
    """Measures a system.

    Images are generated once for all measures. With ``out`` they are stored there with their features, and the same
    call continues after an interruption, also with more measures or a larger ``num``.

    Args:
      system: a folder, the name of an included system, a URL, or a loaded system.
      measures: names of ``dalle2_jax.evaluation.registry.MEASURES``; those of the protocol by default.
      **options: see `EvaluateOptions`.

    Raises:
      UserError: a measure does not fit the system or the data, or the system cannot be loaded.
      ConfigError: an option is not accepted, or ``out`` has samples of other settings; with the field's name.
    """
    given = [measures] if isinstance(measures, str) else list(measures)
    names = registry.chosen_measures(given, options.get("protocol"))
    chosen = make_options(options)
    _check_sweep(names, _scales(chosen))
    with _folder(chosen) as folder:
        loaded = system if isinstance(system, System) else _load(system, names, chosen)
        return _measure(loaded, names, chosen, folder)


def _load(system: str | os.PathLike[str], names: Sequence[str], options: Options) -> System:
    """Loads the stages that some measures need."""
    path = os.fspath(system)
    root = fetch_system(path) if "://" in path else find_system(path)
    kinds = {MEASURES[name].loads for name in names}
    stages: dict[str, None] = {}
    if "digits" in names:
        captions.check_digits_folder(root)
    if STAGE in kinds:
        stages |= dict.fromkeys(likelihood.stages_needed(root, options.stage))
    if CASCADE in kinds:
        stages |= dict.fromkeys(load.cascade_stages(root, options.prior))
    if PRIOR in kinds:
        stages |= dict.fromkeys(("clip", load.choose_prior(root, options.prior)))
    if registry.CLIP in kinds:
        stages |= {"clip": None}
    return load_system(root, stages=tuple(stages), prior=options.prior, verify=options.verify)


@contextlib.contextmanager
def _folder(options: Options) -> Iterator[Path]:
    """Yields the folder of samples, locked; one that is removed afterwards if the user names none."""
    if options.out is not None:
        with lock.hold_folder(options.out):
            yield options.out
    else:
        with tempfile.TemporaryDirectory(prefix="dalle2_jax-") as folder:
            yield Path(folder)


def _measure(system: System, names: Sequence[str], options: Options, folder: Path) -> Evaluation:
    """Runs the measures; writes the results after each of them if the user names a folder."""
    context = Context(system, options, folder)
    plan = {name: _num(context, name) for name in names}
    context.num = max((num for name, num in plan.items() if _reads_samples(name)), default=0)
    for name, num in plan.items():
        check = FUNCTIONS[name].check
        if check is not None:
            check(context, num)
    context.extracted = _extracted(context, names)
    scales = _scales(options)
    found: dict[str, Figures] = {}
    contexts = [context.at_guidance(scale) for scale in scales] or [context]
    for place, at_scale in enumerate(contexts):
        for name in (name for name in plan if place == 0 or MEASURES[name].swept):
            swept = len(scales) > 1 and MEASURES[name].swept
            label = f"{name} at guidance {at_scale.scale:g}" if swept else name
            found[label] = FUNCTIONS[name].measure(at_scale, plan[name])
            if options.out is not None:
                _evaluation(at_scale, found, plan).save(options.out)
    if len(scales) > 1 and options.out is not None:
        guidance.write_sweep(found, options.out)
    return _evaluation(contexts[0], found, plan)


def _check_sweep(names: Sequence[str], scales: Sequence[float]) -> None:
    """Raises ConfigError for several guidance scales without a measure that is repeated for each."""
    if len(scales) > 1 and not any(MEASURES[name].swept for name in names):
        swept = ", ".join(name for name, measure in MEASURES.items() if measure.swept)
        raise ConfigError(f"guidance has several scales, but no measure that is repeated for each: {swept}", "guidance")


def _num(context: Context, name: str) -> int:
    """Returns the number of examples of a measure: the user's, or its own, if the data have as many."""
    options, measure = context.options, MEASURES[name]
    if options.num is not None:
        return options.num
    num = PROTOCOLS[options.protocol].num if options.protocol is not None else measure.num
    if name in OWN_DATA:
        return num
    return min(num, len(context.source if measure.loads == CASCADE else context.clip_source))


def _reads_samples(name: str) -> bool:
    """Whether a measure reads samples of the data's captions."""
    return MEASURES[name].loads == CASCADE and name not in OWN_DATA


def _extracted(context: Context, names: Sequence[str]) -> tuple[FeatureNetwork, ...]:
    """Returns the networks whose features of samples some measures compare."""
    networks = [*context.networks] if any(MEASURES[name].network for name in names) else []
    return (*networks, context.clip_network) if {*names} & {*CLIP_FEATURES} else tuple(networks)


def _scales(options: Options) -> tuple[float, ...]:
    """Returns the guidance scales to measure at; () for the system's own."""
    if options.guidance or options.protocol is None:
        return options.guidance
    return (PROTOCOLS[options.protocol].guidance,)


def _evaluation(context: Context, found: Mapping[str, Figures], plan: Mapping[str, int]) -> Evaluation:
    options, samples = context.options, context.first_samples
    settings = {
        "num": dict(plan),
        "data": options.data if isinstance(options.data, str) else None,
        "split": options.split,
        "seed": options.seed,
        "guidance": [*_scales(options)],
        "sampling": {name: dict(fields) for name, fields in options.sampling.items()},
        "protocol": options.protocol,
        "features": [f"{network.name} {network.fingerprint}" for network in context.networks],
        "checkpoints": {name: each.step for name, each in context.system.stages.items()},
    }
    count = 0 if samples is None else min(SHOWN, len(samples))
    images = samples.images(count) if samples is not None and count else None
    captions_shown = samples.captions[:count] if samples is not None else []
    return Evaluation(str(context.system.path), dict(found), settings, images, captions_shown)
