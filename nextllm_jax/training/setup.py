"""`open_session`: checks, opens and restores a run, and creates everything that its steps need."""

import contextlib
import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax

from nextllm_jax import hardware
from nextllm_jax.checkpoint.base import base_id
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.files import workdir_of
from nextllm_jax.data.mixture import data_id
from nextllm_jax.data.sources import open_sources, source_paths
from nextllm_jax.distributed.process_group import ProcessGroup
from nextllm_jax.distributed.signals import StopRequest
from nextllm_jax.model.accounting import flops_per_token
from nextllm_jax.model.transformer import set_matmul_precision
from nextllm_jax.pretrained.source import Source
from nextllm_jax.progress import phase
from nextllm_jax.training.compiled_programs import CompiledPrograms
from nextllm_jax.training.flight_recorder import FlightRecorder, environment
from nextllm_jax.training.hooks import Hook
from nextllm_jax.training.metrics import TrainMeter
from nextllm_jax.training.open_run import OpenRun, open_run
from nextllm_jax.training.pictures import Pictures
from nextllm_jax.training.profiler import StepProfiler
from nextllm_jax.training.samples import Samples
from nextllm_jax.training.saving import open_checkpoints, restore_or_begin
from nextllm_jax.training.session import Moment, Session
from nextllm_jax.training.start import CHECKS, Remark, Start, require, resume_data
from nextllm_jax.training.state import require_finite
from nextllm_jax.training.trackers import open_trackers
from nextllm_jax.training.train_log import TrainLog
from nextllm_jax.training.vocabulary import with_vocab_size
from nextllm_jax.training.writers import MetricsWriter

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_session(
    config: Config,
    *,
    source: Source | None = None,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
    replaced: Mapping[str, tuple[Any, ...]] | None = None,
    profile_steps: int = 0,
    group: ProcessGroup | None = None,
    stop: StopRequest | None = None,
) -> Iterator[tuple[Session, Moment]]:
    """A run on data that is prepared, and the moment from which it goes on: its latest checkpoint, or step 0.

    `config` already has the model of its `init_from`; `source` is that model if `with_source` opened it. `group`: the
    processes of this training (None: only this one). `stop`: a StopRequest that is already entered. `replaced`: as
    `accepted_changes.replaced_values` returns it. The rest is as in `launch.train`.

    Raises InputError for what the user can fix.
    """
    group = group or ProcessGroup()
    config = with_vocab_size(config, source_paths(config.data)[0], overwrite=overwrite)
    start = Start(
        config,
        lambda: open_sources(config.data),
        overwrite=overwrite,
        allow_change=allow_change,
    )
    remarks = require(CHECKS, start)
    set_matmul_precision(start.program.model.dtype)
    texts = hashlib.sha256(repr(start.texts).encode(errors="replace")).hexdigest()
    group.check_same({"data with id": data_id(start.sources), "evaluation.texts with sha256": texts})
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest(group))
        writes = group.process_id == 0
        programs = stack.enter_context(contextlib.closing(CompiledPrograms(RunDir(workdir_of(config)), writes=writes)))
        stack.enter_context(jax.set_mesh(start.mesh))
        opened = stack.enter_context(
            open_run(workdir_of(config), config, overwrite=overwrite, allow_change=allow_change, group=group)
        )
        checkpoints = stack.enter_context(open_checkpoints(opened.dir, start))
        stack.push(group.report)  # before the checkpoints close, which can wait for the others
        programs.wait()
        with phase("restoring the latest checkpoint" if checkpoints.steps() else "creating the initial state"):
            state, record = restore_or_begin(start, source, opened.dir, checkpoints)
        remarks += resume_data(start, record)
        require_finite(state, str(opened.dir.path))
        at = Moment(int(state.step), state, evaluated=record.get("evaluated", False))
        initial_step = at.step if record else None
        if writes:  # only now, when a resumed run has passed all checks
            start.tokenizer.save(opened.dir.tokenizer)
            opened.dir.write_config(config, replaced)
        trackers = stack.enter_context(open_trackers(opened.dir, config, enabled=writes))
        writer = MetricsWriter(
            opened.dir,
            config.model,
            initial_step=initial_step,
            evaluated=at.evaluated,
            enabled=writes,
            trackers=trackers,
        )
        stack.enter_context(contextlib.closing(writer))
        _announce(opened, remarks, initial_step)
        base = None if state.frozen is None else base_id(opened.dir)
        meter = _make_meter(start, record)
        session = Session(start, opened.dir, checkpoints, meter, writer, trackers, stop, hooks=[], base=base)
        for hook in _make_hooks(session, initial_step, profile_steps, writes):
            session.hooks.append(stack.enter_context(contextlib.closing(hook)))
        session.hooks.append(programs)
        yield session, at


def _announce(run: OpenRun, remarks: Iterable[Remark], step: int | None) -> None:
    """Report what is trained, on what, and from which step."""
    if run.set_aside:
        _log.info(f"the run that was here is in {run.set_aside}")
    for text, is_warning in remarks:
        _log.log(logging.WARNING if is_warning else logging.INFO, text)
    if step is not None:
        _log.info(f"continuing from step {step} of {run.dir.path}")
    for change in run.changes:
        _log.info(f"changed: {change}")
    if run.changes:
        _log.info("the run keeps these changes: from now on, the command without them continues it too")


def _make_meter(start: Start, record: dict[str, Any]) -> TrainMeter:
    devices, config = start.mesh.devices, start.config
    chip = hardware.chip(devices.flat[0].device_kind)
    return TrainMeter(
        flops_per_token=flops_per_token(config.model, config.data.sequence_length, config.lora),
        peak_flops=chip.peak_flops_bf16 * devices.size if chip else None,
        tokens_per_step=config.training.global_batch_size * config.data.sequence_length,
        record=record,
    )


def _make_hooks(session: Session, initial_step: int | None, profile_steps: int, writes: bool) -> list[Hook]:
    """The hooks of a run, in the order in which they are called."""
    start, run, config, meter = session.start, session.run, session.config, session.meter
    about = environment(start.mesh, start.program.model.dtype)
    log = TrainLog(config, meter, session.writer, enabled=writes)
    return [
        FlightRecorder(run, config, start.loader, session.checkpoints, about, before_failure=log.write_line),
        log,
        StepProfiler(run, initial_step or 0, profile_steps if writes else 0, meter.pause),
        Pictures(run, config.model, enabled=writes, trackers=session.trackers),
        Samples(run, start, initial_step, enabled=writes, trackers=session.trackers),
    ]
