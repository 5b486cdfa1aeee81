"""The settings of the service, for `serve run serve.config key=value …` and `serve deploy`."""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self

import click
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from addressvlm import InputError

BODY_COPIES = 3  # in memory: as it came, parsed, and on its way to another deployment
_DOMAIN = re.compile(r"\.?([a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.)*[a-z]([a-z0-9-]*[a-z0-9])?(:\d{1,5})?")
_ORIGIN = re.compile(r"https?://[^/\s]+")


class SettingsError(InputError, click.ClickException):
    """An InputError that `serve run` prints as one line, without a traceback."""


def _split(value: Any) -> Any:
    """A list from the command line, where it is text with commas."""
    return [item for item in (part.strip() for part in value.split(",")) if item] if isinstance(value, str) else value


# The settings that the model and the image deployments get: a change to others does not restart their replicas.
MODEL_SETTINGS = (
    "engine vllm_python vllm_options dtype trust_remote_code base exact_answers cities_per_replica photo_memory_mb "
    "chat_memory_mb batch_size batch_wait_s request_s"
).split()
IMAGE_SETTINGS = "image_processes decode_s max_megapixels max_body_mb image_domains private_addresses fetch_s".split()
Names = Annotated[list[str], BeforeValidator(_split)]


class ServiceSettings(BaseModel):
    """All settings; values may be text, as from the command line."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    # What is served
    model: str | None = None  # a merged model: a folder that all nodes see, or s3://…, gs://…. Default: the last trained
    cities: Names = []  # instead: runs, folders of runs, or trained systems, whose adapters share one base model
    base: str | None = None  # the base of `cities`, if it was moved since training
    storage: str = Field(default_factory=lambda: os.environ.get("ADDRESSVLM_STORAGE", "runs"))  # where the last model is sought
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm_python: str | None = None  # the Python that has vLLM, if it is not this one
    vllm_options: Names = []  # further arguments of vLLM's server, such as --gpu-memory-utilization,0.8
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if the processor has instructions for it
    trust_remote_code: bool = False
    exact_answers: bool = True  # chat: answer questions about the address from its probabilities, not by generation

    # How it scales
    min_replicas: int = Field(1, ge=0)  # 0: an unused model is unloaded, and the next request waits for it to load
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: float = Field(8, gt=0)  # per model replica; more on average starts another one
    max_ongoing_requests: int = Field(32, ge=1)  # per model replica; keep it above the target
    max_queued_requests: int = Field(128, ge=-1)  # per HTTP replica; beyond it callers get 503. -1: no limit
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)
    drain_s: float = Field(120, ge=0)  # how long a replica may finish its requests before it is replaced
    num_cpus: float = Field(1, ge=0)  # per model replica
    num_gpus: float = Field(0, ge=0)
    cities_per_replica: int = Field(8, ge=1)  # adapters in a model replica; the least recently used one is evicted
    photo_memory_mb: float = Field(256, ge=0)  # per model replica, of the latest photos: more questions on them are faster
    chat_memory_mb: float = Field(0, ge=0)  # per model replica, for chats; 0: 40 % of free GPU memory, or 25 % of main memory
    batch_size: int = Field(8, ge=1)  # photos scored together
    batch_wait_s: float = Field(0.01, ge=0)  # how long the first of a batch waits for others, in seconds
    http_replicas: int = Field(2, ge=1)  # at most
    image_replicas: int = Field(2, ge=1)  # at most; they fetch and decode
    image_processes: int = Field(2, ge=1)  # photos decoded at the same time per replica, each in a process
    image_cpus: float = Field(0, ge=0)  # reserved per image replica

    # Limits of a request
    max_body_mb: float = Field(20, gt=0)
    request_memory_mb: float = Field(1000, gt=0)  # per HTTP replica, bodies and pixels of its requests; beyond it 503
    max_megapixels: float = Field(50, gt=0)  # checked in the header, before decoding
    decode_s: int = Field(10, ge=1)  # CPU seconds for decoding one photo
    max_tokens: int = Field(512, ge=1)  # per answer; a request for more gets this many
    request_s: float = Field(300, gt=0)  # a request that takes longer is answered 503; of a stream, each chunk
    require_keys: bool = False  # start only with API keys (ADDRESSVLM_API_KEYS), so that no open service is deployed by mistake
    rate_limit: float = Field(0, ge=0)  # requests per minute of an API key, or of an IP address without keys; 0: no limit
    forwarded: bool = False  # behind one proxy of yours: the caller's address is the last in X-Forwarded-For
    image_domains: Names = []  # hosts that images may be fetched from: host, host:port, or .example.org for all below it
    private_addresses: bool = False  # allow private networks: for an image server of your own
    fetch_s: float = Field(10, gt=0)
    allowed_origins: Names = []  # other origins (CORS), such as https://example.org

    @model_validator(mode="wrap")
    @classmethod
    def _as_settings_error(cls, values: Any, validate: Callable[[Any], Self]) -> Self:
        try:
            return validate(values)
        except ValidationError as error:
            problems = []
            for problem in error.errors():
                key, known = ".".join(map(str, problem["loc"])), sorted(cls.model_fields)
                if problem["type"] == "extra_forbidden":
                    nearest = difflib.get_close_matches(key, known, n=1)
                    hint = f"the nearest known is '{nearest[0]}'" if nearest else f"known are {', '.join(known)}"
                    problems.append(f"unknown argument '{key}', {hint}")
                else:
                    problems.append(f"'{key}' is {problem['input']!r}: {problem['msg']}")
            raise SettingsError("; ".join(problems) + ".") from None

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise SettingsError(f"max_replicas is {self.max_replicas}, give it at least min_replicas, {self.min_replicas}.")
        if self.max_ongoing_requests <= self.target_ongoing_requests:
            raise SettingsError(
                f"max_ongoing_requests is {self.max_ongoing_requests}, give it more than target_ongoing_requests, "
                f"{self.target_ongoing_requests:g}, or the service never scales up."
            )
        if self.request_memory_mb < (least := BODY_COPIES * self.max_body_mb):
            raise SettingsError(
                f"request_memory_mb is {self.request_memory_mb:g}, give it at least {least:g}: {BODY_COPIES} times max_body_mb."
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
    def max_in_flight(self) -> float:
        """Requests that an HTTP replica accepts: as many as may queue, plus as many as all model replicas may process."""
        queued = self.max_queued_requests
        return queued + self.max_replicas * self.max_ongoing_requests if queued >= 0 else math.inf

    def subset(self, names: Iterable[str]) -> Self:
        """These settings; all others have their defaults."""
        return self.model_construct(**{name: getattr(self, name) for name in names})
