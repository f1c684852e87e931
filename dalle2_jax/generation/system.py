"""A system ready to sample: the loaded stages, and their agreement on one embedding space."""

import dataclasses
from collections.abc import Mapping

from dalle2_jax.stages import EmbeddingContract, Stage, Variables
from dalle2_jax.text import Tokenizer
from dalle2_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Member:
    """One trained stage: what it is, its averaged weights, and what it was trained under."""

    stage: Stage
    variables: Variables
    step: int
    contract: EmbeddingContract | None  # None for a stage that knows no embedding
    tokenizer: Tokenizer | None  # None for a stage that reads no text, or that was imported without
    context_length: int  # 0 for a stage that reads no text


def check_agreement(members: Mapping[str, Member], where: str) -> None:
    """Checks that every stage was trained under the contract of the CLIP beside it.

    Raises:
      UserError: naming the stage, both contracts, and what to do.
    """
    if "clip" not in members:
        return
    theirs = members["clip"].contract
    for name, member in members.items():
        if member.contract is not None and member.contract != theirs:
            differing = [
                f"{field.name} {getattr(member.contract, field.name)!r} against {getattr(theirs, field.name)!r}"
                for field in dataclasses.fields(EmbeddingContract)
                if getattr(member.contract, field.name) != getattr(theirs, field.name)
            ]
            raise UserError(
                f"stage {name} in {where} was trained with other CLIP embeddings than the clip beside it "
                f"({', '.join(differing)}): train {name} again, or put back the clip it was trained with"
            )
