"""The section `labels`: who writes the alignment labels, and within which limits."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from addressvlm.config.base import Section


class LabelsConfig(Section):
    """Who writes the alignment labels (paper 001, Sec. 3.2)."""

    # template: no model; openai: a compatible endpoint; local: a Hugging Face model; vllm: a server that the job starts
    labeler: Literal["template", "openai", "local", "vllm"] = "template"
    prompt: str = "alignment"  # alignment, grounded, grounded_small, reasoning, or the path of a prompt file
    send_image: bool = True  # false: the model reads only the facts, so it may be a text-only one
    image_pixels: int | None = Field(None, ge=32)  # longer side of the image that is sent; default: as grafted
    image_quality: int | None = Field(None, ge=30, le=100)  # JPEG quality of the image that is sent; default: as grafted
    image_detail: Literal["low", "high", "auto"] = "auto"  # OpenAI's detail of an image, which changes its price
    language: str = Field("en", pattern="^[a-z]{2}$")  # of the labels, ISO 639-1; templates are in English
    words: tuple[int, int] = (15, 150)  # minimum and maximum length of a label
    distance_tolerance: float = Field(0.25, ge=0)  # share by which a distance may differ from the measured one, or 10 m
    ask_address: bool = False  # begin each conversation about a grafted image with a stage 2 question for the address
    model: str = "gpt-4o-mini"  # its name at the endpoint (the key is in OPENAI_API_KEY), or a folder or hub name
    base_url: str | None = None  # for `openai`: any compatible endpoint
    concurrency: int = Field(16, ge=1)  # requests in flight, of all workers together
    max_attempts: int = Field(3, ge=1)  # answers per row before the template is used and marked as fallback
    timeout_s: float = Field(60.0, gt=0)  # of a request, in seconds
    retries: int = Field(5, ge=0)  # of a transient error (429, 5xx, time-out), after the wait that the endpoint asks for
    max_tokens: int = Field(256, ge=16)
    extra_body: dict[str, Any] = {}  # further fields of a request to the endpoint; null removes one of the defaults
    requests_per_minute: float | None = Field(None, gt=0)  # the endpoint's rate limits, for the whole job; default: none
    tokens_per_minute: float | None = Field(None, gt=0)
    budget_tokens: int | None = Field(None, ge=1)  # the job stops before the run costs more; all answers are saved
    budget_usd: float | None = Field(None, gt=0)
    usd_per_million_in: float | None = Field(None, ge=0)  # price of a million input tokens, images included
    usd_per_million_out: float | None = Field(None, ge=0)  # and of a million output tokens
    # How the endpoint counts an image, for estimates. tiles: image_base + image_each per tile of 512 pixels, in low detail only
    # image_base (the defaults are gpt-4o-mini's; gpt-4o: 85 and 170); patches: image_each per patch of 32 pixels; fixed:
    # image_base
    image_rule: Literal["tiles", "patches", "fixed"] = "tiles"
    image_base: int = Field(2833, ge=0)
    image_each: float = Field(5667.0, ge=0)
    workers: int = Field(1, ge=1)  # `local`: copies of the model; `openai`: labelling tasks; `vllm`: servers
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)  # for `local` and the server of `vllm`, which needs all of `tensor_parallel`
    temperature: float = Field(0.0, ge=0)  # 0 is greedy
    batch_size: int = Field(8, ge=1)  # for `local`: rows at a time
    # for `local` and `vllm`; auto: bfloat16 where the hardware supports it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
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
                f"gpus_per_worker is {self.gpus_per_worker:g} and the vLLM server shares its model among "
                f"{self.tensor_parallel} GPUs: set gpus_per_worker to tensor_parallel"
            )
        return self
