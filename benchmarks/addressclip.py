"""AddressCLIP's training loop against open_clip's own, `train_one_epoch`, on the same photos and texts in turn.

    pip install open_clip_torch
    python benchmarks/addressclip.py

Both sides train the same architecture from random weights: transformers' CLIPModel here, open_clip's CLIP there. Photos are
JPEGs in memory, which both decode and scale; texts are addresses, all different, cut into tokens by CLIP's own vocabulary. Only
the contrastive loss of photos and addresses is on, so that both do the same work: texts are as long on both sides (--context
gives open_clip its usual 77 tokens, padding included). Seconds of processor time count.
"""

import argparse
import io
import math
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from open_clip import CLIP, ClipLoss, image_transform
from open_clip.tokenizer import SimpleTokenizer
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.utils import logging

from addressvlm.baselines import addressclip
from addressvlm.baselines.addressclip_data import Captions, ClipData
from addressvlm.baselines.dual_encoder import build_dual_encoder
from addressvlm.config import Config
from addressvlm.config.compare import AddressClipConfig
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.models.loading import autocast
from addressvlm.training.metrics_logger import StepClock

WARM = 1  # steps that are not timed
RATE, WARMUP, CLIP_NORM, PHOTO = 1e-4, 0.05, 1.0, (480, 360)
MARKS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


class Clock:
    """Processor seconds between ticks."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def tick(self) -> None:
        self.ticks.append(time.process_time())

    @property
    def seconds(self) -> float:
        """Of a step."""
        return statistics.median(np.diff(self.ticks)[WARM:])


class Photos:
    """Training rows in memory, in their own order."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.rows = [{"id": str(n), "image": {"bytes": jpeg(rng), "path": None}, **where(n)} for n in range(count)]
        self.starts, self.group_count = np.array([0, count]), 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def prefetch(self, indices: Any, keep: int) -> None:
        """They are here."""

    def epoch(self, seed: int, epoch: int, window: int = 1) -> np.ndarray:
        return np.arange(len(self))


def jpeg(rng: np.random.Generator) -> bytes:
    """A photo of large coloured patches."""
    patches = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    file = io.BytesIO()
    patches.resize(PHOTO).save(file, "JPEG")
    return file.getvalue()


def where(number: int) -> dict[str, Any]:
    return {"street": f"{number} Harbour Street North", "district": f"District {number % 9}", "lat": None, "lon": None}


class Bench:
    """Photos, a model's folder and how much is trained."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.steps, self.batch, self.folder, self.side = args.steps, args.batch, folder, args.side
        self.photos = Photos(args.batch * args.steps)
        tokenizer = SimpleTokenizer()
        self.texts = [Address(row["street"], row["district"]).text() for row in self.photos.rows]
        longest = max(len(tokenizer.encode(text)) for text in self.texts) + 2
        self.context = args.context or longest
        self.tokenizer = SimpleTokenizer(context_length=self.context)
        self.vision = {"width": args.width, "layers": args.layers, "patch_size": args.patch, "image_size": args.side}
        self.text = {"width": args.width, "layers": args.layers, "vocab_size": self.tokenizer.vocab_size}
        self._write()

    def _write(self) -> None:
        """The model of this repository's side."""
        width, layers, heads = self.vision["width"], self.vision["layers"], self.vision["width"] // 64
        same = {
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "hidden_act": "gelu",
        }  # fmt: skip
        image = {**same, "image_size": self.side, "patch_size": self.vision["patch_size"]}
        words = {**same, "vocab_size": self.tokenizer.vocab_size, "max_position_embeddings": self.context}
        CLIPModel(CLIPConfig(text_config=words, vision_config=image, projection_dim=width)).save_pretrained(self.folder)
        merges = list(self.tokenizer.bpe_ranks)
        names = CLIPTokenizer(vocab={MARKS.get(k, k): n for k, n in self.tokenizer.encoder.items()}, merges=merges)
        size = {"height": self.side, "width": self.side}
        CLIPProcessor(CLIPImageProcessorPil(size=size, do_center_crop=False), names).save_pretrained(self.folder)

    def ours(self, seed: int) -> tuple[Clock, float, int]:
        """Clock, last loss and number of parameters."""
        encoder = build_dual_encoder(str(self.folder), "", "float32", seed)
        system = AddressClipConfig.model_validate(
            {
                "name": "bench", "kind": "addressclip", "captions": "none", "weights": {"caption": 0, "geography": 0},
                "batch_size": self.batch, "max_steps": self.steps, "learning_rate": RATE, "projection_learning_rate": RATE,
                "warmup": WARMUP,
            }
        )  # fmt: skip
        data = ClipData(self.photos, self.batch, seed, Captions("none"), encoder)
        stage, context = (
            addressclip.clip_stage(Config(), system, data),
            autocast(torch.device("cpu"), torch.float32, "float32"),
        )
        towers = addressclip.DualEncoderTowers(encoder, system, data)
        learner = addressclip.ClipLearner(towers, data.batch(0, most=2), CLIP_NORM, context)
        clock, loss, steps = Clock(), math.nan, StepClock(torch.device("cpu"))
        for number, batch in data.batches(0, self.steps, 0, 1):
            clock.tick()
            loss = addressclip.clip_step(learner, stage, number, batch, (0, 1), context, steps).loss
        clock.tick()
        return clock, loss, sum(p.numel() for p in learner.trainable.values())

    def open_clip(self, seed: int) -> tuple[Clock, float, int]:
        """Clock, last loss and number of parameters."""
        torch.manual_seed(seed)
        words = {**self.text, "context_length": self.context, "heads": self.text["width"] // 64}
        model: Any = CLIP(self.vision["width"], {**self.vision, "head_width": 64}, words, output_dict=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=addressclip.BETAS, weight_decay=0.0)
        cosine = cosine_lr(optimizer, RATE, max(1, round(WARMUP * self.steps)), self.steps)
        scale, losses, clock = image_transform(self.side, is_train=False), Losses(), Clock()

        def example(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            photo = Image.open(io.BytesIO(self.photos[number]["image"]["bytes"]))
            return scale(photo), self.tokenizer(self.texts[number])[0]

        loader: Any = DataLoader(Examples(example, len(self.photos)), batch_size=self.batch)
        loader.num_batches, loader.num_samples = self.steps, len(self.photos)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        settings = SimpleNamespace(
            device="cpu", precision="fp32", distill=False, skip_scheduler=False, accum_freq=1, grad_clip_norm=CLIP_NORM,
            horovod=False, log_every_n_steps=100, rank=0, log_local=False, batch_size=self.batch, world_size=1, wandb=False,
        )  # fmt: skip

        def schedule(step: int) -> None:
            clock.tick()
            cosine(step)

        train_one_epoch(model, data, losses, 0, optimizer, None, schedule, None, settings)
        clock.tick()
        return clock, losses.last, sum(p.numel() for p in model.parameters())


class Examples(torch.utils.data.Dataset):
    """Photos and tokens that are made when they are wanted."""

    def __init__(self, example: Any, count: int) -> None:
        self.example, self.count = example, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        made: tuple[torch.Tensor, torch.Tensor] = self.example(number)
        return made


class Losses(ClipLoss):
    """open_clip's loss, which remembers the last one."""

    last = math.nan

    def forward(self, *args: Any, **given: Any) -> Any:
        found = super().forward(*args, **given)
        self.last = float(found["contrastive_loss"].detach())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="photos")
    parser.add_argument("--width", type=int, default=384, help="of both encoders, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="of each encoder")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--side", type=int, default=160, help="pixels of a photo as the encoder sees it")
    parser.add_argument("--context", type=int, help="tokens of a text (default: as many as the longest address has)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pace: dict[str, list[float]] = {"ours": [], "open_clip": []}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for number in range(args.rounds):
            for side in sorted(pace, reverse=bool(number % 2)):  # each is the first of a round in turn
                clock, loss, parameters = getattr(bench, side)(number)
                pace[side].append(args.batch / clock.seconds)
                print(
                    f"round {number} {side:9} {pace[side][-1]:.3f} samples/s, {parameters:,} parameters, last loss {loss:.3f}"
                )
    ratios = [ours / theirs for ours, theirs in zip(pace["ours"], pace["open_clip"], strict=True)]
    medians = ", ".join(f"{side} {statistics.median(found):.3f}" for side, found in pace.items())
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"samples a processor second: {medians}; ours is {statistics.median(ratios):.2f} x ({spread} over the rounds)")


if __name__ == "__main__":
    main()
