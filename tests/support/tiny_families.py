"""Tiny random models of families with other images and positions than LLaVA: Qwen2.5-VL, Qwen3-VL, SmolVLM (Idefics3)."""

from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

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


def tiny_smol() -> tuple[Any, Any]:
    """A random Idefics3, what SmolVLM is: SigLIP tower, pixels shuffled into fewer tokens, llama."""
    tokenizer = train_tokenizer(TEXT, 330)
    tokenizer.add_special_tokens({"additional_special_tokens": SMOL_MARKS})
    config = Idefics3Config(
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
    torch.manual_seed(4)
    model = Idefics3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False, do_pad=True
    )
    return model.eval(), Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)


FAMILIES = {"qwen2.5-vl": tiny_qwen, "qwen3-vl": tiny_qwen3, "smolvlm": tiny_smol}
