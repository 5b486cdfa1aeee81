"""Alignment labels (paper 001, Sec. 3.2): why a photo matches its address, as text to learn from."""

from collections.abc import Callable
from functools import partial

from addressvlm.addresses import Gazetteer
from addressvlm.config_labels import LabelsConfig
from addressvlm.labels.attempts import Attempts
from addressvlm.labels.checks import checker_of
from addressvlm.labels.prompt import prompt_of
from addressvlm.labels.writer import Label, Labeler, Request, TemplateLabeler

__all__ = ["Label", "Labeler", "Request", "beginning", "make_labeler"]


def beginning(config: LabelsConfig, seed: int = 0, gazetteer: Gazetteer | None = None) -> Callable[[Request], Attempts]:
    """What begins the way of a row to its label; without a gazetteer the checks know fewer names.

    Raises:
        InputError: the prompt can't be used.
    """
    prompt = prompt_of(config)
    return partial(Attempts, prompt=prompt, checker=checker_of(config, prompt, gazetteer), config=config, seed=seed)


def make_labeler(config: LabelsConfig, seed: int = 0, gazetteer: Gazetteer | None = None) -> Labeler:
    """The labeler that the settings name; the checks know the names of the gazetteer.

    Raises:
        InputError: it can't be used as configured.
    """
    if config.labeler == "openai":
        from addressvlm.labels.openai_labeler import OpenAILabeler

        return OpenAILabeler(config, beginning(config, seed, gazetteer))
    if config.labeler == "local":
        from addressvlm.labels.local_labeler import LocalLabeler

        return LocalLabeler(beginning(config, seed, gazetteer), config)
    return TemplateLabeler(prompt_of(config), seed)
