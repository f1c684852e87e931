"""Images are paired with their stored embeddings by name, for every format and order of either."""

import json
import pickle
import shutil

import cv2
import numpy as np
import pytest
from embedding_tasks import DIM, LENGTH, SumEmbedder, task_of
from raised import mentions
from streams import sample

from dalle2_jax.data import (
    EmbeddingSource,
    FolderConfig,
    FolderSource,
    ImageSource,
    PairedEmbeddings,
    TfdsConfig,
    WebdatasetConfig,
    example,
    make_source,
    make_stream,
    prepare,
)
from dalle2_jax.data.embeddings.digests import same_image, thumbnail
from dalle2_jax.data.embeddings.write import write_split
from dalle2_jax.data.synthetic import digits
from dalle2_jax.data.tools.convert import convert
from dalle2_jax.errors import ConfigError, DataError, UserError
from dalle2_jax.testing import WordTokenizer

COLUMNS = ("image", "image_emb", "text_emb", "caption")


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(folder, numbers, captions=lambda number: [f"red {number} {other}" for other in range(number % 3 + 1)]):
    """Writes images of noise in the given order; the pixels depend only on the number."""
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
    """Returns the task that embedded twelve images, in shards of three."""
    task = task_of(write(tmp_path / "images", range(12)), tmp_path / "embedded", states=True)
    assert write_split(task) == 12
    return task


def rows_of(image, caption):
    """Returns the embeddings of an image and of a caption."""
    tokens, mask = WordTokenizer().encode([caption], LENGTH)
    return SumEmbedder().images(image[None])[0], SumEmbedder().captions(tokens, mask)["text_emb"][0]


@pytest.mark.parametrize("form", ["folder", "webdataset", "arrayrecord"])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_every_format_in_every_order_is_paired_with_its_embeddings(embedded, tmp_path, form, crop):
    folder = write(tmp_path / "again", [7, 3, 11, 0, 5])
    config = {"folder": FolderConfig, "webdataset": WebdatasetConfig, "arrayrecord": TfdsConfig}[form]
    if form != "folder":
        convert({"train": FolderSource(folder)}, tmp_path / form, form)
    how = {"path": str(folder if form == "folder" else tmp_path / form), "resolution": 8, "crop": crop}
    plain = make_source(config(**how), "train")
    source = make_source(config(**how, embeddings=str(embedded.out)), "train")
    assert isinstance(source, PairedEmbeddings) and len(source) == 5
    for index in range(5):
        for one in (source, pickle.loads(pickle.dumps(source))):
            found = example(one, index)
            images = example(plain, index)
            assert {**images, "image": None} == {name: {**found, "image": None}[name] for name in images}
            image_emb, text_emb = rows_of(example(plain, index)["image"], found["caption"])
            np.testing.assert_array_equal(found["image_emb"], image_emb)
            np.testing.assert_array_equal(found["text_emb"], text_emb)
            for seed in range(4):
                rows, images = sample(one.select(COLUMNS), index, seed), sample(plain, index, seed)
                np.testing.assert_array_equal(rows["image"], images["image"])
                assert rows["caption"] == images["caption"] and rows.keys() == {*COLUMNS}
                np.testing.assert_array_equal(rows["image_emb"], image_emb)
                np.testing.assert_array_equal(rows["text_emb"], rows_of(images["image"], images["caption"])[1])
    assert not source.rejections.counts


def test_batches_have_images_and_the_requested_columns(embedded):
    records = FolderSource(embedded.source.records.path, resolution=8).records
    source = PairedEmbeddings(EmbeddingSource(embedded.out), records, 8)
    selected = prepare(source, WordTokenizer(), LENGTH).select(
        ("image", "image_emb", "text_emb", "text_seq", "tokens", "mask")
    )
    batch = next(make_stream(selected, 4, seed=0))
    assert {name: rows.shape for name, rows in batch.items()} == {
        "image": (4, 8, 8, 3),
        "image_emb": (4, DIM),
        "text_emb": (4, DIM),
        "text_seq": (4, LENGTH, 3),
        "tokens": (4, LENGTH),
        "mask": (4, LENGTH),
    }
    np.testing.assert_allclose(batch["text_seq"][..., 0], batch["tokens"] / 7, rtol=1e-3)
    longer = prepare(source, WordTokenizer(), 11)
    batch = next(make_stream(longer.select(("image", "image_emb", "tokens", "mask")), 4, seed=0))
    assert batch["tokens"].shape == (4, 11), "tokens are encoded at the stage's own context length"
    with pytest.raises(ConfigError) as caught:
        longer.select(("image", "text_seq", "tokens", "mask"))
    assert caught.value.field == "text.context_length"
    images = source.select(["image", "caption"])
    assert type(images) is ImageSource and example(images, 0).keys() == {"image", "caption"}
    embeddings = source.select(["image_emb", "caption"])
    assert type(embeddings) is EmbeddingSource and example(embeddings, 0).keys() == {"image_emb", "caption"}


def test_records_without_a_matching_embedding_are_rejected_by_cause(embedded, tmp_path):
    folder = write(tmp_path / "other", range(8, 16))
    lines = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(lines.replace("red 9 0", "green 9 0").replace("red 8 0", "  red\\t8 0"))
    (folder / "10.png").write_bytes((folder / "15.png").read_bytes())
    how = {"max_rejected": 1.0, "embeddings": str(embedded.out)}
    source = make_source(FolderConfig(str(folder), 8, **how), "train")
    keys = {example(source, index)["key"] for index in range(len(source))}
    assert keys == {"8.png", "11.png"}
    assert source.rejections.counts == {"not embedded": 4, "other captions": 1, "other image": 1}
    with pytest.raises(DataError, check=mentions("'val'", "train", "dalle2 data embed", path=embedded.out)):
        make_source(FolderConfig(str(folder), 8, embeddings=str(embedded.out)), "val")


def test_renamed_files_are_rejected(embedded, tmp_path):
    """Images and captions are both renamed by three, so that even the numbers of captions agree."""
    write(tmp_path / "images", range(12))
    folder = tmp_path / "moved"
    folder.mkdir()
    lines = []
    for number in range(12):
        shutil.copy(tmp_path / "images" / f"{number}.png", folder / f"{(number + 3) % 12}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": ["red"] * (number % 3 + 1)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, check=mentions("5 of 12 records", "5 other captions", "max_rejected=0.1")):
        make_source(FolderConfig(str(folder), 8, embeddings=str(embedded.out)), "train").fetch([0])
    shutil.copy(tmp_path / "images" / "metadata.jsonl", folder)
    with pytest.raises(UserError, check=mentions("5 of 12 records", "5 other image", "max_rejected=0.1")):
        make_source(FolderConfig(str(folder), 8, embeddings=str(embedded.out)), "train").fetch([0])


def test_thumbnails_distinguish_images_at_any_resolution(tmp_path):
    """Handwritten digits are the hardest case, since they are similar within a class; JPEG coding must still match."""
    digits.write(tmp_path / "digits")
    scans = [FolderSource(tmp_path / "digits", resolution=side) for side in (8, 64)]
    thumbnails = [[thumbnail(example(source, index)["image"]) for index in range(60)] for source in scans]
    alike = np.array([[same_image(small, large) for large in thumbnails[1]] for small in thumbnails[0]])
    assert alike.diagonal().all() and alike.mean() < 1 / 60 + 0.03
    jpeg = cv2.imencode(".jpg", example(scans[1], 7)["image"], [cv2.IMWRITE_JPEG_QUALITY, 40])[1]
    assert same_image(thumbnails[0][7], thumbnail(cv2.imdecode(jpeg, cv2.IMREAD_COLOR)))
    black, gray = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 30, np.uint8)
    assert same_image(black, black) and not same_image(black, gray)


def test_ambiguous_names_are_paired_with_no_embedding(tmp_path):
    folder = write(tmp_path / "images", range(4))
    (folder / "1.png").rename(folder / "0.bmp")
    lines = (folder / "metadata.jsonl").read_text().replace("1.png", "0.bmp")
    (folder / "metadata.jsonl").write_text(lines)
    task = task_of(folder, tmp_path / "embedded")
    write_split(task)
    source = make_source(FolderConfig(str(folder), 8, max_rejected=1.0, embeddings=str(task.out)), "train")
    assert {example(source, index)["key"] for index in range(4)} == {"2.png", "3.png"}
    assert source.rejections.counts == {"not embedded": 2}
