"""The whole chain at paper 001's size without a GPU: CLIP ViT-L/14-336, MLP, Phi-3-mini, 4.1 billion random parameters.

    python benchmarks/full_size.py /data/full                       # 17 GB of disk, 24 GB of memory, 10 minutes
    python benchmarks/full_size.py /tmp/small --shrink 8            # the same with an eighth of layers and widths
    python benchmarks/full_size.py full-size --base                 # the base alone, for benchmarks/training.py and gpu_step.py

Each phase is a process of its own: write the base, train both stages for a few steps of one row, which also merges, load the
merged model and score one photo. Printed are seconds and the most memory of each. Tokenizer and processor are those of the
built-in toy base, whose short words make rows longer than Phi-3's tokenizer does.
"""

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from addressvlm.config import Config, load
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import Localizer
from addressvlm.models import load_model
from addressvlm.models.loading import TOY_BASE
from addressvlm.questions import training_rounds
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training.memory_estimate import print_estimate
from addressvlm.training.trainer import train_system

SIDE, PATCH = 336, 14  # pixels
SYSTEM = "AddressVLM"
PHASES = ("base", "train", "score")
GIB = 2**30
CITY = Gazetteer([Address(street, "Oakland") for street in ("Forbes Avenue", "Mill Street", "Oak Lane")], city="Full size")


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


def processor_of_full_size(folder: Path) -> Any:
    """Tokenizer and processor for the shape, written into a folder."""
    shutil.copytree(TOY_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md", "config.json"))
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["patch_size"] = PATCH
    processor["image_processor"] |= {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return AutoProcessor.from_pretrained(folder, backend="pil")


def write_base(folder: Path, shrink: int) -> int:
    """Write the base; returns its number of parameters."""
    processor_of_full_size(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        image_token = load_model(str(TOY_BASE))[0].config.image_token_id
        model = LlavaForConditionalGeneration._from_config(shape(image_token, shrink), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model.num_parameters()


def config_of(folder: Path, steps: int) -> Config:
    """The settings of paper-pitts on one CPU worker, a few steps of one row."""
    config = load("paper-pitts", [f"storage={folder}/runs", "name=full-size", f"model.base={folder / 'base'}"])
    train = config.train
    train.workers, train.cpus_per_worker, train.gpus_per_worker, train.validate_every = 1, 1, 0, None
    train.gpu_memory_gib, train.checkpoint_activations = None, True
    for stage in train.stages.values():
        stage.batch_size, stage.gradient_accumulation_steps, stage.max_steps = 1, 1, steps
    return config


def write_tables(config: Config, photos: int = 4) -> None:
    """Photos with questions, as both stages' tables."""
    rng, rows = random.Random(0), []
    for number in range(photos):
        file = io.BytesIO()
        Image.effect_noise((640, 480), 60 + number % 9).convert("RGB").save(file, "JPEG")
        rounds = training_rounds(CITY.addresses[number % 3], CITY, rng, 7)
        rows.append({"id": str(number), "image": {"bytes": file.getvalue(), "path": None}, "rounds": rounds})
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in ("id", "image", "rounds")]))
    for table in (Run(config).photos, Run(config).alignment):
        tables.write_table(table, "train", rows, schema)
    CITY.save(Run(config).gazetteer)


def run_phase(phase: str, folder: Path, shrink: int, steps: int) -> None:
    """What each process does."""
    config = config_of(folder, steps)
    if phase == "base":
        print(f"{write_base(folder / 'base', shrink):,} parameters", flush=True)
    elif phase == "train":
        write_tables(config)
        print_estimate(config, [s for s in config.train.systems if s.name == SYSTEM])
        train_system(config, SYSTEM, None, lambda metrics, checkpoint: None)
    else:
        scores = Localizer(str(Run(config).model_dir(SYSTEM) / "merged"), "cpu").address_scores([Image.new("RGB", (640, 480))])
        print(f"scores of {scores.shape[1]} addresses: {', '.join(f'{score:.2f}' for score in scores[0])}", flush=True)


def chain(folder: Path, shrink: int, steps: int) -> None:
    """All phases, and their seconds and memory as a table."""
    rows = []
    for phase in PHASES:
        arguments = [str(folder), "--phase", phase, "--shrink", str(shrink), "--steps", str(steps)]
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, __file__, *arguments])
        _, status, used = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{phase} failed")
        rows.append((phase, time.monotonic() - began, used.ru_maxrss * 1024 / GIB))
    print("| phase | seconds | most memory, GiB |\n|---|---:|---:|")
    for phase, seconds, memory in rows:
        print(f"| {phase} | {seconds:.0f} | {memory:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shrink", type=int, default=1, help="divide layers and widths")
    parser.add_argument("--steps", type=int, default=2, help="of each stage")
    parser.add_argument("--base", action="store_true", help="write the base alone into the folder")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.base:
        print(f"{args.folder}: {write_base(args.folder, args.shrink):,} parameters")
    elif args.phase:
        run_phase(args.phase, args.folder, args.shrink, args.steps)
    else:
        chain(args.folder.absolute(), args.shrink, args.steps)


if __name__ == "__main__":
    main()
