"""The section `evaluate` of the configuration tree (see addressvlm/config.py)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from addressvlm.config.base import Section


class EvaluateConfig(Section):
    """Answers on the test split and what is computed from them."""

    workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    batch_size: int = Field(64, ge=1)  # questions at a time
    max_new_tokens: int = Field(24, ge=1)
    temperature: float = Field(0.0, ge=0)  # of free answers; 0 is greedy; paper 001 uses 0.1
    # free: the model's own words, as in paper 001; constrained: only the city's names can be said; scored: all three kinds of
    # questions follow from the probabilities of all addresses
    answers: Literal["free", "constrained", "likelihood"] = "free"
    # What the model is shown. grafts: each photo on the tile of its true place, which tells where that is: for ablations only
    # (docs/comparison.md)
    images: Literal["photos", "grafts"] = "photos"
    max_photos: int | None = Field(None, ge=1)  # score only this many, drawn by seed
    bootstrap: int = Field(1000, ge=100)  # resamples of places for the 95 % intervals
    calibration_photos: int = Field(256, ge=0)  # photos of the split `val` that probabilities are calibrated on; 0: do without
    target_precision: float = Field(0.8, gt=0, lt=1)  # share of answers to be right; below that confidence it is "don't know"
