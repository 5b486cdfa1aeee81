"""AddressCLIP as a row of a comparison, through Ray."""

from pathlib import Path

import numpy as np
import pytest

from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from ray_jobs.baselines import addressclip
from ray_jobs.baselines.context import ComparisonContext
from tests.support.dual_encoders import addressclip_config, photo_run
from tests.support.tiny import tiny_llava

pytestmark = pytest.mark.xdist_group("ray")


def test_a_row_is_trained_and_scored_once(ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = photo_run(tmp_path, tiny_llava(tmp_path / "base"))
    config.city.manifest = "none.csv"
    config.evaluate.workers = 1
    run = Run(config)
    ids = {split: tables.read_table(run.photos, split, ["id"])["id"].to_pylist() for split in ("val", "test")}
    work = ComparisonContext(config, run, ids, Gazetteer.load(run.gazetteer), run.folder / "costs")
    outcome = addressclip.run(work, addressclip_config(max_steps=2))
    assert {split: [row["id"] for row in rows] for split, rows in outcome.scores.items()} == ids
    assert all(np.isfinite(row["scores"]).all() and len(row["scores"]) == 3 for row in outcome.scores["test"])
    assert outcome.parameters > 0
    assert outcome.stored_bytes > 4 * outcome.parameters
    assert outcome.model == run.model_dir("AddressCLIP")
    assert outcome.notes == {"steps": 2, "photos without a caption": 0}
    assert work.noted("AddressCLIP").keys() == {"training", "answering"}
    capsys.readouterr()
    assert addressclip.run(work, addressclip_config(max_steps=2)) == outcome
    assert "starting" not in capsys.readouterr().out
