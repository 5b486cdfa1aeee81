"""Tiny random models of families with other images and positions than LLaVA.

Qwen2.5-VL, Qwen3-VL, SmolVLM (Idefics3), SmolVLM2, InternVL's Hugging Face port, LLaVA-OneVision.
"""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from addressvlm.tools.toy_base import CHAT_TEMPLATE, train_tokenizer
from tests.support.families import qwen_processor, qwen_shape, tiny_qwen
from tests.support.tiny import TEXT

SMOL_MARKS = ["<fake_token_around_image>", "<global-img>", "<row_1_col_1>"]


class Qwen3Processor(Qwen3VLProcessor):
    """One that does without a video processor, which would need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def tiny_qwen3() -> tuple[Any, Any]:
    """A random Qwen3-VL: three-dimensional positions, features of the encoder's middle layers added in the language model."""
    tokenizer, config = qwen_shape(
        Qwen3VLConfig, {"head_dim": 16}, {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    )
    torch.manual_seed(3)
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    return model.eval(), qwen_processor(Qwen3Processor, tokenizer)


def smol_shape(kind: Any) -> tuple[Any, Any]:
    """A tokenizer, and a config of that kind: SigLIP tower, pixels shuffled into fewer tokens, llama."""
    tokenizer = train_tokenizer(TEXT, 330)
    tokenizer.add_special_tokens({"additional_special_tokens": SMOL_MARKS})
    return tokenizer, kind(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        scale_factor=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


SMOL_IMAGES: dict[str, Any] = {
    "size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False, "do_pad": True,
}  # fmt: skip


def tiny_smol() -> tuple[Any, Any]:
    """A random Idefics3, what the first SmolVLM is."""
    tokenizer, config = smol_shape(Idefics3Config)
    torch.manual_seed(4)
    model = Idefics3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    images = Idefics3ImageProcessorPil(**SMOL_IMAGES)
    return model.eval(), Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)


class Smol2Processor(SmolVLMProcessor):
    """One that does without a video processor, and without num2words, which only videos need."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def tiny_smol2() -> tuple[Any, Any]:
    """A random SmolVLM2."""
    tokenizer, config = smol_shape(SmolVLMConfig)
    torch.manual_seed(5)
    model = SmolVLMForConditionalGeneration._from_config(config, attn_implementation="eager")
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    images = SmolVLMImageProcessorPil(**SMOL_IMAGES)
    processor = Smol2Processor(images, tokenizer, None, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    processor.video_processor = SimpleNamespace(num_frames=1, fps=1)
    return model.eval(), processor


def qwen2_text(tokenizer: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


class InternProcessor(InternVLProcessor):
    """One that does without a video processor."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def tiny_intern() -> tuple[Any, Any]:
    """A random InternVL: one to several tiles an image, each of four tokens; Qwen2."""
    tokenizer = train_tokenizer(TEXT, 330)
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer._set_model_specific_special_tokens({**marks, "video_token": "<video>"})
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks.values(), "<video>"]})
    config = InternVLConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [32, 32], "patch_size": [8, 8],
        },
        text_config=qwen2_text(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(6)
    model = InternVLForConditionalGeneration._from_config(config, attn_implementation="eager")
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=3)
    template = CHAT_TEMPLATE.replace("<image>", "<IMG_CONTEXT>")
    return model.eval(), InternProcessor(images, tokenizer, None, image_seq_length=4, chat_template=template)


class OneVisionProcessor(LlavaOnevisionProcessor):
    """One that does without a video processor."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def tiny_onevision() -> tuple[Any, Any]:
    """A random LLaVA-OneVision: a small picture of the whole and tiles of it, as many as its shape needs; Qwen2."""
    tokenizer = train_tokenizer(TEXT, 330)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    grid = [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "vision_use_head": False,
        },
        text_config=qwen2_text(tokenizer), image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), image_grid_pinpoints=grid,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(7)
    model = LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation="eager")
    images = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=grid)
    processor = OneVisionProcessor(
        images, tokenizer, None, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=CHAT_TEMPLATE
    )
    return model.eval(), processor


FAMILIES = {
    "qwen2.5-vl": tiny_qwen, "qwen3-vl": tiny_qwen3, "smolvlm": tiny_smol, "smolvlm2": tiny_smol2, "internvl": tiny_intern,
    "llava-onevision": tiny_onevision,
}  # fmt: skip
