"""The options of sample.py: each reaches the sampling config of its stage, and a wrong one is one line."""

import dataclasses

import pytest
from raised import mentions

from dalle2_jax import testing
from dalle2_jax.cli import sample, stage_options
from dalle2_jax.diffusion import SAMPLERS, NoiseStatistics
from dalle2_jax.errors import ConfigError, UsageError
from dalle2_jax.stages import ArSamplingConfig, SamplingConfig, Variables
from dalle2_jax.system import PRIORS, LoadedStage
from dalle2_jax.system.options import sampling_configs

STAGES = {"prior": "prior", "decoder": "decoder", "upsampler_1": "upsampler"}


def sampling_of(*words, **stages):
    """Returns the sampling config of each tiny stage under options of the command line; ``stages`` replace some."""
    stages = {name: stages.get(name, testing.tiny_stage(kind)) for name, kind in STAGES.items()}
    members = {name: LoadedStage(stage, Variables({}, {}), 1, None, None, 0) for name, stage in stages.items()}
    given = ["text2image", "--system", "s", "--out", "o", *words]
    settings = stage_options.stage_settings(sample.make_parser().parse_args(given), list(members))
    try:
        return sampling_configs(members, {**dict.fromkeys(STAGES, {}), **settings})
    except ConfigError as error:
        raise UsageError(stage_options.as_option(error)) from error


def test_left_out_all_is_as_the_config_says():
    assert sampling_of() == {name: testing.tiny_stage(kind).sampling for name, kind in STAGES.items()}


def test_what_the_config_says_is_checked_too():
    decoder = testing.tiny_stage("decoder")
    sampling = dataclasses.replace(decoder.sampling, name="ddpm", variance="analytic")
    with pytest.raises(UsageError, check=mentions("decoder", "noise_statistics")):
        sampling_of(decoder=dataclasses.replace(decoder, sampling=sampling, noise_statistics=None))


WORDS = {
    # the word of an option: what may follow it, and the fields of SamplingConfig that it decides
    "sampler": ("dpmpp_2m", {"name": "dpmpp_2m"}),
    "steps": ("karras5", {"steps": "karras5"}),
    "eta": ("0.5", {"eta": 0.5}),
    "clip_sample": ("2", {"clip_sample": 2.0}),
    "clip": ("2", {"clip_sample": 2.0}),
    "threshold": ("dynamic", {"threshold": "dynamic"}),
    "quantile": ("0.9", {"quantile": 0.9}),
    "temperature": ("0.997", {"temperature": 0.997}),
    "guidance": ("-1.5", {"guidance": -1.5}),
    "image_guidance": ("0", {"image_guidance": 0.0}),
    "text_guidance": ("7", {"text_guidance": 7.0}),
    "guidance_schedule": ("cosine", {"guidance_schedule": "cosine"}),
    "guidance_interval": ("0.2,0.8", {"guidance_interval": (0.2, 0.8)}),
    "guidance_rescale": ("0.7", {"guidance_rescale": 0.7}),
    "guidance_order": ("text,image", {"guidance_order": "text,image"}),
}


@pytest.mark.parametrize("option", WORDS)
def test_each_word_decides_its_field_of_its_stage_alone(option):
    word, fields = WORDS[option]
    before, after = sampling_of(), sampling_of(f"--decoder.{option}", word)
    assert after == {**before, "decoder": dataclasses.replace(before["decoder"], **fields)} != before


def test_every_field_of_a_sampling_has_a_word():
    fields = {field for field, _ in stage_options.DIFFUSION_OPTIONS.values()}
    assert fields == {field.name for field in dataclasses.fields(SamplingConfig)}
    assert {*stage_options.DIFFUSION_OPTIONS} == {*WORDS, "variance"}
    assert {field for field, _ in stage_options.AR_OPTIONS.values()} == {
        f.name for f in dataclasses.fields(ArSamplingConfig)
    }


def test_help_names_what_there_is():
    assert (
        stage_options.SAMPLERS == SAMPLERS
        and sample.PRIORS == (*PRIORS,)
        and {*stage_options.STAGES} < {*stage_options.OPTIONS}
    )


def test_another_sampler_leaves_behind_what_belonged_to_the_first():
    """The config's eta belongs to its own sampler; options given together with the sampler are used."""
    noisy = testing.tiny_stage("decoder")
    noisy = dataclasses.replace(noisy, sampling=dataclasses.replace(noisy.sampling, eta=0.5))
    assert sampling_of("--decoder.sampler", "ddpm", decoder=noisy)["decoder"].eta == 0
    given = sampling_of("--decoder.sampler", "ddpm", "--decoder.variance", "fixed_large", decoder=noisy)["decoder"]
    assert (given.name, given.variance, given.eta) == ("ddpm", "fixed_large", 0)


def test_measured_moments_allow_the_analytic_variance():
    prior, words = testing.tiny_stage("prior"), ("--prior.sampler", "ddpm", "--prior.variance", "analytic")
    measured = dataclasses.replace(prior, noise_statistics=NoiseStatistics((0.9,) * 100, 1.0))
    assert sampling_of(*words, prior=measured)["prior"].variance == "analytic"
    with pytest.raises(UsageError, check=mentions("--prior.*", "noise_statistics")):
        sampling_of(*words)


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("--decoder.threshold", "static_"), ["--decoder.*", "threshold", "'static_'"]),
        (("--prior.threshold", "dynamic"), ["--prior.*", "'dynamic'", "clip_sample"]),
        (("--decoder.quantile", "0"), ["--decoder.quantile", "above 0"]),
        (("--decoder.variance", "analytic"), ["--decoder.*", "'ddim'", "variance"]),
        (("--prior.variance", "learned_range"), ["--prior.*", "variance", "'learned_range'"]),
        (("--decoder.sampler", "unipc", "--decoder.eta", "1"), ["--decoder.*", "'unipc'", "eta"]),
        (("--upsampler_1.text_guidance", "2"), ["--upsampler_1.*", "text_guidance"]),
        (("--upsampler_1.guidance", "2"), ["--upsampler_1.*", "guidance"]),
        (("--prior.image_guidance", "2"), ["--prior.*", "image_guidance"]),
        (("--decoder.guidance_schedule", "linaer"), ["--decoder.*", "'linaer'", "'linear'"]),
        (("--decoder.guidance_interval", "0.8,0.2"), ["guidance_interval", "(0.8, 0.2)"]),
        (("--decoder.guidance_interval", "0.8"), ["--decoder.guidance_interval", "'0.8'"]),
        (("--decoder.guidance_rescale", "2"), ["--decoder.guidance_rescale", 0, 1, 2.0]),
        (("--decoder.text_guidance", "nan"), ["--decoder.text_guidance", "nan"]),
        (("--decoder.steps", "ddim80"), ["--decoder.*", "'ddim80'", 100]),
        (("--upsampler_2.steps", "3"), ["stage upsampler_2"]),
    ],
)
def test_wrong_words_are_usage_errors(words, facts):
    with pytest.raises(UsageError, check=mentions(*facts)):
        sampling_of(*words)


def parsed(*words):
    return sample.make_parser().parse_args([words[0], "--system", "s", "--out", "o", *map(str, words[1:])])


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("inpaint", "--image", "a.png"), ["--mask"]),
        (("inpaint", "--image", "a", "--mask", "b", "--resample", "3"), ["--resample", "'3'"]),
        (("inpaint", "--image", "a", "--mask", "b", "--resample", "0,2"), ["--resample", 0, "1 to 1000"]),
        (("variations", "--image", "a", "--eta", "2"), ["--eta", 2, "0 to 1"]),
        (("reconstruct",), ["--image"]),
        (("interpolate", "--image", "a", "--image", "b", "--frames", "1"), ["--frames", 1, 2]),
        (("text_diff", "--image", "a", "--from", "red"), ["--to"]),
    ],
)
def test_wrong_words_of_editing(words, facts):
    with pytest.raises(UsageError, check=mentions(*facts)):
        parsed(*words)
