"""The section `labels` of the configuration tree: who writes the alignment labels (see addressvlm/config.py)."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from addressvlm.config.base import Section


class LabelsConfig(Section):
    """Who writes the alignment labels (paper 001, Sec. 3.2)."""

    # template: no model; openai: a compatible endpoint; local: a Hugging Face model; vllm: a server that the job starts
    labeler: Literal["template", "openai", "local", "vllm"] = "template"
    prompt: str = "alignment"  # what is asked: alignment, grounded, grounded_small, reasoning, or the path of a prompt file
    send_image: bool = True  # off: the model reads only the facts, so it may be a text-only one
    image_pixels: int | None = Field(None, ge=32)  # longer side of the image that is sent; default: as grafted
    image_quality: int | None = Field(None, ge=30, le=100)  # JPEG quality of the image that is sent; default: as grafted
    image_detail: Literal["low", "high", "auto"] = "auto"  # how closely the endpoint looks, which has its price
    language: str = Field("en", pattern="^[a-z]{2}$")  # of the labels, ISO 639-1; templates are in English
    words: tuple[int, int] = (15, 150)  # a label's length, least and most
    distance_tolerance: float = Field(0.25, ge=0)  # share by which a distance may differ from the measured one, or 10 m
    ask_address: bool = False  # begin each conversation about a grafted image with a stage 2 question for the address
    model: str = "gpt-4o-mini"  # its name at the endpoint (the key is in OPENAI_API_KEY), or a folder or hub name
    base_url: str | None = None  # for `openai`: any compatible endpoint
    concurrency: int = Field(16, ge=1)  # requests in flight
    max_attempts: int = Field(3, ge=1)  # asks per row before falling back to a template marked as such
    timeout_s: float = Field(60.0, gt=0)  # of one request, in seconds
    retries: int = Field(5, ge=0)  # of a request that fails for now (429, 5xx, time-out); waits as long as the endpoint says
    max_tokens: int = Field(256, ge=16)
    extra_body: dict[str, Any] = {}  # further fields of a request to the endpoint; null takes one of ours out
    requests_per_minute: float | None = Field(None, gt=0)  # the endpoint's limits, for the whole job; default: none
    tokens_per_minute: float | None = Field(None, gt=0)
    budget_tokens: int | None = Field(None, ge=1)  # the job stops before a run has cost more than this, answers are kept
    budget_usd: float | None = Field(None, gt=0)
    usd_per_million_in: float | None = Field(None, ge=0)  # price of a million tokens sent, of which an image is some
    usd_per_million_out: float | None = Field(None, ge=0)  # and of a million tokens written
    # How the endpoint counts an image, for estimates (those of gpt-4o-mini; 85 and 170 are gpt-4o's): tiles: a base and so many
    # a tile of 512 pixels, in low detail only the base; patches: so many a patch of 32 pixels; fixed: the base
    image_rule: Literal["tiles", "patches", "fixed"] = "tiles"
    image_base: int = Field(2833, ge=0)
    image_each: float = Field(5667.0, ge=0)
    workers: int = Field(1, ge=1)  # for `local`: copies of the model
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)  # for `local` and for the server of `vllm`, which needs all of `tensor_parallel`
    temperature: float = Field(0.0, ge=0)  # 0 is greedy; a text that failed is asked again with the reason
    batch_size: int = Field(8, ge=1)  # for `local`: rows at a time
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # for `local` and `vllm`; auto: bfloat16 where the processor is made for it
    )
    tensor_parallel: int = Field(1, ge=1)  # for `vllm`: GPUs that share the model
    vllm_python: str | None = None  # interpreter that has vLLM, default: this one
    vllm_arguments: list[str] = []  # further arguments of its server, such as --gpu-memory-utilization=0.8
    vllm_start_s: float = Field(900.0, gt=0)  # how long it may take to load the model

    @model_validator(mode="after")
    def _fits_together(self) -> LabelsConfig:
        if self.budget_usd is not None and (self.usd_per_million_in is None or self.usd_per_million_out is None):
            raise ValueError("budget_usd needs the prices usd_per_million_in and usd_per_million_out")
        if self.base_url and "@" in urlsplit(self.base_url).netloc:
            raise ValueError("base_url holds a name or password: keys come from OPENAI_API_KEY alone")
        if self.labeler == "vllm" and self.tensor_parallel > 1 and self.gpus_per_worker < self.tensor_parallel:
            raise ValueError(
                f"gpus_per_worker is {self.gpus_per_worker:g} and the server of vllm shares its model among "
                f"{self.tensor_parallel} GPUs: set gpus_per_worker to tensor_parallel"
            )
        return self
