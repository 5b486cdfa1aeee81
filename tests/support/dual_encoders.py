"""Tiny random dual encoders, and a run that they can learn from: coloured squares, each colour a street in its own corner."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from addressvlm.config import Config
from addressvlm.config.compare import AddressClipConfig
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.tools.toy_base import train_tokenizer
from tests.support.tiny import TEXT
from tests.support.training_tables import STREETS, table_rows, trained_config

SIDE = 32
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_clip(folder: Path, kind: str = "clip") -> Path:
    """Write a CLIP or SigLIP of a few thousand parameters and return its folder."""
    tokenizer = train_tokenizer(TEXT, 330)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **ids}
    vision = {**SIZES, "image_size": SIDE, "patch_size": 8}
    size = {"height": SIDE, "width": SIDE}
    torch.manual_seed(0)
    if kind == "siglip":
        model: Any = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor: Any = SiglipProcessor(SiglipImageProcessorPil(size=size), tokenizer)
    else:
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        processor = CLIPProcessor(CLIPImageProcessorPil(size=size, do_center_crop=False), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def photo_run(folder: Path, base: Path, rows: int = 24, **train: Any) -> Config:
    """A run with training, validation and test photos, and explanations of the training photos."""
    config = trained_config(folder, base, rows, **train)
    run, corner = Run(config), {street: number for number, street in enumerate(STREETS)}
    addresses = [Address(street, "Harbour") for street in STREETS]
    streets = [addresses[number % len(addresses)].street for number in range(rows)]
    placed = [
        row | {"lat": 52.0 + corner[street] / 100, "lon": corner[street] / 50, "street": street, "district": "Harbour"}
        for row, street in zip(table_rows(rows), streets, strict=True)
    ]
    names = ("id", "place", "lat", "lon", "image", "street", "district", "rounds")
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(name) for name in names]))
    for split, count in (("train", rows), ("val", 3), ("test", 3)):
        own = [row | {"id": f"{split}{row['id']}"} for row in placed[:count]]
        tables.write_table(run.photos, split, own, schema)
    explained = [row | {"id": f"train{row['id']}"} for row in placed[1:]]
    tables.write_table(run.alignment, "train", explained, schema)
    Gazetteer(addresses, city="Toytown").save(run.gazetteer)
    return config


def addressclip_config(**settings: Any) -> AddressClipConfig:
    """AddressCLIP's settings for a tiny model."""
    settings = {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "projection_learning_rate": 1e-2, **settings}
    return AddressClipConfig(name="AddressCLIP", kind="addressclip", **settings)
