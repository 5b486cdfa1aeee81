"""Pretrain the toy base model's vision encoder to recognize street traits and written words in images.

    python -m addressvlm.tools.toy_base_encoder /tmp/toy-data /tmp/encoder.safetensors --minutes 15

An untrained language model long ignores image tokens; with a pretrained encoder they carry information from the first step.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionModel

from addressvlm.tools.toy_base import image_processor, vision_config
from addressvlm.training.collator import sample_from_row
from addressvlm.training.dataset import Schedule, TableRows
from addressvlm.training.optim import learning_rate


class EncoderProbe(nn.Module):
    """The encoder with one logit per trait, from the mean of all patches and from the patch with the highest score."""

    def __init__(self, traits: int) -> None:
        super().__init__()
        config = vision_config()
        self.encoder = CLIPVisionModel(config)
        self.image_head = nn.Linear(config.hidden_size, traits)
        self.patch_head = nn.Linear(config.hidden_size, traits)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> logits (B, traits)."""
        patches = self.encoder(pixels).last_hidden_state[:, 1:]
        return self.image_head(patches.mean(1)) + torch.logsumexp(self.patch_head(patches), 1) - 6.0


def main() -> None:
    """Train for the requested time and save the encoder's weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that addressvlm.tools.toy_base_data wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    traits = TableRows(args.data, "train", ("traits",))
    names = sorted({trait for index in range(len(traits)) for trait in traits[index]["traits"]})
    indices = {name: index for index, name in enumerate(names)}
    rows = TableRows(args.data, "train", ("image", "rounds", "traits"))
    model, processor = EncoderProbe(len(indices)), image_processor()
    model.encoder.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    schedule, started, step = Schedule(rows, args.batch_size, seed=0), time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < args.minutes * 60:
        total = max(step + 1, round(step * args.minutes * 60 / elapsed)) if step > 20 else 10_000
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, 1e-3, 0.03)
        batch = [rows[i] for i in schedule.indices(step)]
        pixels = processor(images=[sample_from_row(row).image for row in batch], return_tensors="pt")["pixel_values"]
        labels = torch.zeros(len(batch), len(indices))  # 1 where the image has the trait
        for i, row in enumerate(batch):
            labels[i, [indices[trait] for trait in row["traits"]]] = 1
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixels)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum") / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            recall = ((logits > 0) & (labels > 0)).sum() / labels.sum()
            print(f"encoder: step {step}/{total}, loss {loss.item():.2f}, recall {recall:.0%}, {elapsed:.0f} s", flush=True)
        step += 1
    save_file({key: value.contiguous() for key, value in model.encoder.state_dict().items()}, args.out)


if __name__ == "__main__":
    main()
