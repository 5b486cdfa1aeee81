"""Photos with a prompt each, answered by a model behind an OpenAI-compatible endpoint.

Asking is that of the labels (addressvlm/labels/engine.py): so many requests in flight, tries again, limits, a budget and a
ledger in which every answer is kept, so that none is paid for twice. Pace, budget, image size and time-outs are the settings
`labels.*`; endpoint, model, length and temperature are the row's own.
"""

from collections.abc import Callable, Iterable, Iterator

from addressvlm.config_compare import RagConfig
from addressvlm.config_labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.attempts import Attempts
from addressvlm.labels.facts import Facts
from addressvlm.labels.ledger import writing
from addressvlm.labels.openai_labeler import OpenAILabeler
from addressvlm.labels.writer import Label, Request, writer
from addressvlm.stores import AnyPath

NAMED_HERE = {"labels.model": "model", "labels.base_url": "endpoint", "labels.labeler is openai": "the row has an endpoint"}
NOTHING = Facts("", "", ())


class _Words:
    """In place of a prompt file: the prompt is the row's own text."""

    version = "rag"
    afresh = False

    def opening(self) -> list[dict[str, str]]:
        return []

    def ask(self, _: Facts, text: str) -> str:
        return text


class _Asked(Attempts):
    """One photo: whatever comes back is the reply."""

    def __init__(self, request: Request, text: str, config: LabelsConfig) -> None:
        self.request, self.prompt, self.config, self.question = request, _Words(), config, text  # type: ignore[assignment]
        self.number, self._last = 0, None

    def take(self, text: str | None, refusal: str | None = None) -> Label:
        self.number += 1
        return Label(self.question, text or refusal or "", writer(self.config), self.number)

    def fall_back(self) -> Label:
        return Label(self.question, "", "no answer", self.number)


def replies(
    labels: LabelsConfig,
    row: RagConfig,
    photos: Iterable[tuple[str, bytes, str]],
    total: int,
    ledger: AnyPath,
    again: bool = False,
    show: Callable[[str], object] = print,
) -> dict[str, str | None]:
    """Photo -> the reply as it came, what was refused in the endpoint's words; None where there was none.

    Args:
        photos: id, encoded image and prompt.
        ledger: folder of the answers that are kept.
        again: ask once more about photos that the endpoint failed for.

    Raises:
        InputError: the endpoint refuses the key, the model or a request, or keeps failing; the budget is used up.
    """
    config = labels.model_copy(
        update={
            "labeler": "openai", "model": row.model, "base_url": row.endpoint, "max_tokens": row.max_new_tokens,
            "temperature": row.temperature, "send_image": True, "attempts": 1,
        }
    )  # fmt: skip
    ids: list[str] = []
    texts: dict[str, str] = {}
    found: dict[str, str | None] = {}

    def requests() -> Iterator[Request]:
        for photo, image, text in photos:
            ids.append(photo)
            texts[photo] = text
            yield Request(photo, image, NOTHING)

    def done(number: int, label: Label) -> None:
        found[ids[number]] = label.text or None

    def named(line: str) -> None:
        show(line.replace("label:", f"compare: {row.name}:"))

    try:
        with writing(ledger) as kept:
            asking = OpenAILabeler(config, lambda request: _Asked(request, texts[request.id], config), kept, named, again)
            asking.settle(requests(), total, done)
    except InputError as error:
        said = str(error)
        for there, here in NAMED_HERE.items():
            said = said.replace(there, here)
        raise InputError(f"'{row.name}': {said}") from None
    return {photo: found.get(photo) for photo in ids}
