"""model_config.py: config.json in and out, refusals in one line."""

import pytest
from folders import edit, save
from small_model import tiny

import weights


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(architectures=["InternVLChatModelX"]),
            "architecture InternVLChatModelX is not supported",
        ),
        (
            dict(vision_config__model_type="aimv2"),
            "model_type = 'aimv2' is not supported, only 'intern_vit_6b'",
        ),
        (
            dict(vision_config__architectures=["CLIPVisionModel"]),
            r"vision encoder: architectures = \['CLIPVisionModel'\] is not supported, only "
            r"\['InternVisionModel'\] or \['AIMv2Model'\]",
        ),
        (
            dict(llm_config__architectures=["InternLM2ForCausalLM"]),
            r"model: architectures = \['InternLM2ForCausalLM'\] is not",
        ),
        (dict(vision_config__qk_normalization=True), "qk_normalization = True is not supported"),
        (dict(llm_config__rope_scaling={"type": "yarn"}), "rope_scaling = .* is not supported"),
        (dict(ps_version="v1"), "ps_version = 'v1' is not supported, only 'v2'"),
        (dict(select_layer=-4), "select_layer = -4 is not supported"),
        (dict(force_image_size=224), "force_image_size = 224 is not supported, only 56"),
        (dict(downsample_ratio=0.3), "downsample_ratio 0.3"),
        (dict(llm_config={"architectures": ["Qwen2ForCausalLM"]}), "lacks vocab_size, hidden_size"),
        (
            dict(llm_config__intermediate_size=97),
            r"mlp.down_proj.weight has shape \(64, 96\), config.json asks for \(64, 97\)",
        ),
        (
            dict(llm_config__num_hidden_layers=4),
            "12 parameters without a tensor: language_model.model.layers.3.*and 7 more",
        ),
        (
            dict(architectures="InternVLChatModel"),
            "architectures = 'InternVLChatModel' must be a list",
        ),
        (
            dict(architectures=["InternVLForConditionalGeneration"]),
            "vision encoder: model_type = 'intern_vit_6b' is not supported, only 'internvl_vision'",
        ),
        (
            dict(llm_config__vocab_size="330"),
            "language model: vocab_size = '330' must be a whole number",
        ),
        (dict(llm_config__hidden_size=-64), "hidden_size = -64 must be at least 1 and at most"),
        (dict(llm_config__num_key_value_heads=0), "num_key_value_heads = 0 must be at least 1"),
        (
            dict(llm_config__num_key_value_heads=3),
            "m/config.json: 4 heads do not divide over 3 kv heads",
        ),
        (
            dict(llm_config__num_hidden_layers=10**6),
            "num_hidden_layers = 1000000 must be at least 1 and at most 256",
        ),
        (dict(llm_config__rope_theta="x"), "rope_theta = 'x' must be a number"),
        (dict(llm_config__tie_word_embeddings=1), "tie_word_embeddings = 1 must be true or false"),
        (dict(vision_config__patch_size=0), "vision encoder: patch_size = 0 must be"),
        (dict(vision_config__image_size=[56, 56]), r"image_size = \[56, 56\] must be"),
        (
            dict(vision_config__num_attention_heads=5),
            "m/config.json: dim 64 does not divide by n_heads 5",
        ),
        (dict(vision_config=[1]), "config.json is not what it should be"),
        (dict(min_dynamic_patch="a"), "min_dynamic_patch = 'a' must be a whole number"),
        (dict(template=[1]), r"template = \[1\] must be a name"),
        (dict(pad2square=True), "pad2square = True is not supported, only False"),
        (dict(dynamic_image_size=False), "dynamic_image_size = False is not supported"),
        (
            dict(vision_config__num_hidden_layers=1),
            "14 tensors without a parameter: vision_model.encoder.layers.1",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_words(tmp_path, change, words):
    edit(save(tmp_path / "m", tiny()), **change)
    with pytest.raises(ValueError, match=words):
        weights.load_folder(tmp_path / "m")
