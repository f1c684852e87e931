"""Published config files: every field is known (a warning of an unknown one is an error)."""

import json

import pytest
from clips import FIXTURES

from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.types import Preprocessing
from dalle2_jax.weights.clip.processor import read_processor
from dalle2_jax.weights.clip.transformers_config import (
    read_clip_config,
    read_text_config,
    read_vision_config,
)
from dalle2_jax.weights.config_files import FieldError, Known, Section
from dalle2_jax.weights.karlo import diffusers, priors, scheduler
from dalle2_jax.weights.karlo.diffusers_unet import read_unet_config

KARLO = json.loads((FIXTURES / "weights" / "karlo_full_configs.json").read_text())
"""The config files that diffusers 0.33.1 and transformers 4.46.3 write at full size."""

_OLD = {
    # fields of every config of transformers in 2022
    **{"_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None},
    **{"bos_token_id": 0, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "do_sample": False},
    **{"decoder_start_token_id": None, "diversity_penalty": 0.0, "early_stopping": False, "eos_token_id": 2},
    **{"encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None, "finetuning_task": None},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}},
    **{"initializer_factor": 1.0, "initializer_range": 0.02, "is_decoder": False, "is_encoder_decoder": False},
    **{"label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0},
    **{"no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1},
    **{"output_attentions": False, "output_hidden_states": False, "output_scores": False, "pad_token_id": 1},
    **{"prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False},
    **{"repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None},
    **{"suppress_tokens": None, "begin_suppress_tokens": None, "task_specific_params": None, "temperature": 1.0},
    **{"tf_legacy_loss": False, "tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None},
    **{"top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False, "typical_p": 1.0},
    **{"transformers_version": "4.16.0.dev0", "use_bfloat16": False, "attention_dropout": 0.0, "dropout": 0.0},
}
VIT_L14 = {
    "_name_or_path": "clip-vit-large-patch14/",
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {
        **_OLD,
        **{"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05},
        **{"max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12},
        **{"num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408},
    },
    "text_config_dict": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
        "projection_dim": 768,
    },
    "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config": {
        **_OLD,
        **{"hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 224, "intermediate_size": 4096},
        **{"layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16},
        **{"num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768},
    },
    "vision_config_dict": {
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24},
        **{"patch_size": 14, "projection_dim": 768},
    },
}
PROCESSOR = {
    **{"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True},
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    **{"resample": 3, "size": 224},
}


def section(name, **fields):
    return Section({**KARLO[name], **fields}, f"{name}/config.json")


def test_karlo_at_full_size():
    unet = UNetConfig(**read_unet_config(section("decoder", _class_name="UNet2DConditionModel")))
    assert (unet.channels, unet.channel_mult, unet.context_dim) == (320, (1, 2, 3, 4), 1536)
    small = read_unet_config(section("super_res_first", _class_name="UNet2DModel"))
    assert small["in_channels"] == 6 and small["context_dim"] is None
    assert priors._model(section("prior"), {}).width == 2048
    section("text_proj").check(diffusers._TEXT_PROJ_FIELDS)
    assert read_text_config(section("text_encoder"))[1] == 768
    assert read_vision_config(section("image_encoder"))[0].image_size == 224


def test_openais_clip_as_transformers_wrote_it_in_2022():
    text, vision, dim = read_clip_config(Section(VIT_L14, "config.json"), {})
    assert (text.width, vision.width, vision.patch_size, dim) == (768, 1024, 14, 768)
    processor = read_processor(Section(PROCESSOR, "preprocessor_config.json"), 224)
    assert processor.preprocessing == Preprocessing("bicubic", "shortest", 224, 224)


def test_a_scheduler_as_published():
    fields = {"_class_name": "UnCLIPScheduler", "_diffusers_version": "0.15.0.dev0", **scheduler._DEFAULTS}
    Section(fields, "scheduler_config.json").check(scheduler._SCHEDULER)


def test_fields_of_three_kinds():
    known = Known(("size",), {"mode": "a", "on": False}, "version|name_.*") | Known(("side",))
    Section({"size": 3, "side": [], "version": 9, "name_x": 1, "mode": "a", "nothing": None}, "f").check(known)
    for wrong in ({"mode": "b"}, {"mode": None}, {"on": 0}, {"on": True}):
        with pytest.raises(FieldError) as caught:
            Section(wrong, "f", "part.").check(known)
        assert (caught.value.path, caught.value.field) == ("f", f"part.{next(iter(wrong))}")
