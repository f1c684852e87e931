"""The commands of ``sample.py`` that edit, on a tiny system of Karlo's layout, with two upsampling networks."""

import json

import checkpoints
import numpy as np
import pytest
from checkpoints import import_into
from PIL import Image
from raised import mentions

from dalle2_jax import cli
from dalle2_jax.cli import sample
from dalle2_jax.errors import UsageError

FAST = ("--prior.steps", "2", "--decoder.steps", "2", "--num", "1")
DECODED = FAST[2:]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a folder with a system "karlo" and two images."""
    place = tmp_path_factory.mktemp("karlo")
    import_into(place / "karlo", checkpoints.karlo_five(place / "files"))
    noise = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(noise.integers(256, size=(40, 64, 3), dtype=np.uint8)).save(place / f"{name}.png")
    return place


@pytest.fixture
def run(place, monkeypatch, tmp_path, capsys):
    """Returns a function that runs a command and returns its exit code, output folder and stderr."""
    monkeypatch.chdir(place)

    def run(command, *words):
        code = cli.main(["sample", command, "--system", "karlo", "--out", str(tmp_path / "out"), *words])
        return code, tmp_path / "out", capsys.readouterr().err

    return run


def about(out):
    return json.loads((out / "samples.json").read_text())


@pytest.mark.parametrize("source", [("--prior", "none"), ("--image_emb", "text"), ("--image_emb", "none")])
def test_captions_without_a_prior(run, source):
    code, out, error = run("text2image", "--prompt", "red", *source, *DECODED)
    assert code == 0, error
    assert about(out)["image_emb"] == ("none" if source[1] == "none" and source[0] == "--image_emb" else "text")
    assert "prior" not in about(out)["checkpoints"] and "upsampler_1" in about(out)["checkpoints"]


def test_negative_captions(run):
    words = ("--prompt", "red", "--negative", "blue", "--decoder.guidance_order", "text,image", *FAST)
    code, out, error = run("text2image", *words)
    assert (code, about(out)["negative"]) == (0, "blue"), error
    assert about(out)["sampling"]["decoder"]["guidance_order"] == "text,image"


def test_mixtures(run):
    weights = ("--weight", "1", "--weight", "-0.5", "--weight", "2")
    code, out, error = run("mix", "--image", "a.png", "--image", "b.png", "--caption", "red", *weights, *FAST)
    assert (code, about(out)["weights"]) == (0, [1, -0.5, 2]), error
    assert {path.name for path in out.iterdir()} >= {"0_0.png", "grid.png"}


def test_interpolation_from_an_image_to_a_caption(run):
    words = (
        "--image",
        "a.png",
        "--caption",
        "red",
        "--eta",
        "0",
        "--frames",
        "3",
        "--even",
        "--animate",
        "webp",
        *FAST,
    )
    code, out, error = run("interpolate", *words)
    assert (code, about(out)["even"]) == (0, True), error
    with Image.open(out / "animation.webp") as animation, Image.open(out / "strip.png") as strip:
        assert animation.n_frames == 4 and strip.width > 2 * strip.height
    assert {path.name for path in out.iterdir()} >= {"0_0.png", "1_0.png", "2_0.png", "grid.png", "samples.json"}


def test_text_diff_without_a_base(run):
    words = ("--image", "a.png", "--to", "red", "--theta", "0.25,0.5", "--depth", "0.4", "--animate", "gif", *DECODED)
    words += ("--frames", "2")
    code, out, error = run("text_diff", *words)
    assert (code, about(out)["theta"], about(out)["depth"]) == (0, [0.25, 0.5], 0.4) and "from" not in about(out), error
    assert (out / "animation.gif").exists()


def test_a_word_on_an_image(run, capsys):
    words = ("--word", "blue", "--label", "a red circle", "--label", "a blue circle", *DECODED)
    code, out, error = run("typographic_probe", "--image", "a.png", *words)
    assert code == 0, error
    assert {path.name for path in out.iterdir()} >= {"0_0.png", "0_1.png", "1_0.png", "1_1.png", "grid.png"}
    assert about(out)["word"] == "blue"


def test_extended_images(run):
    words = ("--image", "a.png", "--left", "6", "--top", "3", "--prompt", "red", "--prior", "none", *DECODED)
    code, out, error = run("outpaint", *words)
    assert code == 0, error
    with Image.open(out / "0_0.png") as image:
        assert image.size == (51 + 6, 32 + 3)


def test_reconstruction_from_components(run, place):
    """Measured once, then used; more than the rank of five images is an error."""
    words = ("reconstruct", "--image", "a.png", "--components", "1,3", *DECODED)
    code, _, error = run(*words)
    assert code == 1 and mentions("karlo/clip", "components")(error.strip().splitlines()[-1])
    (place / "images").mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "images" / f"{number}.png")
        (place / "images" / f"{number}.txt").write_text("noise")
    measure = ["evaluate", "karlo", "--measures", "components", "--data", "folder:images", "--num", "5"]
    assert cli.main(measure) == 0
    code, out, error = run(*words)
    assert code == 0, error
    assert [image["psnr"] > 0 for image in about(out)["pictures"]] == [True, True]
    code, _, error = run(*words[:4], "1,5", *DECODED)
    assert code == 2 and mentions("components", 4, 5)(error.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("text2image", "--prompt", "red", "--prior", "none", "--image_emb", "prior"), ["--prior", "--image_emb"]),
        (("text2image", "--prompt", "red", "--prior", "none", "--prior.steps", "2"), ["--prior.*", "stage prior"]),
        (("mix",), ["images", "captions"]),
        (("outpaint", "--image", "a.png"), ["margins", "left"]),
        (("typographic_probe", "--image", "a.png", "--word", "x", "--label", "red"), ["labels", 1]),
        (("mix", "--image", "a.png", "--weight", "1", "--weight", "2"), ["2 weights", 1]),
        (("mix", "--image", "a.png", "--weight", "0"), ["weights", 0]),
        (("interpolate", "--image", "a.png"), ["two", 1]),
        (("interpolate", "--caption", "a", "--caption", "b", "--eta", "0"), ["eta"]),
        (("interpolate", "--image", "a.png", "--image", "b.png", "--lpips", "b.png"), ["--lpips", "--even"]),
        (("text_diff", "--image", "a.png", "--to", "red", "--depth", "0"), ["depth", 0]),
        (("text_diff", "--image", "a.png", "--to", "red", "--whole_inversion"), ["depth", 0.2, 1]),
        (("reconstruct", "--image", "a.png", "--negative", "red"), ["negative", "text_guidance"]),
    ],
)
def test_wrong_words(run, words, facts):
    code, out, error = run(*words)
    assert code == 2 and not (out / "grid.png").exists()
    assert mentions(*facts)(error.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("text_diff", "--image", "a", "--to", "red", "--theta", "0.5,0.25"), ["--theta", "0.5,0.25"]),
        (("text_diff", "--image", "a", "--to", "red", "--theta", "2"), ["--theta", 2, "0 to 1"]),
        (("text_diff", "--image", "a", "--to", "red", "--depth", "2"), ["--depth", 2, "0 to 1"]),
        (("interpolate", "--image", "a", "--animate", "mp4"), ["--animate", "'mp4'", "'webp'"]),
        (("interpolate", "--image", "a", "--fps", "0"), ["--fps", 0, 0.1]),
        (("reconstruct", "--image", "a", "--components", "3,0"), ["--components", 0, 1]),
        (("mix", "--image", "a", "--weight", "nan"), ["--weight", "nan"]),
        (("mix", "--caption", "red", "--image_emb", "none"), ["--image_emb", "'none'"]),
    ],
)
def test_wrong_values(words, facts):
    command, *rest = words
    with pytest.raises(UsageError, check=mentions(*facts)):
        sample.make_parser().parse_args([command, "--system", "s", "--out", "o", *rest])


def test_an_unreadable_image_is_one_line(run, place):
    (place / "no.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    code, _, error = run("mix", "--image", "no.png")
    assert code == 1 and mentions("no.png")(error.strip().splitlines()[-1])
