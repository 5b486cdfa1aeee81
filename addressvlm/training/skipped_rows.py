"""The table of rows that training skipped and why, one file a system; a resumed run continues it."""

from typing import Any

import pyarrow as pa
import torch.distributed as dist

from addressvlm.storage import tables
from addressvlm.storage.files import write_parquet
from addressvlm.storage.remote_path import AnyPath
from addressvlm.training.dataset import low_locatability
from addressvlm.training.stages import Stage

SCHEMA = tables.REJECTS.append(pa.field("stage", pa.string()))


class SkippedRows:
    """The rows skipped in all stages so far."""

    def __init__(self, file: AnyPath, resumed: bool) -> None:
        self.file = file
        before = tables.read_table_file(file).to_pylist() if resumed and file.is_file() else []
        self.reasons = {(row["stage"], row["id"]): row["reason"] for row in before}

    def write(self, stages: list[Stage]) -> int:
        """Gather the skipped rows of all workers and write them; every worker calls it. Returns their number."""
        mine = {(s.name, row): why for s in stages for row, why in s.schedule.rejected.copy().items()}
        by_worker: list[Any] = [mine]
        if dist.is_initialized():
            by_worker = [None] * dist.get_world_size()
            dist.all_gather_object(by_worker, mine)
        for stage in stages:
            self.reasons |= {(stage.name, row): why for row, why in low_locatability(stage.schedule.rows).items()}
        for reasons in by_worker:
            self.reasons |= reasons
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.file.unlink(missing_ok=True)
            rows = [
                {"file": None, "row": None, "id": row, "reason": why, "stage": stage}
                for (stage, row), why in sorted(self.reasons.items())
            ]
            if rows:
                write_parquet(pa.Table.from_pylist(rows, schema=SCHEMA), self.file)
        return len(self.reasons)
