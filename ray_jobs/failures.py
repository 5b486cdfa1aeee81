"""How a training that fails ends in one sentence, on whichever worker it happens."""

import errno
from typing import Any

import ray
import ray.train
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from addressvlm import InputError
from addressvlm.config import Config


@ray.remote(num_cpus=0)
class Notice:
    """Holds the sentence with which a worker gave up; a restarted worker group reads it and ends instead of trying again."""

    def __init__(self) -> None:
        self.said: str | None = None

    def write(self, said: str) -> None:
        self.said = self.said or said

    def read(self) -> str | None:
        return self.said


def notice() -> Any:
    """A `Notice` on this node: the job ends when the driver's node is lost, and not when another one is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Notice.options(scheduling_strategy=here).remote()


def told(notice: Any) -> InputError | None:
    """What a worker wrote into the notice."""
    said = ray.get(notice.read.remote())
    return InputError(said) if said else None


def explained(error: Exception, config: Config, system: str) -> InputError | None:
    """A sentence for the failures that somebody at the cluster can mend; None for our defects."""
    failures = getattr(error, "worker_failures", {}).values()
    stored = [sentence_of(getattr(failure, "_base_exc", failure), config) for failure in failures]  # while training went on
    if said := next((sentence for sentence in stored if sentence), None):
        return InputError(said)
    if any(isinstance(failure, ray.exceptions.RayActorError) for failure in failures):
        return InputError(
            f"training '{system}' lost workers more often than train.max_failures={config.train.max_failures} (out of memory, "
            "or machines went away): lower batch_size of train.stages if memory is short, and run the same command again to "
            "go on from the last checkpoint."
        )
    if isinstance(error, ray.train.ControllerError):
        sentence = " ".join(str(error.controller_failure).split())[:200]
        return InputError(
            f"training '{system}' could not be started ({sentence}): look at `ray status`, run the same command again, and if "
            "it stays so, begin anew with --redo."
        )
    return None


def sentence_of(error: Exception, config: Config) -> str | None:
    """What a person can do about an error that would come back at every attempt."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "a GPU is out of memory: lower batch_size in train.stages and raise accumulate by as much."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return f"{config.storage} can't be written ({error.strerror}): free room or set storage elsewhere, then run again."
    return None
