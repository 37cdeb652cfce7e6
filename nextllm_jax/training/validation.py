"""The validation loss of a run, at the steps at which it is evaluated."""

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence

from nextllm_jax.data.loader import validation_batches
from nextllm_jax.data.mixture import Source
from nextllm_jax.distributed.signals import StopRequest
from nextllm_jax.evaluation.evaluate import Evaluation, evaluate
from nextllm_jax.model.objective import Batch, perplexity
from nextllm_jax.progress import phase
from nextllm_jax.sharding import padded_size, sharding
from nextllm_jax.training.evaluations import evaluations
from nextllm_jax.training.session import Moment, Session

_log = logging.getLogger(__name__)


class _Stopped(Exception):
    """A stop was requested during an evaluation."""


def validate(session: Session, at: Moment) -> float | None:
    """The validation loss, after it is written to metrics.jsonl and reported; None if a stop is requested meanwhile.

    That of several sources is the mean by their weights. Other evaluations that are due are written with it.
    """
    session.pause()
    sources = session.start.sources
    try:
        with phase(f"evaluating step {at.step}"):
            found = [_evaluate(session, at, source) for source in sources]
            others: dict[str, float] = {}
            for results in evaluations(session.start, at.step, at.state):
                others |= results
                if session.stop.reached():
                    raise _Stopped
    except _Stopped:
        return None
    loss = _mean(sources, [each.loss for each in found])
    bits = [each.bits_per_byte for each in found if each.bits_per_byte is not None]
    bits_per_byte = _mean(sources, bits) if len(bits) == len(sources) else None
    values = {"loss": loss, "perplexity": perplexity(loss), "bits_per_byte": bits_per_byte}
    for source, each in zip(sources, found, strict=True):
        if source.name:
            values |= {f"loss/{source.name}": each.loss, f"bits_per_byte/{source.name}": each.bits_per_byte}
    session.writer.validation({"step": at.step, **values, **others, **session.meter.totals()})
    _log.info(
        f"step {at.step}: validation loss {loss:.4f}, perplexity {values['perplexity']:.2f}{_in_bits(bits_per_byte)}"
    )
    for source, each in zip(sources, found, strict=True):
        if source.name:
            _log.info(f"  {source.name}: validation loss {each.loss:.4f}{_in_bits(each.bits_per_byte)}")
    for name, value in others.items():
        _log.info(f"  {name} {value:.4f}")
    return loss


def _evaluate(session: Session, at: Moment, source: Source) -> Evaluation:
    """The evaluation of a source's whole validation split. Raises _Stopped."""
    config, start, split = session.config, session.start, source.dataset.split("validation")
    batches = validation_batches(
        split,
        sequence_length=config.data.sequence_length,
        batch_size=padded_size(config.training.evaluation_batch_size, "batch"),
        sharding=sharding(start.mesh, "batch", "seq"),
    )
    eval_step = functools.partial(start.program.eval_step, frozen=at.state.frozen)
    return evaluate(eval_step, at.state.evaluated_params, _until_stopped(batches, session.stop), split.num_bytes)


def _mean(sources: Sequence[Source], values: Sequence[float]) -> float:
    """The mean by the weights of the sources. Of a single source it is exactly its value."""
    if len(sources) == 1:
        return values[0]
    weighted = sum(source.weight * value for source, value in zip(sources, values, strict=True))
    return weighted / sum(source.weight for source in sources)


def _in_bits(bits_per_byte: float | None) -> str:
    return "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits per byte"


def _until_stopped(batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
    for batch in batches:
        if stop.reached():
            raise _Stopped
        yield batch
