"""Alignment labels (paper 001, Sec. 3.2): why a photo matches its address, as text to learn from."""

from collections.abc import Sequence

from addressvlm.config_labels import LabelsConfig
from addressvlm.labels.writer import Label, Labeler, Request, TemplateLabeler

__all__ = ["Label", "Labeler", "Request", "make_labeler"]


def make_labeler(config: LabelsConfig, seed: int = 0, streets: Sequence[str] = ()) -> Labeler:
    """The labeler that the settings name; `streets` are those of the city, which no label may conclude on by mistake.

    Raises:
        InputError: it can't be used as configured.
    """
    if config.labeler == "openai":
        from addressvlm.labels.openai_labeler import OpenAILabeler

        return OpenAILabeler(config, seed, streets)
    return TemplateLabeler(seed)
