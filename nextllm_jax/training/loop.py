"""`run_steps`: the story of a training, from the step at which it starts or resumes to its end."""

import logging
import time
from collections.abc import Iterator
from typing import Literal

import jax

from nextllm_jax.model.objective import Batch
from nextllm_jax.training.hooks import is_due
from nextllm_jax.training.saving import (
    prepare_to_save,
    report_costs,
    save,
    save_validation_loss,
    too_late_to_save,
    wait,
)
from nextllm_jax.training.session import Moment, Session
from nextllm_jax.training.validation import validate

Outcome = Literal["finished", "interrupted"]

_log = logging.getLogger(__name__)


def run_steps(session: Session, at: Moment) -> Outcome:
    """Train from `at` to the last step or to a request to stop.

    Work that is due at a step (save, evaluate, stop) happens before the next step, so a resumed run first does what the
    interruption prevented. Saving comes first, because a failure in anything later must not cost the step.

    Raises RunFailed if a save fails, or if too many consecutive steps are skipped.
    """
    config, first = session.config, at.step
    session.stop.defer_signals()
    batches = session.start.loader.batches(at.step)
    while True:
        if is_due(config, config.checkpoint.every_steps, at.step):
            save(session, at)
        if is_due(config, config.training.evaluate_every_steps, at.step):
            at = _evaluate(session, at)
        if at.evaluated and at.step == config.training.steps:
            return _finish(session, at, first)
        if signal := session.stop.reached():
            return _interrupt(session, at, first, signal)
        at = _take_step(session, at, batches)


def _evaluate(session: Session, at: Moment) -> Moment:
    """`at` once it is evaluated; unchanged if a stop is requested meanwhile."""
    if not at.evaluated:
        loss = validate(session, at)
        if loss is None:
            return at
        at = at._replace(evaluated=True)
        save_validation_loss(session, at, loss)
    for hook in session.hooks:
        hook.after_evaluation(at.step, at.state)
    return at


def _take_step(session: Session, at: Moment, batches: Iterator[Batch]) -> Moment:
    """The moment after the next step, which is dispatched but may still be running."""
    dispatch = _compile_and_dispatch if at.metrics is None else _dispatch
    after = dispatch(session, at, batches)
    assert after.metrics is not None
    for hook in session.hooks:
        hook.after_step(after.step, after.metrics)
    return after


def _compile_and_dispatch(session: Session, at: Moment, batches: Iterator[Batch]) -> Moment:
    """As `_dispatch`, for the first step of this process. Waits for the step."""
    session.checkpoints.wait()
    prepare_to_save(session, at)
    session.stop.allow_exit("compiling the train step and taking the first")
    _log.info("compiling the train step")
    started = time.perf_counter()
    after = jax.block_until_ready(_dispatch(session, at, batches))
    session.stop.defer_signals()
    _log.info(f"compiled the train step and took the first in {time.perf_counter() - started:.1f} s")
    return after


def _dispatch(session: Session, at: Moment, batches: Iterator[Batch]) -> Moment:
    for hook in session.hooks:
        hook.before_step(at.step + 1)
    batch = session.meter.wait_for(batches)
    with jax.profiler.StepTraceAnnotation("train", step_num=at.step + 1):
        state, metrics = session.start.program.train_step(at.state, batch)
    session.checkpoints.check()
    return Moment(at.step + 1, state, metrics)


def _finish(session: Session, at: Moment, first: int) -> Outcome:
    wait(session)
    if at.metrics is None:
        length = session.config.optimizer.schedule_steps or at.step
        _log.info(
            f"the run is finished at step {at.step}; to continue it, raise --training.steps, with "
            f"--optimizer.schedule-steps {length} to keep the schedule"
        )
        return "finished"
    skipped = int(at.state.skipped)
    _log.info(
        f"finished at step {at.step}; the best checkpoint is step {session.checkpoints.best_step()}"
        + (f"; {skipped} updates were skipped" if skipped else "")
    )
    report_costs(session.checkpoints, at.step - first)
    return "finished"


def _interrupt(session: Session, at: Moment, first: int, signal: str) -> Outcome:
    problem = too_late_to_save(session, at)
    if problem is None:
        save(session, at)
        wait(session)
    done = f"stopped without saving step {at.step} ({problem})" if problem else f"saved step {at.step} and stopped"
    again = "without --overwrite" if session.start.overwrite else "the same command again"
    _log.info(f"{signal}: {done}; run {again} to continue")
    report_costs(session.checkpoints, at.step - first)
    return "interrupted"
