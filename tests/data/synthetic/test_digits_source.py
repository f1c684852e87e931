import cv2
import numpy as np
import pytest
from raised import mentions
from sklearn.datasets import load_digits

from dalle2_jax.cli import main
from dalle2_jax.data import FolderSource, example
from dalle2_jax.data.synthetic import digits
from dalle2_jax.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    assert main(["data", "digits", str(out)]) == 0
    return out


def _run(capsys, *arguments):
    try:
        code = main(["data", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_splits_cover_every_scan_once():
    train, val = digits.load("train"), digits.load("val")
    assert len(train.labels) + len(val.labels) == 1797
    assert 0.13 < len(val.labels) / 1797 < 0.17
    assert set(val.labels.tolist()) == set(range(10))
    train_images = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in train_images for image in val.images) == 0
    with pytest.raises(UserError, check=mentions("digits", "'test'", "train", "val")):
        digits.load("test")


def test_images_match_the_scans():
    scans, train = load_digits(), digits.load("train")
    assert train.images.shape[1:] == (32, 32, 3) and train.images.dtype == np.uint8
    for image, label in zip(train.images[:20], train.labels[:20], strict=True):
        down = cv2.resize(image[..., 0], (8, 8), interpolation=cv2.INTER_AREA).ravel()
        correlation = np.corrcoef(down, scans.images.reshape(1797, 64))[0, 1:]
        assert correlation.max() > 0.97 and scans.target[correlation.argmax()] == label


def test_captions_name_the_digit():
    every = [caption for label in range(10) for caption in digits.captions_of(label)]
    assert len(set(every)) == len(every)
    assert "a handwritten three" in digits.captions_of(3)
    assert "the digit 3 written by hand" in digits.captions_of(3)
    assert [digits.label_of(caption) for caption in digits.captions_of(7)] == [7] * len(digits.captions_of(7))
    assert digits.label_of("a cat") is None


def test_the_written_folder_is_a_source(written):
    val = FolderSource(written, "val", 32)
    expected = digits.load("val")
    assert len(val) == len(expected.labels) and len(FolderSource(written)) == 1797 - len(val)
    for index in (0, 17, len(val) - 1):
        assert digits.label_of(example(val, index)["caption"]) == expected.labels[index]
        np.testing.assert_array_equal(example(val, index)["image"], expected.images[index])
    assert sorted(path.name for path in written.parent.iterdir()) == ["digits"]


def test_a_folder_that_is_not_empty_is_rejected(written, capsys):
    code, captured = _run(capsys, "digits", written)
    assert code == 1 and mentions(written, "empty folder")(captured.err)
    code, captured = _run(capsys, "digits", written / "val" / "metadata.jsonl")
    assert code == 1


def test_a_failed_write_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)
    with pytest.raises(OSError, check=mentions("train/0000.png")):
        digits.write(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_preview_writes_a_sheet_of_samples(written, tmp_path, capsys):
    sheet = tmp_path / "sheets" / "sheet.png"
    code, captured = _run(capsys, "preview", f"folder:{written}", "--split", "val", "--num", 7, "--out", sheet)
    assert code == 0 and "the first 7" in captured.out
    pixels = cv2.imread(str(sheet))
    assert pixels.shape[1] > 6 * 128 and pixels.std() > 40
    assert [path.name for path in sheet.parent.iterdir()] == ["sheet.png"]
    assert _run(capsys, "preview", "shapes", "--num", 2, "--out", tmp_path / "shapes.png")[0] == 0


def test_invalid_arguments_exit_with_one_line_errors(tmp_path, capsys):
    code, captured = _run(capsys, "preview", "shopes", "--out", tmp_path / "x.png")
    assert code == 1 and captured.err.count("\n") == 1 and "'shopes'" in captured.err
    assert all(form in captured.err for form in ("shapes", "folder:PATH", "webdataset:PATH", "tfds:PATH"))
    code, captured = _run(capsys, "preview", "shapes", "--split", "test", "--out", tmp_path / "x.png")
    assert code == 1 and mentions("shapes", "'test'")(captured.err)
    (tmp_path / "file").write_text("")
    assert _run(capsys, "preview", "shapes", "--num", 1, "--out", tmp_path / "file" / "x.png")[0] == 1
    assert _run(capsys, "preview", "shapes", "--num", 0, "--out", tmp_path / "x.png")[0] == 2
    assert _run(capsys, "preview", "shapes")[0] == 2
    for command in ([], ["digits"], ["preview"], ["inspect"]):
        code, captured = _run(capsys, *command, "--help")
        assert code == 0 and "example" in captured.out
