"""A random LLaVA of a few thousand parameters, built like a real one: CLIP tower, two-layer adapter, llama."""

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from addressvlm.tools.toy_base import CHAT_TEMPLATE, train_tokenizer

TEXT = ["Which street is this? Mill Street, Harbour. Yes. No. Oak Avenue. Options: A; B; C; D. This is in the district."]


def tiny_llava(folder: Path, seed: int = 0, side: int = 32, patch: int = 8) -> Path:
    """Write model and processor into `folder` and return it."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(TEXT, 330)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=patch
        ),
        text_config=LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.lm_head.weight.data.mul_(20)  # LoRA leaves the head as it is, so it must be able to say something
    images = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)
