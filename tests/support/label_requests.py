"""Rows, settings and runs of the labeler with an endpoint, for tests."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.costs import CostEstimate, LabelStats, estimate_cost
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import Label, Request, state_factory
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import open_for_writing
from tests.support.label_texts import GOOD
from tests.support.openai_endpoint import Endpoint

KEY = "sk-test-0123456789abcdef"
FACTS = Facts("Mill Street", "Harbour", ("Mill Street", "King Street"), "east-west", "along", "east", "King Street", 40, "east")
BAD = GOOD.replace("Mill Street", "some street")


def requests(count: int, first: int = 0) -> list[Request]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return [Request(f"row{i}", buffer.getvalue() + bytes([i]), FACTS) for i in range(first, first + count)]


def config_of(endpoint: Endpoint, **settings: Any) -> LabelsConfig:
    return LabelsConfig(**{"labeler": "openai", "model": "m", "base_url": endpoint.url, "concurrency": 4, **settings})


def run_labeler(
    config: LabelsConfig, folder: Path, rows: list[Request], retry_failed: bool = False, seed: int = 0
) -> tuple[dict[int, Label], LabelStats]:
    labels: dict[int, Label] = {}
    with open_for_writing(folder) as cache:
        labeler = OpenAILabeler(config, state_factory(config, seed), cache, retry_failed=retry_failed)
        stats = labeler.run(rows, len(rows), labels.__setitem__)
    return labels, stats


def estimate(config: LabelsConfig, folder: Path, rows: list[Request]) -> CostEstimate:
    sample = map(state_factory(config), rows[:2])
    return estimate_cost(config, [row.id for row in rows], sample, folder)
