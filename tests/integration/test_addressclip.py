"""AddressCLIP as a system of a comparison, through Ray."""

from pathlib import Path

import numpy as np
import pytest

from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from ray_jobs import evaluation
from ray_jobs.baselines.addressclip import AddressClipSystem
from ray_jobs.baselines.system import ComparisonContext
from tests.support.dual_encoders import addressclip_config, photo_run
from tests.support.tiny import tiny_llava

pytestmark = pytest.mark.xdist_group("ray")


def test_a_dual_encoder_is_trained_and_scored_once(ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = photo_run(tmp_path, tiny_llava(tmp_path / "base"))
    config.city.manifest = "none.csv"
    config.evaluate.workers = 1
    run = Run(config)
    ids = {split: tables.read_table(run.photos, split, ["id"])["id"].to_pylist() for split in ("val", "test")}
    context = ComparisonContext(run, evaluation.open_task(config, run.photos, "test", run.folder), ids)
    system = AddressClipSystem(addressclip_config(max_steps=2))
    outcome = system.run(context)
    assert outcome.scores is not None
    assert {split: [row["id"] for row in outcome.scores.rows(split)] for split in ids} == ids
    assert all(np.isfinite(row["scores"]).all() and len(row["scores"]) == 3 for row in outcome.scores.rows("test"))
    assert outcome.parameters > 0
    assert outcome.stored_bytes > 4 * outcome.parameters
    assert outcome.model == run.model_dir("AddressCLIP")
    assert outcome.notes == {"steps": 2, "photos without a caption": 0}
    assert context.costs("AddressCLIP").keys() == {"training", "answering"}
    assert (run.folder / "scores" / "addressclip" / "test" / "_done.json").is_file()
    capsys.readouterr()
    assert system.run(context) == outcome
    assert "starting" not in capsys.readouterr().out
