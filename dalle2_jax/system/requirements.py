"""What a training run requires of the system that it belongs to: the CLIP and the tokenizer."""

import pathlib

import jax

from dalle2_jax import data, text
from dalle2_jax.config import inherit
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.parse import Place, expand_file
from dalle2_jax.config.sections import TokenizerConfig
from dalle2_jax.errors import UserError
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.system import load
from dalle2_jax.system.loaded_stage import LoadedStage
from dalle2_jax.workdir.folder import StageFolder


def find_tokenizer(
    experiment: Experiment,
    folder: StageFolder,
    base: StageFolder | None,
    source: data.Source,
    clip: LoadedStage | None,
) -> text.Tokenizer | None:
    """Returns the tokenizer of a stage that reads text: CLIP's if it requires CLIP, else its own."""
    config = experiment.spec.text
    if not experiment.spec.reads_text or config is None:
        return None
    return clip.tokenizer if clip and config.kind != "labels" else own_tokenizer(folder, base, config, source)


def own_tokenizer(
    folder: StageFolder, base: StageFolder | None, config: TokenizerConfig, source: data.Source
) -> text.Tokenizer:
    """Returns a stage's own tokenizer: that of its checkpoints, else its base's, else as its config has it."""
    if inherit.resumes(folder, base):  # without a checkpoint, the folder may hold files of an aborted run
        return text.load_tokenizer(folder.path / "tokenizer")
    if base or config.path:
        return text.load_tokenizer(base.path / "tokenizer" if base else config.path)
    kinds = {
        "sentencepiece": lambda size: text.train_sentencepiece(source.captions(20_000), size),
        "clip": text.clip_tokenizer,
        "glide": text.glide_tokenizer,
        "labels": text.LabelTokenizer,
    }
    place = Place("config", "text.kind")
    return place.choose(str(place), config.kind, kinds)(config.vocab_size)


def find_clip(
    experiment: Experiment,
    folder: StageFolder,
    base: StageFolder | None,
    source: data.Source,
    mesh: jax.sharding.Mesh,
    page: str,
) -> LoadedStage | None:
    """Returns the CLIP that a stage requires: of its system, else of its base's. None if it requires none.

    For data with stored embeddings it has no weights, and is that of the data where neither system has a CLIP yet.

    Raises:
      ContractError: it is not the CLIP of the stage's checkpoints, of the base, or of the stored embeddings.
      UserError: there is none.
    """
    if "clip" not in experiment.requires:
        return None
    stored = source.stored_embeddings
    homes = [folder.root, *([base.root] if base else []), *([stored.path] if stored else [])]
    home = next((root for root in homes if StageFolder(root, "clip").exists()), None)
    if home is None and stored:
        raise UserError(
            f"neither {folder.root} nor {stored.path} has a clip to go with the embeddings: link the one that made them"
        )
    if home is None:
        raise UserError(load.missing_stage(folder.root, "clip", page))
    clip_folder = StageFolder(home, "clip")
    clip = load.describe_clip(clip_folder) if stored else load.load_stage(home, "clip", mesh)
    if clip.contract is None:
        raise UserError(load.missing_stage(home, "clip", page))
    if stored:
        path = pathlib.Path(stored.path) / "clip" / "contract.json"
        expand_file(EmbeddingContract, stored.contract, path).check(
            clip.contract,
            f"{stored.path} holds other CLIP embeddings than those of {clip_folder.path}",
            "embed the data with this clip, or use a --workdir without a clip, or with that one",
        )
    if inherit.resumes(folder, base):
        check_contract(folder, clip.contract)
    elif base:
        inherit.check_contract(base, clip_folder)
    return clip


def check_contract(folder: StageFolder, contract: EmbeddingContract) -> None:
    """Raises ContractError unless a stage's checkpoints were trained under the contract of the system's CLIP."""
    stored = inherit.stored_contract(folder)
    if stored is not None:
        stored.check(
            contract,
            f"{folder.path} was trained with another clip than that of its system",
            f"remove {folder.path} to train it again, or put back that clip",
        )
