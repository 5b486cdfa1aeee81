"""Alignment labels written by a model behind an OpenAI-compatible endpoint.

The key comes from OPENAI_API_KEY and from nowhere else.
"""

import asyncio
import base64
import os
from collections.abc import Sequence
from typing import Any, cast

import openai

from addressvlm.config_labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.checks import Checker
from addressvlm.labels.prompt import load_prompt
from addressvlm.labels.writer import Label, Request, template_label

GIVE_UP_AFTER = 16  # requests in a row that failed for good without one success between them


class OpenAILabeler:
    """Asks the endpoint for every label, checks what comes back, asks again with the reason, falls back to the template."""

    def __init__(self, config: LabelsConfig, seed: int, streets: Sequence[str] = ()) -> None:
        """Prepare the client; nothing is sent yet.

        Raises:
            InputError: the key is missing.
        """
        key = os.environ.get("OPENAI_API_KEY") or ("none" if config.base_url else "")
        if not key:
            raise InputError(
                "OPENAI_API_KEY is not set and labels.labeler is openai: set it where the job runs, or use template."
            )
        self.config, self.seed = config, seed
        self._checker = Checker(streets)
        self._prompt = load_prompt()
        self._failures = 0
        self._runner = asyncio.Runner()
        self._client = openai.AsyncOpenAI(
            api_key=key, base_url=config.base_url, timeout=config.timeout_s, max_retries=config.retries
        )

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """Label images, `concurrency` at a time; the order is kept.

        Raises:
            InputError: the endpoint refuses the key, the model or the request, or keeps failing.
        """
        return self._runner.run(self._all(requests))

    async def _all(self, requests: Sequence[Request]) -> list[Label]:
        room = asyncio.Semaphore(self.config.concurrency)

        async def one(request: Request) -> Label:
            async with room:
                return await self._one(request)

        tasks = [asyncio.ensure_future(one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:  # after a refusal nothing more is asked
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, request: Request) -> Label:
        """One label: up to `attempts` texts are asked for, the first good one is taken."""
        fallback = template_label(request, self.seed, source="fallback:template")
        picture = "data:image/jpeg;base64," + base64.b64encode(request.image).decode()
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": self._prompt.system},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture}},
                    {"type": "text", "text": self._prompt.ask(request.facts, fallback.question)},
                ],
            },
        ]
        attempt = 0
        for attempt in range(1, self.config.attempts + 1):
            text = await self._ask(messages)
            if text is None:
                break
            problems = self._checker.problems(text, request.facts)
            if not problems:
                return Label(fallback.question, text, f"openai:{self.config.model}", attempt)
            again = self._prompt.ask_again(problems)
            messages = [*messages[:2], {"role": "assistant", "content": text}, {"role": "user", "content": again}]
        return Label(fallback.question, fallback.text, fallback.source, attempt)

    async def _ask(self, messages: list[dict[str, Any]]) -> str | None:
        """The endpoint's text, None if it failed although it was tried again."""
        try:
            answer = await self._client.chat.completions.create(
                model=self.config.model,
                messages=cast(Any, messages),
                max_tokens=self.config.max_tokens,
            )
        except (openai.APITimeoutError, openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
            self._failures += 1
            if self._failures >= GIVE_UP_AFTER:
                raise InputError(
                    f"{self._client.base_url} keeps failing ({_sentence(error)}): run the same command again later."
                ) from None
            return None
        except openai.APIError as error:
            raise InputError(
                f"{self._client.base_url} refuses the request ({_sentence(error)}): check OPENAI_API_KEY, labels.model and "
                "labels.base_url."
            ) from None
        self._failures = 0
        return (answer.choices[0].message.content or "").strip() if answer.choices else ""


def _sentence(error: openai.APIError) -> str:
    """What the server said, short."""
    status = getattr(error, "status_code", None)
    body = error.body if isinstance(error.body, dict) else {}
    said = " ".join(str(body.get("message") or error.message).split())[:300]
    return f"{status}: {said}" if status else said
