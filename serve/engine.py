"""The model in one process: all cities of a replica on one base model, every request a job of the model's thread.

What needs no model is done before, in other threads: `Engine.prepare_localize` and `Engine.prepare_chat` check a request and
make its tensors. The model's thread takes turns: a batch of photos is scored, waiting chats begin, every answer that is being
written gets its next token. So no request waits for another one's last token.
"""

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from addressvlm import InputError
from addressvlm.answers.address_distribution import AddressDistribution, Localization
from addressvlm.answers.chat_model import PreparedPrompt, input_size
from addressvlm.answers.generate import Answer, Decoder, Token
from addressvlm.answers.question_parser import ParsedQuestion, parse_question
from addressvlm.answers.types import TextChunk
from addressvlm.inference import PREFILL_TOKENS, Localizer
from addressvlm.models.loading import context_length
from addressvlm.questions import ADDRESS_QUESTION
from serve.cities import City
from serve.city_models import CityModels
from serve.errors import ApiError, overloaded
from serve.metrics import ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings

GPU_CACHE_SHARE = 0.4  # of the memory free after loading, for the caches of chats; twice that while answers join
CPU_CACHE_SHARE = 0.25  # of the machine's memory
ADDRESS_TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ADDRESS_QUESTION}]}]

Tokens = list[tuple[Answer, Token]]


@dataclass(eq=False)
class Job:
    """A request for the model's thread, prepared.

    Attributes:
        put: called in the model's thread with the scores of all addresses, float64 (addresses,), or with the new tokens of
            each turn, or with the exception that ends the job.
        answers: to be written; without any, addresses are scored.
        weights: of the addresses, see `Localizer.address_weights`.
        result: makes of the scores what the caller gets.
    """

    localizer: Localizer
    prompt: PreparedPrompt
    put: Callable[[Any], None]
    answers: Sequence[Answer] = ()
    weights: np.ndarray = field(default_factory=lambda: np.empty(0))
    result: Callable[[np.ndarray], Any] = field(default=lambda scores: scores)
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled = True
        for answer in self.answers:
            answer.cancelled = True


class Engine:
    """Answers for the loaded cities.

    Attributes:
        cities: their localizers.
        image_size: longer side of the model's input in pixels.
        context_length: of the model, in tokens.
        cache_tokens: how many tokens may be in the key-value caches of all chats together.
        failure: why the process can't be used any more.

    Raises:
        InputError: the model can't be loaded.
    """

    def __init__(self, settings: ServiceSettings, cities: Sequence[City], metrics: ServiceMetrics | None = None) -> None:
        self.settings, self.metrics = settings, metrics or ServiceMetrics()
        self.cities = CityModels(settings, cities, self.call)
        self.model = self.cities.model
        self.image_size = input_size(self.cities.processor.image_processor)
        self.context_length = context_length(self.model) or 2**20
        self.cache_tokens = self._cache_tokens()
        self.decoder = Decoder()
        self.failure: Exception | None = None
        self._wake = threading.Condition()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._photos: deque[Job] = deque()
        self._chats: deque[Job] = deque()
        self._jobs: dict[Answer, Job] = {}
        self._turn_began: float | None = None
        self._thread: threading.Thread | None = None

    # ---- requests, in any thread

    def prepare_localize(self, localizer: Localizer, query: LocalizeQuery, put: Callable[[Any], None]) -> Job:
        """The job whose result is a `Localization`. InputError: no gazetteer, or the prior excludes all of it."""
        gazetteer = localizer.require_gazetteer()
        weights = localizer.address_weights(query.prior)
        threshold = localizer.calibration.threshold if query.threshold is None else query.threshold

        def result(scores: np.ndarray) -> Localization:
            distribution = AddressDistribution(gazetteer.addresses, scores / localizer.calibration.temperature + weights)
            return distribution.localization(query.top_k, threshold)

        (prompt,) = localizer.prepare_questions([Image.fromarray(query.pixels)], [ADDRESS_QUESTION])
        return Job(localizer, prompt, put, weights=weights, result=result)

    def prepare_chat(self, localizer: Localizer, query: ChatQuery, put: Callable[[Any], None]) -> Job:
        """The job of a conversation; the result of one about the address is a list of one `TextChunk`.

        Raises:
            InputError: the prompt is longer than the model's context.
            ApiError: 503, its answers need more memory than there is.
        """
        images, text = [Image.fromarray(pixels) for pixels in query.images], localizer.prompt(query.messages)
        question = self._address_question(localizer, query)
        if question:
            (prompt,) = localizer.prepare_questions(images, [ADDRESS_QUESTION])
            image_tokens = len(prompt) - len(localizer.tokenizer(localizer.prompt(ADDRESS_TURN))["input_ids"])
            length = image_tokens + len(localizer.tokenizer(text)["input_ids"])
        else:
            prompt = localizer.prepare(text, images)
            length = len(prompt)
        if length >= self.context_length:
            raise InputError(
                f"The conversation has {length} tokens and the model reads {self.context_length}: send a shorter one."
            )
        max_tokens = min(query.sampling.max_tokens, self.context_length - length)
        if question:
            result = _exact_answer(localizer, question, length, max_tokens)
            return Job(localizer, prompt, put, weights=localizer.address_weights(None), result=result)
        sampling = replace(query.sampling, max_tokens=max_tokens)
        needed = sampling.n * (length + max_tokens)
        if needed > self.cache_tokens:
            message = f"{needed:,} tokens in {sampling.n} answers are more than the {self.cache_tokens:,} that fit in memory"
            raise ApiError(503, f"{message}: ask for fewer or shorter answers.", code="overloaded")
        answers = [Answer(localizer, sampling, length, index) for index in range(sampling.n)]
        return Job(localizer, prompt, put, answers)

    def submit(self, job: Job) -> None:
        """Give a job to the model's thread."""
        with self._wake:
            (self._chats if job.answers else self._photos).append(job)
            self._wake.notify()

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that changes the model, called between two turns of the model's thread."""
        if self._thread is None:
            return function()
        future: Future[Any] = Future()
        with self._wake:
            self._calls.append((function, future))
            self._wake.notify()
        return future.result()

    def check_health(self) -> None:
        """RuntimeError if the device failed, or a turn takes longer than a request may."""
        began, limit = self._turn_began, self.settings.request_s
        if self.failure:
            raise RuntimeError(f"the model's device or thread failed: {self.failure}")
        if began is not None and time.monotonic() - began > limit:
            raise RuntimeError(f"the model's thread has been in one turn for more than {limit:g} s")

    # ---- the model's thread

    def start(self) -> None:
        """Start the model's thread; until then whoever calls `turn` is it."""
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        size, wait_s = self.settings.batch_size, self.settings.batch_wait_s
        while not self.failure:
            with self._wake:
                self._wake.wait_for(lambda: self._calls or self._photos or self._chats or len(self.decoder))
                if not (len(self.decoder) or self._calls):
                    self._wake.wait_for(lambda: max(len(self._photos), len(self._chats)) >= size or self._calls, wait_s)
            self._turn_began = time.monotonic()
            try:
                self.turn()
            except Exception as error:
                self.failure = error
            self._turn_began = None
        self._fail(list(dict.fromkeys(self._jobs.values())), overloaded())
        while True:  # whatever comes until Ray Serve has replaced the replica
            with self._wake:
                self._wake.wait_for(lambda: self._calls or self._photos or self._chats)
                for _, future in self._calls:
                    future.set_exception(overloaded())
                self._calls.clear()
            self._fail([*self._take(self._photos, 2**20), *self._take(self._chats, 2**20)], overloaded())

    def turn(self) -> bool:
        """Score a batch of photos, begin chats, and write a token of every answer; whether there was anything to do."""
        calls = self._calls
        while calls:
            function, future = calls.popleft()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        scored, began = self._score_photos(), self._begin_chats()
        return self._write() or scored or began

    def _score_photos(self) -> bool:
        jobs = self._take(self._photos, self.settings.batch_size)
        if not jobs:
            return False

        def score(some: list[Job]) -> None:
            prompts, owners = [job.prompt for job in some], [job.localizer for job in some]
            scores = owners[0].score_prompts(prompts, owners, [job.weights for job in some])
            for job, row in zip(some, scores, strict=True):
                job.put(row)

        with self._timed("localize", len(jobs)):
            self._attempt(score, jobs)
        return True

    def _begin_chats(self) -> bool:
        """Prefill waiting chats as far as there is room in the cache, in the order they came."""
        joining: list[tuple[int, int]] = []
        jobs: list[Job] = []
        with self._wake:
            while self._chats:
                job = self._chats[0]
                lengths = [(len(job.prompt), job.answers[0].sampling.max_tokens)] * len(job.answers)
                full = sum(len(job.prompt) for job in jobs) + len(job.prompt) > PREFILL_TOKENS and jobs
                if not job.cancelled and (full or self.decoder.cached_tokens(joining + lengths) > self.cache_tokens):
                    break
                self._chats.popleft()
                if not job.cancelled:
                    jobs.append(job)
                    joining += lengths
        if not jobs:
            return False

        def begin(some: list[Job]) -> None:
            owners = [job.localizer for job in some]
            for rows, state in owners[0].prefill_prompts([job.prompt for job in some], owners):
                answers = [(row, answer) for row, i in enumerate(rows) for answer in some[i].answers]
                self._jobs |= {answer: some[i] for i in rows for answer in some[i].answers}
                try:
                    tokens = self.decoder.join(state.rows([row for row, _ in answers]), [answer for _, answer in answers])
                except torch.OutOfMemoryError as error:  # they have begun, so there is no second try
                    self._fail([some[i] for i in rows], self._for_caller(error))
                else:
                    self._put(tokens)

        with self._timed("prefill", len(jobs)):
            self._attempt(begin, jobs)
        return True

    def _write(self) -> bool:
        """The next token of every answer."""
        count = len(self.decoder)
        if not count:
            return False
        try:
            with self._timed("chat", count):
                self._put(self.decoder.step())
        except Exception as error:
            self.decoder = Decoder()
            self._fail(list(dict.fromkeys(self._jobs.values())), self._for_caller(error))
        return True

    def _put(self, tokens: Tokens) -> None:
        """Hand tokens to their jobs, and forget answers that ended or that nobody waits for."""
        by_job: dict[Job, Tokens] = defaultdict(list)
        for answer, token in tokens:
            by_job[self._jobs[answer]].append((answer, token))
            if not answer.live:
                del self._jobs[answer]
        for job, some in by_job.items():
            job.put(some)
        for answer in [answer for answer in self._jobs if answer.cancelled]:
            del self._jobs[answer]

    def _attempt(self, work: Callable[[list[Job]], None], jobs: list[Job]) -> None:
        """Do the work for jobs together; in halves if there is not enough memory."""
        try:
            work(jobs)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            if len(jobs) == 1:
                return self._fail(jobs, self._for_caller(error))
            half = len(jobs) // 2
            self._attempt(work, jobs[:half])
            self._attempt(work, jobs[half:])
        except Exception as error:
            self._fail(jobs, self._for_caller(error))

    def _for_caller(self, error: Exception) -> Exception:
        """The error that a job gets; one of the device ends the process."""
        if isinstance(error, torch.AcceleratorError):
            self.failure = error
            return overloaded()
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return ApiError(503, "The model's device has no memory left for this: send fewer images.", code="overloaded")
        return error

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            job.cancel()
            for answer in job.answers:
                self._jobs.pop(answer, None)
            job.put(error)

    def _take(self, queue: deque[Job], count: int) -> list[Job]:
        """The first jobs of a queue that somebody waits for."""
        jobs: list[Job] = []
        with self._wake:
            while queue and len(jobs) < count:
                if not queue[0].cancelled:
                    jobs.append(queue[0])
                queue.popleft()
        return jobs

    def _timed(self, kind: str, size: int) -> Any:
        self.metrics.observe("addressvlm_batch_size", size, kind)
        return self.metrics.time("addressvlm_model_seconds", kind)

    def _cache_tokens(self) -> int:
        """Tokens of chats that may be in key-value caches together."""
        text, cuda = self.model.config.get_text_config(), self.model.device.type == "cuda"
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token_bytes = 2 * text.num_hidden_layers * heads * head_dim * self.model.dtype.itemsize
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = torch.cuda.mem_get_info()[0] * GPU_CACHE_SHARE if cuda else memory * CPU_CACHE_SHARE
        return int((self.settings.chat_memory_mb * 2**20 or free) // token_bytes)

    def warm_up(self) -> None:
        """Answer about a grey photo, alone and on a GPU also as a full batch, so that the first callers need not wait."""
        city = next(iter(self.cities.cities))
        localizer = self.cities.acquire(city)
        pixels = np.full((self.image_size, self.image_size, 3), 128, np.uint8)
        for size in {1, self.settings.batch_size if self.model.device.type == "cuda" else 1}:
            images = [Image.fromarray(pixels + np.uint8(number % 100)) for number in range(size)]
            if localizer.gazetteer and localizer.gazetteer.addresses:
                localizer.address_scores(images)
            localizer.answer(images, ["?"] * size, max_new_tokens=2)
        localizer.photo_caches.clear()
        self.cities.release(city)

    def _address_question(self, localizer: Localizer, query: ChatQuery) -> ParsedQuestion | None:
        """The query as a question about the address, if the address distribution is to answer it."""
        gazetteer, sampling = localizer.gazetteer, query.sampling
        greedy = sampling.temperature == 0 and sampling.n == 1 and sampling.logprobs is None and not sampling.stop
        if not (self.settings.exact_answers and greedy and gazetteer and gazetteer.addresses and len(query.images) == 1):
            return None
        text = " ".join(part["text"] for part in query.messages[-1]["content"] if part["type"] == "text")
        return parse_question(text, gazetteer)


def _exact_answer(
    localizer: Localizer, question: ParsedQuestion, prompt_tokens: int, max_tokens: int
) -> Callable[[np.ndarray], list[TextChunk]]:
    """From the scores of all addresses to the answer."""

    def result(scores: np.ndarray) -> list[TextChunk]:
        distribution = AddressDistribution(localizer.require_gazetteer().addresses, localizer.calibration.apply(scores))
        text = question.answer(distribution)[0]
        ids = localizer.answer_tokens(ADDRESS_TURN, text)
        if len(ids) <= max_tokens:
            return [TextChunk(0, text, "stop", (), prompt_tokens, len(ids))]
        return [TextChunk(0, localizer.decode(ids[:max_tokens]), "length", (), prompt_tokens, max_tokens)]

    return result
