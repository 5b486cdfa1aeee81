"""The HTTP schema: the model of every request and response body; FastAPI documents them at /openapi.json."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from addressvlm.answers.address_distribution import Circle, Prior
from addressvlm.answers.types import Sampling

MAX_TOP_K = 50
MAX_NAMES = 1000  # streets or districts of one prior
MAX_MESSAGES = 64
MAX_CHOICES = 8
MAX_STOPS = 4
LEAST_TEMPERATURE = 0.01  # below it answers are greedy: logits divided by less overflow
Name = Annotated[str, Field(min_length=1, max_length=200)]
Stop = Annotated[str, Field(max_length=200)]


# ---- requests to /v1/localize


class StrictRequest(BaseModel):
    """A request whose unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CircleFields(StrictRequest):
    """A rough position."""

    lat: float = Field(ge=-90, le=90)
    lon: float = Field(ge=-180, le=180)
    radius_m: float = Field(ge=1, le=1e6)
    soft: bool = Field(False, description="weight streets by their distance instead of excluding those outside")


class PriorFields(StrictRequest):
    """Prior knowledge of the place; all given parts apply together."""

    districts: list[Name] = Field([], max_length=MAX_NAMES)
    streets: list[Name] = Field([], max_length=MAX_NAMES)
    circle: CircleFields | None = None
    weights: dict[Name, Annotated[float, Field(ge=0)]] = Field({}, max_length=MAX_NAMES, description="street -> weight")

    def prior(self) -> Prior:
        """The prior that the model takes."""
        circle = Circle(**self.circle.model_dump()) if self.circle else None
        return Prior(tuple(self.districts), tuple(self.streets), circle, self.weights or None)


class LocalizeFields(StrictRequest):
    """The options of a localization, without the photo."""

    city: str | None = Field(None, max_length=200, description="id of a city; needed if the service has several")
    prior: PriorFields | None = None
    top_k: int | None = Field(None, ge=1, le=MAX_TOP_K, description="number of candidates, default 5")
    threshold: float | None = Field(None, ge=0, le=1, description="confidence above which the address counts as known")


class LocalizeRequest(LocalizeFields):
    """A localization as JSON."""

    image: str = Field(description="base64, a data URL, or a web address of a host that this service allows")


class LocalizeForm(LocalizeFields):
    """A localization as multipart/form-data."""

    file: str = Field(description="JPEG, PNG or WebP", json_schema_extra={"format": "binary"})
    prior: str = Field("", description="the prior as JSON")  # type: ignore[assignment]


# ---- requests to /v1/chat/completions


class LenientRequest(BaseModel):
    """A request whose unknown fields are ignored, as OpenAI's clients send many."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ImageUrl(LenientRequest):
    """An image of a message."""

    url: str = Field(description="a data URL, or a web address of a host that this service allows")
    detail: str | None = None


class Part(LenientRequest):
    """Text or an image."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None


def _content_parts(content: Any) -> Any:
    """A plain text or null as a list of parts."""
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(LenientRequest):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_content_parts, json_schema_input_type=str | list[Part] | None)] = []


class StreamOptions(LenientRequest):
    """What a stream reports besides the text."""

    include_usage: bool = False


class ChatRequest(LenientRequest):
    """An OpenAI chat request. Parameters that would change the answer but are not supported are errors, others are ignored."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="default 0, the likeliest answer (OpenAI's default is 1)")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    top_p: float | None = Field(None, gt=0, le=1)
    response_format: dict[str, Any] | None = None
    # Not supported: only values that change nothing are accepted
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    repetition_penalty: float | None = Field(None, ge=1, le=1)
    top_k: int | None = Field(None, ge=-1, le=0)
    min_p: float | None = Field(None, ge=0, le=0)
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None

    def sampling(self, max_tokens: int) -> Sampling:
        """The sampling parameters, with at most `max_tokens` tokens per answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=min(self.max_completion_tokens or self.max_tokens or max_tokens, max_tokens),
            temperature=temperature if (temperature := self.temperature or 0.0) >= LEAST_TEMPERATURE else 0.0,
            top_p=self.top_p or 1.0,
            n=self.n or 1,
            stop=[stop for stop in stops if stop],
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            seed=self.seed,
        )


# ---- responses


class Answer(BaseModel):
    """A response with exactly these fields."""

    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class ErrorBody(Answer):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(Answer):
    """The OpenAI error object."""

    error: ErrorBody


class AddressAnswer(Answer):
    """An address."""

    street: str
    district: str


class CandidateAnswer(AddressAnswer):
    """A candidate address with a point on its street and the street's shape as GeoJSON geometry."""

    probability: float
    lat: float | None
    lon: float | None
    geometry: dict[str, Any] | None


class LocalizeAnswer(Answer):
    """Where a photo was taken; `address` is null if the confidence is not above the threshold, and `reason` says why."""

    known: bool
    reason: str | None
    confidence: float
    threshold: float
    address: AddressAnswer | None
    candidates: list[CandidateAnswer]
    city: str
    model: str
    request_id: str


class CityAnswer(Answer):
    """A city of the service, with the size of its gazetteer."""

    id: str
    name: str
    model: str
    streets: int
    districts: int
    addresses: int


class CityList(Answer):
    """All cities of the service."""

    object: Literal["list"] = "list"
    data: list[CityAnswer]


class SampleAnswer(Answer):
    """A photo to try."""

    id: int
    url: str


class SampleList(Answer):
    """Photos of a city that training never saw, if the run that the model is from has any."""

    object: Literal["list"] = "list"
    data: list[SampleAnswer]


class ModelAnswer(Answer):
    """A model for chats."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "addressvlm"


class ModelList(Answer):
    """All models of the service, one per city."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class Health(Answer):
    """The number of model replicas that run."""

    status: Literal["ok"] = "ok"
    replicas: int


class Usage(Answer):
    """Token counts of a chat."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(Answer):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(Answer):
    """One of the answers."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class ChatCompletion(Answer):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
