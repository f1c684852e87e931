"""``python -m dalle2_jax.weights``: public checkpoints in, and out again."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import ml_dtypes
import numpy as np
import tqdm

from dalle2_jax import build, entry, text
from dalle2_jax.generation import Member
from dalle2_jax.networks import borrows_clip, reads_text
from dalle2_jax.stages import ClipStage, EmbeddingContract
from dalle2_jax.stages.base import fingerprint
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.types import UsageError, UserError
from dalle2_jax.weights import families
from dalle2_jax.weights.clip import export_hf, export_open_clip, export_openai
from dalle2_jax.weights.clip_towers import EMBEDDING
from dalle2_jax.weights.component import Component, Hints, merged
from dalle2_jax.weights.karlo_export import Trained, export_diffusers
from dalle2_jax.weights.landing import Trees, read, staging, stored_config, write_files, write_stage
from dalle2_jax.workdir import StageFolder

EXAMPLE = "python -m dalle2_jax.weights import auto karlo-v1-alpha runs/karlo"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = entry.parser("python -m dalle2_jax.weights", "Public checkpoints in and out.", EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    kinds = ("auto", *families.KINDS)
    command = commands.add_parser("import", help="makes a system, or stages of one, of public checkpoints")
    command.add_argument("kind", choices=kinds, help="what the sources are; auto finds out")
    command.add_argument("source", nargs="+", type=Path, help="files and folders; of parts that come twice, the first")
    command.add_argument("system", type=Path, help="the system's folder, as in runs/karlo")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 halves the disk")
    tokenizer = "folder of CLIP's tokenizer, in place of the one that comes with it"
    command.add_argument("--tokenizer", type=Path, help=tokenizer)
    _add_hints(command)
    command = commands.add_parser("inspect", help="says what a file or folder is, and what it can join")
    command.add_argument("source", nargs="+", type=Path, help="files and folders")
    command.add_argument("--kind", choices=kinds, default="auto", help="what they are (default: find out)")
    _add_hints(command)
    command = commands.add_parser("export", help="writes a system, or its CLIP, for other programs")
    forms = "diffusers: UnCLIPPipeline; or CLIP alone, in one of its forms"
    command.add_argument("format", choices=EXPORTS, help=forms)
    command.add_argument("system", type=Path, help="the system's folder")
    command.add_argument("folder", type=Path, help="folder to make")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tensors (default %(default)s)")
    return parser


def _add_hints(command: argparse.ArgumentParser) -> None:
    """Adds what state dicts leave open."""
    group = command.add_argument_group("of a GLIDE or ADM network other than the released ones")
    group.add_argument("--head_channels", type=entry.positive, help="width of an attention head (released: 64)")
    group.add_argument("--image_size", type=entry.positive, help="side of its pictures (released: 4 x 2^levels)")
    group.add_argument("--attention_order", choices=("legacy", "new"), help="of ADM (released: new at 64 pixels alone)")
    group = command.add_argument_group("of a prior of DALLE2-pytorch")
    group.add_argument(
        "--attention", choices=("relaxed", "cosine"), help="by version: before 1.4.3 (as LAION's), or 1.4.3 to 1.8.4"
    )


def find(options: argparse.Namespace) -> list[Component]:
    """Returns what the sources hold; files of nothing known are said on standard error."""
    hints = Hints(options.head_channels, options.image_size, options.attention_order, options.attention)
    found = [families.recognise(path, options.kind, hints) for path in options.source]
    for path in (path for each in found for path in each.unknown):
        print(f"warning: {path} is left out: it is none of the families known here", file=sys.stderr)
    return [component for each in found for component in each.components]


# --- inspect --------------------------------------------------------------------------------


def inspect(options: argparse.Namespace) -> None:
    """Prints a line on each component."""
    for component in find(options):
        dtypes = sorted({tensor.dtype for tensor in component.tensors.values()})
        print(f"{component.where}: {component.family}")
        count = families.parameters(component)
        print(f"  stage {component.stage}, {count:,} parameters, {', '.join(dtypes)}; {joins(component)}")
        if component.needs:
            print(f"  {component.needs} completes it")


def joins(component: Component) -> str:
    """Says which systems a component belongs to: the embedding contract, in words."""
    width = families.embedding_width(component)
    if component.stage == "clip":
        return f"makes embeddings of {width} dimensions ({in_words(component.config.get('embedding', EMBEDDING))})"
    if "model" not in component.config:
        return f"is a part of a {component.stage}"
    if width is None:
        return "takes no embedding: it joins any system" if component.stage != "decoder" else "needs no CLIP or prior"
    return f"joins a CLIP of {width} dimensions ({in_words(component.embedding or EMBEDDING)})"


def in_words(embedding: Mapping[str, Any]) -> str:
    """Says how a contract hands embeddings on."""
    return f"{embedding['normalisation']} x {embedding['scale']:.6g}"


# --- import ---------------------------------------------------------------------------------


def import_system(options: argparse.Namespace) -> None:
    """Writes each stage that the sources hold: all of them, or none."""
    components = under_contract(merged(find(options)))
    names = [name for name in build.STAGES if name in components]
    for component in components.values():
        check_whole(component)
    if options.tokenizer is not None and "clip" not in names:
        raise UsageError("--tokenizer is CLIP's, and there is no CLIP among the sources")
    with staging(options.system, names) as temporary:
        clip_root = temporary if "clip" in names else options.system
        clip: ClipStage | None = None
        for name in names:
            borrows = borrows_clip(stored_config(components[name]))
            if borrows:
                clip = clip or clip_beside(clip_root, components[name])
                check_contract(components[name], clip)
            component = with_tokenizer(components[name], options.tokenizer, clip_root)
            stage = build.build_stage(stored_config(component), vocab_size(component), clip)
            trees = read_stage(stage, component, DTYPES[options.dtype])
            folder = StageFolder(temporary, name)
            write_stage(folder, component, trees)
            if isinstance(stage, ClipStage):
                clip = stage
                kind, scale = stage.embedding.normalisation, stage.embedding.scale
                contract = EmbeddingContract(fingerprint(trees.params), stage.model.embed_dim, kind, scale)
                folder.write_json("contract.json", dataclasses.asdict(contract))
            elif borrows:
                folder.write_json("contract.json", StageFolder(clip_root, "clip").read_json("contract.json"))
            del trees
    for name in names:
        count = families.parameters(components[name])
        print(f"{options.system / name}: {components[name].family}, {count:,} parameters")


def check_whole(component: Component) -> None:
    """Raises UserError for a part that says too little of its stage to build it: an image tower, statistics."""
    if "model" not in component.config or (component.stage == "clip" and "text" not in component.config):
        what = f"{component.where} ({component.family}) is no whole {component.stage}"
        raise UserError(f"{what}: give {component.needs} too")


def under_contract(components: Mapping[str, Component]) -> dict[str, Component]:
    """Returns the components, a CLIP among them handing its embeddings on as those beside it were trained with."""
    asked = [component.embedding for component in components.values() if component.embedding]
    if "clip" not in components or not asked:
        return dict(components)
    clip = components["clip"]
    return {**components, "clip": dataclasses.replace(clip, config={**clip.config, "embedding": asked[0]})}


def check_contract(component: Component, clip: ClipStage) -> None:
    """Raises UserError unless a component was trained with embeddings as its CLIP hands them on, and as wide."""
    width, ours = families.embedding_width(component), clip.model.embed_dim
    if width is not None and width != ours:
        raise UserError(
            f"{component.where} ({component.family}) does not fit a CLIP of {ours} dimensions: give the one it was "
            f"trained with, of {width}"
        )
    asked, given = component.embedding or EMBEDDING, dataclasses.asdict(clip.embedding)
    if asked != given:
        raise UserError(
            f"{component.where} ({component.family}) was trained with CLIP embeddings {in_words(asked)}, and the clip "
            f"beside it hands on {in_words(given)}: import it to another folder, together with its CLIP"
        )


def with_tokenizer(component: Component, given: Path | None, clip_root: Path) -> Component:
    """Returns the component with its tokenizer: ``given`` for CLIP, and CLIP's for those that CLIP reads for.

    Raises:
      UserError: the given one has another vocabulary.
    """
    config, beside = stored_config(component), clip_root / "clip" / "tokenizer"
    if component.stage == "clip" and given is not None:
        tokenizer, known = text.read_clip_tokenizer(given), component.config["text"]["vocab_size"]
        if tokenizer.vocab_size != known:
            raise UserError(
                f"the tokenizer in {given} has {tokenizer.vocab_size} tokens, and {component.where} knows {known}: "
                "give the one it was trained with"
            )
        return dataclasses.replace(component, tokenizer=tokenizer)
    if component.tokenizer is not None or not reads_text(config):
        return component
    if borrows_clip(config):
        return dataclasses.replace(component, tokenizer=text.load_tokenizer(beside)) if beside.is_dir() else component
    hint = "give --tokenizer FOLDER to draw from captions" if component.stage == "clip" else "it draws without captions"
    print(f"warning: {component.where} brings no tokenizer: {hint}", file=sys.stderr)
    return component


def vocab_size(component: Component) -> int | None:
    """Returns the size of a component's vocabulary, None where it reads no text."""
    if component.tokenizer is not None:
        return component.tokenizer.vocab_size
    return component.config.get("text", {}).get("vocab_size")


def clip_beside(root: Path, component: Component) -> ClipStage:
    """Returns the CLIP of a system, without its weights. UserError if there is none, or it is not trained yet."""
    folder = StageFolder(root, "clip")
    config = folder.read_json("config.json")
    if config is None or folder.read_json("contract.json") is None:
        raise UserError(
            f"{component.where} ({component.family}) needs the CLIP it was trained with: give that too, as in "
            f"`import auto CLIP {component.where} {root}`, or import it to {root} first"
        )
    tokenizer = folder.path / "tokenizer"
    known = text.load_tokenizer(tokenizer).vocab_size if tokenizer.is_dir() else config["text"]["vocab_size"]
    return build.build_stage(config, known, None)


def read_stage(stage: Any, component: Component, dtype: Any) -> Trees:
    """Returns a component's arrays, a bar showing how many of its tensors were read."""
    abstract = jax.eval_shape(stage.init, jax.random.key(0))
    with tqdm.tqdm(total=len(component.tensors), desc=f"reading {component.stage}", unit="tensor", leave=False) as bar:

        def counted(take: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
            def reading() -> np.ndarray:
                bar.update()
                return take()

            return reading

        tensors = {key: each._replace(read=counted(each.read)) for key, each in component.tensors.items()}
        shapes = Trees(abstract.params, abstract.stats)
        return read(dataclasses.replace(component, tensors=tensors), shapes, dtype)


# --- export ---------------------------------------------------------------------------------


def trained(root: Path, members: Mapping[str, Member]) -> dict[str, Trained]:
    """Returns stages as exporters want them."""
    return {
        name: Trained(
            StageFolder(root, name).read_json("config.json"),
            member.stage.model,
            Trees(member.variables.params, member.variables.stats),
            member.tokenizer,
        )
        for name, member in members.items()
    }


def _clip_alone(write: Callable[[Path, Trained, Any], None]) -> Callable[[Path, Mapping[str, Trained], Any], None]:
    return lambda folder, stages, dtype: write(folder, stages["clip"], dtype)


EXPORTS = {
    # format: the stages it takes, none for all, and what writes them
    "diffusers": ((), export_diffusers),
    "hf_clip": (
        ("clip",),
        _clip_alone(lambda folder, clip, dtype: export_hf(folder, clip.model, clip.trees, clip.tokenizer, dtype)),
    ),
    "openai_clip": (
        ("clip",),
        _clip_alone(lambda to, clip, dtype: export_openai(to / "clip.safetensors", clip.model, clip.trees, dtype)),
    ),
    "open_clip": (
        ("clip",),
        _clip_alone(lambda folder, clip, dtype: export_open_clip(folder, clip.model, clip.trees, dtype)),
    ),
}


def export(options: argparse.Namespace) -> None:
    """Writes a system for other programs: whole, or not at all."""
    names, write = EXPORTS[options.format]
    members = build.load_system(options.system, make_mesh(MeshConfig()), names)
    stages = trained(options.system, members)
    write_files(options.folder, lambda folder: write(folder, stages, DTYPES[options.dtype]))
    print(f"{options.folder}: {', '.join(members)} of {options.system}")


COMMANDS = {"import": import_system, "inspect": inspect, "export": export}


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    entry.enable_compilation_cache()
    COMMANDS[options.command](options)


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
