"""What a server counts and measures, for Prometheus. No text of a request is in it."""

import dataclasses

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from nextllm_jax.inference.scheduler import Scheduler
from nextllm_jax.inference.speeds import Speeds

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclasses.dataclass(frozen=True)
class ModelMetrics:
    """The metrics of one model. The worker's thread updates them."""

    waiting: Gauge
    slots: Gauge
    slots_used: Gauge
    cache_used: Gauge
    prompt_tokens: Counter
    read_tokens: Counter
    new_tokens: Counter
    first_token: Histogram
    per_token: Histogram

    def observe(self, scheduler: Scheduler | None, num_scoring: int) -> None:
        """Set the gauges to what a worker does now."""
        waiting, running, used = num_scoring, 0, 0.0
        if scheduler is not None:
            engine = scheduler.engine
            waiting, running = waiting + len(scheduler.waiting), scheduler.num_running
            used = engine.positions_used / (engine.num_slots * engine.max_length)
        self.waiting.set(waiting)
        self.slots_used.set(running)
        self.cache_used.set(used)

    def count(self, speeds: Speeds) -> None:
        """Add the tokens of a step."""
        self.read_tokens.inc(speeds.prefill_tokens)
        self.new_tokens.inc(speeds.decode_tokens)


class Metrics:
    """The metrics of a server."""

    def __init__(self) -> None:
        disable_created_metrics()
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("nextllm_requests", "Answered requests", ["endpoint", "status"], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"nextllm_{name}", text, ["model"], registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"nextllm_{name}", text, ["model"], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"nextllm_{name}", text, ["model"], buckets=buckets, registry=registry)

        self._of_models = {
            "waiting": gauge("waiting_rows", "Rows that wait for a slot"),
            "slots": gauge("slots", "Slots of the engine"),
            "slots_used": gauge("slots_used", "Slots in which a row runs"),
            "cache_used": gauge("cache_used_ratio", "Part of the cache's positions that running rows use"),
            "prompt_tokens": counter("prompt_tokens", "Tokens of prompts"),
            "read_tokens": counter("prompt_tokens_read", "Tokens of prompts that were not in the cache yet"),
            "new_tokens": counter("new_tokens", "Generated tokens"),
            "first_token": histogram(
                "time_to_first_token_seconds", "From the request to its first tokens", _FIRST_TOKEN_SECONDS
            ),
            "per_token": histogram("time_per_token_seconds", "Seconds per token after the first chunk", _TOKEN_SECONDS),
        }

    def of_model(self, name: str) -> ModelMetrics:
        """The metrics of a model."""
        return ModelMetrics(**{key: metric.labels(name) for key, metric in self._of_models.items()})

    def count_request(self, endpoint: str, status: int) -> None:
        """Count an answered request."""
        self._requests.labels(endpoint, str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
