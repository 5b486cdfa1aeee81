"""The section `evaluate` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from addressvlm.config.base import Section


class EvaluateConfig(Section):
    """Answers to the questions about test photos, and their metrics; its workers also serve the other jobs with a model."""

    workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    batch_size: int = Field(64, ge=1)  # questions at a time
    max_new_tokens: int = Field(24, ge=1)
    temperature: float = Field(0.0, ge=0)  # of free answers; 0 is greedy; paper 001 uses 0.1
    # free: the model's own words, as in paper 001; constrained: only the city's names are possible; likelihood: all answers
    # follow from the probabilities of all addresses
    answers: Literal["free", "constrained", "likelihood"] = "free"
    # What the model sees. grafts: each photo on the tile of its true place, which gives the place away: for ablations only
    # (docs/comparison.md)
    images: Literal["photos", "grafts"] = "photos"
    max_photos: int | None = Field(None, ge=1)  # evaluate only so many, drawn by seed
    bootstrap: int = Field(1000, ge=100)  # resamples of places for the 95 % intervals
    calibration_photos: int = Field(256, ge=0)  # of the split `val`, to calibrate probabilities on; 0: no calibration
    # accuracy of the answers that are not "don't know"; the confidence below which it is "don't know" is fitted to it
    target_precision: float = Field(0.8, gt=0, lt=1)
