"""Checks whether a run may be resumed with a config, and reports each field that differs; see config.fields.

Importing this module does not import jax, so a command can check before it prepares data.
"""

import dataclasses
import difflib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from etils import epath

from nextllm_jax.checkpoint.run_dir import CONFIG, RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.fields import OTHER_DATA, fields_of
from nextllm_jax.config.files import is_of_first_format
from nextllm_jax.config.mixture import parse_mixture
from nextllm_jax.errors import InputError

_NEW_RUN = "start a new run: another --workdir, or --overwrite to set the old run aside"


class Change(NamedTuple):
    """A changed field, with its old and new value and the effect of the change."""

    name: str
    old: Any
    new: Any
    meaning: str
    allowable: bool

    def __str__(self) -> str:
        return f"{self.name} {self.old} -> {self.new}" + (f" ({self.meaning})" if self.meaning else "")


def allowed_fields(allow_change: Collection[str]) -> frozenset[str]:
    """The dotted field names from `--allow-change`.

    Raises InputError for an unknown field, and for a field that cannot change even with an explicit override.
    """
    known, allowed = fields_of(Config()), frozenset(name.replace("-", "_") for name in allow_change)
    for name in sorted(allowed):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "give a dotted name, such as optimizer.learning_rate"
            raise InputError(f"--allow-change {name}: unknown field; {hint}")
        if known[name].on_resume.change == "fixed":
            raise InputError(
                f"--allow-change {name}: this field cannot change, since the saved arrays would not fit; {_NEW_RUN}"
            )
    return allowed


def _schedule_change(old: Config, new: Config) -> Change | None:
    """A change of the schedule that would have changed the learning rates of past steps; None if there is none.

    There is none if training.steps changes but optimizer.schedule_steps is set, or if a constant schedule changes its
    length but not its warmup.
    """
    before = old.optimizer.schedule_length(old.training.steps)
    after = new.optimizer.schedule_length(new.training.steps)
    warmup = old.optimizer.warmup_steps
    constant = old.optimizer.schedule == new.optimizer.schedule == "constant"
    if before == after or (constant and min(warmup, before // 2) == min(warmup, after // 2)):
        return None
    if old.optimizer.schedule_steps == new.optimizer.schedule_steps:
        meaning = (
            "this is also the length of the schedule, so the learning rate would jump; add "
            f"--optimizer.schedule-steps {before} to keep the schedule"
        )
        return Change("training.steps", old.training.steps, new.training.steps, meaning, True)
    lengths = f"the schedule would have {after} steps instead of {before}, so the learning rate would jump"
    return Change("optimizer.schedule_steps", old.optimizer.schedule_steps, new.optimizer.schedule_steps, lengths, True)


def _changes_since_first_format(old: Config, new: Config) -> list[Change]:
    """The schedule settings of a first-format run that this version interprets differently."""
    length = new.optimizer.schedule_length(new.training.steps)
    warmup, fraction = old.optimizer.warmup_steps, old.optimizer.decay_steps_fraction
    found = []
    if warmup > length // 2:
        meaning = "the warmup now takes at most half of the schedule, so the learning rate would jump"
        found.append(Change("optimizer.warmup_steps", warmup, length // 2, meaning, True))
    room = length - warmup - 1
    if old.optimizer.schedule == "wsd" and round(length * fraction) > max(room, 1):
        meaning = "the decay now never overlaps the warmup, so the learning rate would jump"
        found.append(Change("optimizer.decay_steps_fraction", fraction, max(room, 0) / length, meaning, True))
    return found


def _are_same(name: str, old: Any, new: Any) -> bool:
    """Whether two values of a field are equivalent."""
    if name == "model.vocab_size" and new == 0:  # a config that does not state it takes the run's
        return True
    if name == "data.mixture" and old and new:  # only the proportions of the weights matter
        return parse_mixture(old) == parse_mixture(new)
    if name == "lora.targets":  # the order does not matter, and () is a newer way to say all
        every = ("q", "k", "v", "o", "gate", "up", "down")
        return set(old or every) == set(new or every)
    return old == new


def changes(old: Config, new: Config) -> list[Change]:
    """The differences from `old` to `new` that matter for resuming, in the order of the config."""
    after = fields_of(new)
    schedule = _schedule_change(old, new)
    found = []
    for name, (value, (change, meaning)) in fields_of(old).items():
        if name in ("training.steps", "optimizer.schedule_steps"):
            found += [schedule] if schedule and schedule.name == name else []
        elif not _are_same(name, value, after[name].value) and change != "free":
            found.append(Change(name, value, after[name].value, meaning, change != "fixed"))
    return found


def require_resumable(run: RunDir, config: Config, allow_change: Collection[str]) -> list[Change]:
    """Raise InputError, with a line for each field, if `run` may not be resumed with `config`.

    Returns the changes that `allow_change` permits; none if there is no run yet.
    """
    allowed = allowed_fields(allow_change)
    if not run.exists():
        return []
    old = run.read_config()
    found = changes(old, config)
    if is_of_first_format(run.path / CONFIG):
        named = {change.name for change in found}
        found += [change for change in _changes_since_first_format(old, config) if change.name not in named]
    refused = [change for change in found if change.name not in allowed]
    if not refused:
        return found
    flags = " ".join(f"--allow-change {change.name}" for change in refused)
    fix = f"restore the old values, or allow the changes: {flags}; or " if all(c.allowable for c in refused) else ""
    lines = "".join(f"\n  {change}" for change in refused)
    raise InputError(f"{run.path} holds a run with another config, which was not touched:{lines}\n{fix}{_NEW_RUN}")


def with_recorded_data(config: Config, run: RunDir) -> Config:
    """The config with the paths of the data that `run` was trained on, if it does not choose other data."""
    if not run.exists():
        return config
    from nextllm_jax.data.sources import continued  # imports the tokenizers, which --help does not need

    return dataclasses.replace(config, data=continued(config.data, run.read_config().data))


def recorded_data(record: dict[str, Any]) -> dict[str, Any]:
    """The data position in a checkpoint's record. Raises InputError if it has none."""
    if not isinstance(record.get("data"), dict):
        raise InputError(
            "the checkpoint does not record its training data, so another version may have written it; use that "
            f"version, or {_NEW_RUN}"
        )
    return record["data"]


def require_same_data(
    recorded: dict[str, Any], found: dict[str, Any], where: Sequence[epath.PathLike], allow_change: Collection[str]
) -> None:
    """Raise InputError if the data in the directories `where` is not the data that a checkpoint was trained on.

    `recorded` and `found` are the data positions of the checkpoint and of the loader; see TrainLoader. Other data with
    the same tokenizer is accepted if `allow_change` names data.path or another field that selects data.
    """
    places, field = ", ".join(map(str, where)), "data.path" if len(where) == 1 else "data.mixture"
    if recorded.get("tokenizer_hash", found["tokenizer_hash"]) != found["tokenizer_hash"]:
        raise InputError(
            f"the data in {places} has another tokenizer than the run, so its ids do not fit the model; "
            f"set {field} to data with the run's tokenizer, or {_NEW_RUN}"
        )
    known = fields_of(Config())
    choosing = {name for name, each in known.items() if each.on_resume.meaning == OTHER_DATA} | {"data.mixture"}
    if recorded.get("data_id") != found["data_id"] and not choosing & allowed_fields(allow_change):
        raise InputError(
            f"the checkpoint was trained on other data than {places} holds ({recorded.get('data_id')} -> "
            f"{found['data_id']}); set {field} to the data of the checkpoint, or allow the change: "
            f"--allow-change {field} ({known[field].on_resume.meaning}); or {_NEW_RUN}"
        )
