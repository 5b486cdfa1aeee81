"""The section `labels` of the configuration tree: who writes the alignment labels (see addressvlm/config.py)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from addressvlm.config_city import Strict


class LabelsConfig(Strict):
    """Who writes the alignment labels (paper 001, Sec. 3.2)."""

    labeler: Literal["template", "openai"] = "template"
    ask_address: bool = False  # begin each conversation about a grafted image with a stage 2 question for the address
    model: str = "gpt-4o-mini"  # for `openai`: the model's name at the endpoint; the key is in OPENAI_API_KEY
    base_url: str | None = None  # for `openai`: any compatible endpoint
    concurrency: int = Field(16, ge=1)  # requests in flight
    attempts: int = Field(3, ge=1)  # asks per row before falling back to a template marked as such
    timeout_s: float = Field(60.0, gt=0)  # of one request, in seconds
    retries: int = Field(5, ge=0)  # of a request that fails for now (429, 5xx, time-out); waits as long as the endpoint says
    max_tokens: int = Field(256, ge=16)
