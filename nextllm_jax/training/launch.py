"""`train(config)`: connects the processes, prepares the data, opens the run and runs its steps.

Without init_from, jax is imported only once the data is prepared, so mistakes are reported at once.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Literal

from nextllm_jax.config import Config
from nextllm_jax.config.files import workdir_of
from nextllm_jax.distributed.process_group import ProcessGroup, facts_of
from nextllm_jax.distributed.rendezvous import DistributedConfig
from nextllm_jax.distributed.signals import StopRequest
from nextllm_jax.process import use_compilation_cache
from nextllm_jax.progress import phase, show_messages
from nextllm_jax.training.accepted_changes import replaced_values, with_accepted_changes
from nextllm_jax.training.resume_guard import allowed_fields, with_recorded_data

if TYPE_CHECKING:
    from nextllm_jax.pretrained.source import Source


def train(
    config: Config,
    *,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
    profile_steps: int = 0,
    distributed: DistributedConfig | None = None,
    file: Config | None = None,
    stated: Collection[str] = (),
    may_exit: bool = False,
) -> Literal["finished", "interrupted"]:
    """Train as configured, or resume the run in `config.workdir`. Data that is missing is prepared first.

    Args:
        config: The run. Its model comes from `init_from` if that is set.
        overwrite: Start over; an existing run moves to overwritten/ in its directory.
        allow_change: Dotted fields in which a resumed run may differ from its config.json.
        profile_steps: Number of steps to trace into profile/ of the run.
        distributed: Settings of several processes; None: a single process.
        file: The config before command-line overrides, which determine what `init_from` may replace; None: `config`.
        stated: Dotted fields that the command line sets. A change that `allow_change` accepted earlier stays in force
            for the others, if their value is the one that it replaced.
        may_exit: Whether a signal may exit the process while no work would be lost. Only commands set it.

    Returns "interrupted" if SIGINT, SIGTERM or SIGHUP arrived: the run is saved, and the same call resumes it. Signals
    are handled only if this is called in the main thread, and the previous handlers are restored. Messages go to the
    logger `nextllm_jax`, see `progress.show_messages`; nothing is written to standard output.

    Raises InputError for what the user can fix, and RunFailed for a failure of the machine.
    """
    show_messages()
    group = ProcessGroup(distributed or DistributedConfig(num_processes=1))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest(group, may_exit=may_exit))
        stack.enter_context(group)
        stop.allow_exit("waiting for the other processes")
        allowed = allowed_fields(allow_change)
        workdir_of(config)  # raises InputError if there is none
        group.connect()
        stack.enter_context(_messages_from_process_0(group))
        file, replaced = file or config, {}
        if not overwrite:
            config = with_accepted_changes(config, stated)
            replaced = replaced_values(config, file, allowed)
        config, source = _prepare(config, file, group, stop, overwrite, allowed)

        with phase("importing the training code"):
            from nextllm_jax.training.loop import run_steps
            from nextllm_jax.training.setup import open_session

        with open_session(
            config,
            source=source,
            overwrite=overwrite,
            allow_change=allow_change,
            replaced=replaced,
            profile_steps=profile_steps,
            group=group,
            stop=stop,
        ) as (session, at):
            outcome = run_steps(session, at)
        group.end()
    return outcome


@contextlib.contextmanager
def _messages_from_process_0(group: ProcessGroup) -> Iterator[None]:
    """A context in which the other processes report only errors, since process 0 reports for all."""
    logger = logging.getLogger("nextllm_jax")
    level = logger.level
    if group.process_id != 0:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _prepare(
    config: Config, file: Config, group: ProcessGroup, stop: StopRequest, overwrite: bool, allowed: frozenset[str]
) -> tuple[Config, "Source | None"]:
    """Prepare the data in process 0 while the others wait, and start jax in all.

    Returns the config to train, with the model of init_from and the path of the data, and the source of its weights if
    it was opened.
    """
    source = None
    if config.init_from is not None:
        with phase("importing jax"):
            from nextllm_jax.pretrained.init_from import with_source
        with phase("opening init_from"):
            config, source = with_source(config, file, overwrite=overwrite)
    choices = {"--overwrite": str(overwrite), "--allow-change": ", ".join(sorted(allowed))}
    group.check_same({**choices, **facts_of(config)})
    stop.allow_exit("preparing data")
    paths = _prepare_data(config, source, overwrite, allowed) if group.process_id == 0 else None
    paths = group.gather(paths, "process 0 to prepare the data")[0]

    from nextllm_jax.data.sources import has_source_paths, with_source_paths

    if not has_source_paths(config.data):  # else the processes compare the ids of their data
        config = dataclasses.replace(config, data=with_source_paths(config.data, paths))
    stop.allow_exit("starting")
    with phase("importing jax and finding the devices"):
        use_compilation_cache()
        group.start_jax()
    return config, source


def _prepare_data(config: Config, source: "Source | None", overwrite: bool, allowed: frozenset[str]) -> list[str]:
    """The directories of the data, which is prepared if necessary. A run continues with the data that it recorded."""
    from nextllm_jax.checkpoint.run_dir import RunDir
    from nextllm_jax.data.prepare import ensure_prepared
    from nextllm_jax.data.settings import CONTENT_FIELDS
    from nextllm_jax.data.sources import source_paths
    from nextllm_jax.training.open_run import require_startable

    # To report mistakes before the data is prepared; `open_run` checks again once it holds the run's lock.
    require_startable(config, overwrite=overwrite, allow_change=allowed)
    run = RunDir(workdir_of(config))
    if not overwrite and run.exists():
        config = with_recorded_data(config, run)
        allowed |= {*CONTENT_FIELDS}  # the checkpoint says which data it needs
    paths = source_paths(config.data, functools.partial(ensure_prepared, allow_change=allowed))
    if source is not None:
        from nextllm_jax.pretrained.init_from import require_tokenizer

        require_tokenizer(config, source, paths[0])
    return [str(path) for path in paths]
