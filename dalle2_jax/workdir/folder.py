"""How a system lies on disk.

    WORKDIR/                     a system
      clip/                      one folder a stage
        experiment.json          the stage's config with every field (before version 0.2: config.json)
        contract.json            the embedding contract it was trained under
        base.json                of a fine-tuned stage: a fingerprint of the weights that it started from
        noise_statistics.json    statistics of the predicted noise, and the step of the checkpoint they were measured on
        components.json          of a CLIP: principal components of its image embeddings
        tokenizer/               the tokenizer of its captions
        digests.json             checksums of the files above, to detect damage; each checkpoint has its own
        run.json                 the --config it was trained with, with which versions, and what a resumed run changed
        checkpoints/<step>/      params, ema, opt_state, stats, ema_stats; the data position as metadata
        metrics.jsonl  tensorboard/  samples/

Training and import write this; sampling and evaluation read it. Every file appears under its final name only when it is
complete. A stage may be a symbolic link to a stage of another system; links inside a stage are rejected.
"""

import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from dalle2_jax.errors import SystemWarning, UserError
from dalle2_jax.files import write_atomically
from dalle2_jax.reading import parse_json, read_text
from dalle2_jax.workdir import digests

EXPERIMENT, PREVIOUS = "experiment.json", "config.json"
"""The file with a stage's config, and its name before version 0.2."""


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """One stage's folder in a system's workdir."""

    root: pathlib.Path
    stage: str

    @property
    def path(self) -> pathlib.Path:
        return self.root / self.stage

    def exists(self) -> bool:
        """Whether this stage was ever started here."""
        return self.experiment_file() is not None

    def experiment_file(self) -> str | None:
        """Returns the name of the file with the stage's config: `EXPERIMENT`, else `PREVIOUS`, else None."""
        names = (name for name in (EXPERIMENT, PREVIOUS) if os.path.lexists(self.path / name))
        return next(names, None)

    def is_link_to(self, other: "StageFolder") -> bool:
        """Whether this is another system's stage, linked."""
        return self.path.is_symlink() and self.path.resolve() == other.path.resolve()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Returns the object in ``name`` or None if there is no such file. UserError if it is not a JSON object."""
        path = self.path / name
        _check_kind(self.path, folder=True)
        _check_kind(path, folder=False)
        if not path.is_file():
            return None
        try:
            content = parse_json(read_text(path))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); restore it or remove {self.path}") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no JSON object; restore it or remove {self.path}")
        return content

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes ``value`` to ``name`` in this folder, atomically."""
        write_atomically(self.path / name, json.dumps(value, indent=2, sort_keys=True) + "\n")
        digests.record(self.path, name)

    def record(self, name: str) -> None:
        """Records the digest of a file, or of all files of a subfolder, to detect damage."""
        digests.record(self.path, name)

    def warn_if_changed(self) -> None:
        """Warns if files in this folder, besides checkpoints, differ from what this program wrote."""
        names = digests.changed(self.path) if digests.verifying() else []
        if names:
            warnings.warn(
                f"{self.path} has files that differ from what this program wrote ({', '.join(names)}): they were "
                f"edited, or are damaged. After an edit, remove {self.path / digests.NAME}",
                SystemWarning,
                stacklevel=2,
            )

    def reject_links(self) -> None:
        """Raises UserError if there is a symbolic link in this folder: it could lead reading and writing elsewhere."""
        for root, folders, files in os.walk(self.path):
            for path in (pathlib.Path(root, name) for name in (*folders, *files)):
                if path.is_symlink():
                    raise UserError(
                        f"{path} is a symbolic link to {os.readlink(path)!r}; links in a stage folder are rejected: "
                        "replace it by a copy, or make the stage folder itself a link"
                    )

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        folder = self.path / "checkpoints"
        _check_kind(folder, folder=True)
        return max(saved_steps(folder), default=None)


def _check_kind(path: pathlib.Path, folder: bool) -> None:
    """Raises UserError if a file lies where a folder of a stage belongs, or the reverse."""
    if path.exists() and path.is_dir() != folder:
        found, expected = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UserError(f"{path} is {found}, where {expected} of a stage belongs: move it away")


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns what is in a folder, nothing where there is none. OSError when it cannot be read."""
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except FileNotFoundError:
        return []


def saved_steps(folder: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, the newest first."""
    names = [path.name for path in entries(folder)]
    return sorted((int(name) for name in names if name.isdecimal() and name == str(int(name))), reverse=True)
