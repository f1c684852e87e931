"""``dalle2 weights`` on every public layout: imported systems load, equal their files, and can be sampled."""

import dataclasses
import json

import checkpoints
import jax
import numpy as np
import pytest
from checkpoints import FIXTURES, KARLO, assert_error, import_into, run, run_ok
from PIL import Image

from dalle2_jax.cli import sample
from dalle2_jax.cli import weights as weights
from dalle2_jax.system import load
from dalle2_jax.text import read_clip_tokenizer
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights.component import Hints, merge_parts
from dalle2_jax.weights.inspection import count_parameters, find
from dalle2_jax.weights.stage_writer import Trees, read_component
from dalle2_jax.workdir import digests

# --- systems --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def five(place):
    """Returns Karlo's released files and a system imported from them."""
    return checkpoints.karlo_five(place / "five_files"), import_into(place / "five", place / "five_files")


@pytest.fixture(scope="module")
def folders(place, five):
    """Returns the same as a diffusers folder and a system imported from it."""
    run_ok(weights, "export", "diffusers", five[1], place / "diffusers")
    return place / "diffusers", import_into(
        place / "folders", place / "diffusers", place / "diffusers" / "image_variations"
    )


@pytest.fixture(scope="module")
def glide(place):
    return checkpoints.glide(place / "glide_files"), import_into(place / "glide", place / "glide_files")


@pytest.fixture(scope="module")
def glide_inpaint(place):
    """The upsampler has one level: without a hint its image size would be 8, not 32."""
    source = checkpoints.glide(place / "inpaint_files", inpaint=True)
    system = import_into(place / "inpaint", source / "base.safetensors")
    return source, import_into(system, source / "upsampler.safetensors", "--image_size", 32)


@pytest.fixture(scope="module")
def adm(place):
    return checkpoints.adm(place / "64x64_diffusion.safetensors"), import_into(
        place / "adm", place / "64x64_diffusion.safetensors", "--attention_order", "new"
    )


@pytest.fixture(scope="module")
def adm_upsampler(place, five):
    """An ADM upsampler to 32 x 32 pixels in a system with Karlo's clip, prior and decoder."""
    files = [path for path in five[0].iterdir() if "sr" not in path.name and "notes" not in path.name]
    path = checkpoints.adm(place / "up.safetensors", in_channels=6, image_size=32, **checkpoints.PLAIN)
    system = import_into(place / "adm_upsampler", *files)
    return (path, "--image_size", 32), import_into(system, path, "--image_size", 32)


@pytest.fixture(scope="module")
def kandinsky(place, folders):
    source = checkpoints.kandinsky(place / "kandinsky_files", folders[0])
    return (source, folders[0]), import_into(place / "kandinsky", source, folders[0])


@pytest.fixture(scope="module")
def eclipse(place, folders):
    source = checkpoints.eclipse(place / "eclipse_files", folders[0])
    return (source, folders[0]), import_into(place / "eclipse", source, folders[0])


def loaded(system):
    return load.load_system(system, make_mesh(MeshConfig()))


FAMILIES = {
    # fixture: {stage: family}
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
    """Returns the components in sources, with the hints among them."""
    sources = sources if isinstance(sources, tuple) else (sources,)
    options = weights.make_parser().parse_args(["import", "auto", *map(str, sources), "system"])
    return merge_parts(find(options.source, "auto", Hints(**weights._hints(options))).components)


@pytest.mark.filterwarnings("ignore::dalle2_jax.weights.config_files.WeightsWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_imported_system_equals_the_files(name, request):
    """Every stage loads with the weights of its component, bit for bit."""
    sources, system = request.getfixturevalue(name)
    loaded_stages, found = loaded(system), components(sources)
    families = {stage: json.loads((system / stage / "source.json").read_text())["family"] for stage in loaded_stages}
    assert FAMILIES[name].items() <= families.items() and found.keys() <= loaded_stages.keys()
    for stage, component in found.items():
        trained = loaded_stages[stage]
        shapes = Trees(*jax.eval_shape(trained.stage.init, jax.random.key(0)))
        trees = read_component(component, shapes)
        for ours, theirs in ((trained.variables.params, trees.params), (trained.variables.stats, trees.stats)):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        count = sum(leaf.size for leaf in jax.tree.leaves((trees.params, trees.stats)))
        assert count_parameters(component) in (count, count - 1)  # a single text tower has no temperature


# --- sampling --------------------------------------------------------------------------------


def sampled(system, out, command, *words, steps=("prior", "decoder", "upsampler_1")):
    """Samples an image with two steps per stage; returns it and the output on standard error."""
    for stage in (stage for stage in steps if (system / stage).is_dir()):
        words += (f"--{stage}.steps", 2)
    done = run_ok(sample, command, "--system", system, "--num", 1, "--out", out, *words)
    image = np.asarray(Image.open(out / "0_0.png"))
    assert image.std() > 0
    return image, done.stderr


@pytest.fixture(scope="module")
def given(place):
    """Returns the options for an image and a mask."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place / "in.png")
    Image.fromarray(np.where(np.arange(32) < 16, 255, 0).astype(np.uint8)[None].repeat(32, 0)).save(place / "mask.png")
    return ("--image", place / "in.png"), ("--mask", place / "mask.png")


CAPTION = ("--prompt", "a red panda")


def test_karlo_samples_from_captions_and_images(five, given, tmp_path):
    first, _ = sampled(five[1], tmp_path / "first", "text2image", *CAPTION)
    other, _ = sampled(five[1], tmp_path / "other", "text2image", "--prompt", "a lighthouse")
    assert first.shape == (32, 32, 3) and (first != other).any()
    varied, _ = sampled(five[1], tmp_path / "varied", "variations", *given[0], steps=("decoder", "upsampler_1"))
    assert varied.shape == (32, 32, 3)
    settings = json.loads((tmp_path / "first" / "samples.json").read_text())["sampling"]
    assert (settings["prior"]["guidance"], settings["decoder"]["guidance"]) == (4.0, 8.0)


def test_files_and_folders_of_the_same_weights_give_the_same_image(five, folders, tmp_path):
    """With the same bound on the prior's x_0, which only the folder contains."""
    one, other = (
        sampled(system, tmp_path / name, "text2image", *CAPTION, "--prior.clip", 5, "--seed", 3)[0]
        for name, system in (("files", five[1]), ("folders", folders[1]))
    )
    np.testing.assert_array_equal(one, other)


def test_glide_samples_from_captions_without_other_stages(glide, tmp_path):
    image, stderr = sampled(glide[1], tmp_path / "one", "text2image", *CAPTION)
    nothing, _ = sampled(glide[1], tmp_path / "two", "text2image", "--prompt", "")
    assert image.shape == (32, 32, 3) and (image != nothing).any() and "warning" not in stderr


def test_glides_inpainting_networks_preserve_known_pixels(glide_inpaint, given, tmp_path):
    image, _ = sampled(glide_inpaint[1], tmp_path / "conditional", "inpaint", *CAPTION, *given[0], *given[1])
    unconditional, _ = sampled(glide_inpaint[1], tmp_path / "unconditional", "inpaint", *given[0], *given[1])
    known = np.asarray(Image.open(given[0][1]))[:, 16:]
    assert np.abs(image[:, 16:].astype(int) - known).max() <= 1 and (image[:, :16] != unconditional[:, :16]).any()


def test_adm_samples_from_classes(adm, tmp_path):
    third, fourth = (sampled(adm[1], tmp_path / name, "text2image", "--prompt", name)[0] for name in "34")
    assert third.shape == (8, 8, 3) and (third != fourth).any()


def test_an_adm_upsampler_enlarges_karlos_images(adm_upsampler, tmp_path):
    image, _ = sampled(adm_upsampler[1], tmp_path, "text2image", *CAPTION)
    assert image.shape == (32, 32, 3)


@pytest.mark.parametrize(("name", "steps"), [("kandinsky", 25), ("eclipse", 1)])
def test_other_priors_work_with_karlos_decoder(name, steps, request, tmp_path):
    system = request.getfixturevalue(name)[1]
    image, _ = sampled(system, tmp_path, "text2image", *CAPTION, steps=("decoder", "upsampler_1"))
    settings = json.loads((tmp_path / "samples.json").read_text())["sampling"]
    assert image.shape == (32, 32, 3) and settings["prior"]["steps"] == steps


def test_systems_that_embed_no_image_give_an_error(glide, five, folders, given, tmp_path):
    words = ("--out", tmp_path / "out", *given[0])
    done = run(sample, "variations", "--system", glide[1], *words)
    assert_error(done, "embedding", "text2image", "inpaint")
    decoder = [path for path in five[0].iterdir() if path.name.startswith("decoder")]
    blind = import_into(tmp_path / "blind", folders[0] / "text_encoder", *decoder)
    assert_error(run(sample, "variations", "--system", blind, *words), "no image tower", "image encoder")
    assert not (tmp_path / "out").exists()


# --- export and import -------------------------------------------------------


def trees(system):
    """Returns a system's weights by stage."""
    return {name: stage.variables for name, stage in loaded(system).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("form", ["hf_clip", "openai_clip", "open_clip"])
def test_import_inverts_export_of_clip(form, five, tmp_path):
    run_ok(weights, "export", form, five[1], tmp_path / "out")
    kind = "openai_clip" if form == "openai_clip" else "auto"
    run_ok(weights, "import", kind, tmp_path / "out", tmp_path / "again")
    before, after = loaded(five[1])["clip"], loaded(tmp_path / "again")["clip"]
    assert_same({"clip": before.variables}, {"clip": after.variables})
    rounding = "floor" if form == "hf_clip" else "even"  # of an odd margin, in transformers
    how = dataclasses.replace(before.contract.preprocessing, crop_rounding=rounding)
    assert dataclasses.replace(before.stage, preprocessing=how) == after.stage
    assert dataclasses.replace(before.contract, preprocessing=how) == after.contract
    (tokens, mask), (again, _) = (each.tokenizer.encode(["a red panda!", ""], 77) for each in (before, after))
    np.testing.assert_array_equal(np.where(mask, tokens, 0), np.where(mask, again, 0))  # Hugging Face pads otherwise


def test_import_inverts_export_of_karlo(five, folders, tmp_path):
    """From Karlo's released files to a diffusers folder, and from there to an equal folder."""
    before, after = trees(five[1]), trees(folders[1])
    for clip in (before["clip"], after["clip"]):
        del clip.params["logit_scale"]  # of which diffusers' folders have none
    assert_same(before, after)
    run_ok(weights, "export", "diffusers", folders[1], tmp_path / "again")
    one, other = (
        {
            path.relative_to(root): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.name != digests.NAME
        }
        for root in (folders[0], tmp_path / "again")
    )
    assert one.keys() == other.keys() and len(one) > 20
    differing = [name for name in one if one[name] != other[name]]
    assert {str(name.name) for name in differing} <= {"config.json"} and {name.parent.name for name in differing} <= {
        "text_encoder"  # OpenAI pads with "!", Hugging Face with the end token
    }
    done = run(weights, "export", "diffusers", five[1], tmp_path / "again")
    assert_error(done, tmp_path / "again", "exists")


def test_both_pipelines_of_karlo_are_one_system(place):
    """Their shared components are imported once."""
    system = import_into(place / "karlo", KARLO, checkpoints.karlo_variations(place / "second"))
    loaded_stages = loaded(system)
    assert (
        loaded_stages.keys() == {"clip", "prior", "decoder", "upsampler_1"}
        and loaded_stages["upsampler_1"].stage.last_network
    )
    assert (
        loaded_stages["clip"].stage.model.vision.image_size == 32
        and loaded_stages["decoder"].stage.model.unet.image_size == 16
    )
    assert loaded_stages["decoder"].tokenizer == read_clip_tokenizer(KARLO / "tokenizer")


def test_import_in_bfloat16(five, tmp_path):
    """Half the disk space, weights equal to eight bits, and the system can be sampled."""
    half = import_into(tmp_path / "half", five[0], "--dtype", "bfloat16")

    def size(system):
        return sum(path.stat().st_size for path in system.rglob("checkpoints/0/ema/**/*") if path.is_file())

    assert size(half) < 0.6 * size(five[1])
    for one, other in zip(jax.tree.leaves(trees(five[1])), jax.tree.leaves(trees(half)), strict=True):
        assert other.dtype == one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=2**-8)
    sampled(half, tmp_path / "out", "text2image", *CAPTION)
    run_ok(weights, "export", "hf_clip", half, tmp_path / "clip", "--dtype", "bfloat16")


def test_a_clip_without_a_tokenizer_causes_a_warning(tmp_path):
    source = FIXTURES / "weights" / "clip_torchscript.pt"
    done = run_ok(weights, "import", "auto", source, tmp_path / "system")
    assert f"warning: {source}" in done.stderr and "tokenizer" in done.stderr
    assert loaded(tmp_path / "system")["clip"].tokenizer is None


def test_clip_uses_a_given_tokenizer(five, tmp_path):
    clip = five[0] / "ViT-L-14.safetensors"
    system = import_into(tmp_path / "system", clip, "--tokenizer", KARLO / "tokenizer")
    ours, theirs = (loaded(root)["clip"].tokenizer for root in (system, five[1]))
    assert ours != theirs and ours.vocab_size == theirs.vocab_size
    later = import_into(system, *(path for path in five[0].iterdir() if path.name.startswith("decoder")))
    assert loaded(later)["decoder"].tokenizer == ours


# --- inspect --------------------------------------------------------------------------------

INSPECTED = {
    # fixture: parts of the output
    "five": ["CLIP (OpenAI)", "produces embeddings of 64 dimensions (raw x 1)", "a part of a prior"],
    "folders": ["Karlo prior", "requires a CLIP of 64 dimensions", "incomplete: give the text encoder too"],
    "glide": ["GLIDE base", "stage decoder", "requires no CLIP or prior", "requires no CLIP: fits any system"],
    "adm": ["ADM 8 (heads of 64 channels, legacy attention order)", "requires no CLIP or prior"],
    "kandinsky": ["Kandinsky 2.2 prior", "requires a CLIP of 64 dimensions"],
    "eclipse": ["ECLIPSE prior", "requires a CLIP of 64 dimensions"],
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_describes_components(name, request):
    sources, _ = request.getfixturevalue(name)
    source = sources[0] if isinstance(sources, tuple) else sources
    done = run_ok(weights, "inspect", source)
    for part in (*INSPECTED[name], "parameters", "float32"):
        assert part in done.stdout, done.stdout
    assert ("notes.safetensors is skipped" in done.stderr) == (name == "five")
