"""The text in an answer of a model: reasoning is cut off, parts are joined; where no text is left, the reason.

Models and servers mark reasoning in many ways: `<think>` (DeepSeek, Qwen, whose template may have written the opening tag),
`[THINK]` (Magistral), `◁think▷` (Kimi), `<|START_THINKING|>` (Cohere), channels (gpt-oss, Gemma 4), fields of their own (vLLM,
Ollama, OpenRouter), parts of the content (Mistral). Cutting takes linear time.
"""

import re
from typing import Any, NamedTuple

_REASONING = (
    r"(?:[a-z]+:)?(?:inner_)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|analysis|scratch_?pad|monologue)"
)
_MARK = re.compile(
    rf"(?i)(?P<opening><\s?{_REASONING}(?:\s[^<>]{{0,200}})?>|\[think(?:ing)?\]|◁\s?think\s?▷"
    rf"|<\|(?:begin[_ ]of[_ ]|start_)?{_REASONING}\|>|<\|channel>\s?(?:thought|analysis)|<details[^<>]{{0,200}}>"
    r"|```(?:think|thinking|thoughts?|reasoning)\b)"
    rf"|<\s?/\s?{_REASONING}\s?>|\[/think(?:ing)?\]|◁\s?/\s?think\s?▷|<\|(?:/|end[_ ](?:of[_ ])?){_REASONING}\|>"
    r"|<channel\|>|</details>|```"
)
_CHANNEL = re.compile(r"<\|channel\|>\s?(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
_PLAIN_CHANNELS = re.compile(r"(?s)(?:assistant)?(?:analysis|commentary)(?=[^\s.,]).*assistant\s?final")  # markers were removed
_PLAIN_ANALYSIS = re.compile(r"(?:assistant)?analysis(?=[A-Z])")
_WRAPPER = re.compile(
    r"(?is)<(answer|response|output|final|label|solution)>(.*?)(?:</\1>)?|<\|(?:begin_of_|start_)(?:box|solution|response)\|>"
    r"(.*?)(?:<\|end_(?:of_)?(?:box|solution|response)\|>)?"
)
REASONING_FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
LIMIT_REACHED = {"length", "max_tokens", "model_length", "max_output_tokens"}
MAX_COUNT = 10**8  # tokens of one request; more is no count


class ParsedAnswer(NamedTuple):
    """What a model's answer holds; at most one field is set, none if it is empty.

    Attributes:
        unusable: why there is no text: a kind and a sentence, `limit: …`.
    """

    text: str | None = None
    refusal: str | None = None
    unusable: str | None = None


def cut_reasoning(text: str) -> tuple[str, bool]:
    """The text without reasoning, whatever marks it, and whether there was any."""
    if "&lt;" in text:
        text = text.replace("&lt;", "<").replace("&gt;", ">")
    whole = text
    if channels := list(_CHANNEL.finditer(text)):
        final = next((match for match in reversed(channels) if match[1].lower() == "final"), None)
        body = text[final.end() :] if final else ""
        text = body[: end.start()] if (end := _MESSAGE_END.search(body)) else body
    elif match := _PLAIN_CHANNELS.match(text):
        text = text[match.end() :]
    elif _PLAIN_ANALYSIS.match(text):
        text = ""
    parts: list[str] = []
    position, opened_by = 0, ""  # of the text that is kept next; the kind of mark that began the reasoning
    for mark in _MARK.finditer(text):
        kind = "```" if mark[0].startswith("```") else "tag"
        if mark["opening"] and not opened_by:
            parts.append(text[position : mark.start()])
            opened_by = kind
        elif not mark["opening"] and opened_by == kind:
            position, opened_by = mark.end(), ""
        elif not mark["opening"] and not opened_by and kind == "tag":  # the prompt opened it
            parts, position = [], mark.end()
    kept = "".join([*parts, "" if opened_by else text[position:]]).strip()
    if wrapped := _WRAPPER.fullmatch(kept):
        kept = (wrapped[2] or wrapped[3] or "").strip()
    return kept, kept != whole.strip()


def completion_text(response: Any, max_tokens: int) -> ParsedAnswer:
    """The text of a chat completion as an endpoint sent it, of any shape.

    Args:
        response: decoded JSON.
        max_tokens: of the request, for the sentence.
    """
    choices = response.get("choices") if isinstance(response, dict) else None
    if choices == []:
        return ParsedAnswer()
    choice = choices[0] if isinstance(choices, list) else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return ParsedAnswer(unusable="shape: it has no choices[0].message, as a chat completion has")
    content, refusal, reasoned = _join_parts(message.get("content"))
    finish = str(choice.get("finish_reason") or "").lower()
    if finish == "content_filter":
        return ParsedAnswer(refusal="content filter")
    if refusal := refusal or str(message.get("refusal") or ""):
        return ParsedAnswer(refusal=refusal)
    if content is None:
        return ParsedAnswer(unusable="shape: its content is neither text nor a list of parts")
    text, was_cut = cut_reasoning(content)
    if text:
        return ParsedAnswer(text)
    return no_text(
        reasoned or was_cut or any(message.get(field) for field in REASONING_FIELDS),
        finish in LIMIT_REACHED,
        max_tokens,
        calls_tool=bool(message.get("tool_calls") or message.get("function_call")),
    )


def no_text(reasoned: bool, limit_reached: bool, max_tokens: int, calls_tool: bool = False) -> ParsedAnswer:
    """The answer where nothing is left after the reasoning."""
    if limit_reached:
        used_up = "was used up by reasoning" if reasoned else "was reached"
        return ParsedAnswer(
            unusable=f"limit: labels.max_tokens={max_tokens} {used_up} before the text began: raise labels.max_tokens, or "
            "switch reasoning off with labels.extra_body"
        )
    if calls_tool:
        return ParsedAnswer(unusable="shape: it calls a tool instead of writing a text")
    if reasoned:
        return ParsedAnswer(
            unusable="reasoning: it is reasoning and no text: raise labels.max_tokens, switch reasoning off with "
            "labels.extra_body, or check the server's reasoning parser"
        )
    return ParsedAnswer()


def token_counts(usage: Any) -> tuple[int, int]:
    """Input and output tokens by the endpoint's count, 0 where it gives none that can be true."""
    counts = usage if isinstance(usage, dict) else {}

    def count(name: str) -> int:
        value = counts.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
            return 0  # NaN is in no range
        return int(value)

    return count("prompt_tokens"), count("completion_tokens")


def _join_parts(content: Any) -> tuple[str | None, str, bool]:
    """The text of a message's content, None if it can't be one; a refusal in its parts; whether a part is reasoning."""
    if content is None or isinstance(content, str):
        return content or "", "", False
    texts, refusals, reasoned = [], [], False
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            return None, "", False
        elif part.get("type") == "refusal" or isinstance(part.get("refusal"), str):
            refusals.append(str(part.get("refusal") or part.get("text") or "refused"))
        elif str(part.get("type")).startswith(("reason", "think", "redacted_think")) or "thinking" in part:
            reasoned = True
        else:
            text = part.get("text")
            text = text.get("value") if isinstance(text, dict) else text
            if not isinstance(text, str):
                return None, "", False
            texts.append(text)
    return "".join(texts), " ".join(refusals), reasoned
