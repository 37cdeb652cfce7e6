"""`train(config)` from the outside: the processes meet, process 0 prepares the data, and the loop takes over.

Without init_from, jax is imported only once the data is prepared, so mistakes are reported at once.
"""

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from nextllm_jax.config import Config
from nextllm_jax.config.files import local_workdir
from nextllm_jax.distributed.process_group import ProcessGroup, facts_of
from nextllm_jax.distributed.rendezvous import DistributedConfig
from nextllm_jax.distributed.signals import StopRequest
from nextllm_jax.process import use_compilation_cache

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
    may_exit: bool = False,
) -> Literal["finished", "interrupted"]:
    """Train as configured, or continue the run in `config.workdir`; data that is not there is prepared first.

    `overwrite` moves an existing run to overwritten/. `allow_change` lists dotted fields that may differ from the run
    being continued. `profile_steps` steps are traced into the run's profile/. `distributed` configures several
    processes; None: a single process. `file` is the config before command-line overrides. `may_exit` (commands only):
    a signal may exit the process when no work would be lost.

    A first SIGINT, SIGTERM or SIGHUP saves and gives "interrupted", if this is the main thread. Raises InputError for
    what the user can fix, and RunFailed for a failure of the machine.
    """
    group = ProcessGroup(distributed or DistributedConfig(num_processes=1))
    with StopRequest(group, may_exit=may_exit) as stop, group:
        config, source = _prepare(config, file or config, group, stop, overwrite, allow_change)

        from nextllm_jax.training import loop

        outcome = loop.train(
            config,
            source=source,
            overwrite=overwrite,
            allow_change=allow_change,
            profile_steps=profile_steps,
            group=group,
            stop=stop,
        )
        group.end()
    return outcome


def _prepare(
    config: Config, file: Config, group: ProcessGroup, stop: StopRequest, overwrite: bool, allow_change: Collection[str]
) -> tuple[Config, "Source | None"]:
    """Meet the other processes, if there are any, and have the data prepared; then connect jax.

    Returns the config to train, with the model of init_from and the path of the data, and the source of its weights if
    it was opened.
    """
    stop.allow_exit("waiting for the other processes")

    from nextllm_jax.training.resume_guard import allowed_fields

    consent = allowed_fields(allow_change)
    local_workdir(config)  # raises InputError for none
    group.connect()
    source = None
    if config.init_from is not None:
        from nextllm_jax.pretrained.init_from import with_source  # imports jax

        config, source = with_source(config, file, overwrite=overwrite)
    choices = {"--overwrite": str(overwrite), "--allow-change": ", ".join(sorted(consent))}
    group.check_same({**choices, **facts_of(config)})
    stop.allow_exit("preparing data")
    path = _prepare_data(config, source, overwrite, consent) if group.process_id == 0 else None
    path = group.gather(path, "process 0 to prepare the data")[0]
    config = _with_data_path(config, path)
    stop.allow_exit("starting")
    use_compilation_cache()
    group.start_jax()
    return config, source


def _prepare_data(config: Config, source: "Source | None", overwrite: bool, consent: frozenset[str]) -> str:
    """The directory of the data, which is prepared if necessary. A run continues with the data that it recorded."""
    from nextllm_jax.checkpoint.run_dir import RunDir
    from nextllm_jax.data.prepare import ensure_prepared
    from nextllm_jax.data.settings import CONTENT_FIELDS
    from nextllm_jax.training.open_run import require_startable
    from nextllm_jax.training.resume_guard import with_recorded_data

    # To report mistakes before the data is prepared; `open_run` checks again once it holds the run's lock.
    require_startable(config, overwrite=overwrite, allow_change=consent)
    run = RunDir(local_workdir(config))
    if not overwrite and run.exists():
        config = with_recorded_data(config, run)
        consent |= {*CONTENT_FIELDS}  # the checkpoint says which data it needs
    path = str(ensure_prepared(config.data, allow_change=consent))
    if source is not None:
        from nextllm_jax.pretrained.init_from import require_tokenizer

        require_tokenizer(_with_data_path(config, path), source)
    return path


def _with_data_path(config: Config, path: str) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
