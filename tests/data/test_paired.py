"""Pictures find their stored embeddings by name, whatever the form and the order of either."""

import json
import pickle
import shutil

import cv2
import numpy as np
import pytest
from test_embeddings import DIM, LENGTH, SumEmbedder, task_of

from dalle2_jax.data import EmbeddingSource, FolderConfig, FolderSource, PairedSource, TfdsConfig, WebdatasetConfig
from dalle2_jax.data import digits, make_source, make_stream
from dalle2_jax.data.convert import convert
from dalle2_jax.data.embed import write_split
from dalle2_jax.data.embeddings import look, look_alike
from dalle2_jax.testing import WordTokenizer
from dalle2_jax.types import UserError


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(folder, numbers, captions=lambda number: [f"red {number} {other}" for other in range(number % 3 + 1)]):
    """Writes pictures of noise, each always the same, in an order."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in numbers:
        pixels = np.random.default_rng(number).integers(256, size=(10, 13, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), pixels)
        lines.append(json.dumps({"file_name": f"{number}.png", "text": captions(number)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def embedded(tmp_path):
    """Twelve pictures, embedded in shards of three."""
    task = task_of(write(tmp_path / "pictures", range(12)), tmp_path / "embedded", states=True)
    assert write_split(task) == 12
    return task


def rows_of(picture, caption):
    """What the embedder says of a picture and a caption."""
    tokens, mask = WordTokenizer().encode([caption], LENGTH)
    return SumEmbedder().images(picture[None])[0], SumEmbedder().captions(tokens, mask)["text_emb"][0]


@pytest.mark.parametrize("form", ["folder", "webdataset", "arrayrecord"])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_every_form_in_every_order_finds_its_embeddings(embedded, tmp_path, form, crop):
    folder = write(tmp_path / "again", [7, 3, 11, 0, 5])
    config = {"folder": FolderConfig, "webdataset": WebdatasetConfig, "arrayrecord": TfdsConfig}[form]
    if form != "folder":
        convert({"train": FolderSource(folder)}, tmp_path / form, form)
    how = {"path": str(folder if form == "folder" else tmp_path / form), "resolution": 8, "crop": crop}
    plain = make_source(config(**how), "train")
    source = make_source(config(**how, embeddings=str(embedded.out)), "train")
    assert isinstance(source, PairedSource) and len(source) == 5
    for index in range(5):
        for one in (source, pickle.loads(pickle.dumps(source))):
            example = one[index]
            assert {**plain[index], "image": None} == {name: {**example, "image": None}[name] for name in plain[index]}
            image_emb, text_emb = rows_of(plain[index]["image"], example["caption"])
            np.testing.assert_array_equal(example["image_emb"], image_emb)
            np.testing.assert_array_equal(example["text_emb"], text_emb)
            for seed in range(4):
                rows, caption = one.draw(index, np.random.default_rng(seed))
                image, said = plain.draw(index, np.random.default_rng(seed))
                np.testing.assert_array_equal(rows["image"], image)
                assert caption == said and rows.keys() == {"image", "image_emb", "text_emb"}
                np.testing.assert_array_equal(rows["image_emb"], image_emb)
                np.testing.assert_array_equal(rows["text_emb"], rows_of(image, said)[1])
    assert not source.rejected


def test_batches_have_pictures_and_what_is_asked_for(embedded):
    pictures = FolderSource(embedded.source.records.path, resolution=8).records
    source = PairedSource(EmbeddingSource(embedded.out), pictures, 8)
    told = source.telling(("image_emb", "text_emb", "text_seq"), LENGTH)
    batch = next(make_stream(told, WordTokenizer(), LENGTH, 4, seed=0))
    assert {name: rows.shape for name, rows in batch.items()} == {
        "image": (4, 8, 8, 3),
        "image_emb": (4, DIM),
        "text_emb": (4, DIM),
        "text_seq": (4, LENGTH, 3),
        "tokens": (4, LENGTH),
        "mask": (4, LENGTH),
    }
    np.testing.assert_allclose(batch["text_seq"][..., 0], batch["tokens"] / 7, rtol=1e-3)
    longer = next(make_stream(source.telling(("image_emb",), 11), WordTokenizer(), 11, 4, seed=0))
    assert longer["tokens"].shape == (4, 11), "a stage that reads tokens has its own of any length"
    with pytest.raises(UserError, match="context_length must be 8, not 11"):
        source.telling(("text_seq",), 11)
    alone = source.alone()
    assert type(alone[0]["image"]) is np.ndarray and "image_emb" not in alone[0]


def test_what_does_not_fit_is_refused_by_cause(embedded, tmp_path):
    folder = write(tmp_path / "other", range(8, 16))
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace("red 9 0", "green 9 0").replace("red 8 0", "  red\\t8 0"))
    (folder / "10.png").write_bytes((folder / "15.png").read_bytes())
    how = {"max_rejected": 1.0, "embeddings": str(embedded.out)}
    source = make_source(FolderConfig(str(folder), 8, **how), "train")
    keys = {source[index]["key"] for index in range(len(source))}
    assert keys == {"8.png", "11.png"}
    assert source.rejected == {"not embedded": 4, "other captions": 1, "other picture": 1}
    with pytest.raises(UserError, match="no embeddings of split 'val', only train"):
        make_source(FolderConfig(str(folder), 8, embeddings=str(embedded.out)), "val")


def test_files_that_changed_names_are_refused(embedded, tmp_path):
    """Pictures and captions both moved on by three, so that even the numbers of captions agree."""
    write(tmp_path / "pictures", range(12))
    folder = tmp_path / "moved"
    folder.mkdir()
    lines = []
    for number in range(12):
        shutil.copy(tmp_path / "pictures" / f"{number}.png", folder / f"{(number + 3) % 12}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": ["red"] * (number % 3 + 1)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="5 of 12 records .*found so far: 5 other captions"):
        make_source(FolderConfig(str(folder), 8, embeddings=str(embedded.out)), "train")[0]
    shutil.copy(tmp_path / "pictures" / "metadata.jsonl", folder)
    with pytest.raises(UserError, match="5 of 12 records .*found so far: 5 other picture"):
        make_source(FolderConfig(str(folder), 8, embeddings=str(embedded.out)), "train")[0]


def test_looks_tell_pictures_apart_at_any_resolution(tmp_path):
    """Handwritten digits, the hardest: plain, and alike within a class; and cut or coded otherwise they still fit."""
    digits.write(tmp_path / "digits")
    scans = [FolderSource(tmp_path / "digits", resolution=side) for side in (8, 64)]
    looks = [[look(source[index]["image"]) for index in range(60)] for source in scans]
    alike = np.array([[look_alike(small, large) for large in looks[1]] for small in looks[0]])
    assert alike.diagonal().all() and alike.mean() < 1 / 60 + 0.03
    jpeg = cv2.imencode(".jpg", scans[1][7]["image"], [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    assert look_alike(looks[0][7], look(cv2.imdecode(jpeg, cv2.IMREAD_COLOR)))
    black, gray = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 30, np.uint8)
    assert look_alike(black, black) and not look_alike(black, gray)


def test_names_that_are_there_twice_are_found_by_neither(tmp_path):
    folder = write(tmp_path / "pictures", range(4))
    (folder / "1.png").rename(folder / "0.bmp")
    lines = (folder / "metadata.jsonl").read_text().replace("1.png", "0.bmp")
    (folder / "metadata.jsonl").write_text(lines)
    task = task_of(folder, tmp_path / "embedded")
    write_split(task)
    source = make_source(FolderConfig(str(folder), 8, max_rejected=1.0, embeddings=str(task.out)), "train")
    assert {source[index]["key"] for index in range(4)} == {"2.png", "3.png"}
    assert source.rejected == {"not embedded": 2}
