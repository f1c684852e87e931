"""Invalid uses of the data commands fail before anything is written."""

import numpy as np
import pytest
from raised import mentions
from tiny_data import write_images

from dalle2_jax.cli import main
from dalle2_jax.cli.data import make_parser
from dalle2_jax.config.experiment import experiment
from dalle2_jax.data.configs import ShapesConfig
from dalle2_jax.data.embeddings.write import _write_empty
from dalle2_jax.errors import UsageError


def fail(capsys, *args):
    """Runs a data command that must fail; returns its exit code and its one-line error."""
    code = main(["data", *map(str, args)])
    captured = capsys.readouterr()
    assert code and not captured.out and captured.err.count("\n") == 1
    return code, captured.err


def test_embed_rejects_folders_with_other_content(tmp_path, capsys):
    image_folder = tmp_path / "images"
    image_folder.mkdir()
    before = sorted(write_images(image_folder, 3).iterdir())
    args = ["embed", "--system", tmp_path / "none", "--data", f"folder:{image_folder}", "--out"]
    code, error = fail(capsys, *args, image_folder)
    assert code == 1 and mentions(image_folder, "no embeddings")(error)
    assert sorted(image_folder.iterdir()) == before
    (tmp_path / "system" / "clip").mkdir(parents=True)
    (tmp_path / "system" / "prior").mkdir()
    assert mentions(tmp_path / "system", "no embeddings")(fail(capsys, *args, tmp_path / "system")[1])


@pytest.mark.parametrize("left", ["nothing", "hidden", "a part of clip", "the contract", "a split"])
def test_embed_accepts_the_folder_of_a_killed_run(tmp_path, capsys, left):
    """The command gets past the check of the folder and fails at the missing system."""
    out = tmp_path / "out"
    (out / "clip" / "tokenizer").mkdir(parents=True)
    if left == "nothing":
        (out / "clip" / "tokenizer").rmdir()
        (out / "clip").rmdir()
    if left == "hidden":
        (out / ".empty.npz.x3f").write_text("")
    if left in ("the contract", "a split"):
        (out / "clip" / "contract.json").write_text("{}")
    if left == "a split":
        (out / "train").mkdir()
        _write_empty(out / "empty.npz", {"a": np.zeros(1)})
    code, error = fail(capsys, "embed", "--system", tmp_path / "none", "--out", out)
    assert code == 1 and mentions(tmp_path / "none")(error)


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("what is no Python", ["SyntaxError", "line 1"]),
        ("import sys; sys.exit(0)", ["SystemExit: 0", "line 1"]),
        ("def get_config(which):\n    return 1 / 0", ["ZeroDivisionError", "line 2"]),
        ("def get_config(which):\n    return get_config(which)", ["RecursionError", "line 2"]),
        ("def get_config(which):\n    raise ValueError('line one\\nline two')", ["ValueError: line one", "line 2"]),
        ("import no_such_module", ["ModuleNotFoundError", "'no_such_module'", "line 1"]),
    ],
)
def test_an_exception_in_a_config_file_is_reported_in_one_line(tmp_path, program, error):
    (tmp_path / "config.py").write_text(program)
    with pytest.raises(UsageError, check=mentions(tmp_path / "config.py", *error, "FILE:STAGE")):
        experiment(f"{tmp_path}/config.py:clip")


def test_the_config_file_rejects_unknown_stages():
    assert isinstance(experiment("tests/support/tiny_system.py:clip").data, ShapesConfig)
    with pytest.raises(UsageError, check=mentions("tests/support/tiny_system.py", "'klip'", "'clip'")):
        experiment("tests/support/tiny_system.py:klip")


@pytest.mark.parametrize("split", ["", ".", "..", "../base", "/tmp", "a/b", "a\\b"])
def test_a_path_is_rejected_as_split(tmp_path, capsys, split):
    for args in (
        ["preview", "shapes", "--out", tmp_path / "x.png", "--split", split],
        ["inspect", "shapes", "--split", split],
        ["convert", "shapes", tmp_path / "out", "--to", "webdataset", "--splits", "train", split],
        ["embed", "--system", tmp_path, "--out", tmp_path / "out", "--split", split],
    ):
        code, error = fail(capsys, *args)
        assert code == 2 and mentions(repr(split))(error)


@pytest.mark.parametrize("split", ["val", "train[10%:]+test", "train[:2.5%]", "train[-3:]", "my-split_2"])
def test_slices_are_accepted_as_splits(split):
    assert make_parser().parse_args(["inspect", "shapes", "--split", split]).split == split


def test_preview_tolerates_max_rejected_bad_records(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_images(folder, 40)
    for path in sorted(folder.glob("*.png"))[:30]:
        path.write_bytes(b"bad")
    args = ["preview", f"folder:{folder}", "--out", str(tmp_path / "x.png")]
    assert main(["data", *args]) == 1
    assert main(["data", *args, "--max_rejected", "1"]) == 0
