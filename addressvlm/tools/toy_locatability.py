"""Train the models that score locatability (GeoReasoner, paper 003) in toy cities: a SegFormer, a CLIP, and clue texts.

    python -m addressvlm.tools.toy_locatability runs/clues
    python ray_jobs/locatability.py --config demo --segmentation runs/clues/segmentation --clip runs/clues/clip \\
        --clues runs/clues/clues.yaml

Both learn from cities other than the demo's: the SegFormer the class of each pixel, the CLIP texts that describe the parts of a
photo. Takes less than four minutes on two busy cores.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTImageProcessorPil,
)

from addressvlm.baselines.addressclip import contrastive_loss
from addressvlm.baselines.dual_encoder import ClipLike
from addressvlm.baselines.locatability import MIN_SHARE, LocatabilityTexts, masked_part
from addressvlm.demo.camera import CLASSES, photograph, segment
from addressvlm.demo.city import street_places, view_headings
from addressvlm.demo.world import Character, generate
from addressvlm.tools.toy_base import train_tokenizer
from addressvlm.training.optim import learning_rate

FIRST_SEED = 5000  # of the training cities; those of the demo and of the base model are smaller
PHOTOS_PER_CITY = 64
SIDE = 160  # pixels of a photo
CLIP_SIDE, CLIP_PATCH = 80, 10  # pixels
# Classes that look the same in every street, in words; for the others the indices of the traits that they show
UNINFORMATIVE = {"sky": "the sky", "yard": "the ground of a yard", "pavement": "the pavement"}
TRAITS_OF_CLASS = {"road": (0,), "tree": (2, 3), "building": (1, 4, 5)}


@dataclass(frozen=True)
class LocatabilityExample:
    """A photo of a place, the classes of its pixels, and the traits of the place."""

    photo: Image.Image
    classes: np.ndarray  # (SIDE, SIDE), indices into CLASSES
    traits: list[str]


def locatability_examples(rng: random.Random) -> Iterator[LocatabilityExample]:
    """Photos of one city after another, endlessly."""
    for seed in count(FIRST_SEED):
        world = generate(seed)
        for street, x, y in rng.choices(list(street_places(world)), k=PHOTOS_PER_CITY):
            x, y = x + rng.uniform(-1.5, 1.5), y + rng.uniform(-1.5, 1.5)
            heading = rng.choice(view_headings(street, rng))
            photo = photograph(world, x, y, heading, rng.uniform(0.8, 1.12), SIDE)
            traits = street.block_at(x, y).character.traits()
            yield LocatabilityExample(photo, segment(world, x, y, heading, SIDE), traits)


def locatability_texts() -> LocatabilityTexts:
    """Texts of what tells the streets of a toy city apart, and of what does not."""
    traits = Character.trait_values()
    return LocatabilityTexts(
        tuple(trait for indices in TRAITS_OF_CLASS.values() for index in indices for trait in traits[index]),
        tuple(UNINFORMATIVE.values()),
    )


def train_segmentation(examples: Iterator[LocatabilityExample], steps: int, batch: int) -> tuple[Any, Any]:
    """A SegFormer with a few hundred thousand parameters that segments photos into `CLASSES`, and its processor."""
    model = SegformerForSemanticSegmentation(
        SegformerConfig(
            id2label=dict(enumerate(CLASSES)), label2id={part: number for number, part in enumerate(CLASSES)},
            hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=64,
        )
    )  # fmt: skip
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})

    def loss() -> torch.Tensor:
        batch_examples = [next(examples) for _ in range(batch)]
        pixels = processor(images=[example.photo for example in batch_examples], return_tensors="pt")["pixel_values"]
        labels = torch.from_numpy(np.stack([example.classes for example in batch_examples])).long()
        logits = F.interpolate(model(pixel_values=pixels).logits, size=labels.shape[1:], mode="bilinear")
        return F.cross_entropy(logits, labels)

    _train("segmentation", model, loss, steps, 2e-3)
    return model, processor


def train_clip(examples: Iterator[LocatabilityExample], steps: int, batch: int) -> ClipLike:
    """A CLIP with a few hundred thousand parameters for the parts of photos and their descriptions."""
    texts = [*locatability_texts().clues, *locatability_texts().others]
    tokenizer = train_tokenizer(texts, 512)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)  # CLIP takes the text embedding at the end token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **ids},
        vision_config={**sizes, "image_size": CLIP_SIDE, "patch_size": CLIP_PATCH},
        projection_dim=64,
    )
    size = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    model = ClipLike(CLIPModel(config), CLIPProcessor(CLIPImageProcessorPil(size=size, do_center_crop=False), tokenizer))
    rng = random.Random(0)
    indices = {text: index for index, text in enumerate(texts)}

    def loss() -> torch.Tensor:
        pairs = [pair for _ in range(batch) for pair in _masked_parts(next(examples), rng)]
        images = model.project_images(model.image_states(model.pixels([image for image, _ in pairs])))
        descriptions = model.project_texts(model.text_states(model.tokens([text for _, text in pairs])))
        return contrastive_loss(images, descriptions, model.scale, torch.tensor([indices[text] for _, text in pairs]))

    _train("clip", model, loss, steps, 1e-3)
    return model


def _masked_parts(example: LocatabilityExample, rng: random.Random) -> Iterator[tuple[Image.Image, str]]:
    """Each class of a photo, the rest greyed out, with one of the texts that describe it."""
    for index, name in enumerate(CLASSES):
        if (example.classes == index).mean() >= MIN_SHARE:
            text = UNINFORMATIVE.get(name) or example.traits[rng.choice(TRAITS_OF_CLASS[name])]
            yield masked_part(example.photo, example.classes == index), text


def _train(name: str, model: torch.nn.Module, loss: Callable[[], torch.Tensor], steps: int, peak_learning_rate: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_learning_rate, 0.05)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"{name}: step {step + 1}/{steps}, loss {value.item():.3f}", flush=True)
    model.eval()


def train_models(out: Path, steps: int, batch: int = 16) -> None:
    """Train both models and write them and the texts to a folder."""
    torch.manual_seed(0)
    model, processor = train_segmentation(locatability_examples(random.Random(0)), steps, batch)
    clip = train_clip(locatability_examples(random.Random(1)), steps, batch)
    for name, parts in (("segmentation", (model, processor)), ("clip", (clip.model, clip.processor))):
        for part in parts:
            part.save_pretrained(out / name)
    words = {kind: list(texts) for kind, texts in asdict(locatability_texts()).items()}
    (out / "clues.yaml").write_text(yaml.safe_dump(words), encoding="utf-8")
    print(f"written: {out}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="of each model (default: 300)")
    args = parser.parse_args()
    train_models(args.out, args.steps)


if __name__ == "__main__":
    main()
