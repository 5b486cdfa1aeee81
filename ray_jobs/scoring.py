"""The steps of evaluate that need no generated answer: scores of addresses, calibration, the ways of answering compared."""

import json
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from addressvlm import InputError, tables
from addressvlm.addresses import GAZETTEER, Gazetteer
from addressvlm.answers import calibration
from addressvlm.answers.calibration import Calibration
from addressvlm.config import Config
from addressvlm.evaluation import modes
from addressvlm.evaluation.scores import scored
from addressvlm.run import DONE, is_done, slug, writing
from addressvlm.stores import AnyPath, path_of
from ray_jobs.asking import Holder, scores_of

VALIDATION, TRAINING = "val", "train"

Row = dict[str, Any]


def gazetteer_of(model: str, city: Gazetteer) -> Gazetteer:
    """The model's own gazetteer, else the city's."""
    own = path_of(model) / GAZETTEER
    return Gazetteer.load(own) if own.is_file() else city


def calibrated_on(config: Config, data: AnyPath) -> dict[str, list[str]]:
    """Split -> the photos to calibrate on, drawn by seed; nothing if there are no validation photos or none are wanted."""
    if not (config.evaluate.calibrate_on and tables.count(data, VALIDATION)):
        return {}
    return {split: _drawn(config, data, split) for split in (VALIDATION, TRAINING)}


def _drawn(config: Config, data: AnyPath, split: str) -> list[str]:
    ids = tables.read(data, split, ["id"])["id"].to_pylist()
    drawn = set(random.Random(config.seed).sample(ids, min(config.evaluate.calibrate_on, len(ids))))
    return [photo for photo in ids if photo in drawn]


def score(
    config: Config, folder: AnyPath, name: str, model: str, data: AnyPath, wanted: Mapping[str, Sequence[str]], made_from: Row,
    city: Gazetteer, redo: bool, scorer: type[Holder] | None = None,
) -> dict[str, list[Row]]:  # fmt: skip
    """One system's rows of SCORES for each split of `wanted` (split -> ids), from scores/<slug> or new.

    Splits that are there already are kept, whoever wanted them. `scorer` holds the model where it is no vision-language model.

    Raises:
        InputError: neither the model nor the data has a gazetteer, or the folder was made otherwise.
    """
    folder = folder / "scores" / slug(name)
    counts = {split: len(ids) for split, ids in wanted.items()}
    before = {} if redo or not (folder / DONE).is_file() else json.loads((folder / DONE).read_text())
    held = before.get("photos", {})
    missing = [split for split in wanted if split not in held]
    kept = {split: before[split] for split in held if split in before}
    settings = {**kept, **made_from, "photos": {**held, **counts}}
    if not is_done(folder, _without(missing, settings), redo) or missing:
        if not gazetteer_of(model, city).addresses:
            raise InputError(f"neither {model} nor {data} holds a {GAZETTEER}: addresses can't be scored without their names.")
        files = [file for split in missing for file in tables.files(data, split)]
        ids = [photo for split in missing for photo in wanted[split]]
        found = {row["id"]: row for row in scores_of(config, name, model, files, ids, city, scorer)}
        rows = {split: list(tables.rows(folder, split)) for split in held}
        rows |= {split: [found[photo] for photo in wanted[split]] for split in missing}
        with writing(folder, settings) as partial:
            for split, of_split in rows.items():
                tables.write(partial, split, of_split, tables.SCORES)
    return {split: list(tables.rows(folder, split)) for split in wanted}


def _without(splits: Collection[str], settings: Row) -> Row:
    """The settings of the other splits alone."""
    photos = {split: count for split, count in settings["photos"].items() if split not in splits}
    return {**{key: value for key, value in settings.items() if key not in splits}, "photos": photos}


def calibrate(config: Config, name: str, model: str, rows: Mapping[str, Sequence[Row]], city: Gazetteer) -> Calibration:
    """Fit a trained model's calibration and leave it in its folder.

    Args:
        rows: of SCORES, of the photos of `calibrated_on`.

    Raises:
        InputError: no photo has an address that the model knows, or the folder can't be written.
    """
    validation, training = (scored(rows[split], gazetteer_of(model, city)) for split in (VALIDATION, TRAINING))
    fitted = calibration.fit(validation, config.evaluate.precision, training.scores)
    try:
        fitted.save(path_of(model))
    except OSError as error:
        raise InputError(f"{model} can't be written ({error.strerror}): set evaluate.calibrate_on=0 to go without.") from error
    before, after = (fitted.measured["ece"][when] for when in ("before", "after"))
    sure = f"sure above {fitted.threshold:.2f}" if fitted.threshold < calibration.NEVER else "never sure enough"
    prior = "divided by the model's own prior, " if fitted.own_prior else ""
    print(
        f"evaluate: {name}: calibrated on {fitted.measured['photos']:,} photos, {prior}temperature {fitted.temperature:.2f}, "
        f"calibration error {before:.2f} -> {after:.2f}; for {fitted.target:.0%} right answers {sure}",
        flush=True,
    )
    return fitted


def compare(
    config: Config, out: AnyPath, name: str, model: str, rows: Sequence[Row], answered: Mapping[str, Sequence[Row]],
    city: Gazetteer,
) -> Row:  # fmt: skip
    """The ways of answering of one model side by side, also written to modes.json."""
    settings = modes.Settings(config.evaluate.bootstrap, config.seed)
    ids = {row["id"] for row in rows}
    same = {mode: [row for row in given if row["id"] in ids] for mode, given in answered.items()}
    found = modes.compare(rows, gazetteer_of(model, city), Calibration.load(path_of(model)), same, settings)
    found = {"system": name, **found}
    (out / "modes.json").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return found
