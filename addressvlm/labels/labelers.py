"""Labelers, and rows of labels: alignment labels of grafted images, reasoning labels of street views."""

import base64
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import try_to_load_from_cache
from PIL import Image

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.grafting import decode_photo, display_image
from addressvlm.labels.facts import Facts, photo_facts
from addressvlm.labels.prompt import Prompt, configured_prompt
from addressvlm.labels.response_cache import RequestKey, ResponseCache
from addressvlm.labels.templates import explain, reason
from addressvlm.labels.validator import LabelValidator, Problem, make_validator
from addressvlm.pictures import orientation, to_rgb, upright
from addressvlm.questions import SUFFIXES, TEMPLATES
from addressvlm.storage.remote_path import path_of
from addressvlm.storage.shards import ShardResult

JPEG_QUALITY = 92  # of an image that is only resized
SENT_AS_IS = {"image/jpeg", "image/png", "image/webp", "image/gif"}  # formats that endpoints take
FALLBACK = "fallback:template"
NO_ANSWER = "no answer"  # problem of a row for which the endpoint keeps failing
# Settings that change what the model answers, and so are part of the cache key.
CACHE_KEY_SETTINGS = {
    "send_image", "image_pixels", "image_quality", "image_detail", "max_tokens", "temperature", "extra_body", "language",
}  # fmt: skip
LEVELS = {"graft": "alignment", "photo": "reasoning"}  # by what the prompt shows
# Kinds of problems that settings or the prompt may cause in every answer, whatever the photo shows.
SETTING_PROBLEMS = {"text", "language", "length", "form", "rating"}
FACTS_PIXELS = 168  # longer side of a photo whose facts are measured
CHECK_PIXELS = 42  # of an image that is only checked

Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One image to label, grafted or a street view: the row's id, its encoded bytes, its facts."""

    id: str
    image: bytes
    facts: Facts


@dataclass(frozen=True)
class Label:
    """A question about the image and the text that answers it, who wrote it, after how many attempts."""

    question: str
    text: str
    source: str  # template, <labeler>:<model> or fallback:template
    attempts: int
    problems: tuple[str, ...] = ()  # kinds of problems of the rejected texts, over all attempts


class Labeler(Protocol):
    """Writes labels."""

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """One label per request, in their order."""
        ...


def make_labeler(config: LabelsConfig, seed: int = 0, gazetteer: Gazetteer | None = None, base: str | None = None) -> Labeler:
    """The labeler that the settings name; gazetteer and base as for `state_factory`."""
    if config.labeler == "openai":
        from addressvlm.labels.request_scheduler import OpenAILabeler

        return OpenAILabeler(config, state_factory(config, seed, gazetteer, base))
    if config.labeler == "local":
        from addressvlm.labels.local_labeler import LocalLabeler

        return LocalLabeler(state_factory(config, seed, gazetteer, base), config)
    return TemplateLabeler(configured_prompt(config), seed)


def state_factory(
    config: LabelsConfig, seed: int = 0, gazetteer: Gazetteer | None = None, base: str | None = None
) -> Callable[[Request], "RetryState"]:
    """A function that makes the state of a row.

    Args:
        gazetteer: without it the validator knows fewer names.
        base: the model that learns from the labels; none of its special tokens may be in one.
    """
    prompt = configured_prompt(config)
    validator = make_validator(config, prompt, gazetteer, special_tokens(base) if base else ())
    return partial(RetryState, prompt=prompt, validator=validator, config=config, seed=seed)


@cache
def special_tokens(base: str) -> frozenset[str]:
    """Of a base model in a folder or in the hub's local cache; of others, where only the usual ones are refused, none."""
    try:
        cached = try_to_load_from_cache(base, "tokenizer.json") if base.count("/") == 1 else None
        file = Path(cached) if isinstance(cached, str) else path_of(base) / "tokenizer.json"
        tree = json.loads(file.read_text(encoding="utf-8"))
        return frozenset(token["content"] for token in tree["added_tokens"] if token["special"])
    except (OSError, ValueError, KeyError, TypeError, InputError):
        return frozenset()


def label_source(config: LabelsConfig) -> str:
    """The value of the column `source`; of a model in a local folder only the folder's name."""
    is_path = config.model.startswith(("/", ".", "~"))
    return f"{config.labeler}:{Path(config.model).name if is_path else config.model}"


class TemplateLabeler:
    """Puts facts into sentences; a row gets the same label in any order and on any machine."""

    def __init__(self, prompt: Prompt, seed: int) -> None:
        self.prompt, self.seed = prompt, seed

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """See Labeler."""
        return [template_label(request, self.prompt, self.seed) for request in requests]


def template_label(request: Request, prompt: Prompt, seed: int) -> Label:
    """The template's label of one row; its question is the same whoever writes the text."""
    rng = random.Random(f"{seed}:{request.id}")
    question = rng.choice(prompt.questions)
    text = explain(request.facts, rng) if prompt.shows == "graft" else reason(request.facts, rng, prompt.concludes)
    return Label(question, text, "template", 1)


class CachedLabeler:
    """Labels from cached answers, validated anew; sends nothing."""

    def __init__(self, new_state: Callable[[Request], "RetryState"], cache: ResponseCache) -> None:
        self._new_state, self._cache = new_state, cache

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """See Labeler."""
        labels = []
        for request in requests:
            label = self._new_state(request).replay(self._cache)
            if label is None:
                raise InputError(f"{self._cache.folder} lacks the answer for row {request.id}: rerun to resume.")
            labels.append(label)
        return labels


class RetryState:
    """One row: what to send next, until an answer is valid or `labels.max_attempts` are used up.

    A labeler sends `messages()`, passes the answer to `add_answer`, and repeats while that returns None. The state depends on
    the answers alone, so cached ones can be replayed.

    Attributes:
        attempts: answers so far.
    """

    def __init__(self, request: Request, prompt: Prompt, validator: LabelValidator, config: LabelsConfig, seed: int) -> None:
        self.request, self.prompt, self.validator, self.config, self.seed = request, prompt, validator, config, seed
        self.attempts = 0
        self.question = random.Random(f"{seed}:{request.id}").choice(prompt.questions)  # the one of `template_label`
        self.useless: str | None = None  # why no answer like the last one can become a label
        self._problems: list[str] = []  # kinds, over all attempts
        self._rejected: tuple[str, list[str]] | None = None  # the text of the last attempt, and its problems

    def messages(self) -> list[dict[str, Any]]:
        """OpenAI chat messages of the next attempt; after a rejected text they say what is wrong with it."""
        text = self.prompt.user_message(self.request.facts, self.question)
        retry = self.prompt.retry_message(self._rejected[1]) if self._rejected is not None else ""
        if retry and self.prompt.hide_rejected:
            text = f"{retry}\n\n{text}"
        content: str | list[dict[str, Any]] = text
        if self.config.send_image:
            url = {"url": data_url(self.request, self.config)}
            if self.config.image_detail != "auto":
                url["detail"] = self.config.image_detail
            content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": text}]
        messages = [*self.prompt.opening_messages(), {"role": "user", "content": content}]
        if self._rejected is not None and not self.prompt.hide_rejected:
            messages += [{"role": "assistant", "content": self._rejected[0]}, {"role": "user", "content": retry}]
        return messages

    def add_answer(self, text: str | None, refusal: str | None = None, unusable: str | None = None) -> Label | None:
        """The label of the row, None if another attempt is needed.

        Args:
            text: the answer; None or blank if there is none.
            refusal: why the endpoint or the model refuses to answer.
            unusable: a kind and a sentence, `limit: …`, why what came holds no text.

        Returns:
            The first valid text, or after the last attempt the template's, marked `fallback:template`.
        """
        self.attempts += 1
        text = (text or "").strip()
        self._rejected = self.useless = None
        if refusal or unusable or not text:
            self.useless = f"refused: {refusal}" if refusal else unusable or "empty: it has no text"
            self._problems.append(self.useless.partition(":")[0])
        elif problems := self._validated(text):
            self._problems += [problem.kind for problem in problems]
            self._rejected = (text, [problem.text for problem in problems])
            self.useless = next((f"{kind}: {why}" for kind, why in problems if kind in SETTING_PROBLEMS), None)
        else:
            return Label(self.question, text, label_source(self.config), self.attempts, tuple(self._problems))
        return self.fall_back() if self.attempts >= self.config.max_attempts else None

    def _validated(self, text: str) -> list[Problem]:
        """The problems of a text; one that the validator can't read is the fault of that text alone."""
        try:
            return self.validator.problems(text, self.request.facts)
        except Exception as error:
            return [Problem("text", f"it can't be read ({type(error).__name__})")]

    def fall_back(self, *problems: str) -> Label:
        """The template's label, marked as such; `problems` are added to those of the attempts."""
        text = template_label(self.request, self.prompt, self.seed).text
        return Label(self.question, text, FALLBACK, self.attempts, (*self._problems, *problems))

    def request_key(self) -> RequestKey:
        """The cache key of the next attempt."""
        config = self.config
        return RequestKey(
            id=self.request.id,
            prompt=self.prompt.version,
            model=label_source(config),
            settings=settings_digest(config, self.prompt.version),
            image=blake2b(self.request.image, digest_size=16).hexdigest(),
            digest=blake2b(self.prompt.user_message(self.request.facts, self.question).encode(), digest_size=16).hexdigest(),
            number=self.attempts + 1,
        )

    def replay(self, cache: ResponseCache, retry_failed: bool = False, key: RequestKey | None = None) -> Label | None:
        """Go through the cached answers of a new state; the label, None if the row needs another answer.

        Args:
            retry_failed: whether to send rows again for which the endpoint kept failing.
            key: `request_key()`, where it is already computed.
        """
        key = key or self.request_key()
        while (answer := cache.get(key)) is not None and not (retry_failed and answer.failure):
            if answer.failure is not None:
                return self.fall_back(NO_ANSWER)
            label = self.add_answer(answer.text, answer.refusal, answer.unusable)
            if label is not None:
                return label
            key = replace(key, number=self.attempts + 1)
        return None


def settings_digest(config: LabelsConfig, prompt_version: str) -> str:
    """Changes when the prompt, the model or what is sent with every row does; all answers before are to something else."""
    # The job's own vLLM server has another port each time.
    endpoint = [config.labeler, config.model, config.base_url if config.labeler == "openai" else None]
    sent = [endpoint, prompt_version, config.model_dump(include=CACHE_KEY_SETTINGS)]
    return blake2b(json.dumps(sent, sort_keys=True).encode(), digest_size=16).hexdigest()


def data_url(request: Request, config: LabelsConfig) -> str:
    """The row's image as a data URL, upright; resized or recompressed only if the settings say so."""
    try:
        with Image.open(io.BytesIO(request.image)) as image:
            kind, data = image.get_format_mimetype() or "", request.image
            limit = config.image_pixels
            resize = limit is not None and max(image.size) > limit
            rotated = orientation(image) != 1
            if resize or rotated or config.image_quality is not None or kind not in SENT_AS_IS:
                picture = to_rgb(upright(image))
                if limit is not None:
                    picture.thumbnail((limit, limit), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                picture.save(buffer, "JPEG", quality=config.image_quality or JPEG_QUALITY)
                kind, data = "image/jpeg", buffer.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"the image of row {request.id} can't be decoded ({error}): make the table again.") from None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def label_batch(
    labels: str, seed: int, gazetteer: str, response_cache: str, rows: Iterable[Row], base: str | None = None
) -> ShardResult:
    """Rows of GRAFTS to rows of ALIGNMENT, or, by a prompt that shows photos alone, rows of PHOTOS to rows of REASONING.

    Images that can't be decoded become rejects; labels are counted by source, rejected texts by problem. The labeler is kept
    between calls.

    Args:
        labels: a LabelsConfig as JSON.
        gazetteer: path of the city's gazetteer; without that file the validator knows fewer streets.
        response_cache: folder of the response cache that holds all answers; empty: the labeler writes the texts now.
        base: as for `state_factory`.
    """
    config = LabelsConfig.model_validate_json(labels)
    prompt, city = configured_prompt(config), load_gazetteer(gazetteer)
    pairs, rejects = label_requests(rows, prompt, city.city if city else "")
    results = _labeler(labels, seed, gazetteer, response_cache, base).label([request for _, request in pairs])
    counts = Counter(f"source {label.source}" for label in results)
    counts.update(f"problem {kind}" for label in results for kind in label.problems)
    labelled = [_label_row(row, label, config, prompt, seed) for (row, _), label in zip(pairs, results, strict=True)]
    return ShardResult({"train": labelled}, rejects, counts)


def label_requests(rows: Iterable[Row], prompt: Prompt, city: str) -> tuple[list[tuple[Row, Request]], list[Row]]:
    """Rows of GRAFTS or PHOTOS with their requests, and rows of REJECTS for those whose image can't be decoded."""
    pairs, rejects = [], []
    for row in rows:
        try:
            data = display_image(row)
            if prompt.shows == "graft":
                facts = Facts.from_json(row["facts"])
                decode_photo(data, CHECK_PIXELS)
            else:
                facts = photo_facts(row["street"], row["district"], decode_photo(data, FACTS_PIXELS), city)
            pairs.append((row, Request(row["id"], data, facts)))
        except InputError as error:
            rejects.append({"file": row["image"]["path"], "row": None, "id": row["id"], "reason": str(error)})
    return pairs, rejects


@cache
def load_gazetteer(path: str) -> Gazetteer | None:
    """The city's gazetteer, None if there is no such file."""
    return Gazetteer.load(path_of(path)) if path_of(path).is_file() else None


def _label_row(row: Row, label: Label, config: LabelsConfig, prompt: Prompt, seed: int) -> Row:
    """A row of ALIGNMENT or REASONING, without the hint; it begins with a question for the address if the settings say so."""
    rounds = []
    if config.ask_address:
        question = random.Random(f"{seed}:{row['id']}").choice(TEMPLATES[prompt.concludes])
        answer = row["district"] if prompt.concludes == "district" else Address(row["street"], row["district"]).text()
        rounds.append((prompt.concludes, "generation", f"{question} {SUFFIXES['generation']}", answer))
    rounds.append((LEVELS[prompt.shows], "explanation", label.question, label.text))
    return {
        **{key: row.get(key) for key in ("id", "place", "image", "tile", "street", "district")},
        "rounds": [
            {"level": level, "kind": kind, "question": question, "answer": answer, "options": []}
            for level, kind, question, answer in rounds
        ],
        "source": label.source,
        "attempts": label.attempts,
    }


@cache
def _labeler(labels: str, seed: int, gazetteer: str, response_cache: str, base: str | None) -> Labeler:
    config, city = LabelsConfig.model_validate_json(labels), load_gazetteer(gazetteer)
    if response_cache:
        return CachedLabeler(state_factory(config, seed, city, base), ResponseCache(path_of(response_cache)))
    return make_labeler(config, seed, city, base)
