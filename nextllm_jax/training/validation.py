"""The validation loss of a run, at the steps at which it is evaluated."""

import functools
import logging
from collections.abc import Iterable, Iterator

from nextllm_jax.data.loader import validation_batches
from nextllm_jax.distributed.signals import StopRequest
from nextllm_jax.evaluation.evaluate import evaluate
from nextllm_jax.model.objective import Batch
from nextllm_jax.progress import phase
from nextllm_jax.sharding import padded_size, sharding
from nextllm_jax.training.session import Moment, Session

_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """A stop was requested during an evaluation."""


def validate(session: Session, at: Moment) -> float | None:
    """The validation loss, after it is written to metrics.jsonl and reported; None if a stop is requested meanwhile."""
    session.pause()
    config, start = session.config, session.start
    split = start.dataset.split("validation")
    batches = validation_batches(
        split,
        sequence_length=config.data.sequence_length,
        batch_size=padded_size(config.training.evaluation_batch_size, "batch"),
        sharding=sharding(start.mesh, "batch", "seq"),
    )
    eval_step = functools.partial(start.program.eval_step, frozen=at.state.frozen)
    try:
        with phase(f"evaluating step {at.step}"):
            found = evaluate(
                eval_step, at.state.evaluated_params, _until_stopped(batches, session.stop), split.num_bytes
            )
    except _Stopped:
        return None
    values = {"loss": found.loss, "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    session.writer.validation({"step": at.step, **values, **session.meter.totals()})
    bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits per byte"
    _log.info(f"step {at.step}: validation loss {found.loss:.4f}, perplexity {found.perplexity:.2f}{bits}")
    return found.loss


def _until_stopped(batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
    for batch in batches:
        if stop.reached():
            raise _Stopped
        yield batch
