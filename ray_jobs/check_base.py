#!/usr/bin/env python
"""Check a base model on your own tiles before labels are paid for: does it read names, match photos, tell colours apart?

    python ray_jobs/check_base.py --config my_city.yaml
    python ray_jobs/check_base.py --config my_city.yaml --model Qwen/Qwen2.5-VL-3B-Instruct --places 60
    OPENAI_API_KEY=… python ray_jobs/check_base.py --config my_city.yaml --model gpt-4o --endpoint https://api.openai.com/v1

Reads <run>/photos (made if it is not there), asks seven questions a place, writes <run>/base_check/<model>.json and prints
shares of right answers with 95 % intervals and what stage 1 can be expected to give. Without --endpoint the model runs here.
"""

import base64
import json
import os
import random
from collections.abc import Sequence

from PIL import Image

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.city import TilesConfig
from addressvlm.evaluation.base_check import CANDIDATES, CHANCE, Answer, CheckedPlace, check_base, verdict
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.grafting import decode_photo, encode_jpeg
from addressvlm.labels.api_client import KEY
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, slug
from addressvlm.tiles.renderer import TileRenderer
from ray_jobs import common, graft, prepare

COLUMNS = ["id", "place", "lat", "lon", "street", "main_street", "image"]
BATCH = 16  # questions at a time
MAX_TOKENS = 48
JPEG_QUALITY = 92  # of what an endpoint sees


def run_step(config: Config, model: str, endpoint: str | None, places: int) -> dict[str, object]:
    """Ask, write the result and print it.

    Raises:
        InputError: there are too few places, nothing to draw tiles from, or the model can't be used.
    """
    run = Run(config)
    prepare.run_step(config)
    checked = checked_places(config, run, places)
    answer = ask_endpoint(endpoint, model) if endpoint else ask_model(config, model)
    shares = check_base(checked, answer, Gazetteer.load(run.gazetteer).streets, config.tiles.delta, config.seed)
    result = {"model": model, "endpoint": endpoint, "places": len(checked), "shares": shares, "verdict": verdict(shares)}
    file = run.folder / "base_check" / f"{slug(model)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    for name, share in shares.items():
        if share["value"] is None:
            print(f"{name:20} nothing to ask about")
            continue
        value, low, high = (100 * float(share[end] or 0) for end in ("value", "low", "high"))
        print(f"{name:20} {value:5.1f} % ({low:.0f} to {high:.0f}), by chance {100 * CHANCE[name]:.0f} %; n = {share['n']}")
    print(f"{result['verdict']}\n{file}", flush=True)
    return result


def checked_places(config: Config, run: Run, count: int) -> list[CheckedPlace]:
    """Places of the split train drawn by seed, a photo of each, with their tiles."""
    files, tiles = graft.sources(config, run)
    settings = TilesConfig.model_validate_json(tiles)
    named = TileRenderer(*files, settings)
    bare = TileRenderer(*files, settings.model_copy(update={"names": False}))
    photo_of = {row["place"]: row["id"] for row in tables.iter_rows(run.photos, "train", ["id", "place"])}
    drawn = set(random.Random(config.seed).sample(sorted(photo_of), max(0, min(count, len(photo_of)))))
    chosen = []
    for row in tables.iter_rows(run.photos, "train", COLUMNS):
        place, street = row["place"], row["main_street"]
        if place in drawn and photo_of[place] == row["id"]:
            tile, without_names = (renderer.tile(row["lat"], row["lon"], street) for renderer in (named, bare))
            photo = decode_photo(row["image"]["bytes"])
            chosen.append(CheckedPlace(place, street, photo, tile.image, without_names.image, tile.names))
    streets = {place.street for place in chosen}
    if min((sum(place.street != street for place in chosen) for street in streets), default=0) < CANDIDATES - 1:
        raise InputError(f"{len(chosen)} places of {len(streets)} streets are too few to match photos with: raise --places.")
    return chosen


def ask_model(config: Config, model: str) -> Answer:
    """A model on this machine."""
    from addressvlm.inference import Localizer

    localizer = Localizer(model, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code, memory_mb=0)

    def answer(images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        batches = [slice(start, start + BATCH) for start in range(0, len(images), BATCH)]
        return [text for batch in batches for text in localizer.answer(images[batch], questions[batch], MAX_TOKENS)]

    return answer


def ask_endpoint(endpoint: str, model: str) -> Answer:
    """A model behind an OpenAI-compatible endpoint, which may need no key; one request a question."""
    import openai

    client = openai.OpenAI(base_url=endpoint, api_key=os.environ.get(KEY) or "none")

    def answer(images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        answers = []
        for image, question in zip(images, questions, strict=True):
            url = "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image.convert("RGB"), JPEG_QUALITY)).decode()
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
            try:
                response = client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": content}], max_tokens=MAX_TOKENS, temperature=0,
                )  # fmt: skip
            except openai.OpenAIError as error:
                raise InputError(f"{endpoint} does not answer for {model} ({' '.join(str(error).split())[:200]}).") from error
            answers.append(response.choices[0].message.content or "")
        return answers

    return answer


def main(argv: list[str] | None = None) -> None:
    parser = common.job_parser(__doc__)
    parser.add_argument(
        "--model", metavar="MODEL", help="folder or hub name, or the endpoint's name of it (default: model.base)"
    )
    parser.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server instead of this machine")
    parser.add_argument("--places", type=int, default=40, help="how many are asked about (default: 40)")
    args = parser.parse_args(argv)
    config = common.load_config(args)
    common.connect()
    run_step(config, args.model or config.model.base, args.endpoint, args.places)


if __name__ == "__main__":
    common.run_main(main)
