"""Base models: load them, name their three parts, attach LoRA, save and merge."""

from addressvlm.models.base import load

__all__ = ["load"]
