"""What a trained system is made of: numbers that were trained, bytes to keep, licences."""

from math import prod

from safetensors import safe_open

from addressvlm.config import Config
from addressvlm.config_training import Part, SystemConfig
from addressvlm.files import fetched, fetched_model
from addressvlm.models.base import locate
from addressvlm.models.card import base_licence
from addressvlm.models.parts import part_named
from addressvlm.run import Run
from addressvlm.stores import AnyPath, files_in, path_of
from ray_jobs import given
from ray_jobs.rivals.work import Outcome


def described(config: Config, system: SystemConfig) -> Outcome:
    """What a trained system is made of; without answers."""
    run = Run(config)
    folder = path_of(fetched_model(locate(given.model_of(config, run, system))))
    learning = {part for stage in system.stages for part in config.train.stages[stage].parts}
    return Outcome(
        parameters=_numbers(run.model(system.name) / "adapter", learning) if system.stages else 0,
        stored_bytes=sum(file.stat().st_size for file in files_in(folder, "*.safetensors")),
        licences={"base model": base_licence(config) or "not said"},
    )


def _numbers(folder: AnyPath, learning: set[Part]) -> int:
    """How many numbers of these parts the safetensors files of a folder hold; an adapter has all parts, trained or not."""
    total = 0
    for file in files_in(folder, "*.safetensors"):
        with safe_open(str(fetched(file)), framework="np") as opened:
            total += sum(
                prod(opened.get_slice(name).get_shape())
                for name in opened.keys()  # noqa: SIM118
                if (part_named(name) or "llm") in learning
            )
    return total
