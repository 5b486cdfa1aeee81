"""The sections `model` and `train` of the configuration tree (see addressvlm/config.py)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from addressvlm.config_city import Strict

Part = Literal["vision", "adapter", "llm"]


class PartConfig(Strict):
    """How one part of the model is tuned: LoRA, or all of its weights."""

    full: bool = False
    rank: int = Field(128, ge=1)
    alpha: float = Field(256.0, gt=0)


class ModelConfig(Strict):
    """The base model and the parts of it that LoRA is attached to."""

    base: str = "toy"  # folder or hub name of an AutoModelForImageTextToText; "toy" is the embedded one
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    vision: PartConfig = PartConfig(rank=64, alpha=16.0)  # xtuner's LLaVA default (assumed: the paper does not say)
    adapter: PartConfig = PartConfig(full=True)
    lora_dropout: float = Field(0.05, ge=0, lt=1)  # xtuner's default (assumed)
    llm: PartConfig = PartConfig()  # rank 128 as in paper 001; alpha is xtuner's default (assumed)


class StageConfig(Strict):
    """One tuning stage: which table, which parts, how long."""

    data: Literal["alignment", "photos"]
    parts: list[Part] = ["vision", "adapter", "llm"]
    rounds: Literal["conversation", "apart"] = "conversation"  # apart: no question about an image sees the other answers
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)  # stop here even if the epochs are not over
    batch_size: int = Field(16, ge=1)  # images per worker and step
    accumulate: int = Field(1, ge=1)  # optimizer step every so many batches
    learning_rate: float = Field(2e-4, gt=0)
    warmup: float = Field(0.03, ge=0, lt=1)  # share of the steps
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)  # norm of the gradient


class SystemConfig(Strict):
    """A row of the table: the stages it goes through, none for zero-shot."""

    name: str
    stages: list[str] = []
    equal_steps_to: str | None = None  # the last stage runs as many steps as all stages of that system together


class TrainConfig(Strict):
    """Ray Train: workers, strategy, stages, and the systems to train with them."""

    workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    strategy: Literal["ddp", "zero2"] = "ddp"  # zero2 is DeepSpeed
    # Of the forward and backward pass; weights stay as they are. auto: bfloat16 where the processor has instructions for it
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_every: int = Field(50, ge=1)  # optimizer steps
    max_failures: int = Field(3, ge=0)  # lost workers tolerated per system
    stages: dict[str, StageConfig] = {
        "alignment": StageConfig(data="alignment"),
        "localization": StageConfig(data="photos"),
    }
    systems: list[SystemConfig] = [
        SystemConfig(name="zero-shot"),
        SystemConfig(name="stage 2 only", stages=["localization"]),
        SystemConfig(name="stage 2 only, equal steps", stages=["localization"], equal_steps_to="AddressVLM"),
        SystemConfig(name="AddressVLM", stages=["alignment", "localization"]),
    ]

    @model_validator(mode="after")
    def _names_exist(self) -> TrainConfig:
        names = [s.name for s in self.systems]
        for system in self.systems:
            for stage in system.stages:
                if stage not in self.stages:
                    raise ValueError(f"system '{system.name}' names the stage '{stage}', stages are {list(self.stages)}")
            if system.equal_steps_to and system.equal_steps_to not in names:
                raise ValueError(f"system '{system.name}' equals '{system.equal_steps_to}', systems are {names}")
        return self
