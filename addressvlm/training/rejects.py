"""Rows that training could or should not use and why, in one file a system; it outlives an interruption."""

from typing import Any

import pyarrow as pa
import torch.distributed as dist

from addressvlm import tables
from addressvlm.files import write_parquet
from addressvlm.stores import AnyPath
from addressvlm.training.locatable import left_out
from addressvlm.training.loop import Stage

SCHEMA = tables.REJECTS.append(pa.field("stage", pa.string()))


class Rejects:
    """The rows left out in all stages so far."""

    def __init__(self, file: AnyPath, resumed: bool) -> None:
        """Begin anew, or with what an interrupted run wrote."""
        self.file = file
        before = tables.read_file(file).to_pylist() if resumed and file.is_file() else []
        self.reasons = {(row["stage"], row["id"]): row["reason"] for row in before}

    def write(self, stages: list[Stage]) -> int:
        """Write those of all workers; every worker calls it, the first one writes. Their number."""
        mine = {(s.name, row): why for s in stages for row, why in s.schedule.rejected.copy().items()}
        of_all: list[Any] = [mine]
        if dist.is_initialized():
            of_all = [None] * dist.get_world_size()
            dist.all_gather_object(of_all, mine)
        for stage in stages:
            self.reasons |= {(stage.name, row): why for row, why in left_out(stage.schedule.rows).items()}
        for of_one in of_all:
            self.reasons |= of_one
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._write()
        return len(self.reasons)

    def _write(self) -> None:
        self.file.unlink(missing_ok=True)
        if not self.reasons:
            return
        rows = [
            {"file": None, "row": None, "id": row, "reason": why, "stage": stage}
            for (stage, row), why in sorted(self.reasons.items())
        ]
        write_parquet(pa.Table.from_pylist(rows, schema=SCHEMA), self.file)
