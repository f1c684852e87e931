"""One loaded stage, and the check that the stages of a system share one embedding space."""

import dataclasses
from collections.abc import Mapping

import jax

from dalle2_jax.stages import EmbeddingContract, Stage, Variables
from dalle2_jax.text import Tokenizer


@dataclasses.dataclass(frozen=True, repr=False)
class LoadedStage:
    """One trained stage.

    Attributes:
      stage: what it is.
      variables: its averaged weights and its statistics.
      step: of the checkpoint that was loaded.
      contract: the embedding contract that it was trained under; None for a stage that uses no embeddings.
      tokenizer: None for a stage that reads no text, or that was imported without one.
      context_length: tokens per caption; 0 for a stage that reads no text.
    """

    stage: Stage
    variables: Variables
    step: int
    contract: EmbeddingContract | None
    tokenizer: Tokenizer | None
    context_length: int

    def __repr__(self) -> str:
        arrays = jax.tree.leaves(self.variables)
        count = sum(array.size for array in arrays)
        shown = "none" if self.contract is None else f"CLIP {self.contract.clip}, {self.contract.dim} dimensions"
        return (
            f"LoadedStage({self.stage.name}: {type(self.stage).__name__}, step {self.step:,}, {count:,} values,\n"
            f"  embedding contract: {shown})"
        )


def check_agreement(members: Mapping[str, LoadedStage], where: str) -> None:
    """Checks that every stage was trained under the contract of the system's CLIP.

    Args:
      members: the loaded stages by name.
      where: the system, for errors.

    Raises:
      ContractError: a stage was not; with the differences.
    """
    clip = members["clip"].contract if "clip" in members else None
    if clip is None:
        return
    for name, member in members.items():
        if member.contract is not None:
            member.contract.check(
                clip,
                f"stage {name} in {where} was trained with other CLIP embeddings than those of the system's clip",
                f"train {name} again, or put back the clip it was trained with",
            )
