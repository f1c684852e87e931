"""The data set from packages to a source of images."""

import json
import sys

import numpy as np
import pytest
from emoji_packages import COLORS, icon_set, rectangle, write_packages
from PIL import ImageColor
from raised import mentions

from dalle2_jax.cli import main
from dalle2_jax.data import FolderSource, WebdatasetRecords, emoji, example
from dalle2_jax.data.emoji.styles import STYLES, svg_of
from dalle2_jax.errors import DataError, UserError

RASTER = ("noto", "fluent_3d")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    folder = tmp_path / "packages"
    folder.mkdir()
    return write_packages(folder, monkeypatch)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_writes_a_source(packages, tmp_path, capsys):
    out = tmp_path / "emoji"
    assert (
        main(["data", "emoji", str(out), "--styles", "noto,fluent_3d", "--resolution", "32", "--from", str(packages)])
        == 0
    )
    description = json.loads((out / "dataset.json").read_text())
    train = FolderSource(out, "train", 32)
    counts = {split: each["images"] for split, each in description["splits"].items()}
    assert (len(train), counts["train"], counts["compositional"]) == (9, 9, 1)
    assert f"{counts['train']} images of train" in capsys.readouterr().out
    for index in range(len(train)):
        record = train.records.read(index)
        style, key = record.name.split("/")
        assert record.fields["style"] == style and record.fields["licence"] == STYLES[style].licence
        assert record.fields["source"].startswith("@tiny/")
        image = example(train, index)["image"]
        assert image.shape == (32, 32, 3) and (image[0] == 255).all()
        np.testing.assert_allclose(image[16, 16], ImageColor.getrgb(COLORS[key]), atol=2)


def test_only_the_named_groups_are_written(packages, tmp_path):
    out = tmp_path / "emoji"
    command = ["data", "emoji", str(out), "--styles", "noto,fluent_3d", "--from", str(packages), "--groups"]
    assert main([*command, "food-drink,flags"]) == 0
    source = FolderSource(out, "train", 32)
    assert {source.records.read(index).fields["concept"] for index in range(len(source))} == {"red apple"}
    assert json.loads((out / "dataset.json").read_text())["groups"] == ["food-drink", "flags"]


@pytest.mark.parametrize(("option", "names"), [("--groups", "fruit"), ("--groups", "flags,flags"), ("--styles", "")])
def test_unknown_names_are_an_error(tmp_path, capsys, option, names):
    assert main(["data", "emoji", str(tmp_path / "emoji"), option, names]) == 2
    assert mentions(option)(capsys.readouterr().err) and not (tmp_path / "emoji").exists()


def test_the_output_is_reproducible(packages, tmp_path):
    selection = emoji.Selection(RASTER, skin_tones=True, flags=True)
    counts = [emoji.write(tmp_path / name, selection, 32, packages) for name in ("a", "b")]
    assert counts[0] == counts[1] and files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_tar_shards_have_the_same_records(packages, tmp_path):
    selection = emoji.Selection(RASTER)
    emoji.write(tmp_path / "folder", selection, 32, packages)
    emoji.write(tmp_path / "tar", selection, 32, packages, tar=True)
    assert (tmp_path / "folder" / "dataset.json").read_text() == (tmp_path / "tar" / "dataset.json").read_text()
    images, shards = FolderSource(tmp_path / "folder", "train", 32).records, WebdatasetRecords(str(tmp_path / "tar"))
    assert len(images) == len(shards)
    for index in range(len(images)):
        one, other = images.read(index), shards.read(index)
        assert (one.name, one.image, one.captions) == (other.name, other.image, other.captions)
        assert one.fields.items() <= other.fields.items()


def test_vector_styles(packages, tmp_path):
    pytest.importorskip("resvg_py")
    counts = emoji.write(tmp_path / "out", emoji.Selection(("noto", "fluent_flat", "twemoji")), 128, packages)
    train = FolderSource(tmp_path / "out", "train", 128)
    assert len(train) == counts["train"] > 8
    for index in range(len(train)):
        image, key = example(train, index)["image"], train.records.read(index).name.split("/")[1]
        np.testing.assert_array_equal(image[64, 32], ImageColor.getrgb(COLORS[key]))
        assert (image[64, 96] == 255).all()
    sources = {train.records.read(index).fields["source"] for index in range(len(train))}
    assert any(source.startswith("@tiny/noto_svg@1.0.0/icons.json#") for source in sources)


def test_aliases_may_be_mirrored():
    icons = icon_set({"left": rectangle("red")}) | {"aliases": {"right": {"parent": "left", "hFlip": True}}}
    assert svg_of(icons, "left")[0].count("scale(-1 1)") == 0
    svg, width, height = svg_of(icons, "right")
    assert svg.count("scale(-1 1)") == 1 and (width, height) == (16, 16)


def test_images_of_another_shape_are_centred_on_white():
    svg_to_bytes = pytest.importorskip("resvg_py").svg_to_bytes
    from dalle2_jax.data.emoji.styles import _on_square
    from dalle2_jax.data.images import decoding

    icons = icon_set({"tall": '<path fill="red" d="M0 0h16v32H0z"/>'})
    icons["icons"]["tall"]["height"] = 32
    svg, width, height = svg_of(icons, "tall")
    assert (width, height) == (16, 32)
    image = _on_square(decoding.decode(svg_to_bytes(svg_string=svg, height=64)), 64)
    assert (image[:, 16:48] == [255, 0, 0]).all() and (image[:, :16] == 255).all() and (image[:, 48:] == 255).all()


# --- errors -------------------------------------------------------------------------------------


def test_a_damaged_package_leaves_nothing(packages, tmp_path, capsys):
    path = packages / "tiny-fluent_3d-1.0.0.tgz"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["data", "emoji", str(tmp_path / "out"), "--styles", "noto,fluent_3d", "--from", str(packages)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_or_missing_is_reported(packages, tmp_path):
    with pytest.raises(UserError, check=mentions(packages, "empty folder")):
        emoji.write(packages, packages=packages)
    with pytest.raises(DataError, check=mentions(path=tmp_path / "nowhere")):
        emoji.write(tmp_path / "out", packages=tmp_path / "nowhere")


def test_a_missing_renderer_is_reported(packages, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, check=mentions("resvg-py", "dalle2_jax[emoji]")):
        emoji.write(tmp_path / "out", emoji.Selection(("twemoji",)), packages=packages)


@pytest.mark.parametrize(
    "words",
    [["--styles", "apple"], ["--styles", ""], ["--styles", "noto,noto"], ["--resolution", "48"], ["--from", ""]],
)
def test_wrong_arguments_are_usage_errors(tmp_path, capsys, words):
    assert main(["data", "emoji", str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
