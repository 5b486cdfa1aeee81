"""Alignment labels (paper 001, Sec. 3.2): why a photo matches its address, as text to learn from."""

from collections.abc import Callable
from functools import partial

from addressvlm.config.labels import LabelsConfig
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.labels.labelers import Label, Labeler, Request, TemplateLabeler
from addressvlm.labels.prompt import prompt_of
from addressvlm.labels.retry import RetryState
from addressvlm.labels.validator import make_validator

__all__ = ["Label", "Labeler", "Request", "beginning", "make_labeler"]


def beginning(config: LabelsConfig, seed: int = 0, gazetteer: Gazetteer | None = None) -> Callable[[Request], RetryState]:
    """What begins the way of a row to its label; without a gazetteer the checks know fewer names.

    Raises:
        InputError: the prompt can't be used.
    """
    prompt = prompt_of(config)
    return partial(RetryState, prompt=prompt, checker=make_validator(config, prompt, gazetteer), config=config, seed=seed)


def make_labeler(config: LabelsConfig, seed: int = 0, gazetteer: Gazetteer | None = None) -> Labeler:
    """The labeler that the settings name; the checks know the names of the gazetteer.

    Raises:
        InputError: it can't be used as configured.
    """
    if config.labeler == "openai":
        from addressvlm.labels.request_scheduler import OpenAILabeler

        return OpenAILabeler(config, beginning(config, seed, gazetteer))
    if config.labeler == "local":
        from addressvlm.labels.local_labeler import LocalLabeler

        return LocalLabeler(beginning(config, seed, gazetteer), config)
    return TemplateLabeler(prompt_of(config), seed)
