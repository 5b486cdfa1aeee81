"""A base model of paper 001's size and shape with random weights, for speed and memory: CLIP ViT-L/14-336, MLP, Phi-3-mini.

    python benchmarks/full_size.py full-size                        # 8.3 GB
    python benchmarks/training.py demo --set model.base=full-size --set model.dtype=bfloat16 --rows 16 --steps 20

Tokenizer and processor are those of the built-in toy base, whose short words make rows longer than Phi-3's tokenizer does.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from addressvlm.models import load_model
from addressvlm.models.loading import TOY_BASE

SIDE, PATCH = 336, 14  # pixels


def shape(image_token: int, shrink: int = 1) -> LlavaConfig:
    """The architecture; its layers and widths divided by `shrink`.

    `xtuner/llava-phi-3-mini-hf` stores Phi-3 in llama form, with queries, keys and values apart.
    """
    vision = CLIPVisionConfig(
        hidden_size=1024 // shrink, intermediate_size=4096 // shrink, num_hidden_layers=max(3, 24 // shrink),
        num_attention_heads=16 // min(shrink, 16), image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=3072 // shrink, intermediate_size=8192 // shrink, num_hidden_layers=max(1, 32 // shrink),
        num_attention_heads=32 // min(shrink, 16), num_key_value_heads=32 // min(shrink, 16), vocab_size=32064,
        max_position_embeddings=4096,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)


def write(folder: Path, shrink: int) -> int:
    """Write the folder; returns the number of parameters."""
    image_token = load_model(str(TOY_BASE))[0].config.image_token_id
    shutil.copytree(TOY_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md", "config.json"))
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["patch_size"] = PATCH
    processor["image_processor"] |= {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration._from_config(shape(image_token, shrink), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shrink", type=int, default=1, help="divide layers and widths, to try it without a GPU")
    args = parser.parse_args()
    print(f"{args.folder}: {write(args.folder, args.shrink):,} parameters")


if __name__ == "__main__":
    main()
