"""The zoo's Hugging Face transformers: one small configuration of every model type, and what each is called with.

A configuration starts from its own defaults; layers, widths, pictures and vocabularies are made small, in several steps
from smallest to full width, as some models do not build narrow. Inputs are guessed from the forward's signature; what
cannot be guessed stands in `SETTINGS` and `INPUTS`, by model type.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

Shapes = dict[str, Any]
"""Inputs by name: a shape, or a function of a generator that makes the input itself."""

FIRST = (
    "resnet convnext convnextv2 vit deit swin swinv2 regnet mobilenet_v1 mobilenet_v2 segformer beit dinov2 efficientnet "
    "bit poolformer pvt pvt_v2 cvt levit mobilevit mobilevitv2 focalnet hiera data2vec-vision vit_mae dpt glpn detr "
    "yolos bert roberta distilbert albert electra deberta deberta-v2 xlnet mpnet funnel convbert squeezebert "
    "mobilebert fnet longformer big_bird roformer xlm-roberta modernbert gpt2 gpt_neo gpt_neox gptj opt bloom codegen "
    "llama mistral mixtral qwen2 qwen3 gemma gemma2 phi phi3 falcon mpt stablelm mamba rwkv t5 mt5 bart mbart pegasus "
    "blenderbot m2m_100 marian led longt5 switch_transformers prophetnet whisper wav2vec2 hubert wavlm sew unispeech "
    "data2vec-audio speech_to_text audio-spectrogram-transformer clip siglip blip vilt chinese_clip align"
)
"""The families that most people use, in front of all others."""


def rotary(sections: list[int]) -> dict[str, Any]:
    """Rotary positions in three dimensions, `sections` of the frequencies for each."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}


LCNET = {
    "model_type": "pp_lcnet_v4",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "stem_channels": [3, 8, 16],
    "block_configs": [
        [[3, 16, 16, 1, True]],
        [[3, 16, 16, 2, False]],
        [[3, 16, 24, 2, False]],
        [[3, 24, 32, 2, False]],
    ],
}
MINICPM = {"text_config.layer_types": ["linear_attention", "full_attention"], "image_token_id": 199}
QWEN3_5 = {
    "text_config.layer_types": ["linear_attention", "full_attention"],
    "text_config.rope_parameters": rotary([2, 1, 1]) | {"partial_rotary_factor": 0.25},
    "vision_config.num_heads": 4,
    "vision_config.out_hidden_size": 512,
}
SIZES = [[16, 16], [8, 8], [4, 4]]
SAM2_VIDEO = {
    "vision_config.backbone_config.hidden_size": 96,
    "vision_config.backbone_config.embed_dim_per_stage": [96, 192, 384, 768],
    "vision_config.backbone_feature_sizes": SIZES,
    "memory_attention_rope_feat_sizes": [4, 4],
}
SAM3_VIDEO = {
    "prompt_encoder_config.image_size": 56,
    "vision_config.backbone_config.image_size": 56,
    "vision_config.backbone_feature_sizes": SIZES,
    "memory_attention_rope_feat_sizes": [4, 4],
    "image_size": 56,
}
TIMM = {
    "architecture": "vit_pe_core_tiny_patch16_384",
    "model_args": {"img_size": 64, "depth": 2, "embed_dim": 192},
}

CLASSES = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "voxtral_realtime_text": "models.voxtral_realtime.modeling_voxtral_realtime.VoxtralRealtimeTextModel",
}
"""The class to test where the library's table has another: one made from a part of the type's configuration, or none."""

ARGUMENTS: dict[str, Mapping[str, Any]] = {
    "lw_detr": {
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "image_size": 64,
            "hidden_size": 192,
            "num_hidden_layers": 2,
            "num_windows": 4,
            "window_block_indices": [0],
            "out_indices": [1, 2],
        },
        "projector_scale_factors": [1.0, 2.0],
        "num_queries": 20,
    },
    "minicpm_ocr": {"insert_layer_id": 0},
    "minicpmv4_6": {"insert_layer_id": 0},
    "minicpmv4_7": {"insert_layer_id": 0},
    "omdet-turbo": {"image_size": 64},
    "pe_audio_video": {
        "audio_video_config": {"video_config": {"model_type": "pe_video_encoder", "vision_config": TIMM}}
    },
    "pe_audio_video_encoder": {"video_config": {"model_type": "pe_video_encoder", "vision_config": TIMM}},
    "pe_video": {"video_config": {"vision_config": TIMM}},
    "pe_video_encoder": {"vision_config": TIMM},
    "perception_lm": {"vision_config": {"model_type": "timm_wrapper", **TIMM}},
    "pp_ocrv6_medium_det": {
        "backbone_config": LCNET,
        "neck_out_channels": 32,
        "scale_factor_list": [1, 2, 4, 8],
        "kernel_list": [3, 2, 2],
        "intraclass_block_config": {
            "reduce_channel": [1, 1, 0],
            "return_channel": [1, 1, 0],
            **{
                f"{way}_{ratio}ratio": [shape(side), 1, "same"]
                for way, shape in (
                    ("vertical_long_to_small_conv", lambda side: (side, 1)),
                    ("horizontal_small_to_long_conv", lambda side: (1, side)),
                    ("symmetric_conv_long", lambda side: side),
                )
                for ratio, side in (("long", 7), ("mid", 5), ("short", 3))
            },
        },
    },
    "pp_ocrv6_small_det": {
        "backbone_config": LCNET,
        "layer_list_out_channels": [16, 16, 24, 32],
    },
    "rf_detr": {
        "backbone_config": {
            "model_type": "rf_detr_dinov2",
            "hidden_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "out_features": ["stage1", "stage2"],
        },
        "num_queries": 10,
    },
    "step3p7": {
        "text_config": {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 16,
        }
    },
    "timm_backbone": {"backbone": "resnet18"},
    "uvdoc": {
        "backbone_config": {
            "model_type": "uvdoc_backbone",
            "out_features": ["stage1", "stage2", "stage3", "stage4", "stage5", "stage6"],
        }
    },
}
"""What a configuration is made with, where it derives other settings from it."""

SETTINGS: dict[str, Mapping[str, Any]] = {
    "align": {"vision_config.depth_coefficient": 0.2, "vision_config.width_coefficient": 0.5},
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "aya_vision": {"vision_config.num_attention_heads": 12},
    "blip-2": {"image_token_id": 190},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": rotary([1, 1, 2])},
        "vision_config.deepstack_visual_indexes": [0, 1],
        "vision_config.num_heads": 4,
        "vision_config.out_hidden_size": 1024,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": rotary([1, 1, 2])}},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.moe_intermediate_size": 16,
        "text_config.n_routed_experts": 4,
        "text_config.num_experts_per_tok": 2,
        "vision_config.sam_config.downsample_channels": [64, 512],
        "vision_config.sam_config.global_attn_indexes": [1],
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 16,
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "edgetam": {
        "vision_config.backbone_config.architecture": "repvit_m1",
        "vision_config.backbone_feature_sizes": SIZES,
    },
    "edgetam_video": {
        **SAM2_VIDEO,
        "perceiver_resampler_hidden_size": 64,
        "perceiver_resampler_attention_head_dim": 64,
        "perceiver_resampler_num_latents_2d": 16,
        "memory_attention_rope_k_sizes": [4, 4],
    },
    "efficientnet": {"depth_coefficient": 0.2, "width_coefficient": 0.5},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 4, "<image>": 5}},
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": rotary([3, 3, 2]),
        "text_config.moe_intermediate_size": [16, 16],
        "text_config.moe_k": 2,
        "vision_config.num_heads": 8,
    },
    "esm": {"pad_token_id": 1, "mask_token_id": 4},
    "gemma3n": {"text_config.vocab_size_per_layer_input": 200},
    "gemma3n_text": {"vocab_size_per_layer_input": 200},
    "glm4v_moe": {
        "text_config.num_attention_heads": 8,
        "text_config.num_key_value_heads": 4,
        "text_config.rope_parameters": rotary([4, 6, 6]) | {"partial_rotary_factor": 0.5},
    },
    "glm5_next": {
        "text_config.layer_types": ["linear_attention", "indexed_attention"],
        "text_config.mlp_layer_types": ["dense", "sparse"],
    },
    "granite4_vision": {
        "deepstack_layer_map": [(0, 0), (1, 1)],
        "downsample_rate": "1/2",
        "image_grid_pinpoints": [[64, 64]],
        "image_token_index": 199,
        "spatial_target_layers": [0, 0, 1, 1],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "inkling_mm_model": {
        "audio_token_id": 198,
        "text_config.n_routed_experts": 4,
        "text_config.num_experts_per_tok": 2,
    },
    "instructblip": {"image_token_id": 190},
    "instructblipvideo": {"video_token_id": 190},
    "kosmos-2": {"latent_query_num": 4},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "lfm3_vl": {"text_config.layer_types": ["conv", "full_attention"]},
    "minicpm_ocr": MINICPM,
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": MINICPM,
    "ministral": {"head_dim": 16},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "musicgen": {"decoder.num_codebooks": 2, "decoder.vocab_size": 2048},
    "nemotron": {"num_key_value_heads": 8},
    "neomme": {
        "head_dim": 16,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "omdet-turbo": {"num_queries": 20, "vision_features_channels": [32, 32, 32]},
    "perceiver": {"d_latents": 64, "num_self_attends_per_block": 2},
    "qwen2_vl": {
        "text_config.rope_parameters": rotary([2, 3, 3]),
        "vision_config.hidden_size": 1024,
        "vision_config.num_heads": 8,
    },
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": {**QWEN3_5, "vision_config.out_hidden_size": 256},
    "qwen4_exp": {
        **QWEN3_5,
        "text_config.layer_types": ["linear_attention", "indexed_attention"],
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 4,
        "text_config.indexer_compress_ratio": 2,
        "vision_config.out_hidden_size": 256,
    },
    "sam2_video": SAM2_VIDEO,
    "sam3_tracker_video": SAM3_VIDEO,
    "sam3_video": {
        "detector_config.detr_decoder_config.num_queries": 4,
        "new_det_thresh": 0.0,
        "score_threshold_detection": 0.0,
        "detector_config.vision_config.backbone_feature_sizes": SIZES,
        "detector_config.vision_config.backbone_config.image_size": 56,
        **{f"tracker_config.{key}": value for key, value in SAM3_VIDEO.items()},
    },
    "seggpt": {"image_size": [128, 64]},
    "step3p7": {
        "text_config.n_routed_experts": 4,
        "text_config.num_experts_per_tok": 2,
    },
    "t5gemma2_encoder": {
        "image_token_index": 199,
        "mm_tokens_per_image": 4,
        "text_config.dropout_rate": 0.1,
    },
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "vibevoice": {"audio_config.num_filters": 4, "semantic_model_config.num_filters": 4},
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config.num_filters": 4,
        "semantic_tokenizer_encoder_config.num_filters": 4,
    },
    "xmod": {"default_language": "en_XX"},
}
"""Settings that a type's default configuration lacks or that do not fit a small one; dots lead into nested ones."""

INPUTS: dict[str, Callable[[Any], Shapes]] = {
    "audioflamingo3_encoder": lambda config: {
        "input_features": (2, config.num_mel_bins, 2 * config.max_source_positions),
        "input_features_mask": ones(2, 2 * config.max_source_positions),
    },
    "bark": lambda config: {
        "semantic": lambda generator: {"input_ids": words(generator, 2, 8)},
        "coarse_acoustics": lambda generator: {"input_ids": words(generator, 2, 8)},
        "fine_acoustics": lambda generator: {"codebook_idx": 1, "input_ids": words(generator, 2, 8, 8)},
        "codec_model": lambda generator: {"input_values": torch.randn(2, 1, 4000, generator=generator)},
    },
    "blip-2": lambda config: {
        "pixel_values": (2, 3, config.vision_config.image_size, config.vision_config.image_size),
        "input_ids": with_pictures(config, config.num_query_tokens),
    },
    "blip_2_qformer": lambda config: {
        "query_embeds": (2, 8, config.hidden_size),
        "encoder_hidden_states": (2, 8, config.encoder_hidden_size),
    },
    "bros": lambda config: {"input_ids": (2, 8), "bbox": (2, 8, config.dim_bbox)},
    "clap": lambda config: {"input_ids": (2, 8), "input_features": (2, 1, 1001, 64)},
    "clvp": lambda config: {"input_ids": (2, 8), "input_features": (2, 80, 64)},
    **dict.fromkeys(
        ["cohere_compass", "ernie4_5_vl_moe", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen4_exp"],
        lambda config: {
            "input_ids": with_pictures(config, 4),
            "pixel_values": (32, packed_width(config.vision_config)),
            "image_grid_thw": constant([1, 4, 4], [1, 4, 4]),
            "mm_token_type_ids": marked(4),
        },
    ),
    "decision_transformer": lambda config: {
        "states": (2, 8, config.state_dim),
        "actions": (2, 8, config.act_dim),
        "rewards": (2, 8, 1),
        "returns_to_go": (2, 8, 1),
        "timesteps": counting(2, 8),
    },
    "deepseek_ocr2": lambda config: {
        "pixel_values": (2, 3, 64, 64),
        "input_ids": with_pictures(config, 145),
    },
    "edgetam": lambda config: {"pixel_values": (2, 3, 64, 64)},
    "edgetam_video": lambda config: {
        "inference_session": followed(
            config, 1, config.perceiver_resampler_num_latents + config.perceiver_resampler_num_latents_2d
        ),
        "frame_idx": number(1),
    },
    "efficientloftr": lambda config: {"pixel_values": (1, 2, 1, 64, 64)},
    **dict.fromkeys(
        [
            "glm4v_moe",
            "glm5_next",
            "lfm3_vl",
            "emu3",
            "hunyuan_vl",
        ],
        lambda config: {"input_ids": (2, 8)},
    ),
    "fun_asr_nano_encoder": lambda config: {
        "input_features": (2, 64, config.input_size),
        "input_features_mask": ones(2, 64),
    },
    "gemma3n_audio": lambda config: {
        "audio_mel": (2, 64, config.input_feat_size),
        "audio_mel_mask": zeros(2, 64, dtype=torch.bool),
    },
    "gemma4_audio": lambda config: {"input_features": (2, 64, 128)},
    "gemma4_vision": lambda config: {
        "pixel_values": (2, 36, 3 * config.patch_size**2),
        "pixel_position_ids": grid(2, 6),
    },
    "granite4_vision": lambda config: {
        "pixel_values": (2, 2, 3, 64, 64),
        "image_sizes": constant([64, 64], [64, 64]),
        "input_ids": with_pictures(config, 3),
    },
    "granite_speech5_ctc": lambda config: {"input_features": (2, 64, 320)},
    "granite_speech5_encoder": lambda config: {"input_features": (2, 64, 320)},
    "inkling2_vision": lambda config: {
        "pixel_values": (16, *[config.patch_size * config.spatial_merge_size] * 2, 3),
        "image_grid_thw": constant([1, 4, 4]),
    },
    "inkling_mm_model": lambda config: {
        "pixel_values": (
            2,
            config.vision_config.temporal_patch_size,
            *[config.vision_config.patch_size] * 2,
            3,
        ),
        "audio_input_ids": (2, 3, config.audio_config.n_mel_bins),
        "input_ids": lambda generator: torch.tensor([[199] + [198] * 3 + [5, 6, 7, 8]] * 2),
    },
    "instructblip": lambda config: {
        "pixel_values": (2, 3, config.vision_config.image_size, config.vision_config.image_size),
        "qformer_input_ids": (2, 8),
        "input_ids": with_pictures(config, config.num_query_tokens),
    },
    "instructblipvideo": lambda config: {
        "pixel_values": (2, 4, 3, config.vision_config.image_size, config.vision_config.image_size),
        "qformer_input_ids": (2, 8),
        "input_ids": with_pictures(config, 4 * config.num_query_tokens),
    },
    "kosmos-2": lambda config: {
        "pixel_values": (2, 3, config.vision_config.image_size, config.vision_config.image_size),
        "input_ids": (2, 8),
        "image_embeds_position_mask": marked(4),
    },
    "lightglue": lambda config: {"pixel_values": (1, 2, 1, 64, 64)},
    **dict.fromkeys(["lw_detr", "rf_detr"], lambda config: {"pixel_values": (2, 3, 64, 64)}),
    "lxmert": lambda config: {
        "input_ids": (2, 8),
        "visual_feats": (2, 4, config.visual_feat_dim),
        "visual_pos": (2, 4, config.visual_pos_dim),
    },
    "mimi_decoder": lambda config: {"latents": (2, config.hidden_size, 8)},
    **dict.fromkeys(
        ["minicpm_ocr", "minicpmv4_6", "minicpmv4_7"],
        lambda config: {
            "pixel_values": (1, 3, config.vision_config.patch_size, 32 * config.vision_config.patch_size),
            "target_sizes": constant([4, 4], [4, 4]),
            "input_ids": with_pictures(config, 4 if config.model_type == "minicpm_ocr" else 1),
            **({"mm_token_type_ids": marked(1)} if config.model_type == "minicpmv4_7" else {}),
        },
    ),
    "muse_glimmer_assistant": lambda config: {
        "noise_embeds": (2, 8, config.hidden_size),
        "context_hidden_states": (2, 6, config.hidden_size * len(config.target_layer_ids)),
    },
    "musicgen": lambda config: {"input_ids": (2, 8), "input_values": (2, 1, 4000)},
    "musicgen_melody": lambda config: {
        "input_ids": (2, 8),
        "input_features": (2, 6, config.num_chroma),
        "decoder_input_ids": (2 * config.decoder.num_codebooks, 6),
    },
    "neomme": lambda config: {
        "pixel_values": (4, config.patch_dim),
        "input_ids": with_pictures(config, 2),
    },
    "neucodec": lambda config: {"input_values": (1, 1, 16000), "input_features": (1, 50, 160)},
    "omdet-turbo": lambda config: {
        "pixel_values": (2, 3, 64, 64),
        "classes_input_ids": (4, 8),
        "classes_attention_mask": ones(4, 8),
        "tasks_input_ids": (2, 8),
        "tasks_attention_mask": ones(2, 8),
        "classes_structure": constant(2, 2),
    },
    "oneformer": lambda config: {"pixel_values": (1, 3, 64, 64), "task_inputs": (1, 77)},
    "pe_audio": lambda config: {"input_ids": (2, 8), "input_values": (2, 1, 16000)},
    "pe_audio_video": lambda config: {
        "input_ids": (2, 8),
        "input_values": (2, 1, 16000),
        "pixel_values_videos": (2, 4, 3, 64, 64),
    },
    "pe_audio_video_encoder": lambda config: {
        "input_values": (2, 1, 16000),
        "pixel_values_videos": (2, 4, 3, 64, 64),
    },
    "pe_video": lambda config: {"input_ids": (2, 8), "pixel_values_videos": (2, 4, 3, 64, 64)},
    "pe_video_encoder": lambda config: {"pixel_values_videos": (2, 4, 3, 64, 64)},
    "perceiver": lambda config: {"inputs": (2, 8, config.d_model)},
    "perception_lm": lambda config: {
        "pixel_values": (2, 1, 3, 64, 64),
        "input_ids": with_pictures(config, 16),
    },
    "pocket_tts_audio_tokenizer_decoder": lambda config: {"latents": (2, config.hidden_size, 8)},
    "qwen3_asr_encoder": lambda config: {
        "input_features": (2, config.num_mel_bins, 2 * config.n_window),
        "input_features_mask": ones(2, 2 * config.n_window),
    },
    "sam2_video": lambda config: {"inference_session": followed(config, 16, 1), "frame_idx": number(1)},
    "sam3_tracker_video": lambda config: {
        "inference_session": followed(config, 16, 1),
        "frame_idx": number(1),
    },
    "sam3_video": lambda config: {"inference_session": searched, "frame_idx": number(0)},
    "seggpt": lambda config: {
        "pixel_values": (2, 3, 64, 64),
        "prompt_pixel_values": (2, 3, 64, 64),
        "prompt_masks": (2, 3, 64, 64),
    },
    "siglip2_vision_model": lambda config: {
        "pixel_values": (2, 16, 3 * config.patch_size**2),
        "pixel_attention_mask": ones(2, 16),
        "spatial_shapes": constant([4, 4], [4, 4]),
    },
    "step3p7": lambda config: {"pixel_values": (2, 3, 64, 64), "input_ids": with_pictures(config, 1)},
    "t5gemma2_encoder": lambda config: {
        "pixel_values": (2, 3, 64, 64),
        "input_ids": with_pictures(config, config.mm_tokens_per_image),
    },
    "timesfm": lambda config: {
        "past_values": (2, 2 * config.patch_length),
        "past_values_padding": zeros(2, 2 * config.patch_length),
        "freq": zeros(2, 1),
    },
    "tvp": lambda config: {"pixel_values": (1, 2, 3, 64, 64), "input_ids": (1, 8)},
    "vibevoice": lambda config: {
        "input_values": (2, 1, 6400),
        "padding_mask": ones(2, 6400, dtype=torch.bool),
        "input_ids": with_sound(config, 2),
        "labels": counting(2, 6),
        "acoustic_loss_mask": lambda generator: marked(2)(generator).bool(),
        "noise_scheduler": noise_schedule,
    },
    "vibevoice_acoustic_tokenizer_encoder": lambda config: {"hidden_states": (2, 1, 6400)},
    "vibevoice_asr": lambda config: {"input_values": (2, 1, 6400), "input_ids": with_sound(config, 2)},
    "videoprism": lambda config: {
        "input_ids": (2, 8),
        "pixel_values_videos": (2, config.vision_config.num_frames, 3, 64, 64),
    },
    "voxtral_realtime": lambda config: {
        "input_ids": (2, 8),
        "input_features": (2, config.audio_config.num_mel_bins, 64),
    },
    "voxtral_realtime_text": lambda config: {"input_ids": (2, 8), "t_cond": (1, 1, config.hidden_size)},
    "xcodec2": lambda config: {"input_values": (1, 1, 16000), "input_features": (1, 50, 160)},
}
"""What a type is called with where its signature does not tell."""

_LAYERS = re.compile(
    r"(^|_)(n_layers?|num_layers|num_\w+_layers|\w*_layers|layers|depth|num_blocks|n_blocks)$"
)
_NOT_LAYERS = ("num_feat_extract_layers",)
_WIDTHS = re.compile(
    r"(size|dim|dims|d_model|d_ff|d_kv|d_inner|n_embd|n_inner|channels|filters|features|rank|planes)$"
)
_NOT_WIDTHS = re.compile(
    r"(image|patch|vocab|window|kernel|crop|chunk|block|batch|kv_heads|num_channels|stride|max_)"
)


def names() -> list[str]:
    """All model types that have a base model, those that most people use in front."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    first = [name for name in FIRST.split() if name in MODEL_MAPPING_NAMES]
    return first + [name for name in MODEL_MAPPING_NAMES if name not in first]


def specimens(name: str) -> Iterator[tuple[Callable[[], Any], Any, str, Any]]:
    """Narrow and shallow first, then wider; each called with every recipe of inputs that its forward may take.

    Yields what makes the model, its (no) positional arguments, both in words, and its keyword arguments.
    """
    import transformers

    arguments = ARGUMENTS.get(name, {})
    if name in CLASSES:
        cls = operator.attrgetter(CLASSES[name])(transformers)
    else:
        classes = transformers.MODEL_MAPPING[type(transformers.AutoConfig.for_model(name))]
        cls = classes[0] if isinstance(classes, tuple) else classes
    takes = set(inspect.signature(cls.forward).parameters)
    for factor, size in ((8, 64), (4, 64), (2, 64), (1, 64), (8, None), (1, None)):
        config = transformers.AutoConfig.for_model(name, **arguments)
        _shrink(config, factor, size)
        for key, value in SETTINGS.get(name, {}).items():
            _set(config, key, value)
        build = functools.partial(_build, cls, config)
        recipes = [INPUTS[name](config)] if name in INPUTS else list(_recipes(config, takes))
        for recipe in recipes or [{}]:  # what takes something else entirely is built, at least
            text = ", ".join(
                key if callable(shape) else f"{key} {'x'.join(map(str, shape))}"
                for key, shape in recipe.items()
            )
            keywords = functools.partial(
                _inputs, recipe=recipe, vocabulary=_first_of(config, ("vocab_size",), 200)
            )
            yield build, lambda generator: (), f"widths/{factor}: {text}", keywords


def _build(cls: Any, config: Any) -> nn.Module:
    model = cls._from_config(config)
    return Parts(dict(model.named_children())) if cls.__name__ == "BarkModel" else model


def _set(config: Any, key: str, value: Any) -> None:
    *path, last = key.split(".")
    setattr(functools.reduce(getattr, path, config), last, value)


def counting(rows: int, length: int) -> Callable[[torch.Generator], torch.Tensor]:
    """Positions 0, 1, 2, ... in each row."""
    return lambda generator: torch.arange(length).repeat(rows, 1)


def ones(*shape: int, dtype: torch.dtype = torch.long) -> Callable[[torch.Generator], torch.Tensor]:
    """A mask that hides nothing."""
    return lambda generator: torch.ones(shape, dtype=dtype)


def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Callable[[torch.Generator], torch.Tensor]:
    """A padding mask that hides nothing."""
    return lambda generator: torch.zeros(shape, dtype=dtype)


def grid(rows: int, side: int) -> Callable[[torch.Generator], torch.Tensor]:
    """Horizontal and vertical positions of side x side patches."""
    return lambda generator: torch.cartesian_prod(torch.arange(side), torch.arange(side)).repeat(rows, 1, 1)


def with_pictures(config: Any, count: int) -> Callable[[torch.Generator], torch.Tensor]:
    """Text in which `count` tokens stand for a picture."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    token = next(getattr(config, name) for name in names if getattr(config, name, None))
    return lambda generator: torch.tensor([[token] * count + [5, 6, 7, 8]] * 2)


def with_sound(config: Any, count: int) -> Callable[[torch.Generator], torch.Tensor]:
    """Text in which `count` tokens stand for a sound."""
    return lambda generator: torch.tensor([[config.audio_token_id] * count + [5, 6, 7, 8]] * 2)


def words(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Any words of the small vocabulary."""
    return torch.randint(5, 195, shape, generator=generator)


def number(value: int) -> Callable[[torch.Generator], int]:
    """An argument that is no tensor."""
    return lambda generator: value


def followed(config: Any, *memory: int) -> Callable[[torch.Generator], Any]:
    """Two frames of a film in which one object is followed from the first to the second, where another is pointed at."""
    name = type(config).__name__.removesuffix("Config") + "InferenceSession"
    module = sys.modules[type(config).__module__.replace("configuration", "modeling")]

    def session(generator: torch.Generator) -> Any:
        film = torch.randn(2, 3, config.image_size, config.image_size, generator=generator)
        session = getattr(module, name)(video=film, video_height=64, video_width=64, dtype=torch.float32)
        shape = (*memory, config.memory_encoder_output_channels)
        known = {
            "maskmem_features": torch.randn(shape, generator=generator),
            "maskmem_pos_enc": torch.randn(shape, generator=generator),
            "object_pointer": torch.randn(1, config.vision_config.fpn_hidden_size, generator=generator),
        }
        session.store_output(session.obj_id_to_idx(1), 0, output_value=known)
        points = {
            "point_coords": torch.rand(1, 1, 2, 2, generator=generator) * 64,
            "point_labels": ones(1, 1, 2)(generator),
        }
        session.add_point_inputs(session.obj_id_to_idx(2), 1, points)
        session.obj_with_new_inputs = [2]
        return session

    return session


def searched(generator: torch.Generator) -> Any:
    """A frame of a film in which an object is looked for by words."""
    import transformers

    film = torch.randn(1, 3, 56, 56, generator=generator)
    session = transformers.Sam3VideoInferenceSession(
        video=film, video_height=64, video_width=64, dtype=torch.float32
    )
    prompt = session.add_prompt("words")
    session.prompt_input_ids[prompt] = words(generator, 1, 8)
    session.prompt_attention_masks[prompt] = ones(1, 8)(generator)
    return session


class Parts(nn.ModuleDict):
    """The parts of a model that has no forward of its own, each called with its own inputs."""

    def forward(self, **inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: part(**inputs[name]) for name, part in self.items()}


def noise_schedule(generator: torch.Generator) -> Any:
    """Ten steps of noise, as a diffusion loss wants them: how much signal and noise each has, and the mixture."""
    alpha, sigma = torch.linspace(1, 0, 10), torch.linspace(0, 1, 10)
    mix = lambda signal, noise, steps: alpha[steps, None] * signal + sigma[steps, None] * noise
    return types.SimpleNamespace(alpha_t=alpha, sigma_t=sigma, add_noise=mix)


def marked(count: int, rest: int = 4) -> Callable[[torch.Generator], torch.Tensor]:
    """Which tokens of `with_pictures` stand for a picture."""
    return lambda generator: torch.tensor([[1] * count + [0] * rest] * 2)


def packed_width(vision: Any) -> int:
    """Numbers in one flattened patch."""
    return vision.in_channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2


def constant(*values: Any) -> Callable[[torch.Generator], torch.Tensor]:
    """The same numbers at every call."""
    return lambda generator: torch.tensor(list(values))


def _shrink(config: Any, factor: int, size: int | None) -> None:
    """Two layers everywhere, widths divided, small pictures and vocabularies; nested configurations as well."""
    from transformers import PretrainedConfig

    for key, value in list(vars(config).items()):
        small = value
        if key == "vocab_size" and value is None:
            small = 200
        elif key == "num_kv_shared_layers":
            small = 0
        elif isinstance(value, PretrainedConfig):
            _shrink(value, factor, size)
        elif key.endswith("token_id") and isinstance(value, int) and value > 199:
            small = 199
        elif key == "image_size" and size is not None and isinstance(value, (int, list, tuple)):
            small = size if isinstance(value, int) else type(value)(size for _ in value)
        elif key == "layer_types" and isinstance(value, list):
            small = value[:2]
        elif key in ("depths", "layers_per_stage", "num_blocks_per_stage") and isinstance(
            value, (list, tuple)
        ):
            small = type(value)(min(2, each) if isinstance(each, int) else each for each in value)
        elif isinstance(value, (list, tuple)) and _WIDTHS.search(key.rstrip("s")):
            small = type(value)(_narrow(key, each, factor) for each in value)
        elif type(value) is int:
            layers = _LAYERS.search(key) and key not in _NOT_LAYERS
            small = min(2, value) if layers else _narrow(key, value, factor)
        if small is not value:
            with contextlib.suppress(AttributeError, NotImplementedError, ValueError, TypeError):
                setattr(config, key, small)


def _narrow(key: str, value: Any, factor: int) -> Any:
    if type(value) is not int:
        return value
    if key == "vocab_size":
        return min(value, 200)
    if "expert" in key and "num" in key:
        return min(value, 4)
    wide = _WIDTHS.search(key.rstrip("s")) and not _NOT_WIDTHS.search(key)
    return value // factor if wide and value % factor == 0 and value // factor >= 4 else value


def _first_of(config: Any, keys: tuple[str, ...], default: int) -> int:
    """The first of these settings, here or in a nested configuration."""
    from transformers import PretrainedConfig

    nested = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for each in (config, *nested):
        for key in keys:
            value = getattr(each, key, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and value > 0:
                return value
    return default


def _recipes(config: Any, takes: set[str]) -> Iterator[Shapes]:
    """Shapes of inputs by name; several guesses, the first that runs is taken."""
    size = _first_of(config, ("image_size", "img_size"), 64)
    channels = _first_of(config, ("num_channels", "in_channels", "in_chans"), 3)
    mels = _first_of(config, ("num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels"), 80)
    frames = 2 * _first_of(config, ("max_source_positions",), 50)
    decoder = (
        {"decoder_input_ids": (2, 6)} if "decoder_input_ids" in takes and config.is_encoder_decoder else {}
    )
    text = {"input_ids": (2, 8)} if "input_ids" in takes else {}
    yield from _packed(config, takes)
    pictures: list[Shapes] = []
    if "pixel_values" in takes:
        sizes = dict.fromkeys((size, 64, 128, 224))
        pictures = [{"pixel_values": (2, channels, each, each)} for each in sizes]
        pictures += [{"pixel_values": (2, _first_of(config, ("num_frames",), 8), channels, size, size)}]
    words: list[Shapes] = [{**text, **decoder}, {"input_ids": (2, 128), **decoder}] if text else []
    for number, picture in enumerate(pictures):
        yield {**picture, **decoder}
        if text:
            yield {**picture, **text, **decoder}
        if number == 0:  # what wants its pictures in special places of a text runs without them
            yield from words
    if not pictures:
        yield from words
    if "input_values" in takes:
        for shape in (
            (2, 4000),
            (2, 1, 4000),
            (2, _first_of(config, ("max_length",), 1024), mels),
            (2, 16000),
        ):
            yield {"input_values": shape, **decoder}
    if "input_features" in takes:
        for shape in ((2, mels, frames), (2, frames, mels), (2, 64, mels), (2, mels, 3000)):
            yield {"input_features": shape, **decoder}
    if "pixel_values_videos" in takes:
        yield {
            "pixel_values_videos": (
                2,
                _first_of(config, ("num_frames", "frames_per_clip"), 8),
                channels,
                size,
                size,
            )
        }
    if "past_values" in takes:
        length = _first_of(config, ("context_length",), 32)
        if "past_time_features" in takes:
            long, ahead = length + max(config.lags_sequence), config.prediction_length
            yield {
                "past_values": (2, long),
                "past_time_features": (2, long, config.num_time_features),
                "past_observed_mask": ones(2, long),
                "future_values": (2, ahead),
                "future_time_features": (2, ahead, config.num_time_features),
            }
        yield {"past_values": (2, length, _first_of(config, ("num_input_channels",), 1))}
        yield {"past_values": (2, length)}
    if "inputs_embeds" in takes and not text:
        yield {"inputs_embeds": (2, 8, _first_of(config, ("hidden_size", "d_model"), 64))}
    if "hidden_states" in takes:
        yield {"hidden_states": (2, 8, _first_of(config, ("hidden_size", "d_model"), 64))}


def _packed(config: Any, takes: set[str]) -> Iterator[Shapes]:
    """Pictures as rows of flattened patches, with the grid that they came from: 4 x 4 of them."""
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in takes), None)
    if grid is None or "input_ids" in takes:
        return
    rows = "hidden_states" if "hidden_states" in takes else "pixel_values"
    channels = _first_of(config, ("in_channels", "num_channels", "in_chans"), 3)
    patch = _first_of(config, ("patch_size",), 14)
    merged = {"merge_sizes": constant(2)} if "merge_sizes" in takes else {}
    for frames in dict.fromkeys((_first_of(config, ("temporal_patch_size",), 1), 1, 2)):
        for shape in ((16, channels * frames * patch**2), (16, channels, patch, patch)):
            yield {rows: shape, grid: constant([1, 4, 4]), **merged}


def _inputs(generator: torch.Generator, *, recipe: Shapes, vocabulary: int) -> dict[str, Any]:
    return {key: _input(key, shape, generator, vocabulary) for key, shape in recipe.items()}


def _input(key: str, shape: Any, generator: torch.Generator, vocabulary: int) -> Any:
    if callable(shape):
        return shape(generator)
    if key.endswith("_ids"):
        return torch.randint(5, vocabulary - 5, shape, generator=generator)
    return torch.randn(shape, generator=generator)
