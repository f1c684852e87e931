import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits

from dalle2_jax.data import FolderSource, digits
from dalle2_jax.data.__main__ import main
from dalle2_jax.types import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    assert main(["digits", str(out)]) == 0
    return out


def _run(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def test_splits_cover_every_scan_once():
    train, val = digits.load("train"), digits.load("val")
    assert len(train.labels) + len(val.labels) == 1797
    assert 0.13 < len(val.labels) / 1797 < 0.17
    assert set(val.labels.tolist()) == set(range(10))
    kept = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in kept for image in val.images) == 0
    with pytest.raises(UserError, match="no split 'test'"):
        digits.load("test")


def test_pictures_are_the_scans():
    scans, train = load_digits(), digits.load("train")
    assert train.images.shape[1:] == (32, 32, 3) and train.images.dtype == np.uint8
    for image, label in zip(train.images[:20], train.labels[:20], strict=True):
        down = cv2.resize(image[..., 0], (8, 8), interpolation=cv2.INTER_AREA).ravel()
        alike = np.corrcoef(down, scans.images.reshape(1797, 64))[0, 1:]
        assert alike.max() > 0.97 and scans.target[alike.argmax()] == label


def test_captions_name_the_digit():
    every = [caption for label in range(10) for caption in digits.captions_of(label)]
    assert len(set(every)) == len(every)
    assert "a handwritten three" in digits.captions_of(3)
    assert "the digit 3 written by hand" in digits.captions_of(3)
    assert [digits.label_of(caption) for caption in digits.captions_of(7)] == [7] * len(digits.captions_of(7))
    assert digits.label_of("a cat") is None


def test_the_folder_is_a_source(written):
    val = FolderSource(written, "val", 32)
    expected = digits.load("val")
    assert len(val) == len(expected.labels) and len(FolderSource(written)) == 1797 - len(val)
    for index in (0, 17, len(val) - 1):
        assert digits.label_of(val[index]["caption"]) == expected.labels[index]
        np.testing.assert_array_equal(val[index]["image"], expected.images[index])
    assert sorted(path.name for path in written.parent.iterdir()) == ["digits"]


def test_a_folder_in_use_is_refused(written, capsys):
    code, said = _run(capsys, "digits", written)
    assert code == 1 and "not an empty folder" in said.err and len(said.err.strip().splitlines()) == 1
    code, said = _run(capsys, "digits", written / "val" / "metadata.jsonl")
    assert code == 1


def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imwrite", lambda *_: False)
    with pytest.raises(OSError, match="cannot write"):
        digits.write(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_preview(written, tmp_path, capsys):
    sheet = tmp_path / "sheets" / "sheet.png"
    code, said = _run(capsys, "preview", f"folder:{written}", "--split", "val", "--num", 7, "--out", sheet)
    assert code == 0 and "the first 7" in said.out
    picture = cv2.imread(str(sheet))
    assert picture.shape[1] > 6 * 128 and picture.std() > 40
    assert [path.name for path in sheet.parent.iterdir()] == ["sheet.png"]
    assert _run(capsys, "preview", "shapes", "--num", 2, "--out", tmp_path / "shapes.png")[0] == 0


def test_mistakes_are_answered(tmp_path, capsys):
    code, said = _run(capsys, "preview", "shopes", "--out", tmp_path / "x.png")
    known = "write shapes, folder:PATH, webdataset:PATH or tfds:PATH"
    assert code == 1 and said.err == f"error: unknown data set 'shopes': {known}\n"
    code, said = _run(capsys, "preview", "shapes", "--split", "test", "--out", tmp_path / "x.png")
    assert code == 1 and "no split 'test'" in said.err
    (tmp_path / "file").write_text("")
    assert _run(capsys, "preview", "shapes", "--num", 1, "--out", tmp_path / "file" / "x.png")[0] == 1
    assert _run(capsys, "preview", "shapes", "--num", 0, "--out", tmp_path / "x.png")[0] == 2
    assert _run(capsys, "preview", "shapes")[0] == 2
    for command in ([], ["digits"], ["preview"], ["inspect"]):
        code, said = _run(capsys, *command, "--help")
        assert code == 0 and "example" in said.out
