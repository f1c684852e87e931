"""``python -m dalle2_jax.weights`` on every public layout: what it imports loads, is what the files hold, and draws."""

import json

import checkpoints
import jax
import numpy as np
import pytest
import sample
from checkpoints import FIXTURES, KARLO, assert_refused, good, run, take
from PIL import Image

from dalle2_jax import build
from dalle2_jax.text import read_clip_tokenizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights import __main__ as weights
from dalle2_jax.weights import families, merged
from dalle2_jax.weights.landing import Trees, read

# --- systems --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def five(place):
    """Karlo's own files; the system of them."""
    return checkpoints.karlo_five(place / "five_files"), take(place / "five", place / "five_files")


@pytest.fixture(scope="module")
def folders(place, five):
    """The same as folders of diffusers'; the system of these."""
    good(weights, "export", "diffusers", five[1], place / "diffusers")
    return place / "diffusers", take(place / "folders", place / "diffusers", place / "diffusers" / "image_variations")


@pytest.fixture(scope="module")
def glide(place):
    return checkpoints.glide(place / "glide_files"), take(place / "glide", place / "glide_files")


@pytest.fixture(scope="module")
def glide_inpaint(place):
    """Its upsampler has a single level, which is no network of 32 x 32 pixels unless somebody says so."""
    source = checkpoints.glide(place / "inpaint_files", inpaint=True)
    system = take(place / "inpaint", source / "base.safetensors")
    return source, take(system, source / "upsampler.safetensors", "--image_size", 32)


@pytest.fixture(scope="module")
def adm(place):
    return checkpoints.adm(place / "64x64_diffusion.safetensors"), take(
        place / "adm", place / "64x64_diffusion.safetensors", "--attention_order", "new"
    )


@pytest.fixture(scope="module")
def adm_upsampler(place, five):
    """An upsampler of ADM's to 32 x 32 pixels beside Karlo's clip, prior and decoder."""
    files = [path for path in five[0].iterdir() if "sr" not in path.name and "notes" not in path.name]
    path = checkpoints.adm(place / "up.safetensors", in_channels=6, image_size=32, **checkpoints.PLAIN)
    system = take(place / "beside", *files)
    return (path, "--image_size", 32), take(system, path, "--image_size", 32)


@pytest.fixture(scope="module")
def kandinsky(place, folders):
    source = checkpoints.kandinsky(place / "kandinsky_files", folders[0])
    return (source, folders[0]), take(place / "kandinsky", source, folders[0])


@pytest.fixture(scope="module")
def eclipse(place, folders):
    source = checkpoints.eclipse(place / "eclipse_files", folders[0])
    return (source, folders[0]), take(place / "eclipse", source, folders[0])


def loaded(system):
    return build.load_system(system, make_mesh(MeshConfig()))


FAMILIES = {
    # fixture: what each stage is
    "five": {
        "clip": "CLIP (OpenAI)",
        "prior": "Karlo statistics, Karlo prior",
        "decoder": "Karlo decoder",
        "upsampler_1": "Karlo super-resolution",
    },
    "folders": {
        "clip": "CLIP text encoder (transformers), CLIP image encoder (transformers)",
        "prior": "Karlo prior",
        "decoder": "Karlo decoder",
        "upsampler_1": "Karlo super-resolution",
    },
    "glide": {"decoder": "GLIDE base", "upsampler_1": "GLIDE upsampler"},
    "adm": {"decoder": "ADM 8 (heads of 64 channels, new attention order)"},
    "adm_upsampler": {"upsampler_1": "ADM upsampler 32 (heads of 64 channels, legacy attention order)"},
    "kandinsky": {"prior": "Kandinsky 2.2 prior"},
    "eclipse": {"prior": "ECLIPSE prior"},
}


def components(sources):
    """What the importer makes of sources and words."""
    sources = sources if isinstance(sources, tuple) else (sources,)
    options = weights.make_parser().parse_args(["import", "auto", *map(str, sources), "system"])
    return merged(weights.find(options))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_system_is_what_the_files_hold(name, request):
    """Every stage loads as the component's own network, with its weights bit for bit."""
    sources, system = request.getfixturevalue(name)
    members, found = loaded(system), components(sources)
    said = {stage: json.loads((system / stage / "source.json").read_text())["family"] for stage in members}
    assert FAMILIES[name].items() <= said.items() and found.keys() <= members.keys()
    for stage, component in found.items():
        member = members[stage]
        shapes = Trees(*jax.eval_shape(member.stage.init, jax.random.key(0)))
        trees = read(component, shapes)
        for ours, theirs in ((member.variables.params, trees.params), (member.variables.stats, trees.stats)):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        count = sum(leaf.size for leaf in jax.tree.leaves((trees.params, trees.stats)))
        assert families.parameters(component) in (count, count - 1)  # a text tower alone has no temperature


# --- drawing --------------------------------------------------------------------------------


def drawn(system, out, command, *words, steps=("prior", "decoder", "upsampler_1")):
    """Draws a picture by two steps of each stage there is; returns it and what was said."""
    for stage in (stage for stage in steps if (system / stage).is_dir()):
        words += (f"--{stage}.steps", 2)
    done = good(sample, command, "--system", system, "--num", 1, "--out", out, *words)
    picture = np.asarray(Image.open(out / "0_0.png"))
    assert picture.std() > 0
    return picture, done.stderr


@pytest.fixture(scope="module")
def given(place):
    """A picture, and a mask of it."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place / "in.png")
    Image.fromarray(np.where(np.arange(32) < 16, 255, 0).astype(np.uint8)[None].repeat(32, 0)).save(place / "mask.png")
    return ("--image", place / "in.png"), ("--mask", place / "mask.png")


CAPTION = ("--prompt", "a red panda")


def test_karlo_draws_captions_and_variations(five, given, tmp_path):
    first, _ = drawn(five[1], tmp_path / "first", "text2image", *CAPTION)
    other, _ = drawn(five[1], tmp_path / "other", "text2image", "--prompt", "a lighthouse")
    assert first.shape == (32, 32, 3) and (first != other).any()
    varied, _ = drawn(five[1], tmp_path / "varied", "variations", *given[0], steps=("decoder", "upsampler_1"))
    assert varied.shape == (32, 32, 3)
    settings = json.loads((tmp_path / "first" / "samples.json").read_text())["sampling"]
    assert (settings["prior"]["guidance"], settings["decoder"]["guidance"]) == (4.0, 8.0)


def test_files_and_folders_of_the_same_weights_draw_the_same(five, folders, tmp_path):
    """But for the bound of the prior's x_0, which the files leave open and the folder says."""
    one, other = (
        drawn(system, tmp_path / name, "text2image", *CAPTION, "--prior.clip", 5, "--seed", 3)[0]
        for name, system in (("files", five[1]), ("folders", folders[1]))
    )
    np.testing.assert_array_equal(one, other)


def test_glide_alone_draws_captions(glide, tmp_path):
    picture, said = drawn(glide[1], tmp_path / "one", "text2image", *CAPTION)
    nothing, _ = drawn(glide[1], tmp_path / "two", "text2image", "--prompt", "")
    assert picture.shape == (32, 32, 3) and (picture != nothing).any() and "warning" not in said


def test_glide_s_inpainting_networks_keep_what_is_known(glide_inpaint, given, tmp_path):
    picture, _ = drawn(glide_inpaint[1], tmp_path / "told", "inpaint", *CAPTION, *given[0], *given[1])
    untold, _ = drawn(glide_inpaint[1], tmp_path / "untold", "inpaint", *given[0], *given[1])
    known = np.asarray(Image.open(given[0][1]))[:, 16:]
    assert np.abs(picture[:, 16:].astype(int) - known).max() <= 1 and (picture[:, :16] != untold[:, :16]).any()


def test_adm_draws_classes(adm, tmp_path):
    third, fourth = (drawn(adm[1], tmp_path / name, "text2image", "--prompt", name)[0] for name in "34")
    assert third.shape == (8, 8, 3) and (third != fourth).any()


def test_an_upsampler_of_adm_s_enlarges_what_karlo_draws(adm_upsampler, tmp_path):
    picture, _ = drawn(adm_upsampler[1], tmp_path, "text2image", *CAPTION)
    assert picture.shape == (32, 32, 3)


@pytest.mark.parametrize(("name", "steps"), [("kandinsky", 25), ("eclipse", 1)])
def test_other_priors_draw_for_karlo_s_decoder(name, steps, request, tmp_path):
    system = request.getfixturevalue(name)[1]
    picture, _ = drawn(system, tmp_path, "text2image", *CAPTION, steps=("decoder", "upsampler_1"))
    settings = json.loads((tmp_path / "samples.json").read_text())["sampling"]
    assert picture.shape == (32, 32, 3) and settings["prior"]["steps"] == steps


def test_systems_that_embed_no_picture_say_so(glide, five, folders, given, tmp_path):
    words = ("--out", tmp_path / "out", *given[0])
    done = run(sample, "variations", "--system", glide[1], *words)
    assert_refused(done, "told no picture's embedding", "text2image or inpaint")
    decoder = [path for path in five[0].iterdir() if path.name.startswith("decoder")]
    blind = take(tmp_path / "blind", folders[0] / "text_encoder", *decoder)
    assert_refused(run(sample, "variations", "--system", blind, *words), "no image tower", "import its image encoder")
    assert not (tmp_path / "out").exists()


# --- CLIP in its forms, and out again -------------------------------------------------------


def trees(system):
    """A system's weights by stage."""
    return {name: member.variables for name, member in loaded(system).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("form", ["hf_clip", "openai_clip", "open_clip"])
def test_clip_goes_out_and_comes_in_bit_for_bit(form, five, tmp_path):
    good(weights, "export", form, five[1], tmp_path / "out")
    kind = "openai_clip" if form == "openai_clip" else "auto"
    good(weights, "import", kind, tmp_path / "out", tmp_path / "again")
    before, after = loaded(five[1])["clip"], loaded(tmp_path / "again")["clip"]
    assert_same({"clip": before.variables}, {"clip": after.variables})
    assert (before.stage, before.contract) == (after.stage, after.contract)
    (tokens, mask), (again, _) = (each.tokenizer.encode(["a red panda!", ""], 77) for each in (before, after))
    np.testing.assert_array_equal(np.where(mask, tokens, 0), np.where(mask, again, 0))  # Hugging Face pads otherwise


def test_karlo_goes_out_and_comes_in_bit_for_bit(five, folders, tmp_path):
    """From the files it was published in to diffusers' folders, and from these to the same folders."""
    before, after = trees(five[1]), trees(folders[1])
    for clip in (before["clip"], after["clip"]):
        del clip.params["logit_scale"]  # of which diffusers' folders have none
    assert_same(before, after)
    good(weights, "export", "diffusers", folders[1], tmp_path / "again")
    one, other = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (folders[0], tmp_path / "again")
    )
    assert one.keys() == other.keys() and len(one) > 20
    differing = [name for name in one if one[name] != other[name]]
    assert {str(name.name) for name in differing} <= {"config.json"} and {name.parent.name for name in differing} <= {
        "text_encoder"  # OpenAI pads with "!", and Hugging Face, where that is a word, with the end token
    }
    done = run(weights, "export", "diffusers", five[1], tmp_path / "again")
    assert_refused(done, tmp_path / "again", "is there already")


def test_both_pipelines_of_karlo_are_one_system(place):
    """Karlo-tiny's: what they share is taken once."""
    system = take(place / "karlo", KARLO, checkpoints.karlo_variations(place / "second"))
    members = loaded(system)
    assert members.keys() == {"clip", "prior", "decoder", "upsampler_1"} and members["upsampler_1"].stage.last_network
    assert members["clip"].stage.model.vision.image_size == 32 and members["decoder"].stage.model.unet.image_size == 16
    assert members["decoder"].tokenizer == read_clip_tokenizer(KARLO / "tokenizer")


def test_half_the_size(five, tmp_path):
    """--dtype bfloat16: half the disk, the same system to eight bits, and it draws."""
    half = take(tmp_path / "half", five[0], "--dtype", "bfloat16")

    def size(system):
        return sum(path.stat().st_size for path in system.rglob("checkpoints/0/ema/**/*") if path.is_file())

    assert size(half) < 0.6 * size(five[1])
    for one, other in zip(jax.tree.leaves(trees(five[1])), jax.tree.leaves(trees(half)), strict=True):
        assert other.dtype == one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=2**-8)
    drawn(half, tmp_path / "out", "text2image", *CAPTION)
    good(weights, "export", "hf_clip", half, tmp_path / "clip", "--dtype", "bfloat16")


def test_a_clip_without_a_tokenizer_is_said_to_lack_one(tmp_path):
    source = FIXTURES / "weights" / "clip_torchscript.pt"
    done = good(weights, "import", "auto", source, tmp_path / "system")
    assert f"warning: {source} brings no tokenizer: give --tokenizer FOLDER" in done.stderr
    assert loaded(tmp_path / "system")["clip"].tokenizer is None


def test_clip_reads_with_the_tokenizer_it_is_given(five, tmp_path):
    clip = five[0] / "ViT-L-14.safetensors"
    system = take(tmp_path / "system", clip, "--tokenizer", KARLO / "tokenizer")
    ours, theirs = (loaded(root)["clip"].tokenizer for root in (system, five[1]))
    assert ours != theirs and ours.vocab_size == theirs.vocab_size
    later = take(system, *(path for path in five[0].iterdir() if path.name.startswith("decoder")))
    assert loaded(later)["decoder"].tokenizer == ours


# --- inspect --------------------------------------------------------------------------------

SAYS = {
    "five": ["CLIP (OpenAI)", "makes embeddings of 64 dimensions (raw x 1)", "is a part of a prior"],
    "folders": ["Karlo prior", "joins a CLIP of 64 dimensions", "the text encoder completes it"],
    "glide": ["GLIDE base", "stage decoder", "needs no CLIP or prior", "takes no embedding: it joins any system"],
    "adm": ["ADM 8 (heads of 64 channels, legacy attention order)", "needs no CLIP or prior"],
    "kandinsky": ["Kandinsky 2.2 prior", "joins a CLIP of 64 dimensions"],
    "eclipse": ["ECLIPSE prior", "joins a CLIP of 64 dimensions"],
}


@pytest.mark.parametrize("name", SAYS)
def test_inspect_says_what_it_is(name, request):
    sources, _ = request.getfixturevalue(name)
    source = sources[0] if isinstance(sources, tuple) else sources
    done = good(weights, "inspect", source)
    for part in (*SAYS[name], "parameters", "float32"):
        assert part in done.stdout, done.stdout
    assert ("notes.safetensors is left out" in done.stderr) == (name == "five")
