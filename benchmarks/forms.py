"""Trains on one data set in each form that it can have, by the real commands, and compares the loss curves.

    python benchmarks/forms.py

The digits as folder, tar shards and ArrayRecord train CLIP and a prior, and as embeddings a prior too. Before CLIP's
rounding, which depends on the size of its batches, all curves are one.
"""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from common import command, emit

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli

FORMS = {"webdataset": "webdataset", "tfds": "arrayrecord"}
"""Kinds of data, and what `convert` calls their format."""


def write_forms(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes the digits in each form; returns where, by kind."""
    places = {kind: root / kind for kind in ("folder", *FORMS)}
    command("-m", "dalle2_jax", "data", "digits", places["folder"])
    for kind, form in FORMS.items():
        command("-m", "dalle2_jax", "data", "convert", f"folder:{places['folder']}", places[kind], "--to", form)
    return places


def curve(stage: str, kind: str, place: pathlib.Path, root: pathlib.Path) -> list[float]:
    """Trains a stage, with the folder's CLIP if it needs one, and returns its logged losses."""
    system = root / f"{stage}_{kind}"
    system.mkdir()
    if stage != "clip":
        (system / "clip").symlink_to(root / "clip_folder" / "clip")
    data = {"kind": kind, "path": str(place)} | ({} if kind == "embeddings" else {"resolution": 32})
    command("train.py", "--config", f"configs/folder.py:{stage}", "--workdir", system, f"--config.data={data}")
    return [json.loads(line)["loss"] for line in (system / stage / "metrics.jsonl").read_text().splitlines()]


def compare(stage: str, places: dict[str, pathlib.Path], root: pathlib.Path) -> None:
    """Prints how far the loss curve of each form is from the folder's."""
    curves = {kind: curve(stage, kind, place, root) for kind, place in places.items()}
    for kind, losses in curves.items():
        pairs = zip(losses, curves["folder"], strict=True)
        emit(
            benchmark="forms",
            stage=stage,
            data=kind,
            first_loss=losses[0],
            last_loss=losses[-1],
            largest_relative_difference=max(abs(one / other - 1) for one, other in pairs),
        )


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/forms.py"
    args.make_parser(example, "Trains on one data set in each form.", example).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        places = write_forms(root)
        compare("clip", places, root)
        embeddings = root / "embeddings"
        words = ("--data", f"folder:{places['folder']}", "--out", embeddings)
        command("-m", "dalle2_jax", "data", "embed", "--system", root / "clip_folder", *words)
        compare("prior", {**places, "embeddings": embeddings}, root)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
