"""Evaluations of a run in addition to its validation loss: texts, and tasks of the lm-evaluation-harness."""

import logging
from collections.abc import Iterator

from nextllm_jax.sharding import padded_size
from nextllm_jax.training.hooks import is_due
from nextllm_jax.training.live_model import live_model
from nextllm_jax.training.start import Start
from nextllm_jax.training.state import TrainState

_log = logging.getLogger(__name__)


def evaluations(start: Start, step: int, state: TrainState) -> Iterator[dict[str, float]]:
    """The results of each text and task as fields of a validation line; none if no evaluation is due at the step.

    Every process must call this, and ask for the same results, since they are computed on the mesh. A task that fails
    is reported and has no result.
    """
    config = start.config
    if not ((start.texts or start.tasks) and is_due(config, config.steps_between_evaluations, step)):
        return
    llm = live_model(start, state)
    batch_size = padded_size(config.training.evaluation_batch_size, "batch")
    for name, text in start.texts.items():
        bits_per_byte = llm.score(text, batch_size=batch_size).bits_per_byte
        assert bits_per_byte is not None  # the text is not empty
        yield {f"bits_per_byte/{name}": bits_per_byte}
    tasks = start.tasks
    if tasks is None:
        return
    for task in tasks.names:
        try:
            found = tasks.run(task, llm, batch_size)
        except Exception as error:
            _log.warning(f"step {step}: the task {task} failed ({type(error).__name__}: {error})")
            continue
        yield {f"lm_eval/{name}": value for name, value in found.items()}
