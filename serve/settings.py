"""What `serve run serve.config key=value …` and `serve deploy` understand."""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self

import click
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from addressvlm import InputError

_DOMAIN = re.compile(r"\.?([a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.)*[a-z]([a-z0-9-]*[a-z0-9])?(:\d{1,5})?")
_ORIGIN = re.compile(r"https?://[^/\s]+")


class SettingsError(InputError, click.ClickException):
    """An InputError that `serve run` prints as one line, without a traceback."""


def _default_storage() -> str:
    return os.environ.get("ADDRESSVLM_STORAGE", "runs")


def _listed(value: Any) -> Any:
    """A list on the command line is text with commas."""
    return [item for item in (part.strip() for part in value.split(",")) if item] if isinstance(value, str) else value


# What the model and the decoders of images are told: a change elsewhere does not start them anew.
MODEL = (
    "engine vllm_python vllm_options dtype trust_remote_code base exact_answers cities_per_replica photo_memory_mb batch_size "
    "batch_wait_s request_s"
).split()
IMAGES = "image_processes decode_s max_megapixels max_body_mb image_domains private_addresses fetch_s".split()
Names = Annotated[list[str], BeforeValidator(_listed)]


class ServiceSettings(BaseModel):
    """Settings of the service; values may come as text, as the command line gives them."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    # What is served
    model: str | None = None  # a merged model: a folder that all nodes see, or s3://…, gs://…. Default: the last trained
    cities: Names = []  # instead: runs, folders of runs, or trained systems, whose adapters share one base model
    base: str | None = None  # the base of `cities`, where it is not where the adapters were trained
    storage: str = Field(default_factory=_default_storage)  # where runs are, when neither is given
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm_python: str | None = None  # the Python that has vllm, if it is another one
    vllm_options: Names = []  # further arguments of vllm's server, such as --gpu-memory-utilization,0.8
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the processor has instructions for it
    trust_remote_code: bool = False
    exact_answers: bool = True  # chat: questions for the address are answered by the probabilities, not in free words

    # How it scales
    min_replicas: int = Field(1, ge=0)  # 0 lets an unused model go; the next request then waits for it to load
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: float = Field(8, gt=0)  # per model replica; more than this on average starts another one
    max_ongoing_requests: int = Field(32, ge=1)  # per model replica; keep it above the target
    max_queued_requests: int = Field(128, ge=-1)  # per HTTP replica; beyond it callers get 503. -1: no limit
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)
    drain_s: float = Field(120, ge=0)  # how long a replica that is replaced may finish what it has begun
    num_cpus: float = Field(1, ge=0)  # per model replica
    num_gpus: float = Field(0, ge=0)
    cities_per_replica: int = Field(8, ge=1)  # adapters that a model replica holds; the least used one makes room
    photo_memory_mb: float = Field(256, ge=0)  # per model replica, for the photos seen last: questions about them go faster
    batch_size: int = Field(8, ge=1)  # requests answered together
    batch_wait_s: float = Field(0.01, ge=0)  # how long the first of a batch waits for others, in seconds
    http_replicas: int = Field(2, ge=1)  # at most
    image_replicas: int = Field(2, ge=1)  # at most; they fetch and decode
    image_processes: int = Field(2, ge=1)  # photos that one of them decodes at a time, each in a process
    image_cpus: float = Field(0, ge=0)  # reserved for each of them

    # What a request may ask for
    max_body_mb: float = Field(20, gt=0)
    max_megapixels: float = Field(50, gt=0)  # judged from the header, before anything is decoded
    decode_s: int = Field(10, ge=1)  # CPU seconds that decoding one photo may take
    max_tokens: int = Field(512, ge=1)  # of one answer; a request for more gets this many
    request_s: float = Field(300, gt=0)  # what waited and worked longer is answered 503; of a stream, each piece
    rate_limit: float = Field(0, ge=0)  # requests a minute of a key, or of an address where there are no keys; 0: any number
    forwarded: bool = False  # behind one proxy of yours: the caller's address is the last of X-Forwarded-For
    image_domains: Names = []  # hosts that images may be fetched from; .example.org means all below it; host:port
    private_addresses: bool = False  # they may be in this network: for an image server of your own
    fetch_s: float = Field(10, gt=0)
    allowed_origins: Names = []  # web pages of other origins that browsers let ask, such as https://example.org

    @model_validator(mode="wrap")
    @classmethod
    def _in_words(cls, values: Any, check: Callable[[Any], Self]) -> Self:
        try:
            return check(values)
        except ValidationError as error:
            raise SettingsError("; ".join(_problem(e) for e in error.errors()) + ".") from None

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise SettingsError(f"max_replicas is {self.max_replicas}, give it at least min_replicas, {self.min_replicas}.")
        if self.max_ongoing_requests <= self.target_ongoing_requests:
            raise SettingsError(
                f"max_ongoing_requests is {self.max_ongoing_requests}, give it more than target_ongoing_requests, "
                f"{self.target_ongoing_requests:g}, or the service never scales up."
            )
        if self.cities and self.model:
            raise SettingsError("both model and cities are given: a merged model knows one city, give one of the two.")
        if self.cities and self.engine == "vllm":
            raise SettingsError("engine=vllm serves merged models: give model=<folder of a merged model> instead of cities.")
        for domain in self.image_domains:
            if not _DOMAIN.fullmatch(domain.lower()):
                raise SettingsError(
                    f"image_domains has {domain!r}: give names such as example.org or .example.org, no addresses."
                )
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise SettingsError(f"allowed_origins has {origin!r}: give origins such as https://example.org.")
        return self

    @property
    def at_once(self) -> float:
        """Questions that an HTTP replica takes in: as many as may wait, and as many as all model replicas may work on."""
        waiting = self.max_queued_requests
        return waiting + self.max_replicas * self.max_ongoing_requests if waiting >= 0 else math.inf

    def only(self, names: Iterable[str]) -> Self:
        """These settings, all others as if they were not given."""
        return self.model_construct(**{name: getattr(self, name) for name in names})


def _problem(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = sorted(ServiceSettings.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        return f"unknown argument '{key}'" + (
            f", the nearest known is '{near[0]}'" if near else f", known are {', '.join(known)}"
        )
    return f"'{key}' is {error['input']!r}: {error['msg']}"
