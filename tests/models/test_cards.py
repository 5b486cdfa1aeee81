"""Model cards

python -m pytest -q tests/models/test_cards.py
"""

from pathlib import Path

from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.models import cards
from addressvlm.storage.run_dir import Run
from addressvlm.training.trainer import train_system
from tests.support.training_tables import nothing, trained_config


def test_the_card_tells_base_data_and_licence_and_takes_metrics(tmp_path: Path, base: Path) -> None:
    config = trained_config(tmp_path, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    Gazetteer([Address("Mill Street", "Harbour")], city="Smallville", attribution=["Streets: somebody"]).save(
        Run(config).gazetteer
    )
    train_system(config, "stage 2 only", None, nothing)
    folder = Run(config).model_dir("stage 2 only")
    for name in ("adapter", "merged"):
        text = (folder / name / "README.md").read_text()
        assert "license: mit" in text
        assert f"base_model: {base}" in text
        assert "Smallville: 24 photos" in text
        assert "Streets: somebody" in text
        assert cards.no_metrics_section("evaluate") in text
    measured = {"A_ds": {"value": 0.5, "low": 0.25, "high": 0.75}, "A": {"value": None, "low": None, "high": None}}
    cards.set_metrics(folder, measured, "4 test photos")
    cards.set_metrics(folder, measured, "4 test photos")
    text = (folder / "merged" / "README.md").read_text()
    assert text.count("| A_ds | 50.0 | 25.0 to 75.0 |") == 1
    assert "Not measured yet" not in text
