"""The way of one row from the first ask to its label, without any network: what to send, what to make of the answer."""

import base64
import io
from typing import Any

from PIL import ExifTags, Image, ImageOps

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.labelers import Label, Request, question_of, template_label, writer
from addressvlm.labels.prompt import Prompt
from addressvlm.labels.validator import LabelValidator

JPEG_QUALITY = 92  # of an image that is only made smaller
SENT_AS_IS = {"image/jpeg", "image/png", "image/webp", "image/gif"}  # what endpoints take


class RetryState:
    """One row: asked until an answer is good or `labels.max_attempts` are used up.

    An engine sends `messages()`, hands what came back to `take`, and goes on while that is None. The answers alone decide
    what happens, so that a ledger of them can be replayed.

    Attributes:
        number: asks made so far.
    """

    def __init__(self, request: Request, prompt: Prompt, checker: LabelValidator, config: LabelsConfig, seed: int) -> None:
        self.request, self.prompt, self.checker, self.config, self.seed = request, prompt, checker, config, seed
        self.number = 0
        self.question = question_of(request, prompt, seed)
        self._kinds: list[str] = []  # of problems, over all asks
        self._last: tuple[str, list[str]] | None = None  # the text that failed last, and why

    def messages(self) -> list[dict[str, Any]]:
        """OpenAI chat messages of the next ask: the prompt, and after a bad text what is wrong with it, and that text itself.

        Raises:
            InputError: the image can't be decoded.
        """
        text = self.prompt.ask(self.request.facts, self.question)
        again = self.prompt.ask_again(self._last[1]) if self._last is not None else ""
        if again and self.prompt.afresh:
            text = f"{again}\n\n{text}"
        content: str | list[dict[str, Any]] = text
        if self.config.send_image:
            url = {"url": data_url(self.request, self.config)}
            if self.config.image_detail != "auto":
                url["detail"] = self.config.image_detail
            content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": text}]
        messages = [*self.prompt.opening(), {"role": "user", "content": content}]
        if self._last is not None and not self.prompt.afresh:
            messages += [{"role": "assistant", "content": self._last[0]}, {"role": "user", "content": again}]
        return messages

    def take(self, text: str | None, refusal: str | None = None) -> Label | None:
        """Judge the answer to one ask: a label, or None if the row must be asked again.

        Args:
            text: the answer; None or blank if there was none.
            refusal: why the endpoint or the model would not answer.

        Returns:
            The first good text, or after the last ask the template's, marked `fallback:template`.
        """
        self.number += 1
        text = (text or "").strip()
        if refusal or not text:
            self._kinds.append("refused" if refusal else "empty")
            self._last = None
        else:
            problems = self.checker.problems(text, self.request.facts)
            if not problems:
                return Label(self.question, text, writer(self.config), self.number, tuple(self._kinds))
            self._kinds += [problem.kind for problem in problems]
            self._last = (text, [problem.text for problem in problems])
        return self.fall_back() if self.number >= self.config.max_attempts else None

    def fall_back(self) -> Label:
        """The template's label, marked as such: what a row gets that no more is asked about."""
        spare = template_label(self.request, self.prompt, self.seed)
        return Label(self.question, spare.text, "fallback:template", self.number, tuple(self._kinds))


def data_url(request: Request, config: LabelsConfig) -> str:
    """The row's image as a data URL, made smaller or poorer only if the settings ask for it, upright.

    Raises:
        InputError: it is no image that can be decoded.
    """
    try:
        with Image.open(io.BytesIO(request.image)) as image:
            kind = image.get_format_mimetype() or ""
            limit = config.image_pixels
            smaller = limit is not None and max(image.size) > limit
            data = request.image
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if smaller or turned or config.image_quality is not None or kind not in SENT_AS_IS:
                picture = ImageOps.exif_transpose(image).convert("RGB")
                if limit is not None:
                    picture.thumbnail((limit, limit), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                picture.save(buffer, "JPEG", quality=config.image_quality or JPEG_QUALITY)
                kind, data = "image/jpeg", buffer.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"the image of row {request.id} can't be decoded ({error}): make the table again.") from None
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
