"""Checkpoints of a run: restoring the latest one, and saving a step with everything that resuming needs."""

import dataclasses
import functools
import logging
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from nextllm_jax.checkpoint.base import RECORD, save_base
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.checkpoint.saved_steps import DamagedCheckpoint
from nextllm_jax.data.mixture import data_id
from nextllm_jax.errors import InputError
from nextllm_jax.model.accounting import save_estimate
from nextllm_jax.pretrained.init_from import initial_adapters, initial_params
from nextllm_jax.pretrained.source import Source
from nextllm_jax.progress import phase
from nextllm_jax.sharding import placed
from nextllm_jax.storage import costs
from nextllm_jax.training.program import to_save
from nextllm_jax.training.session import Moment, Session
from nextllm_jax.training.start import Start
from nextllm_jax.training.state import TrainState

_log = logging.getLogger(__name__)


def open_checkpoints(run: RunDir, start: Start) -> Checkpoints:
    """The checkpoints of a run, kept as its config says."""
    config = start.config
    return Checkpoints(
        run.checkpoints,
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
        use_scratch=config.checkpoint.scratch is not None,
        guard=run.sync,
        run={
            "config": dataclasses.asdict(config),
            "tokenizer": start.tokenizer.hash,
            "data": data_id(start.sources),
        },
    )


def restore_or_begin(
    start: Start, source: Source | None, run: RunDir, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """The state and the record of the latest readable checkpoint, or the initial state and an empty record.

    A damaged checkpoint is set aside with a warning; otherwise its step could not be saved again. Raises InputError
    instead if checkpoint.strict is set, or if there is no earlier checkpoint to continue from.
    """
    while (step := checkpoints.latest_step()) is not None:
        try:
            return start.program.restore_state(checkpoints, step)
        except DamagedCheckpoint as error:
            if checkpoints.steps()[0] == error.step:
                raise InputError(f"{error}; restore the file, or start over with --overwrite") from error
            if start.config.checkpoint.strict:
                raise InputError(
                    f"{error}; leave out --checkpoint.strict to set it aside and continue from the one before it"
                ) from error
            aside = checkpoints.set_aside(error.step)
            if jax.process_index() == 0:
                left = checkpoints.latest_step()
                _log.warning(str(error))
                _log.warning(f"it is now {aside}; continuing from step {left}")
    return _begin(start, source, run), {}


def _begin(start: Start, source: Source | None, run: RunDir) -> TrainState:
    """The state of step 0. Frozen weights, if any, are first saved to base/."""
    if start.config.init_from is None:
        return start.program.create_state()
    place = functools.partial(placed, start.mesh)
    adapters = initial_adapters(start.config, place)
    state = start.program.state_from(initial_params(start.config, source, place), adapters)
    if state.frozen is not None:
        save_base(run, state.frozen.params)
    return state


def prepare_to_save(session: Session, at: Moment) -> None:
    """Do in the background, while the first step is compiled, what the first save would otherwise wait for."""
    session.checkpoints.prepare(to_save(at.state)[0])


def wait(session: Session) -> None:
    """Wait for the current save."""
    with phase("waiting for the last save"):
        session.checkpoints.wait()


def save(session: Session, at: Moment) -> None:
    """Save the step, unless it is already saved. Returns before the files are complete."""
    session.pause()  # the flight recorder pins the checkpoint of a replay before a save can delete it
    if not session.checkpoints.is_saved(at.step):
        _save(session, at, None, rolling=at.step != session.config.training.steps)


def too_late_to_save(session: Session, at: Moment) -> str | None:
    """After SIGTERM, why the step cannot be saved within training.preemption_seconds; None if it can, or is saved.

    All processes get the same answer.
    """
    limit = session.config.training.preemption_seconds
    if limit is None or session.stop.name != "SIGTERM" or session.checkpoints.is_saved(at.step):
        return None
    session.pause()
    wait(session)
    measured = session.checkpoints.fastest_save_seconds
    needed = measured or save_estimate(session.config, jax.process_count()).seconds
    left = limit - (time.monotonic() - session.stop.asked_at)
    needed, left = multihost_utils.broadcast_one_to_all(np.array([needed, left])).tolist()
    if needed <= left:
        return None
    how = "at best" if measured else "by checkpoint.megabytes_per_second"
    return f"a save takes {needed:.1f} s {how}, but {max(left, 0):.1f} s of training.preemption_seconds are left"


def save_validation_loss(session: Session, at: Moment, loss: float) -> None:
    """Add the validation loss to the step's checkpoint. If it has none, save it only if the loss is a new best.

    A new best is always saved in the run directory, so one that is in the scratch directory is saved again.
    """
    session.pause()
    checkpoints = session.checkpoints
    is_saved, is_best = checkpoints.is_saved(at.step), checkpoints.is_best(loss)
    if is_best and (not is_saved or checkpoints.is_rolling(at.step)):
        _save(session, at, loss)
    elif is_saved:
        checkpoints.add_validation_loss(at.step, loss, _contents(session, at)[1])


def _save(session: Session, at: Moment, loss: float | None, *, rolling: bool = False) -> None:
    wait(session)
    with phase(f"saving step {at.step}"):
        items, record = _contents(session, at)
        session.checkpoints.save(at.step, items, record, validation_loss=loss, rolling=rolling)


def report_costs(checkpoints: Checkpoints, steps: int) -> None:
    """Report what this process has asked of buckets in so many steps; nothing for a run on disk."""
    spent = costs.total()
    if not spent.requests:
        return
    each, others = checkpoints.spent.requests / max(checkpoints.saves, 1), spent.plus(checkpoints.spent, -1).requests
    _log.info(
        f"storage: {spent}; about {each:,.0f} requests per checkpoint, and {others / max(steps, 1):,.1f} per step "
        "besides"
    )


def _contents(session: Session, at: Moment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The items and the record of a checkpoint. Waits for the last step."""
    items, facts = to_save(at.state)
    position = session.start.loader.position(at.step)
    record = {"evaluated": at.evaluated, "data": position, **session.meter.state(), **facts}
    if at.state.frozen is not None:
        record[RECORD] = session.base
    return items, record
