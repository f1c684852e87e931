"""Packs a trained system: a small copy with averaged weights only, which loads like the system itself."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dalle2_jax.config.specs import STAGES
from dalle2_jax.config.stored import stored_experiment, write_experiment
from dalle2_jax.errors import UserError, choose
from dalle2_jax.pretrained import find_system
from dalle2_jax.reading import read_users_text
from dalle2_jax.stages import fingerprint
from dalle2_jax.system.load import load_system, started_stages, trained_stages
from dalle2_jax.system.loaded_stage import LoadedStage
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights.kinds import PACK_DTYPES
from dalle2_jax.weights.packing.card import PackedStage, write_card
from dalle2_jax.weights.stage_writer import write_folder
from dalle2_jax.workdir import packed
from dalle2_jax.workdir.folder import StageFolder

_DTYPES: Mapping[str, Any] = dict(zip(PACK_DTYPES, (ml_dtypes.bfloat16, np.float32), strict=True))

COPIED = ("run.json", "source.json", "base.json", "noise_statistics.json", "moments.json", "components.json")
"""Files of a stage that a packed copy has unchanged, where the stage has them."""


@dataclasses.dataclass(frozen=True)
class PackReport:
    """Result of `pack`.

    Attributes:
        path: the folder that was written.
        stages: one entry per stage.
    """

    path: Path
    stages: tuple[PackedStage, ...]


def pack(
    system: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    stages: Sequence[str] = (),
    dtype: str = "bfloat16",
    card: str | os.PathLike[str] | None = None,
) -> PackReport:
    """Writes a copy of a trained system with averaged weights only, one safetensors file per stage.

    The copy samples, edits and is evaluated as the system is; other stages can be trained on its CLIP, and its stages
    are fine-tuned with ``init_from``. Their own training does not continue. A LoRA is merged into its base. A tokenizer
    that CLIP has too is stored once.

    With "bfloat16", the packed CLIP has other weights than the original one, and therefore another fingerprint in its
    embedding contract, which all packed stages share.

    Args:
        system: folder of the system, or the name of a system that comes with the package.
        out: folder to create.
        stages: names of the stages to pack; all trained ones if empty.
        dtype: "bfloat16" rounds weights of two or more axes and halves their size; "float32" keeps them.
        card: text file with the model card; a list of the stages is appended, in place of the one it has.

    Raises:
        UserError: the system cannot be loaded, or the card cannot be read.
        WeightsError: ``out`` exists or cannot be written.
        UsageError: an unknown dtype or stage.
    """
    array_dtype = choose("dtype", dtype, _DTYPES)
    for name in stages:
        choose("stage", name, dict.fromkeys(STAGES))
    root, path = find_system(system), Path(out).expanduser()
    about = f"# {path.name}" if card is None else read_users_text(Path(card))
    names = tuple(stages) or trained_stages(root, started_stages(root))
    members = load_system(root, make_mesh(MeshConfig()), names, allow_unfinished=True)
    report: list[PackedStage] = []

    def write(folder: Path) -> None:
        report.extend(_write_stages(root, folder, members, array_dtype))
        write_card(folder, about, report)

    write_folder(path, write)
    return PackReport(path, tuple(report))


def _write_stages(root: Path, out: Path, members: Mapping[str, LoadedStage], dtype: Any) -> list[PackedStage]:
    """Writes the folder of each stage."""
    trees = {name: {"ema": each.variables.params, "stats": each.variables.stats} for name, each in members.items()}
    stored = {name: {**tree, "ema": packed.rounded(tree["ema"], dtype)} for name, tree in trees.items()}
    identity = None
    if "clip" in stored:
        identity = fingerprint(jax.tree.map(lambda leaf: leaf.astype(np.float32), stored["clip"]["ema"]))
    shared = members["clip"].tokenizer if "clip" in members else None
    found = []
    for name, member in members.items():
        source, folder = StageFolder(root, name), StageFolder(out, name)
        weights = folder.path / "checkpoints" / str(member.step)
        packed.write(weights, stored[name])
        _write_description(source, folder, member, identity)
        if member.tokenizer is not None and (name == "clip" or member.tokenizer != shared):
            member.tokenizer.save(folder.path / "tokenizer")
            folder.record("tokenizer")
        found.append(
            PackedStage(
                name,
                member.step,
                str((source.read_json("run.json") or {}).get("config", "")),
                sum(leaf.size for leaf in jax.tree.leaves(stored[name]["ema"])),
                (weights / packed.FILE).stat().st_size,
                _relative_error(trees[name]["ema"], stored[name]["ema"]),
            )
        )
    return found


def _write_description(source: StageFolder, folder: StageFolder, member: LoadedStage, identity: str | None) -> None:
    """Writes all that a stage's folder has besides weights; its contract names the CLIP of fingerprint ``identity``."""
    experiment = stored_experiment(source)
    if experiment is None:
        raise UserError(f"{source.path} has no experiment.json: restore it")
    write_experiment(folder, dataclasses.replace(experiment, init_from=None, lora=None))
    for name in COPIED:
        content = source.read_json(name)
        if content is not None:
            folder.write_json(name, content)
    if member.contract is not None:
        contract = dataclasses.replace(member.contract, clip=identity or member.contract.clip)
        folder.write_json("contract.json", dataclasses.asdict(contract))


def _relative_error(original: Any, stored: Any) -> float:
    squares = np.zeros(2)
    for old, new in zip(jax.tree.leaves(original), jax.tree.leaves(stored), strict=True):
        exact = np.asarray(old, np.float64)
        squares += np.square(exact - np.asarray(new, np.float64)).sum(), np.square(exact).sum()
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
