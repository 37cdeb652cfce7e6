"""`Worker`: a thread that runs the requests of one model in an engine, and delivers their text as it is made."""

import dataclasses
import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from nextllm_jax.config import SamplingConfig
from nextllm_jax.inference.llm import LLM
from nextllm_jax.inference.request import FinishReason, Request, TokenLogprob
from nextllm_jax.inference.scheduler import Scheduler
from nextllm_jax.inference.score import prompt_scores
from nextllm_jax.inference.stream import TextRow
from nextllm_jax.serving.metrics import ModelMetrics
from nextllm_jax.sharding import on_mesh

CHUNK_TOKENS = 8
"""Tokens per row between two deliveries. Requests join, and are cancelled, between them."""

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """There is no room for the rows of a request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """What is new in a row."""

    text: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    """Those of the prompt's tokens except the first; they come once, before any text."""
    num_tokens: int = 0
    """Number of new tokens of the row so far, including those that are in no text, such as stop tokens."""
    finish_reason: FinishReason | None = None
    """None: more follows, unless the row has failed."""
    failed: bool = False
    """The row ended because the engine failed."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """A row of a request to the server. `deliver` is called in the worker's thread."""

    request: Request
    row: TextRow
    deliver: Callable[[Update], None]
    scores_prompt: bool = False
    """Deliver the log probabilities of the prompt's tokens."""
    generates: bool = True
    """False: generate no tokens, and deliver only the log probabilities of the prompt."""
    number: int | None = None
    """The scheduler's number of the request."""
    ended: bool = False
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    first_time: float | None = None
    """When its first tokens came."""
    first_tokens: int = 0
    """Number of these tokens."""


class Worker:
    """Runs rows in `num_slots` slots of `max_length` tokens; at most `max_waiting` others wait.

    With `warm_up`, it first compiles all programs that requests can need; otherwise those of one short request. Rows
    get slots in the order in which they came. After an exception in a step, the rows in slots end with an error, and
    those that wait go on in a new engine.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        num_slots: int,
        max_length: int,
        max_waiting: int,
        metrics: ModelMetrics,
        warm_up: bool = False,
    ) -> None:
        self._llm, self._num_slots, self._metrics = llm, num_slots, metrics
        self.max_length = min(max_length, llm.config.context_length)
        self.max_rows = num_slots + max_waiting
        """Limit on the rows that run and wait."""
        self._num_rows = 0
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._scoring: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}
        self._closing = False
        metrics.slots.set(num_slots)
        self._scheduler: Scheduler | None = self._new_scheduler()
        self._answer_once(self._scheduler)
        if warm_up:
            self._scheduler.engine.warm_up()
        self._thread = threading.Thread(target=self._run, name="nextllm worker", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def check(self, request: Request) -> None:
        """Raise InputError if the model cannot process a request."""
        scheduler = self._scheduler
        if scheduler is not None:
            scheduler.engine.check(request)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Add the rows of a request. Raises QueueFull if not all of them fit."""
        with self._lock:
            if self._num_rows + len(jobs) > self.max_rows:
                raise QueueFull
            self._num_rows += len(jobs)
        for job in jobs:
            self._inbox.put(functools.partial(self._admit, job))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End rows; their slots are free after the next chunk. Does nothing for those that have ended."""
        for job in jobs:
            if not job.ended:
                self._inbox.put(functools.partial(self._cancel, job))

    def close(self, timeout_seconds: float) -> None:
        """End the thread after the current chunk."""
        self._inbox.put(self._close)
        self._thread.join(timeout_seconds)

    def _close(self) -> None:
        self._closing = True

    def _run(self) -> None:
        while not self._closing:
            if not self._advance():
                self._restart()
            self._metrics.observe(self._scheduler, len(self._scoring))

    def _advance(self) -> bool:
        """Handle the inbox and run a chunk; False if the engine has failed."""
        try:
            self._handle_inbox()
            self._work()
        except Exception:
            _log.exception("the engine failed; its requests get an error, and a new engine takes over")
            return False
        return True

    def _handle_inbox(self) -> None:
        """Admit and cancel rows as asked since the last chunk; if no row runs, wait for the next call."""
        idle = not self._scoring and (self._scheduler is None or self._scheduler.done)
        try:
            while not self._closing:
                self._inbox.get(block=idle)()
                idle = False
        except queue.Empty:
            pass

    def _work(self) -> None:
        """Score one prompt, if there is one, and generate a chunk of each row."""
        if self._scoring:
            self._score(self._scoring.popleft())
        if self._scheduler is None or self._scheduler.done:
            return
        speeds = self._scheduler.engine.speeds
        for number, output in self._scheduler.advance(CHUNK_TOKENS).items():
            job, now = self._jobs[number], time.perf_counter()
            before = len(job.row.tokens)
            text = job.row.push(output)
            if job.first_time is None:
                job.first_time, job.first_tokens = now, len(job.row.tokens)
                self._metrics.first_token.observe(now - job.submitted)
            logprobs = (job.row.logprobs or [])[before:]
            reason = job.row.finish_reason
            if reason is not None:
                self._end(job)
            job.deliver(Update(text=text, logprobs=logprobs, num_tokens=len(job.row.tokens), finish_reason=reason))
        self._metrics.count(self._scheduler.engine.speeds - speeds)

    def _admit(self, job: Job) -> None:
        if job.ended:
            return
        self._metrics.prompt_tokens.inc(len(job.request.tokens))
        if job.scores_prompt:
            self._scoring.append(job)
        else:
            self._schedule(job)

    def _schedule(self, job: Job) -> None:
        try:
            scheduler = self._scheduler = self._scheduler or self._new_scheduler()
            job.number = scheduler.submit(job.request)
            self._jobs[job.number] = job
        except Exception:
            _log.exception("a request could not be given to the engine")
            self._fail(job)

    def _score(self, job: Job) -> None:
        """Deliver the log probabilities of a prompt, whose row then waits for a slot."""
        try:
            with on_mesh(self._llm.mesh):
                scores = prompt_scores(
                    self._llm.model,
                    self._llm.params,
                    job.request.tokens,
                    top=job.request.top_logprobs or 0,
                    vocab_size=self._llm.tokenizer.vocab_size,
                )
        except Exception:
            _log.exception("a prompt could not be scored")
            self._fail(job)
            return
        if job.generates:
            job.deliver(Update(prompt_logprobs=scores))
            self._schedule(job)
        else:
            self._end(job)
            job.deliver(Update(prompt_logprobs=scores, finish_reason="length"))

    def _cancel(self, job: Job) -> None:
        if not job.ended:
            if job in self._scoring:
                self._scoring.remove(job)
            self._end(job)

    def _end(self, job: Job) -> None:
        """Free what a row holds."""
        job.ended = True
        if job.number is not None:
            self._jobs.pop(job.number, None)
            if self._scheduler is not None:
                self._scheduler.cancel(job.number)
        with self._lock:
            self._num_rows -= 1
        further = len(job.row.tokens) - job.first_tokens
        if job.first_time is not None and further > 0:
            self._metrics.per_token.observe((time.perf_counter() - job.first_time) / further)

    def _restart(self) -> None:
        """End the rows that the failed engine ran, and give the others to a new one."""
        scheduler, self._scheduler = self._scheduler, None
        waiting = set(scheduler.waiting) if scheduler is not None else set()
        scheduler = None  # its memory must be free before there is another
        jobs, self._jobs = self._jobs, {}
        for number, job in jobs.items():
            if number in waiting:
                self._schedule(job)
            else:
                self._fail(job)

    def _fail(self, job: Job) -> None:
        job.number = None
        self._end(job)
        job.deliver(Update(num_tokens=len(job.row.tokens), failed=True))

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self._llm.engine(self._num_slots, self.max_length))

    def _answer_once(self, scheduler: Scheduler) -> None:
        """Run a short request, so a model that cannot run fails at the start."""
        prompt = [*self._llm.tokenizer.encode_prompt("")] * 2
        scheduler.submit(Request(tokens=prompt, max_new_tokens=2, sampling=SamplingConfig(temperature=0)))
        while not scheduler.done:
            scheduler.advance(CHUNK_TOKENS)
