"""What `serve run serve.config key=value …` understands, and which model it means."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import click
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from addressvlm import InputError
from addressvlm.run import LAST_MODEL, storage


class SettingsError(InputError, click.ClickException):
    """An InputError that `serve run` prints as one line, without a traceback."""


def _default_storage() -> str:
    return os.environ.get("ADDRESSVLM_STORAGE", "runs")


class ServiceSettings(BaseModel):
    """Settings of the service; values may come as text, as the command line gives them."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None  # folder of a merged model; on a cluster, one that all nodes see. Default: the last trained
    storage: str = Field(default_factory=_default_storage)  # where runs are, when `model` is not given
    dtype: Literal["float32", "bfloat16"] = "float32"

    min_replicas: int = Field(1, ge=0)  # 0 lets an unused model go; the next request then waits for it to load
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: float = Field(8, gt=0)  # per model replica; more than this on average starts another one
    max_ongoing_requests: int = Field(32, ge=1)  # per model replica; keep it above the target
    max_queued_requests: int = Field(128, ge=-1)  # per HTTP replica; beyond it callers get 503. -1: no limit
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)
    num_cpus: float = Field(1, ge=0)  # per model replica
    num_gpus: float = Field(0, ge=0)

    batch_size: int = Field(8, ge=1)  # requests answered together
    batch_wait_s: float = Field(0.01, ge=0)  # how long the first of a batch waits for others, in seconds

    max_body_mb: float = Field(20, gt=0)
    max_megapixels: float = Field(50, gt=0)  # judged from the header, before anything is decoded
    max_tokens: int = Field(512, ge=1)  # of one answer; a request for more gets this many

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
        return self

    def folder(self) -> Path:
        """The folder of the model to serve, absolute.

        Raises:
            InputError: there is none, or it holds no model.
        """
        if self.model is None:
            return _model_in(_last_model(self.storage))
        return _model_in(Path(os.path.abspath(Path(self.model).expanduser())))


def model_name(folder: Path) -> str:
    """The name that callers see: `<run>/<system>` for a model of ours, the folder's name for any other."""
    if folder.name == "merged" and folder.parent.parent.name == "models":
        return f"{folder.parents[2].name}/{folder.parent.name}"
    return folder.name


def _problem(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = sorted(ServiceSettings.model_fields)
        near = difflib.get_close_matches(key, known, n=1)
        return f"unknown argument '{key}'" + (
            f", the nearest known is '{near[0]}'" if near else f", known are {', '.join(known)}"
        )
    return f"'{key}' is {error['input']!r}: {error['msg']}"


def _last_model(runs: str) -> Path:
    """Where the newest `last-model` file points, among the runs here and those of submitted jobs."""
    places = dict.fromkeys([storage(runs), Path.home() / "addressvlm" / "runs"])
    pointers = [place / LAST_MODEL for place in places if (place / LAST_MODEL).is_file()]
    if not pointers:
        raise SettingsError(
            f"no trained model in {' or '.join(map(str, places))}: run `ray job submit ray_jobs/train.py` first, "
            "or give one with model=<folder>."
        )
    newest = max(pointers, key=lambda pointer: pointer.stat().st_mtime)
    folder = Path(newest.read_text().strip())
    if not folder.is_dir():
        raise SettingsError(f"{newest} points to {folder}, which is not there: train again, or give model=<folder>.")
    return folder


def _model_in(folder: Path) -> Path:
    """The folder itself, or its `merged`, if it holds a model that transformers loads."""
    if not folder.is_dir():
        raise SettingsError(f"no model folder {folder}: give model=<folder of a trained model>, for instance …/merged.")
    for candidate in (folder, folder / "merged"):
        if (candidate / "config.json").is_file():
            return candidate
    if (folder / "adapter_config.json").is_file():
        raise SettingsError(f"{folder} is an adapter without its base: give the folder `merged` beside it.")
    raise SettingsError(f"{folder} is not a model (it has no config.json): give a folder that transformers loads.")
