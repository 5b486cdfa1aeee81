"""Requests of the model's thread without Ray, and their results."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serve as service
from addressvlm import InputError
from addressvlm.answers.address_distribution import Localization
from addressvlm.answers.generate import AnswerText, completion
from addressvlm.answers.types import Completion, Sampling
from serve.engine import Engine, Job
from serve.errors import ApiError
from serve.requests import ChatQuery, LocalizeQuery


def pixels(seed: int) -> np.ndarray:
    """A photo in a colour of its own, with some noise; no two seeds alike."""
    random = np.random.default_rng(seed)
    return (random.integers(0, 200, 3) + random.integers(0, 55, (40, 60, 3))).astype(np.uint8)


def chat_query(
    text: str, *photos: int, city: str = "toytown", before: Sequence[dict[str, Any]] = (), **sampling: Any
) -> ChatQuery:
    parts = [*[{"type": "image"}] * len(photos), {"type": "text", "text": text}]
    turns = [*before, {"role": "user", "content": parts}]
    return ChatQuery(city, turns, [pixels(seed) for seed in photos], Sampling(**{"max_tokens": 6, **sampling}))


def jobs_of(
    engine: Engine, prepare: Callable[..., Job], queries: Sequence[Any], put: Callable[[int, Any], None]
) -> dict[int, Job]:
    """The submitted jobs of queries that can be answered, by number; errors of others are put."""
    jobs = {}
    for number, query in enumerate(queries):
        try:
            jobs[number] = prepare(engine.cities.acquire(query.city), query, partial(put, number))
        except (InputError, ApiError) as error:
            put(number, error)
        else:
            engine.submit(jobs[number])
        engine.cities.release(query.city)
    return jobs


def localize(engine: Engine, queries: Sequence[LocalizeQuery]) -> list[Any]:
    """Results or errors, of jobs that wait together."""
    results: dict[int, Any] = {}
    jobs = jobs_of(engine, engine.prepare_localize, queries, results.__setitem__)
    while engine.turn():
        pass
    return [jobs[n].result(r) if isinstance(r := results[n], np.ndarray) else r for n in range(len(queries))]


def chat(engine: Engine, queries: Sequence[ChatQuery]) -> list[Any]:
    """Answers or errors, of jobs that wait together."""
    answers: list[Any] = [[[] for _ in range(query.sampling.n)] for query in queries]
    texts: dict[Any, AnswerText] = {}

    def put(number: int, result: Any) -> None:
        if isinstance(result, Exception):
            answers[number] = result
        elif isinstance(result, np.ndarray):
            answers[number] = [jobs[number].result(result)]
        else:
            for answer, token in result:
                if chunk := texts.setdefault(answer, AnswerText(answer)).add(token):
                    answers[number][chunk.index].append(chunk)

    jobs = jobs_of(engine, engine.prepare_chat, queries, put)
    while engine.turn():
        pass
    return [a if isinstance(a, Exception) else [completion(chunks) for chunks in a] for a in answers]


def same(result: Localization | Exception, single: Localization | Exception) -> None:
    assert isinstance(result, Localization)
    assert isinstance(single, Localization)
    assert (result.known, result.threshold) == (single.known, single.threshold)
    assert [c.street for c in result.candidates] == [c.street for c in single.candidates]
    assert [c.probability for c in result.candidates] == pytest.approx([c.probability for c in single.candidates], rel=1e-3)


def same_answers(result: Sequence[Completion], single: Sequence[Completion], about: Any = None) -> None:
    for one, other in zip(result, single, strict=True):
        assert replace(one, scores=()) == replace(other, scores=()), about
        assert [score.text for score in one.scores] == [score.text for score in other.scores]
        assert [s.log_p for s in one.scores] == pytest.approx([s.log_p for s in other.scores], abs=1e-4)


PIXELS = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def settings(systems: list[Path], **more: object) -> service.ServiceSettings:
    return service.ServiceSettings(cities=[str(system) for system in systems], dtype="float32", **more)
