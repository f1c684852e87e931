"""Whether a run may continue in a stage's folder: its config must be that of the folder's checkpoints."""

import json
from collections.abc import Mapping
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.workdir.folder import EXPERIMENT, StageFolder

MAY_CHANGE = (
    *("total_steps", "log_every", "checkpoint_every", "sample_every", "eval_every", "keep_checkpoints"),
    *("mesh", "workers", "tracker"),
)
"""Config fields in which a resumed run may differ from the run that made the folder."""

MAY_CHANGE_IN_DATA = "max_rejected"
"""The same for the section ``data``: a run that ended on too many bad records may continue with a higher limit."""

RESUME_CHANGES = "--config.resume_changes=True"
"""The flag with which the section ``optim`` may differ too, as after a run that diverged."""

Json = Mapping[str, Any]


def claim(folder: StageFolder, experiment: Json, stored: Json | None, resume_changes: bool = False) -> None:
    """Writes experiment.json, or checks that the folder's checkpoints were made by the same experiment.

    Args:
      folder: of the stage.
      experiment: JSON of the run's experiment.
      stored: JSON of the experiment in the folder; None if there is none.
      resume_changes: whether the section ``optim`` may differ from that of the folder's checkpoints. The differences
        are then appended to the list "changes" in run.json, with the step of the newest checkpoint.

    Raises:
      UserError: the folder belongs to another experiment; the message lists the differences.
    """
    step = folder.latest_step()
    if stored is not None and step is not None:
        fields = differing(stored, experiment)
        others = [field for field in fields if not field.startswith("optim.")]
        if fields and (others or not resume_changes):
            advice = "" if others else f", or add {RESUME_CHANGES} to change the optimizer's fields"
            raise UserError(
                f"{folder.path} was made with another config ({'; '.join(difference(stored, experiment))}): "
                f"use another --workdir, or give the stored values{advice}"
            )
        if fields:
            run = folder.read_json("run.json") or {}
            change = {"step": step, "fields": {field: list(values) for field, values in fields.items()}}
            before = run["changes"] if "changes" in run else []
            folder.write_json("run.json", {**run, "changes": [*before, change]})
    folder.write_json(EXPERIMENT, experiment)


def difference(stored: Json, requested: Json) -> list[str]:
    """Returns one "field: stored X, requested Y" for each field that differs and may not."""
    return [
        f"{field}: stored {json.dumps(old)}, requested {json.dumps(new)}"
        for field, (old, new) in differing(stored, requested).items()
    ]


def differing(stored: Json, requested: Json, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns "section.field" -> (stored, requested) of the fields in which a resumed run may not differ."""
    fields: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*stored, *requested}):
        if (not prefix and key in MAY_CHANGE) or (prefix.startswith("data.") and key == MAY_CHANGE_IN_DATA):
            continue
        pair = (tree[key] if key in tree else None for tree in (stored, requested))
        old, new = (json.loads(json.dumps(value)) for value in pair)
        if isinstance(old, dict) and isinstance(new, dict):
            fields |= differing(old, new, f"{prefix}{key}.")
        elif old != new:
            fields[f"{prefix}{key}"] = old, new
    return fields
