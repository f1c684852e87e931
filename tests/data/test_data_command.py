"""What the command line of data refuses, before it writes anything."""

import numpy as np
import pytest
from tiny_data import write_pictures

from dalle2_jax.data.__main__ import _config, main, make_parser
from dalle2_jax.data.embed import _write_empty
from dalle2_jax.types import UsageError


def said_of(capsys, *words):
    """Runs a command that fails; returns its code and its one line."""
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    assert code and not told.out and told.err.count("\n") == 1
    return code, told.err


def test_embed_keeps_out_of_folders_that_hold_something_else(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    before = sorted(write_pictures(pictures, 3).iterdir())
    words = ["embed", "--system", tmp_path / "none", "--data", f"folder:{pictures}", "--out"]
    code, told = said_of(capsys, *words, pictures)
    assert code == 1 and told.startswith(f"error: {pictures} is not empty and holds no embeddings")
    assert sorted(pictures.iterdir()) == before
    (tmp_path / "system" / "clip").mkdir(parents=True)
    (tmp_path / "system" / "prior").mkdir()
    assert "holds no embeddings" in said_of(capsys, *words, tmp_path / "system")[1]


@pytest.mark.parametrize("left", ["nothing", "hidden", "a part of clip", "the contract", "a split"])
def test_embed_goes_on_where_it_was_killed(tmp_path, capsys, left):
    """It gets as far as the system, which is not there."""
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
    code, told = said_of(capsys, "embed", "--system", tmp_path / "none", "--out", out)
    assert code == 1 and "there is no system" in told


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("what is no Python", "SyntaxError: invalid syntax"),
        ("x = 1", "KeyError: 'get_config'"),
        ("def get_config(which):\n    raise ValueError('line one\\nline two')", "ValueError: line one"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_config_that_fails_is_told_in_one_line(tmp_path, program, reason):
    (tmp_path / "config.py").write_text(program)
    with pytest.raises(UsageError, match=f"^the config file cannot be read: .*config.py ends in {reason}") as caught:
        _config(str(tmp_path / "config.py"), "clip")
    assert "\n" not in str(caught.value)


def test_a_config_has_the_last_word_on_its_stages():
    assert _config("tests/tiny_system.py", "clip")["data"]["kind"] == "shapes"
    with pytest.raises(UsageError, match="^unknown config of tests/tiny_system.py 'klip'"):
        _config("tests/tiny_system.py", "klip")


@pytest.mark.parametrize("split", ["", ".", "..", "../base", "/tmp", "a/b", "a\\b"])
def test_a_split_is_no_path(tmp_path, capsys, split):
    for words in (
        ["preview", "shapes", "--out", tmp_path / "x.png", "--split", split],
        ["inspect", "shapes", "--split", split],
        ["convert", "shapes", tmp_path / "out", "--to", "webdataset", "--splits", "train", split],
        ["embed", "--system", tmp_path, "--out", tmp_path / "out", "--split", split],
    ):
        code, told = said_of(capsys, *words)
        assert code == 2 and f"{split!r} is not the name of a split" in told


@pytest.mark.parametrize("split", ["val", "train[10%:]+test", "train[:2.5%]", "train[-3:]", "my-split_2"])
def test_slices_are_splits(split):
    assert make_parser().parse_args(["inspect", "shapes", "--split", split]).split == split


def test_preview_bears_as_many_bad_records_as_it_is_told(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write_pictures(folder, 40)
    for path in sorted(folder.glob("*.png"))[:30]:
        path.write_bytes(b"bad")
    words = ["preview", f"folder:{folder}", "--out", str(tmp_path / "x.png")]
    assert main(words) == 1
    assert main([*words, "--max_rejected", "1"]) == 0
