"""The model behind the HTTP front: one Localizer per replica, requests answered in batches as they come together."""

import asyncio
import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from ray import serve

from addressvlm import InputError
from serve.settings import model_name

GAZETTEER = "gazetteer.geojson"


@dataclass(frozen=True)
class Question:
    """One prompt of a conversation, as the model is to go on with it."""

    messages: list[dict[str, Any]]  # parts {"type": "image"} stand for the images, in order
    images: list[Image.Image]
    max_tokens: int
    temperature: float

    def plain(self) -> str | None:
        """The text, if this is one question about one image: the case that is answered in batches."""
        kinds = [part["type"] for message in self.messages for part in message["content"]]
        if len(self.messages) == 1 and self.messages[0]["role"] == "user" and kinds == ["image", "text"]:
            return self.messages[0]["content"][1]["text"]
        return None


@serve.deployment(name="Localizer")
class LocalizerDeployment:
    """Holds the model; everything that computes runs in one thread, so that health checks are answered meanwhile."""

    def __init__(self, folder: str, dtype: str, batch_size: int, batch_wait_s: float) -> None:
        from addressvlm.inference import Localizer

        self.localizer = Localizer(folder, dtype=dtype)
        self.folder = Path(folder)
        self.thread = ThreadPoolExecutor(1)
        for batched in (self._localize, self._answer):
            batched.set_max_batch_size(batch_size)
            batched.set_batch_wait_timeout_s(batch_wait_s)

    async def card(self) -> dict[str, Any]:
        """What the front tells about the model: its name, its city, and the city's map as GeoJSON text or None."""
        gazetteer = self.folder / GAZETTEER
        text = None
        if gazetteer.is_file():
            text = json.dumps(json.loads(gazetteer.read_text(encoding="utf-8")), ensure_ascii=False, separators=(",", ":"))
        city = self.localizer.gazetteer.city if self.localizer.gazetteer else None
        return {"model": model_name(self.folder), "city": city, "map": text}

    async def localize(self, image: Image.Image, top_k: int) -> list[dict[str, Any]]:
        """The likeliest addresses, best first, as {street, district, probability}.

        Raises:
            InputError: the model's folder has no gazetteer.
        """
        return _result(await self._localize((image, top_k)))

    async def answer(self, question: Question) -> dict[str, Any]:
        """The answer as {text, prompt_tokens, completion_tokens, finish}.

        Raises:
            InputError: the prompt is longer than the model's context.
        """
        return _result(await self._answer(question))

    @serve.batch
    async def _localize(self, requests: list[tuple[Image.Image, int]]) -> list[Any]:
        return await self._in_thread(lambda: [_attempt(self._candidates, *request) for request in requests])

    @serve.batch
    async def _answer(self, questions: list[Question]) -> list[Any]:
        return await self._in_thread(self._answers, questions)

    async def _in_thread(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *args)

    def _candidates(self, image: Image.Image, top_k: int) -> list[dict[str, Any]]:
        return [asdict(candidate) for candidate in self.localizer.localize(image, top_k)]

    def _answers(self, questions: list[Question]) -> list[Any]:
        """One result or exception a question: plain ones that share their settings go together, the rest one by one."""
        results: list[Any] = [None] * len(questions)
        together = defaultdict(list)
        for at, question in enumerate(questions):
            room = _attempt(self._room, question)
            if isinstance(room, Exception):
                results[at] = room
            elif question.plain() is None:
                results[at] = _attempt(self._chat, question, *room)
            else:
                together[room[1], question.temperature].append((at, room[0]))
        for (max_tokens, temperature), rows in together.items():
            asked = [questions[at] for at, _ in rows]
            texts = _attempt(
                self.localizer.answer, [q.images[0] for q in asked], [q.plain() for q in asked], max_tokens, temperature
            )
            for row, (at, prompt_tokens) in enumerate(rows):
                failed = isinstance(texts, Exception)
                results[at] = texts if failed else self._finished(texts[row], prompt_tokens, max_tokens)
        return results

    def _chat(self, question: Question, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        text = self.localizer.chat(question.messages, question.images, max_tokens, question.temperature)
        return self._finished(text, prompt_tokens, max_tokens)

    def _room(self, question: Question) -> tuple[int, int]:
        """Tokens of the prompt, its images included, and how many the answer may have."""
        processor = self.localizer.processor
        prompt = processor.apply_chat_template(question.messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=question.images or None, return_tensors="pt")
        used = inputs["input_ids"].shape[1]
        context = getattr(self.localizer.model.config.get_text_config(), "max_position_embeddings", None) or used + 2**20
        if used >= context:
            raise InputError(f"The conversation has {used} tokens and the model reads {context}: send a shorter one.")
        return used, min(question.max_tokens, context - used)

    def _finished(self, text: str, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        count = len(self.localizer.tokenizer(text, add_special_tokens=False)["input_ids"])
        finish = "length" if count >= max_tokens else "stop"
        return {"text": text, "prompt_tokens": prompt_tokens, "completion_tokens": count, "finish": finish}


def _attempt(work: Any, *args: Any) -> Any:
    """The result, or the exception as a value: one bad request must not fail those that came together with it."""
    try:
        return work(*args)
    except Exception as error:
        return error


def _result(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value
