"""Steps made ready ahead of training: row groups are read by threads, rows encoded by processes or a thread.

Every item is a whole step of a worker, a function of seed and step alone, so a resumed run and another number of processes see
the same. Rows are read by the training process and handed to the encoding ones, so that each row group is read once a worker.
"""

import resource
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from addressvlm.config.train import TrainConfig
from addressvlm.errors import InputError
from addressvlm.training.collator import Collator

if TYPE_CHECKING:
    from addressvlm.training.stages import Stage

STEPS_A_PROCESS = 2  # that are encoded ahead
READ_AHEAD = 4  # steps whose row groups are read before they are encoded
PRELOADED = ["addressvlm.training.stages"]  # imported once by the server that loader processes are forked from

# A step, and the worker's rows of it, each with its number in the table
StepRows = tuple[int, list[tuple[int, dict[str, Any]]]]


def loader_processes(settings: TrainConfig, on_gpu: bool) -> int:
    """How many processes of a worker encode rows; 0 for a thread."""
    if settings.loader_processes is not None:
        return settings.loader_processes
    return max(1, int(settings.cpus_per_worker) - 1) if on_gpu else 0


@dataclass
class StepBatches:
    """A worker's share of a step.

    Attributes:
        tokens: of all batches, without padding.
        rejected: id of each row that could not be used -> why.
    """

    batches: list[dict[str, torch.Tensor]]
    tokens: int
    rejected: dict[str, str] = field(default_factory=dict)

    def pin_memory(self) -> "StepBatches":
        """The same in page-locked memory, from which a GPU copies while it computes."""
        pinned = [{key: value.pin_memory() for key, value in batch.items()} for batch in self.batches]
        return StepBatches(pinned, self.tokens, self.rejected)


@dataclass
class StepLoader(Dataset):
    """The worker's shares of a stage's steps from `start` on, in order.

    Attributes:
        rank, world: the worker's number, and how many there are.
        processes: that encode rows; 0 for a thread of this process.
        pin: whether batches lie in page-locked memory.
    """

    stage: "Stage"
    collator: Collator
    start: int
    rank: int
    world: int
    processes: int = 0
    pin: bool = False

    def __getitem__(self, item: StepRows) -> StepBatches | InputError:
        """The batches of a step from its rows; an error is returned, since a loader would wrap it in its trace."""
        try:
            return self.stage.encode_step(self.collator, *item, self.rank, self.world)
        except InputError as error:
            return error

    def __iter__(self) -> Iterator[StepBatches]:
        """Every step.

        Raises:
            InputError: rows can't be read or used, or a loader process was killed.
        """
        for batches in self._encode_in_processes() if self.processes else self._encode_in_thread():
            if isinstance(batches, InputError):
                raise batches
            self.stage.schedule.rejected |= batches.rejected
            yield batches

    def _rows(self) -> Iterator[StepRows]:
        """The rows of every step, read ahead."""
        schedule, worker = self.stage.schedule, (self.rank, self.world)
        for step in range(self.start, min(self.start + READ_AHEAD, self.stage.steps)):
            schedule.prefetch(step, *worker)
        for step in range(self.start, self.stage.steps):
            if step + READ_AHEAD < self.stage.steps:
                schedule.prefetch(step + READ_AHEAD, *worker)
            yield step, schedule.read(step, *worker)

    def _encode_in_thread(self) -> Iterator[StepBatches | InputError]:
        def encode(item: StepRows) -> StepBatches | InputError:
            batches = self[item]
            return batches.pin_memory() if self.pin and isinstance(batches, StepBatches) else batches

        rows = self._rows()
        with ThreadPoolExecutor(1) as pool:
            pending: deque[Future[Any]] = deque()
            while True:
                while len(pending) < STEPS_A_PROCESS and (item := pool.submit(next, rows, None).result()):
                    pending.append(pool.submit(encode, item))
                if not pending:
                    return
                yield pending.popleft().result()

    def _encode_in_processes(self) -> Iterator[StepBatches | InputError]:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each tensor in shared memory is an open file
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        loader = DataLoader(
            self, batch_size=None, sampler=self._rows(), num_workers=self.processes, prefetch_factor=STEPS_A_PROCESS,
            multiprocessing_context=context, pin_memory=self.pin,
        )  # fmt: skip
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"a process that encodes training rows ended ({' '.join(str(error).split())[:120]}), most likely for lack of "
                "memory: lower train.loader_processes, or give the machine more memory (a container: more shared memory)."
            ) from error
