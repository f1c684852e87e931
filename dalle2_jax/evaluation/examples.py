"""The examples on which a system is measured."""

from pathlib import Path

from dalle2_jax import data
from dalle2_jax.system import stored_data


def open_source(
    system: Path, stage: str, split: str = "val", named: str | None = None, trusted: bool = False
) -> data.Source:
    """Opens a split of the data that the user names, or of the data that a stage was trained on.

    Args:
      stage: the stage that is measured.
      split: "train", "val" or another split of the data.
      named: data as KIND or KIND:PATH; None opens the data that the stage's config names.
      trusted: whether a path or URL that the stage's config names is opened.

    Raises:
      UserError: the data cannot be read, or only the system's config names them and the system is not trusted.
    """
    if named:
        return data.source_named(named, split, stored_data.image_side(system, stage))
    return stored_data.open_stored_source(system, stage, split, trusted)
