"""`train(config)`: the story of a run, top to bottom."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from nextllm_jax import hardware
from nextllm_jax.checkpoint.base import RECORD, base_id, save_base
from nextllm_jax.checkpoint.manager import Checkpoints, DamagedCheckpoint
from nextllm_jax.checkpoint.run_dir import SAMPLES, RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.files import local_workdir
from nextllm_jax.data.loader import validation_batches
from nextllm_jax.data.settings import default_data_path
from nextllm_jax.data.shards import Dataset
from nextllm_jax.distributed.process_group import ProcessGroup
from nextllm_jax.distributed.signals import StopRequest
from nextllm_jax.errors import InputError
from nextllm_jax.evaluation.evaluate import evaluate
from nextllm_jax.model.accounting import flops_per_token
from nextllm_jax.model.objective import Batch
from nextllm_jax.model.transformer import set_matmul_precision
from nextllm_jax.pretrained.init_from import initial_params
from nextllm_jax.pretrained.source import Source
from nextllm_jax.sharding import padded_size, placed, sharding
from nextllm_jax.training.flight_recorder import FlightRecorder, environment
from nextllm_jax.training.metrics import TrainMeter
from nextllm_jax.training.open_run import OpenRun, open_run
from nextllm_jax.training.profiler import StepProfiler
from nextllm_jax.training.program import to_save
from nextllm_jax.training.resume_guard import recorded_data, require_same_data
from nextllm_jax.training.samples import sample_text
from nextllm_jax.training.start import CHECKS, Remark, Start, require
from nextllm_jax.training.state import TrainState, require_finite, whole_params
from nextllm_jax.training.step import StepMetrics
from nextllm_jax.training.writers import Writers

Outcome = Literal["finished", "interrupted"]


class _Stopped(Exception):
    """A stop was requested during an evaluation."""


def _restore_or_begin(
    start: Start, source: Source | None, run: RunDir, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """The latest readable checkpoint's state and record, or the state that a run begins with and an empty record.

    A damaged checkpoint is set aside with a message; otherwise its step could not be saved again. Raises
    InputError instead if checkpoint.strict is set, or if there is none before it to go on from.
    """
    while (step := checkpoints.latest_step()) is not None:
        try:
            return start.program.restore_state(checkpoints, step)
        except DamagedCheckpoint as error:
            if checkpoints.steps()[0] == error.step:
                raise InputError(f"{error}; restore the file, or start over with --overwrite") from error
            if start.config.checkpoint.strict:
                raise InputError(
                    f"{error}; leave out --checkpoint.strict to set it aside and go on from the one before it"
                ) from error
            aside = checkpoints.set_aside(error.step)
            if jax.process_index() == 0:
                left = checkpoints.latest_step()
                print(f"WARNING: {error}\nWARNING: it is now {aside}; going on from step {left}", flush=True)
    return _begin(start, source, run), {}


def _begin(start: Start, source: Source | None, run: RunDir) -> TrainState:
    """The state of a run's first step. Frozen weights, if any, are saved to base/ first."""
    if start.config.init_from is None:
        return start.program.create_state()
    state = start.program.state_from(initial_params(start.config, source, functools.partial(placed, start.mesh)))
    if state.frozen is not None:
        save_base(run, state.frozen.params)
    return state


def _checkpoints(run: RunDir, config: Config, dataset: Dataset) -> Checkpoints:
    data_id = dataset.split("train").data_id
    return Checkpoints(
        run.checkpoints,
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
        run={"config": dataclasses.asdict(config), "tokenizer": dataset.tokenizer_hash, "data": data_id},
    )


def _announce(writers: Writers, run: OpenRun, remarks: Iterable[Remark], step: int | None) -> None:
    """Say what is trained, on what and from where."""
    if run.set_aside:
        writers.message(f"the run that was here is in {run.set_aside}")
    for text, is_warning in remarks:
        writers.message(f"WARNING: {text}" if is_warning else text)
    if step is not None:
        writers.message(f"continuing from step {step} of {run.dir.path}")
    for change in run.changes:
        writers.message(f"changed: {change}")


def train(
    config: Config,
    *,
    source: Source | None = None,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
    profile_steps: int = 0,
    group: ProcessGroup | None = None,
    stop: StopRequest | None = None,
) -> Outcome:
    """Train on data that is prepared, from the latest checkpoint if the run directory holds one.

    `config` already has the model of its `init_from`; `source` is that model if `with_source` opened it. `group`: the
    processes of this training (None: only this one). `stop`: a StopRequest that is already entered. The rest is as in
    `launch.train`.

    Raises InputError for what the user can fix, and RunFailed if too many consecutive steps are skipped.
    """
    start = Start(
        config,
        lambda: Dataset.open(default_data_path(config.data), verify=config.data.verify),
        overwrite=overwrite,
        allow_change=allow_change,
    )
    group = group or ProcessGroup()
    writes = group.process_id == 0
    remarks = require(CHECKS, start)
    mesh, dtype, dataset = start.mesh, start.program.model.dtype, start.dataset
    set_matmul_precision(dtype)
    group.check_same({f"the data in {dataset.path} with id": dataset.data_id})
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest(group))
        stack.enter_context(jax.set_mesh(mesh))
        opened = stack.enter_context(
            open_run(local_workdir(config), config, overwrite=overwrite, allow_change=allow_change, group=group)
        )
        run = opened.dir
        checkpoints = stack.enter_context(_checkpoints(run, config, dataset))
        stack.push(group.report)  # before the checkpoints close, which can wait for the others
        state, record = _restore_or_begin(start, source, run, checkpoints)
        if record:
            position = recorded_data(record)
            require_same_data(position, start.loader.position(0), dataset.path, allow_change)
            start.loader.resume(position)
        require_finite(state, str(run.path))
        if writes:  # only now, when a continued run has passed all checks
            start.tokenizer.save(run.tokenizer)
            run.write_config(config)
        step = int(state.step) if record else None
        writers = Writers(
            run,
            total_steps=config.training.steps,
            initial_step=step,
            evaluated=record.get("evaluated", False),
            enabled=writes,
        )
        stack.enter_context(contextlib.closing(writers))
        _announce(writers, opened, remarks, step)
        recorder = FlightRecorder(run, config, start.loader, checkpoints, writers, environment(mesh, dtype))
        profiler = StepProfiler(run.profile, step or 0, profile_steps if writes else 0, writers.message)
        stack.enter_context(contextlib.closing(profiler))
        session = Session(start, run, checkpoints, writers, recorder, profiler, stop)
        return _steps(session, state, record)


@dataclasses.dataclass(frozen=True)
class Session:
    """The parts of a run that its steps work with."""

    start: Start
    run: RunDir
    checkpoints: Checkpoints
    writers: Writers
    recorder: FlightRecorder
    profiler: StepProfiler
    stop: StopRequest

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.start.config

    def due(self, every: int, step: int) -> bool:
        """True every `every` steps and at the last step. Step 0 counts only with init_from."""
        return (step > 0 or self.config.init_from is not None) and (
            step % every == 0 or step == self.config.training.steps
        )


def _steps(session: Session, state: TrainState, record: dict[str, Any]) -> Outcome:
    """Train from `state` to the end or to a request to stop.

    Work due at a step (save, evaluate, stop) happens before the next step, so a continued run first does what the
    interruption prevented. Saving comes first, because a failure in anything later must not cost the step.
    """
    config, writers, stop = session.config, session.writers, session.stop
    step = int(state.step)
    evaluated = record.get("evaluated", False)
    stop.defer_signals()
    batches = session.start.loader.batches(step)
    meter = _make_meter(session, record)
    last: StepMetrics | None = None
    while True:
        session.profiler.end_if_due(step, meter.pause)
        if session.due(config.checkpoint.every_steps, step):
            _save(session, state, last, meter, evaluated=evaluated)
        if session.due(config.training.evaluate_every_steps, step):
            if not evaluated and (loss := _evaluate(session, state, meter)) is not None:
                evaluated = True
                _save(session, state, last, meter, evaluated=True, loss=loss)
            if evaluated:
                _show(session, state, step)
        if evaluated and step == config.training.steps:
            return _finish(session, state, last)
        if signal := stop.reached():
            _save(session, state, last, meter, evaluated=evaluated)
            session.checkpoints.wait()
            again = "without --overwrite" if session.start.overwrite else "the same command again"
            writers.message(f"{signal}: saved step {step} and stopped; run {again} to continue")
            return "interrupted"
        started = time.perf_counter()
        if last is None:
            session.checkpoints.wait()
            stop.allow_exit("compiling the train step and taking the first")
            writers.message("compiling the train step")
        session.profiler.begin_if_due(step, meter.pause)
        batch = meter.wait_for(batches)
        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            state, metrics = session.start.program.train_step(state, batch)
        step, evaluated = step + 1, False
        meter.add(metrics)
        session.checkpoints.check()
        if last is None:
            meter.resume()  # waits: the first step is the one that compiles
            stop.defer_signals()
            writers.message(f"compiled the train step and took the first in {time.perf_counter() - started:.1f} s")
        else:
            session.recorder.look(step - 1, last)  # the step before: this one is still under way
            meter.resume()
        last = metrics
        writers.progress(step)
        if session.due(config.training.log_every_steps, step):
            writers.train(meter.read(step))


def _make_meter(session: Session, record: dict[str, Any]) -> TrainMeter:
    devices, config = session.start.mesh.devices, session.config
    chip = hardware.chip(devices.flat[0].device_kind)
    return TrainMeter(
        flops_per_token=flops_per_token(config.model, config.data.sequence_length, config.lora),
        peak_flops=chip.peak_flops_bf16 * devices.size if chip else None,
        record=record,
    )


def _until_stopped(batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
    for batch in batches:
        if stop.reached():
            raise _Stopped
        yield batch


def _evaluate(session: Session, state: TrainState, meter: TrainMeter) -> float | None:
    """The validation loss, which is reported; None if a stop was requested meanwhile."""
    meter.pause()
    config, mesh, split = session.config, session.start.mesh, session.start.dataset.split("validation")
    batches = validation_batches(
        split,
        sequence_length=config.data.sequence_length,
        batch_size=padded_size(config.training.evaluation_batch_size, "batch"),
        sharding=sharding(mesh, "batch", "seq"),
    )
    try:
        eval_step = functools.partial(session.start.program.eval_step, frozen=state.frozen)
        result = evaluate(eval_step, state.params, _until_stopped(batches, session.stop), split.num_bytes)
    except _Stopped:
        return None
    session.writers.validation(
        {
            "step": int(state.step),
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            **meter.totals(),
        }
    )
    return result.loss


def _is_best(checkpoints: Checkpoints, loss: float) -> bool:
    best = checkpoints.best_step()
    lowest = None if best is None else checkpoints.validation_loss(best)
    return lowest is None or loss < lowest


def _save(
    session: Session,
    state: TrainState,
    last: StepMetrics | None,
    meter: TrainMeter,
    *,
    evaluated: bool,
    loss: float | None = None,
) -> None:
    """Save the current step. With `loss`, save only a new best; if the step is already saved, add `loss` to it.

    `last` are the metrics of the step, None for the one that a run continues from.
    """
    checkpoints, step = session.checkpoints, int(state.step)
    meter.pause()
    if last is not None:
        session.recorder.look(step, last)  # first: the checkpoint that a replay starts from may go with the save
    checkpoints.wait()  # several processes must see the same steps here
    saved = step in checkpoints.steps()
    if loss is None and saved:
        return
    if loss is not None and not saved and not _is_best(checkpoints, loss):
        return
    items, facts = to_save(state)
    record = {"evaluated": evaluated, "data": session.start.loader.position(step), **meter.state(), **facts}
    if state.frozen is not None:
        record[RECORD] = base_id(session.run)
    if not saved:
        checkpoints.save(step, items, record, validation_loss=loss)
    elif loss is not None:
        checkpoints.add_validation_loss(step, loss, record)


def _show(session: Session, state: TrainState, step: int) -> None:
    """Redraw loss.png and write the samples of an evaluated step, which a run can do without."""
    writers, start, training = session.writers, session.start, session.config.training
    writers.picture()
    if not (training.sample_tokens and training.sample_prompts):
        return

    def make_texts() -> list[tuple[str, str]]:
        params = whole_params(state, session.config.model, start.mesh)
        return sample_text(
            session.config.model, params, start.tokenizer, training.sample_prompts, training.sample_tokens
        )

    written = writers.last_samples_step == step
    if jax.process_count() == 1:
        if not written:
            writers.optional(SAMPLES, lambda: writers.samples(step, make_texts()))
        return
    # All processes sample together, if process 0 has not written the block yet; without one of them none can go on.
    if not multihost_utils.broadcast_one_to_all(np.array(written)):
        texts = make_texts()
        writers.optional(SAMPLES, lambda: writers.samples(step, texts))


def _finish(session: Session, state: TrainState, last: StepMetrics | None) -> Outcome:
    checkpoints, step = session.checkpoints, int(state.step)
    checkpoints.wait()
    if last is None:
        length = session.config.optimizer.schedule_steps or step
        session.writers.message(
            f"the run is finished at step {step}; to go on raise --training.steps, with "
            f"--optimizer.schedule-steps {length} to keep the schedule"
        )
        return "finished"
    skipped = int(state.skipped)
    session.writers.message(
        f"finished at step {step}; the best checkpoint is step {checkpoints.best_step()}"
        + (f"; {skipped} updates were skipped" if skipped else "")
    )
    return "finished"
