"""The words of sample.py: each reaches the sampling of its stage, and a wrong one is said in one line."""

import dataclasses

import numpy as np
import pytest
import sample
from PIL import Image

from dalle2_jax import testing
from dalle2_jax.diffusion import NoiseMoments
from dalle2_jax.generation import Member
from dalle2_jax.stages import SamplingConfig, Variables
from dalle2_jax.types import UsageError, UserError

STAGES = {"prior": "prior", "decoder": "decoder", "upsampler_1": "upsampler"}


def sampling_of(*words, **stages):
    """Returns the sampling of each tiny stage under words of the command line; ``stages`` take the place of some."""
    stages = {name: stages.get(name, testing.tiny_stage(kind)) for name, kind in STAGES.items()}
    members = {name: Member(stage, Variables({}, {}), 1, None, None, 0) for name, stage in stages.items()}
    given = ["text2image", "--system", "s", "--out", "o", *words]
    return sample.sampling_of(members, vars(sample.make_parser().parse_args(given)))


def test_left_out_all_is_as_the_config_says():
    assert sampling_of() == {name: testing.tiny_stage(kind).sampling for name, kind in STAGES.items()}


WORDS = {
    # the word of an option: what may follow it, and the fields of SamplingConfig that it decides
    "sampler": ("dpmpp_2m", {"name": "dpmpp_2m"}),
    "steps": ("karras5", {"steps": "karras5"}),
    "eta": ("0.5", {"eta": 0.5}),
    "clip": ("2", {"clip": 2.0}),
    "threshold": ("dynamic", {"threshold": "dynamic"}),
    "quantile": ("0.9", {"quantile": 0.9}),
    "temperature": ("0.997", {"temperature": 0.997}),
    "guidance": ("-1.5", {"guidance": -1.5}),
    "image_guidance": ("0", {"image_guidance": 0.0}),
    "text_guidance": ("7", {"text_guidance": 7.0}),
    "guidance_schedule": ("cosine", {"guidance_schedule": "cosine"}),
    "guidance_interval": ("0.2,0.8", {"guidance_interval": (0.2, 0.8)}),
    "guidance_rescale": ("0.7", {"guidance_rescale": 0.7}),
}


@pytest.mark.parametrize("option", WORDS)
def test_each_word_decides_its_field_of_its_stage_alone(option):
    word, fields = WORDS[option]
    before, after = sampling_of(), sampling_of(f"--decoder.{option}", word)
    assert after == {**before, "decoder": dataclasses.replace(before["decoder"], **fields)} != before


def test_every_field_of_a_sampling_has_a_word():
    fields = {field for field, _ in sample.BY_DIFFUSION.values()}
    assert fields == {field.name for field in dataclasses.fields(SamplingConfig)}
    assert {*sample.BY_DIFFUSION} == {*WORDS, "variance"}


def test_another_sampler_leaves_behind_what_belonged_to_the_first():
    """The config's eta was of its own sampler; what is given beside the sampler stays."""
    noisy = testing.tiny_stage("decoder")
    noisy = dataclasses.replace(noisy, sampling=dataclasses.replace(noisy.sampling, eta=0.5))
    assert sampling_of("--decoder.sampler", "ddpm", decoder=noisy)["decoder"].eta == 0
    given = sampling_of("--decoder.sampler", "ddpm", "--decoder.variance", "fixed_large", decoder=noisy)["decoder"]
    assert (given.name, given.variance, given.eta) == ("ddpm", "fixed_large", 0)


def test_measured_moments_allow_the_analytic_variance():
    prior, words = testing.tiny_stage("prior"), ("--prior.sampler", "ddpm", "--prior.variance", "analytic")
    measured = dataclasses.replace(prior, moments=NoiseMoments((0.9,) * 100, 1.0))
    assert sampling_of(*words, prior=measured)["prior"].variance == "analytic"
    with pytest.raises(UsageError, match="python -m dalle2_jax.evaluation moments"):
        sampling_of(*words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--decoder.threshold", "static_"), "--decoder.*: unknown threshold 'static_'"),
        (("--prior.threshold", "dynamic"), "--prior.*: threshold 'dynamic' needs the range of the data in clip"),
        (("--decoder.quantile", "0"), "quantile is a share"),
        (("--decoder.variance", "analytic"), "sampler 'ddim' has no variance: leave it out, or use sampler 'ddpm'"),
        (("--prior.variance", "learned_range"), "unknown variance 'learned_range'"),
        (("--decoder.sampler", "unipc", "--decoder.eta", "1"), "sampler 'unipc' has no eta"),
        (("--upsampler_1.text_guidance", "2"), "--upsampler_1.*: stage upsampler_1 was not trained to go without text"),
        (("--upsampler_1.guidance", "2"), "has no guidance"),
        (("--prior.image_guidance", "2"), "--prior.*: stage prior was not trained to go without image"),
        (("--decoder.guidance_schedule", "linaer"), "did you mean 'linear'"),
        (("--decoder.guidance_interval", "0.8,0.2"), "two ascending shares of the steps"),
        (("--decoder.guidance_interval", "0.8"), "argument --decoder.guidance_interval: invalid interval value: '0.8'"),
        (("--decoder.guidance_rescale", "2"), "a share from 0 to 1"),
        (("--decoder.text_guidance", "nan"), "nan is not a finite number"),
        (("--decoder.steps", "ddim80"), "'ddim80' does not divide 100 steps"),
        (("--upsampler_2.steps", "3"), "no stage upsampler_2 is used here"),
    ],
)
def test_wrong_words_are_usage_errors(words, says):
    with pytest.raises(UsageError) as error:
        sampling_of(*words)
    assert says in str(error.value) and "\n" not in str(error.value)


def drawing(folder, name, array):
    """Writes a picture file; returns its path."""
    Image.fromarray(array).save(folder / name)
    return folder / name


def parsed(*words):
    return sample.make_parser().parse_args([words[0], "--system", "s", "--out", "o", *map(str, words[1:])])


def test_black_of_the_mask_is_known_at_every_size(tmp_path):
    """And a pixel of the small picture only if all of it is known."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 15:] = 255
    image = drawing(tmp_path, "in.png", np.full((32, 32, 3), 255, np.uint8))
    options = parsed("inpaint", "--image", image, "--mask", drawing(tmp_path, "mask.png", mask), "--prompt", "red")
    kinds = {"decoder": "decoder", "upsampler_1": "upsampler"}
    members = {n: Member(testing.tiny_stage(k), Variables({}, {}), 1, None, None, 0) for n, k in kinds.items()}
    known = sample.known_of(options, members)
    for name, side, columns in (("decoder", 8, 3), ("upsampler_1", 16, 7)):
        assert known[name].picture.shape == (1, side, side, 3) and (np.asarray(known[name].picture) == 1).all()
        assert (known[name].mask == (np.arange(side) < columns)[None, None, :, None]).all()


def test_pictures_are_cropped_to_their_central_square():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    assert (sample.square(wide, 4) == 200).all() and sample.square(wide, 4).shape == (1, 4, 4, 3)


def test_wrong_pictures_are_said_in_one_line(tmp_path):
    plain = np.zeros((8, 8, 3), np.uint8)
    image, small = drawing(tmp_path, "in.png", plain), drawing(tmp_path, "small.png", plain[:4])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for mask, says in ((small, "8x8 and 8x4"), (image, "black all over"), (text, "text.png is not a readable picture")):
        with pytest.raises(UserError, match=says):
            sample.known_of(parsed("inpaint", "--image", image, "--mask", mask), {})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("inpaint", "--image", "a.png"), "required: --mask"),
        (("inpaint", "--image", "a", "--mask", "b", "--resample", "3"), "--resample: invalid pair value: '3'"),
        (("inpaint", "--image", "a", "--mask", "b", "--resample", "0,2"), "0 is not above 0"),
        (("variations", "--image", "a", "--eta", "2"), "2 is not from 0 to 1"),
        (("reconstruct",), "required: --image"),
    ],
)
def test_wrong_words_of_editing(words, says):
    with pytest.raises(UsageError, match=says):
        parsed(*words)
