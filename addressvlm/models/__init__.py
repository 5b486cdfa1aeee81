"""Base models: load them, name their three parts, attach LoRA, save and merge."""

from addressvlm.models.loading import load_model

__all__ = ["load_model"]
