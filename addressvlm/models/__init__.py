"""Base models: loading, their three parts, LoRA, attention for packed rows, model cards."""

from addressvlm.models.loading import load_model

__all__ = ["load_model"]
