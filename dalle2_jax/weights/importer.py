"""Imports public checkpoints as stages of a system."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import tqdm

from dalle2_jax import text
from dalle2_jax.config.inherit import stored_contract
from dalle2_jax.config.specs import STAGES
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.errors import ConfigError, UsageError, WeightsError, choose
from dalle2_jax.stages import ClipStage, Stage, abstract_variables
from dalle2_jax.weights.clip.towers import EMBEDDING
from dalle2_jax.weights.component import Component, make_hints, merge_parts
from dalle2_jax.weights.config_files import WeightsWarning
from dalle2_jax.weights.detect import Found
from dalle2_jax.weights.features import folder
from dalle2_jax.weights.inspection import (
    count_parameters,
    embedding_width,
    find,
    format_embedding,
    is_complete,
    source_paths,
)
from dalle2_jax.weights.kinds import IMPORT_DTYPES, TABLE_DTYPES
from dalle2_jax.weights.rules import check_keys
from dalle2_jax.weights.stage_writer import Trees, imported_experiment, read_component, staging, write_stage
from dalle2_jax.workdir.folder import StageFolder

_DTYPES: Mapping[str, Any] = dict(zip(IMPORT_DTYPES, (np.float32, ml_dtypes.bfloat16), strict=True))


@dataclasses.dataclass(frozen=True)
class ImportedStage:
    """A stage, or a feature network, that was imported.

    Attributes:
        name: name of the stage, or of the network, as in "vgg16".
        path: its folder.
        family: name of its family, as in "Karlo prior".
        parameters: number of parameters and statistics.
    """

    name: str
    path: Path
    family: str
    parameters: int


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Attributes:
        stages: the stages that were written.
        skipped: weights files of no known family.
    """

    stages: tuple[ImportedStage, ...]
    skipped: tuple[Path, ...]


def import_weights(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    workdir: str | os.PathLike[str],
    *,
    kind: str = "auto",
    dtype: str = "float32",
    tokenizer: str | os.PathLike[str] | None = None,
    html_unescape: bool = True,
    table_dtype: str = "float64",
    progress: bool = False,
    **hints: Any,
) -> ImportReport:
    """Writes the stages in public checkpoints to a system: all of them, or none after an error.

    The files of a feature network ("vgg16", "lpips" ..., see ``kinds.FEATURE_KINDS``) become a folder of its own, which
    `dalle2_jax.evaluation.features.load` or `dalle2_jax.evaluation.lpips.load` reads.

    Loading is strict: a missing or unexpected tensor is an error. A `WeightsWarning` reports unknown fields of config
    files, and stages without a tokenizer.

    Args:
        sources: a file or folder, or several. Of a part that occurs twice the first is used.
        workdir: folder of the system, which must not have these stages; of a feature network, a folder to create.
        kind: one of ``kinds.KINDS`` or ``kinds.FEATURE_KINDS``, or "auto" to detect it.
        dtype: dtype in which the weights are stored, "float32" or "bfloat16".
        tokenizer: folder of a CLIP tokenizer that replaces the one of the checkpoint.
        html_unescape: whether CLIP's tokenizer replaces HTML entities in captions, as in its training.
        table_dtype: dtype of the noise schedule's tables, "float64" or "float32" (as in diffusers).
        progress: whether to show a progress bar.
        **hints: fields of `component.Hints`.

    Raises:
        WeightsError: a source is damaged, incomplete or of an unsupported architecture, or the stages do not fit
            together or into the system.
        UsageError: an argument out of range.
    """
    array_dtype = choose("dtype", dtype, _DTYPES)
    choose("table_dtype", table_dtype, dict.fromkeys(TABLE_DTYPES))
    root, paths = Path(workdir).expanduser(), source_paths(sources)
    network = folder.find(paths, kind)
    if network is not None:
        return _import_network(network, root, dtype)
    found = find(paths, kind, make_hints(hints))
    components = _complete_components(found, table_dtype)
    names = [name for name in STAGES if name in components]
    if tokenizer is not None and "clip" not in names:
        raise UsageError("a tokenizer was given, but there is no CLIP among the sources")
    given = None if tokenizer is None else Path(tokenizer).expanduser()
    with staging(root, names) as temporary:
        clip_folder = StageFolder(temporary if "clip" in names else root, "clip")
        for name in names:
            component = with_tokenizer(components[name], given, clip_folder)
            component = with_html_unescape(component, html_unescape)
            _import_stage(StageFolder(temporary, name), component, clip_folder, array_dtype, progress)
    stages = (
        ImportedStage(name, root / name, each.family, count_parameters(each)) for name, each in components.items()
    )
    return ImportReport(tuple(sorted(stages, key=lambda stage: names.index(stage.name))), tuple(found.unknown))


def _complete_components(found: Found, table_dtype: str) -> dict[str, Component]:
    """Returns the found components by stage. WeightsError for one that lacks tensors."""
    components = with_shared_embedding(merge_parts(found.components))
    components = {name: with_table_dtype(component, table_dtype) for name, component in components.items()}
    for component in components.values():
        check_complete(component)
    return components


def _import_network(network: folder.FoundNetwork, root: Path, dtype: str) -> ImportReport:
    """Writes the folder of a feature network."""
    folder.write(network, root, dtype)
    parameters = folder.count_parameters(network)
    return ImportReport((ImportedStage(network.name, root, network.published.family, parameters),), ())


def _import_stage(
    folder: StageFolder, component: Component, clip_folder: StageFolder, dtype: Any, progress: bool
) -> None:
    """Reads a component and writes its stage, with the embedding contract of the CLIP that it depends on."""
    clip: ClipStage | None = None
    if "clip" in imported_experiment(component).requires:
        clip = load_clip(clip_folder, component)
        check_embedding(component, clip)
    stage = build_stage(component, clip)
    trees = read_arrays(stage, component, dtype, progress)
    contract = None
    if component.stage == "clip":
        contract = stage.contract(trees.params)
    elif clip is not None:
        contract = stored_contract(clip_folder)
    write_stage(folder, component, trees, contract)


def build_stage(component: Component, clip: ClipStage | None) -> Stage:
    """Returns the stage that a component's config describes.

    Raises:
        WeightsError: the config describes no valid stage.
    """
    experiment = imported_experiment(component)
    sizes = component.tokenizer or experiment.spec.text
    try:
        return experiment.build(None if sizes is None else sizes.vocab_size, clip)
    except ConfigError as error:
        what = f"{component.where} does not describe a valid {component.stage}: {error}"
        raise WeightsError(what, component.where) from error


def read_arrays(stage: Stage, component: Component, dtype: Any, progress: bool) -> Trees:
    """Returns the arrays of a component; ``progress`` shows a bar over its tensors."""
    abstract = abstract_variables(stage)
    bar = tqdm.tqdm(
        total=len(component.tensors),
        desc=f"reading {component.stage}",
        unit="tensor",
        leave=False,
        disable=not progress,
    )

    def counted(read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
        def read_and_count() -> np.ndarray:
            bar.update()
            return read()

        return read_and_count

    with bar:
        tensors = {key: each._replace(read=counted(each.read)) for key, each in component.tensors.items()}
        counting = dataclasses.replace(component, tensors=tensors)
        return read_component(counting, Trees(abstract.params, abstract.stats), dtype)


# --- the CLIP of the system -----------------------------------------------------------------


def load_clip(folder: StageFolder, component: Component) -> ClipStage:
    """Returns the CLIP of a system, without its weights.

    Args:
        folder: the CLIP's folder.
        component: the component that depends on it, for the error.

    Raises:
        WeightsError: the system has no trained CLIP.
    """
    experiment = stored_experiment(folder)
    if experiment is None or stored_contract(folder) is None:
        raise WeightsError(
            f"{component.where} ({component.family}) needs the CLIP it was trained with: give that too, or import it "
            "to the same system first",
            component.where,
        )
    tokenizer = folder.path / "tokenizer"
    sizes = text.load_tokenizer(tokenizer) if tokenizer.is_dir() else experiment.spec.text
    assert sizes is not None  # every CLIP reads text
    return cast(ClipStage, experiment.build(sizes.vocab_size, None))


def check_embedding(component: Component, clip: ClipStage) -> None:
    """Raises WeightsError unless a component was trained with embeddings like those of the system's CLIP."""
    width, embed_dim = embedding_width(component), clip.model.embed_dim
    what = f"{component.where} ({component.family})"
    if width is not None and width != embed_dim:
        raise WeightsError(
            f"{what} was trained with CLIP embeddings of {width} dimensions, the CLIP of the system has {embed_dim}: "
            "give the CLIP it was trained with",
            component.where,
        )
    expected, given = component.embedding or EMBEDDING, dataclasses.asdict(clip.embedding)
    if expected != given:
        raise WeightsError(
            f"{what} was trained with CLIP embeddings {format_embedding(expected)}, the CLIP of the system produces "
            f"{format_embedding(given)}: import it to another folder, together with its CLIP",
            component.where,
        )


def with_shared_embedding(components: Mapping[str, Component]) -> dict[str, Component]:
    """Returns the components, with a CLIP that produces embeddings as the other stages were trained with."""
    embeddings = [component.embedding for component in components.values() if component.embedding]
    if "clip" not in components or not embeddings:
        return dict(components)
    clip = components["clip"]
    return {**components, "clip": dataclasses.replace(clip, config={**clip.config, "embedding": embeddings[0]})}


# --- components -----------------------------------------------------------------------------


def check_complete(component: Component) -> None:
    """Checks a component before a network of the sizes in its config file is built.

    Raises:
        WeightsError: it is a part of a stage only, or tensors are missing or unexpected.
    """
    if not is_complete(component):
        what = f"{component.where} ({component.family}) is not a complete {component.stage}"
        raise WeightsError(f"{what}: give {component.completed_by} too", component.where)
    check_keys([*component.params, *component.stats], component.tensors, component.where, component.ignored)


def with_table_dtype(component: Component, table_dtype: str) -> Component:
    """Returns the component with the dtype of its noise schedule's tables in its config, unless it is the default."""
    if table_dtype == "float64" or "diffusion" not in component.config:
        return component
    diffusion = {**component.config["diffusion"], "table_dtype": table_dtype}
    return dataclasses.replace(component, config={**component.config, "diffusion": diffusion})


def with_html_unescape(component: Component, html_unescape: bool) -> Component:
    """Returns the component with a CLIP tokenizer that replaces HTML entities, or does not."""
    if not isinstance(component.tokenizer, text.ClipTokenizer):
        return component
    return dataclasses.replace(component, tokenizer=component.tokenizer.with_html_unescape(html_unescape))


def with_tokenizer(component: Component, given: Path | None, clip_folder: StageFolder) -> Component:
    """Returns the component with its tokenizer.

    Args:
        component: the component.
        given: folder of the tokenizer for CLIP; None for the one of the checkpoint.
        clip_folder: folder of the system's CLIP, whose tokenizer the stages that read CLIP's text states share.

    Raises:
        WeightsError: the given tokenizer has another vocabulary size than CLIP.
    """
    experiment = imported_experiment(component)
    if component.stage == "clip" and given is not None:
        tokenizer, vocab_size = text.read_clip_tokenizer(given), component.config["text"]["vocab_size"]
        if tokenizer.vocab_size != vocab_size:
            raise WeightsError(
                f"the tokenizer in {given} has {tokenizer.vocab_size} tokens, {component.where} has {vocab_size}: "
                "give the tokenizer it was trained with",
                given,
            )
        return dataclasses.replace(component, tokenizer=tokenizer)
    if component.tokenizer is not None or not experiment.spec.reads_text:
        return component
    if "clip" in experiment.requires:
        shared = clip_folder.path / "tokenizer"
        return dataclasses.replace(component, tokenizer=text.load_tokenizer(shared)) if shared.is_dir() else component
    consequence = "give one to sample from captions" if component.stage == "clip" else "it samples without captions"
    warnings.warn(f"{component.where} has no tokenizer: {consequence}", WeightsWarning, stacklevel=3)
    return component
