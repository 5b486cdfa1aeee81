"""School the toy base model's vision encoder: which traits of the street and which written words does an image show?

    python -m addressvlm.tools.toy_base_encoder /tmp/lessons /tmp/sight.safetensors --minutes 15

A language model that is still learning to speak ignores its image tokens for long; an encoder that has been to school
gives it something to look at from the first step.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionModel

from addressvlm.tools.toy_base import image_processor, vision_config
from addressvlm.training.collator import sample_from_row
from addressvlm.training.dataset import Schedule, TableRows
from addressvlm.training.loss import learning_rate


class EncoderProbe(nn.Module):
    """The encoder with one score a trait, from the average of all patches and from the patch that shows it best."""

    def __init__(self, traits: int) -> None:
        super().__init__()
        config = vision_config()
        self.encoder = CLIPVisionModel(config)
        self.whole = nn.Linear(config.hidden_size, traits)
        self.patch = nn.Linear(config.hidden_size, traits)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """B x 3 x H x W -> B x traits, logits."""
        patches = self.encoder(pixels).last_hidden_state[:, 1:]
        return self.whole(patches.mean(1)) + torch.logsumexp(self.patch(patches), 1) - 6.0


def vocabulary(rows: TableRows) -> dict[str, int]:
    """Every trait that occurs, numbered."""
    found = {trait for index in range(len(rows)) for trait in rows[index]["traits"]}
    return {trait: number for number, trait in enumerate(sorted(found))}


def targets(batch: list[dict[str, Any]], numbers: dict[str, int]) -> torch.Tensor:
    """B x traits, 1 where the image has it."""
    wanted = torch.zeros(len(batch), len(numbers))
    for row, item in enumerate(batch):
        wanted[row, [numbers[trait] for trait in item["traits"]]] = 1
    return wanted


def main() -> None:
    """Train for the given time and save the encoder's weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lessons", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    numbers = vocabulary(TableRows(args.lessons, "train", ("traits",)))
    rows = TableRows(args.lessons, "train", ("image", "rounds", "traits"))
    pupil, processor = EncoderProbe(len(numbers)), image_processor()
    pupil.encoder.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    schedule, started, step = Schedule(rows, args.batch_size, seed=0), time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < args.minutes * 60:
        total = max(step + 1, round(step * args.minutes * 60 / elapsed)) if step > 20 else 10_000
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, 1e-3, 0.03)
        batch = [rows[i] for i in schedule.indices(step)]
        pixels = processor(images=[sample_from_row(row).image for row in batch], return_tensors="pt")["pixel_values"]
        wanted = targets(batch, numbers)
        with torch.autocast("cpu", torch.bfloat16):
            scores = pupil(pixels)
        loss = F.binary_cross_entropy_with_logits(scores.float(), wanted, reduction="sum") / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            found = ((scores > 0) & (wanted > 0)).sum() / wanted.sum()
            print(
                f"sight: step {step}/{total}, loss {loss.item():.2f}, {found:.0%} of the traits seen, {elapsed:.0f} s",
                flush=True,
            )
        step += 1
    save_file({key: value.contiguous() for key, value in pupil.encoder.state_dict().items()}, args.out)


if __name__ == "__main__":
    main()
