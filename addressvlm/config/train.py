"""The sections `model`, `train` and `cluster` of the configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from addressvlm.config.base import Section

Part = Literal["vision", "adapter", "llm"]
Data = Literal["alignment", "photos", "reasoning", "map", "matching"]  # tables of a run


class PartConfig(Section):
    """How one part of the model is tuned: with LoRA, or all of its weights."""

    full: bool = False
    rank: int = Field(128, ge=1)
    alpha: float = Field(256.0, gt=0)
    dropout: float | None = Field(None, ge=0, lt=1)  # of this part; default: model.lora_dropout


class ModelConfig(Section):
    """The base model and the LoRA settings of its parts."""

    base: str = "toy"  # folder or hub name of an AutoModelForImageTextToText; "toy" is built in
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    vision: PartConfig = PartConfig(rank=64, alpha=16.0)  # xtuner's LLaVA default (assumed: the paper does not say)
    adapter: PartConfig = PartConfig(full=True)
    lora_dropout: float = Field(0.05, ge=0, lt=1)  # xtuner's default (assumed)
    llm: PartConfig = PartConfig()  # rank 128 as in paper 001; alpha is xtuner's default (assumed)

    @field_validator("vision", "adapter", "llm", mode="before")
    @classmethod
    def _fill_part_defaults(cls, value: Any, info: ValidationInfo) -> Any:
        """Missing keys get the part's defaults above, not those of PartConfig."""
        defaults = cls.model_fields[str(info.field_name)].default.model_dump()
        return {**defaults, **value} if isinstance(value, dict) else value


class AugmentConfig(Section):
    """Random augmentation of photos; none by default, as in paper 001."""

    crop: float = Field(1.0, gt=0, le=1)  # smallest share of a photo's area that a crop keeps
    colour: float = Field(0.0, ge=0, lt=1)  # brightness, contrast and saturation times 1 - colour to 1 + colour


class StageConfig(Section):
    """One tuning stage: its data, the trained parts, its length and optimizer."""

    data: Data | list[Data]  # a table, or several mixed row by row
    parts: list[Part] = ["vision", "adapter", "llm"]
    loss: Literal["token", "round"] = "token"  # mean over answer tokens, or over answers, each the mean of its tokens
    isolate_questions: bool = False  # hide the other questions and answers of an image from each question
    locatability: float | None = Field(None, ge=0, le=1)  # skip photos that score less, see ray_jobs/locatability.py
    augment: AugmentConfig = AugmentConfig()
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)  # upper limit, whatever the epochs
    batch_size: int = Field(16, ge=1)  # images a worker and batch
    gradient_accumulation_steps: int = Field(1, ge=1)  # batches an optimizer step
    learning_rate: float = Field(2e-4, gt=0)
    learning_rates: dict[Part, float] = {}  # of parts with a rate of their own
    warmup_ratio: float = Field(0.03, ge=0, lt=1)  # share of the steps
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)  # gradients are clipped to this norm

    @property
    def tables(self) -> list[Data]:
        """The tables it reads."""
        return [self.data] if isinstance(self.data, str) else self.data

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if not self.tables or len(set(self.tables)) < len(self.tables):
            raise ValueError(f"data is {self.data}: name one table or several different ones")
        if {"alignment", "map", "matching"} & set(self.tables) and self.augment.crop < 1:
            raise ValueError(f"augment.crop is {self.augment.crop:g}, which cuts the map off a grafted image: leave it at 1")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts is {self.parts}: name at least one part, each once")
        if idle := [part for part in self.learning_rates if part not in self.parts]:
            raise ValueError(f"learning_rates names {', '.join(idle)}, the parts trained are {', '.join(self.parts)}")
        if any(rate <= 0 for rate in self.learning_rates.values()):
            raise ValueError("learning_rates must be above 0; leave a part out of `parts` to freeze it")
        return self


class SystemConfig(Section):
    """A system of the comparison: its stages, none for zero-shot."""

    name: str
    stages: list[str] = []
    match_steps_of: str | None = None  # the last stage makes the total as many steps as that system's


class TrainConfig(Section):
    """Ray Train: workers, strategy, stages, and the systems to train with them."""

    workers: int = Field(2, ge=1)
    min_workers: int | None = Field(None, ge=1)  # continue with so few when nodes are lost; a step keeps its rows
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    # Processes of each worker that encode rows ahead of training; 0: a thread. Default: cpus_per_worker less 1 on GPUs, else 0
    loader_processes: int | None = Field(None, ge=0)
    # Sharded across workers. ddp: nothing; zero2 (DeepSpeed): gradients and optimizer state; fsdp2, zero3: weights too
    strategy: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"
    checkpoint_activations: bool = False  # keep each layer's input only and recompute the rest: less memory, more time
    compile: bool = False  # each layer by torch.compile: minutes at the start, less time a step on a GPU
    # Of the forward and backward pass; weights stay as they are. auto: bfloat16 where the device has instructions for it
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Several conversations in one row, without padding. auto: on CPUs, where the base model supports it; on a GPU `on` uses
    # flex attention
    packing: Literal["auto", "on", "off"] = "auto"
    seed: int | None = None  # of LoRA's weights, row order and dropout; default: the run's seed, which also draws the split
    cities: dict[str, float] = {}  # runs of this storage to train on instead of this one: name -> epochs of it in one epoch
    checkpoint_minutes: float = Field(10.0, gt=0)  # between checkpoints; a crash loses at most these
    checkpoint_every: int | None = Field(None, ge=1)  # instead of minutes: optimizer steps
    keep_checkpoints: int = Field(2, ge=1)  # the last ones; each holds the adapter that validated best too
    # which adapter becomes the model; best: by validation, A_ds or else A
    checkpoint_to_merge: Literal["last", "best"] = "last"
    validate_every: int | None = Field(None, ge=1)  # optimizer steps; validates on the split `val`
    validate_photos: int = Field(16, ge=1)  # photos of a validation, drawn by seed, with all their questions
    loggers: list[Literal["mlflow", "wandb"]] = []  # besides TensorBoard; installed and set up by their environment variables
    gpu_memory_gib: float | None = Field(None, gt=0)  # for --dry-run; default: that of this machine's GPUs
    peak_tflops: float | None = Field(None, gt=0)  # of a worker at its precision; default: by the GPU's name
    mfu: float = Field(0.4, gt=0, le=1)  # share of the peak that --dry-run assumes
    max_failures: int = Field(3, ge=0)  # lost workers tolerated per system
    stages: dict[str, StageConfig] = {
        "alignment": StageConfig(data="alignment"),
        "localization": StageConfig(data="photos"),
    }
    systems: list[SystemConfig] = [
        SystemConfig(name="zero-shot"),
        SystemConfig(name="stage 2 only", stages=["localization"]),
        SystemConfig(name="stage 2 only, equal steps", stages=["localization"], match_steps_of="AddressVLM"),
        SystemConfig(name="AddressVLM", stages=["alignment", "localization"]),
    ]

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers is {self.min_workers}, above workers, which is {self.workers}: lower it")
        if self.checkpoint_to_merge == "best" and not self.validate_every:
            raise ValueError("checkpoint_to_merge is best, which needs validation: set validate_every too")
        names = [s.name for s in self.systems]
        followers = [s.name for s in self.systems if s.match_steps_of]
        if any(weight <= 0 for weight in self.cities.values()):
            raise ValueError("cities must have weights above 0; leave out a city that is not trained on")
        for system in self.systems:
            for stage in system.stages:
                if stage not in self.stages:
                    raise ValueError(f"system '{system.name}' names the stage '{stage}', stages are {list(self.stages)}")
            if system.match_steps_of and system.match_steps_of not in names:
                raise ValueError(f"system '{system.name}' equals '{system.match_steps_of}', systems are {names}")
            if system.match_steps_of in followers:
                raise ValueError(
                    f"system '{system.name}' equals '{system.match_steps_of}', which has match_steps_of itself: name a system "
                    "with steps of its own"
                )
        return self


class ClusterConfig(Section):
    """Nodes that Ray's autoscaler starts for a job."""

    wait_s: float = Field(1800.0, gt=0)  # a job ends if its nodes are not there after so many seconds
    boot_s: float = Field(300.0, ge=0)  # nodes for a training are asked for when labels are so many seconds from their end
