"""Cards of systems without a model folder, and metrics in the cards of models."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from addressvlm.baselines import addressclip
from addressvlm.config import Config, load, validate
from addressvlm.config.compare import AddressClipConfig, AnyBaseline, PriorConfig
from addressvlm.evaluation import system_cards
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.models import cards
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from tests.support.training_tables import STREETS, table_rows

NOTES = {
    "gallery": 8, "set_aside": 1, "replies": 6, "refused": 2, "weight of AddressCLIP": 0.75, "weight of zero-shot": 0.01,
    "weight of Image-GPS-Address": 1.5, "addresses left": 2.5, "nothing ruled out": 0, "true address ruled out": 3,
}  # fmt: skip
METRICS = {"A_ds": {"value": 0.5, "low": 0.25, "high": 0.75}, "A": {"value": None, "low": None, "high": None}}
RESULT = {
    "metrics": METRICS, "notes": NOTES, "licences": {"encoder": "mit"},
    "cost": {"parameters": 0, "stored_bytes": 5_000_000, "answering": {"seconds": 1, "photos": 4, "cpus": 2, "gpus": 0}},
}  # fmt: skip
SYSTEMS = [
    ({"kind": "retrieval", "encoder": {"base": "a/dino"}}, ["`a/dino`", "8 training photos (1 set aside", "Sec. 6.5"]),
    ({"kind": "retrieval", "neighbours": 5}, ["`a/base`", "the 5 most similar"]),
    (
        {"kind": "rag", "model": "a/reader", "similar": 3, "form": "sentences", "endpoint": "http://host/v1"},
        ["`a/reader`, at an endpoint", "paper 004", "3 similar and 16 dissimilar (farthest)", "sentences", "refused 2", "sent"],
    ),
    ({"kind": "rag", "model": "zero-shot", "ask": "addresses"}, ["the system zero-shot", "the question is for addresses"]),
    ({"kind": "likelihood", "of": "zero-shot"}, ["zero-shot", "`a/base`, not trained", "3 addresses"]),
    ({"kind": "likelihood", "of": "tuned"}, ["`models/tuned/merged`"]),
    ({"kind": "guess"}, ["no photo was looked at", "the commonest in training"]),
    ({"kind": "guess", "by": "random"}, ["random ones"]),
    ({"kind": "blind", "of": "tuned"}, ["tuned with a grey picture"]),
    (
        {"kind": "fusion", "of": ["AddressCLIP", "zero-shot"]},
        ["AddressCLIP: weight 0.75", "Image-GPS-Address: weight 1.5", "as long as in all of them"],
    ),
    (
        {"kind": "prior", "of": "AddressCLIP", "district": True, "gps_m": 100},
        ["AddressCLIP", "the district and GPS within 100 m", "Table 12", "2.5 of 3", "3 photos", "95 of 100"],
    ),
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    systems = [{"name": "zero-shot"}, {"name": "tuned", "stages": ["localization"]}]
    config = validate(
        {"name": "r", "storage": str(tmp_path), "model": {"base": "a/base"}, "train": {"systems": systems}}, "test"
    )
    run = Run(config)
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(name) for name in ("id", "place", "image", "rounds")]))
    tables.write_table(run.photos, "train", table_rows(5), schema)
    addresses = [Address(street, "Harbour") for street in STREETS]
    Gazetteer(addresses, city="Smallville", attribution=["Streets: somebody"]).save(run.gazetteer)
    return config


@pytest.mark.parametrize(("settings", "texts"), SYSTEMS)
def test_a_card_has_the_parts_and_the_metrics_of_a_system(
    config: Config, settings: dict[str, object], texts: list[str]
) -> None:
    (system,) = validate({"compare": {"systems": [{"name": "Their system", **settings}]}}, "test").compare.systems
    text = system_cards.system_card(config, system, RESULT, "4 photos of the split test of Smallville")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {"tags": ["addressvlm", "image-geolocation", settings["kind"]], "license": "mit"}
    assert body.startswith("\n# Smallville: Their system\n")
    for part in [*texts, "Streets: somebody", "5 training photos", "encoder: mit", "5.0 MB", "250 ms"]:
        assert part in body
    assert "Percent on 4 photos of the split test of Smallville" in body
    assert "| A_ds | 50.0 | 25.0 to 75.0 |" in body
    assert "| A |" not in body
    assert "http" not in body


def test_every_kind_of_system_has_a_card_or_a_model() -> None:
    (union, _) = get_args(AnyBaseline)
    kinds = {kind for row in get_args(union) for kind in get_args(row.model_fields["kind"].annotation)}
    assert kinds == {settings["kind"] for settings, _ in SYSTEMS} | {"addressclip"}


@pytest.mark.parametrize("preset", ["demo-compare", "paper-compare"])
def test_systems_of_the_presets_have_cards_and_stand_after_those_that_they_need(config: Config, preset: str) -> None:
    compared = load(preset)
    before = [system.name for system in compared.train.systems]
    for system in compared.compare.systems:
        if not isinstance(system, AddressClipConfig):
            assert system.name in system_cards.system_card(config, system, RESULT, "test photos")
        if isinstance(system, PriorConfig):
            assert system.of in before
        before.append(system.name)


def test_no_licence_is_claimed_where_parts_differ_or_say_none(config: Config) -> None:
    (system,) = validate({"compare": {"systems": [{"name": "x", "kind": "retrieval"}]}}, "test").compare.systems
    for licences in ({}, {"encoder": "not stated"}, {"encoder": "mit", "model": "apache-2.0"}):
        head = system_cards.system_card(config, system, {**RESULT, "licences": licences}, "test photos").split("---\n")[1]
        assert "license" not in yaml.safe_load(head)


def test_the_dual_encoders_card_takes_metrics(config: Config, tmp_path: Path) -> None:
    system = AddressClipConfig(name="AddressCLIP", kind="addressclip")
    readme = tmp_path / "README.md"
    readme.write_text(addressclip.clip_card(config, system, 10, 1000), encoding="utf-8")
    assert "Not measured yet: `python ray_jobs/compare.py` writes them here." in readme.read_text(encoding="utf-8")
    for _ in range(2):
        cards.set_metrics(tmp_path, METRICS, "4 test photos")
    text = readme.read_text(encoding="utf-8")
    assert text.count("| A_ds | 50.0 | 25.0 to 75.0 |") == 1
    assert "Not measured" not in text
    assert text.index("## Training") < text.index("## Metrics") < text.index("## Use")
