"""One photo, many questions, each with the turns before it; the photo and the turns are read once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from addressvlm.answers import kinds
from addressvlm.answers.generation import Sampling, complete
from addressvlm.answers.model import Turn
from addressvlm.answers.priors import Prior
from addressvlm.answers.sight import Look, whole

if TYPE_CHECKING:
    from addressvlm.inference import Localizer


@dataclass(frozen=True)
class Reply:
    """An answer, and its probability where it follows from those of the addresses; None for a freely generated one."""

    text: str
    probability: float | None = None


class Conversation:
    """Questions about one photo.

    Questions about the address (which street, is it on …, options) are answered by its probabilities, so that they never
    contradict each other; all others by the model's own words, with what was said before.
    """

    def __init__(self, localizer: "Localizer", image: Image.Image, prior: Prior | None = None) -> None:
        self._localizer, self._image, self._prior = localizer, image, prior
        self._turns: list[Turn] = []
        self._look: Look | None = None

    def ask(self, question: str, max_tokens: int = 64, temperature: float = 0.0, remember: bool = True) -> Reply:
        """Answer a question; with `remember` it and its answer come before the next one."""
        first = not self._turns
        content = [{"type": "text", "text": question}]
        turns = [*self._turns, {"role": "user", "content": [{"type": "image"}, *content] if first else content}]
        city = self._localizer.gazetteer
        asked = kinds.read(question, city) if city and city.addresses else None
        if asked:
            reply = Reply(*asked.answer(self._localizer.beliefs([self._image], [self._prior])[0]))
        else:
            reply = Reply(self._generate(turns, Sampling(max_tokens, temperature)))
        if remember:
            self._turns = [*turns, {"role": "assistant", "content": [{"type": "text", "text": reply.text}]}]
        return reply

    def _generate(self, turns: list[Turn], sampling: Sampling) -> str:
        prompt = self._localizer.prompt(turns)
        prefix = self._localizer.read_one(prompt, [self._image], self._look)
        self._look = whole(prompt, prefix)
        return complete(self._localizer, prefix, sampling)[0].text
