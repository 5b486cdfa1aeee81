"""Make what GeoReasoner's locatability needs in the toy cities: a SegFormer, a CLIP and texts that name clues.

    python -m addressvlm.tools.toy_locatability runs/clues
    python ray_jobs/locatability.py --config demo --segmentation runs/clues/segmentation --clip runs/clues/clip \\
        --clues runs/clues/clues.yaml

Both models learn from cities that are no one's demo: the first which part of a photo is what, the second what a part looks
like in words. Less than four minutes on two cores with other work beside it.
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
from addressvlm.baselines.locatability import LEAST_SHARE, LocatabilityTexts, masked_part
from addressvlm.demo.camera import CLASSES, photograph, segment
from addressvlm.demo.city import street_places, view_headings
from addressvlm.demo.world import Character, Street, World, district_at, generate
from addressvlm.tools.toy_base import train_tokenizer
from addressvlm.training.loss import learning_rate

FIRST_CITY = 5000  # seeds of the cities to learn from; those of the demo and of the base model are smaller
PER_CITY = 64  # photos
SIDE = 160  # pixels of a photo
CLIP_SIDE, CLIP_PATCH = 80, 10  # pixels
# Parts that tell no street from another, in words; of the others which of the traits of a place they show
NOTHING = {"sky": "the sky", "yard": "the ground of a yard", "pavement": "the pavement"}
SEEN_AS = {"road": (0,), "tree": (1, 6), "building": (2, 3, 4, 5)}


@dataclass(frozen=True)
class LocatabilityExample:
    """A photo of a place, what its pixels show, and what the place is like."""

    photo: Image.Image
    classes: np.ndarray  # (SIDE, SIDE), indices into PARTS
    traits: list[str]


def locatability_examples(rng: random.Random) -> Iterator[LocatabilityExample]:
    """Photos of one city after another, without end."""
    for seed in count(FIRST_CITY):
        world = generate(seed)
        for street, x, y in rng.choices(list(street_places(world)), k=PER_CITY):
            yield _lesson(world, street, x + rng.uniform(-1.5, 1.5), y + rng.uniform(-1.5, 1.5), rng)


def _lesson(world: World, street: Street, x: float, y: float, rng: random.Random) -> LocatabilityExample:
    heading = rng.choice(view_headings(street, rng))
    photo = photograph(world, x, y, heading, rng.uniform(0.8, 1.12), SIDE)
    traits = street.character.traits(district_at(world, x, y).character)
    return LocatabilityExample(photo, segment(world, x, y, heading, SIDE), traits)


def texts() -> LocatabilityTexts:
    """What tells streets of a toy city apart in words, and what does not."""
    traits = Character.kinds()
    return LocatabilityTexts(
        tuple(trait for shown in SEEN_AS.values() for kind in shown for trait in traits[kind]), tuple(NOTHING.values())
    )


def segmentation(examples: Iterator[LocatabilityExample], steps: int, batch: int) -> tuple[Any, Any]:
    """A SegFormer of some hundred thousand parameters that tells `CLASSES` apart, and its processor."""
    model = SegformerForSemanticSegmentation(
        SegformerConfig(
            id2label=dict(enumerate(CLASSES)), label2id={part: number for number, part in enumerate(CLASSES)},
            hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=64,
        )
    )  # fmt: skip
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})

    def loss() -> torch.Tensor:
        shown = [next(examples) for _ in range(batch)]
        pixels = processor(images=[one.photo for one in shown], return_tensors="pt")["pixel_values"]
        wanted = torch.from_numpy(np.stack([one.classes for one in shown])).long()
        logits = F.interpolate(model(pixel_values=pixels).logits, size=wanted.shape[1:], mode="bilinear")
        return F.cross_entropy(logits, wanted)

    _learn("segmentation", model, loss, steps, 2e-3)
    return model, processor


def clip(examples: Iterator[LocatabilityExample], steps: int, batch: int) -> ClipLike:
    """A CLIP of some hundred thousand parameters that puts parts of photos into words."""
    words = [*texts().clues, *texts().others]
    tokenizer = train_tokenizer(words, 512)
    ending = (tokenizer.eos_token, tokenizer.eos_token_id)  # a CLIP's text is what stands at its end
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {ending[0]}", special_tokens=[ending])
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
    names = {text: number for number, text in enumerate(words)}

    def loss() -> torch.Tensor:
        pairs = [pair for _ in range(batch) for pair in _described(next(examples), rng)]
        images = model.project_images(model.image_states(model.pixels([image for image, _ in pairs])))
        said = model.project_texts(model.text_states(model.tokens([text for _, text in pairs])))
        return contrastive_loss(images, said, model.scale, torch.tensor([names[text] for _, text in pairs]))

    _learn("clip", model, loss, steps, 1e-3)
    return model


def _described(lesson: LocatabilityExample, rng: random.Random) -> Iterator[tuple[Image.Image, str]]:
    """Each part of a photo, all else greyed out, with one of the texts that fit it."""
    for number, part in enumerate(CLASSES):
        if (lesson.classes == number).mean() >= LEAST_SHARE:
            text = NOTHING.get(part) or lesson.traits[rng.choice(SEEN_AS[part])]
            yield masked_part(lesson.photo, lesson.classes == number), text


def _learn(name: str, model: torch.nn.Module, loss: Callable[[], torch.Tensor], steps: int, highest: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, highest, 0.05)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            print(f"clues: {name}, step {step + 1}/{steps}, loss {value.item():.3f}", flush=True)
    model.eval()


def make(out: Path, steps: int, batch: int = 16) -> None:
    """Train both models for so many steps and write them, and the texts, into the folder."""
    torch.manual_seed(0)
    model, processor = segmentation(locatability_examples(random.Random(0)), steps, batch)
    looking = clip(locatability_examples(random.Random(1)), steps, batch)
    for name, parts_of_it in (("segmentation", (model, processor)), ("clip", (looking.model, looking.processor))):
        for part in parts_of_it:
            part.save_pretrained(out / name)
    words = {kind: list(said) for kind, said in asdict(texts()).items()}
    (out / "clues.yaml").write_text(yaml.safe_dump(words), encoding="utf-8")
    print(f"clues: {out}", flush=True)


def main() -> None:
    """Train both and write them with the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="of each model (default: 300)")
    args = parser.parse_args()
    make(args.out, args.steps)


if __name__ == "__main__":
    main()
