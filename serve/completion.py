"""Answers in the shapes that OpenAI clients expect: whole, or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from addressvlm.answers.texts import Completion, Piece, TokenScore
from serve.errors import in_words


class Reply:
    """The answers to one chat request.

    Args:
        model: the model's name.
        logprobs: whether they were asked for.
    """

    def __init__(self, model: str, logprobs: bool) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.logprobs = logprobs
        self.used = (0, 0)  # tokens read and written so far

    def whole(self, answers: Sequence[Completion]) -> dict[str, Any]:
        """A `chat.completion` object."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "finish_reason": answer.finish,
                "logprobs": self._logprobs(answer.scores),
            }
            for index, answer in enumerate(answers)
        ]
        self.used = answers[0].prompt_tokens, sum(answer.tokens for answer in answers)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": _usage(*self.used)}

    async def events(self, pieces: AsyncIterator[Piece], include_usage: bool) -> AsyncIterator[str]:
        """`chat.completion.chunk` events as the pieces come, then `[DONE]`; an error in between is an event too."""
        written: dict[int, int] = {}
        held: dict[int, str] = {}
        begun: set[int] = set()
        try:
            async for piece in pieces:
                if piece.index not in written:
                    yield self._chunk(piece.index, {"role": "assistant", "content": ""})
                written[piece.index] = piece.tokens
                self.used = piece.prompt_tokens, sum(written.values())
                text, held[piece.index] = _without_blanks(held.get(piece.index, ""), piece.text, piece.index not in begun)
                begun |= {piece.index} if text else set()
                if text or piece.scores:
                    yield self._chunk(piece.index, {"content": text}, scores=piece.scores)
                if piece.finish:
                    yield self._chunk(piece.index, {}, piece.finish)
        except Exception as error:
            yield f"data: {json.dumps(in_words(error).body())}\n\n"
            return
        if include_usage:
            yield self._event({"choices": [], "usage": _usage(*self.used)})
        yield "data: [DONE]\n\n"

    def _chunk(self, index: int, delta: dict[str, str], finish: str | None = None, scores: Sequence[TokenScore] = ()) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": finish,
            "logprobs": self._logprobs(scores) if scores else None,
        }
        return self._event({"choices": [choice]})

    def _event(self, body: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.head, 'object': 'chat.completion.chunk', **body})}\n\n"

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {**_token(score.text, score.log_p), "top_logprobs": [_token(text, log_p) for text, log_p in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None}


def _token(text: str, log_p: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(log_p, -9999.0), "bytes": list(text.encode())}  # -9999: no -Infinity in JSON


def _without_blanks(held: str, text: str, first: bool) -> tuple[str, str]:
    """What may be given away, and the blanks at the end that wait for more: as when a whole answer is stripped."""
    text = held + text
    text = text.lstrip() if first else text
    kept = text.rstrip()
    return kept, text[len(kept) :]


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
