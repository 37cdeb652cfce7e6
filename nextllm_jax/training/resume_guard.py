"""Which settings may differ when a run goes on, and the refusal, field by field, of all others.

Importing this module does not import jax, so that a command can refuse before it prepares data.
"""

import dataclasses
import difflib
from collections.abc import Collection
from typing import Any, NamedTuple

from etils import epath

from nextllm_jax.checkpoint.run_dir import CONFIG, RunDir
from nextllm_jax.config import Config
from nextllm_jax.config.files import is_of_first_format
from nextllm_jax.config.model import EXECUTION_FIELDS
from nextllm_jax.errors import InputError

_NEW_RUN = "start a new run: another --workdir, or --overwrite to set the old run aside"

# Free to change: where a run is, how it is computed (to rounding) and how it is watched. A whole section, or a field.
# data.path is free as long as the data there is the same, which `require_same_data` sees.
_FREE = frozenset(
    [
        *("workdir", "platform", "mesh", "checkpoint", "optimizer.shard_over_data", "optimizer.offload_state"),
        *(f"model.{name}" for name in EXECUTION_FIELDS),
        *("data.path", "data.num_processes", "data.tokens_per_shard", "data.verify"),
        *("training.accumulation_steps", "training.log_every_steps", "training.evaluate_every_steps"),
        *("training.evaluation_batch_size", "training.max_skipped_steps"),
        *("training.sample_prompts", "training.sample_tokens"),
    ]
)

# Of the model only these may change, with consent: the saved arrays fit none of its other fields, nor of those in
# _FIXED, with another value.
_FLEXIBLE_MODEL = frozenset(
    [
        *("model.context_length", "model.rope_theta", "model.rope_scaling", "model.rope_scaling_factor"),
        *("model.rope_original_context_length", "model.rope_low_freq_factor", "model.rope_high_freq_factor"),
        *("model.rope_beta_fast", "model.rope_beta_slow", "model.rope_attention_factor"),
        *("model.rope_local_theta", "model.rotary_dim", "model.rope_short_factors", "model.rope_long_factors"),
        *("model.sliding_window", "model.norm_eps", "model.init_std", "model.activation", "model.norm_scale_offset"),
        *("model.attention_scale", "model.attention_soft_cap", "model.logit_soft_cap", "model.logit_divisor"),
        *("model.embedding_scale", "model.residual_scale"),
    ]
)

_FIXED = frozenset(["optimizer.first_moment_dtype", "lora.rank", "lora.targets", "lora.frozen"])

# What consent means where it is not just that the new value holds from the next step on.
_OTHER_DATA = "the next step begins other data, in an order of its own, and validation losses cease to compare"
_OTHER_TOKENIZER = "consent helps only if it is another name of the same tokenizer"
_MEANING = {
    "seed": "the data begins again in another order, the weights stay",
    "init_from": "the weights are made already, so that it has no effect",
    "lora.alpha": "the adapters count for more or less from the next step on, and the model jumps",
    "model.init_std": "the weights are made already, so that it has no effect",
    "data.sequence_length": "the data begins again, cut into other windows in another order",
    "training.global_batch_size": "the data goes on where it is, with more or fewer windows a step",
    "data.corpus": _OTHER_DATA,
    "data.text_field": _OTHER_DATA,
    "data.messages_field": _OTHER_DATA,
    "data.chat_template": _OTHER_DATA,
    "data.hf_config": _OTHER_DATA,
    "data.hf_split": _OTHER_DATA,
    "data.validation_fraction": _OTHER_DATA,
    "data.path": _OTHER_DATA,
    "data.tokenizer": _OTHER_TOKENIZER,
    "data.vocab_size": _OTHER_TOKENIZER,
}
_NAMES_OF_OTHER_DATA = frozenset(name for name, meaning in _MEANING.items() if meaning == _OTHER_DATA)


class Change(NamedTuple):
    """A field that may not differ as it is, with its two values and what to know about it."""

    name: str
    old: Any
    new: Any
    meaning: str
    allowable: bool

    def __str__(self) -> str:
        return f"{self.name} {self.old} -> {self.new}" + (f" ({self.meaning})" if self.meaning else "")


def _values(config: Config) -> dict[str, Any]:
    """Every field by its dotted name, such as "model.num_layers"."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= {f"{field.name}.{name.name}": getattr(value, name.name) for name in dataclasses.fields(value)}
        else:
            values[field.name] = value
    return values


def _is_free(name: str) -> bool:
    return name in _FREE or name.partition(".")[0] in _FREE


def _is_allowable(name: str) -> bool:
    fixed = name in _FIXED or name.startswith("model.")
    return _is_free(name) or not fixed or name in _FLEXIBLE_MODEL


def allowed_fields(allow_change: Collection[str]) -> frozenset[str]:
    """The dotted names that `--allow-change` gave.

    Raises InputError for a name that is no field, or the field of a model that no consent can change.
    """
    known, allowed = _values(Config()), frozenset(name.replace("-", "_") for name in allow_change)
    for name in sorted(allowed):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "give a dotted name, such as optimizer.learning_rate"
            raise InputError(f"--allow-change {name}: there is no such field; {hint}")
        if not _is_allowable(name):
            raise InputError(
                f"--allow-change {name}: the saved arrays fit no other value, so that it cannot change; {_NEW_RUN}"
            )
    return allowed


def _schedule_change(old: Config, new: Config) -> Change | None:
    """The change by which the learning rates of steps already taken would have been others; None without one.

    More steps on a schedule of stated length leave the past as it was; so does any length of a constant one that does
    not change the warmup.
    """
    before = old.optimizer.schedule_length(old.training.steps)
    after = new.optimizer.schedule_length(new.training.steps)
    warmup = old.optimizer.warmup_steps
    constant = old.optimizer.schedule == new.optimizer.schedule == "constant"
    if before == after or (constant and min(warmup, before // 2) == min(warmup, after // 2)):
        return None
    if old.optimizer.schedule_steps == new.optimizer.schedule_steps:
        meaning = (
            "it is the schedule's length too, so that the learning rate would jump: add "
            f"--optimizer.schedule-steps {before} to keep the schedule as it was"
        )
        return Change("training.steps", old.training.steps, new.training.steps, meaning, True)
    lengths = f"the schedule would have {after} steps instead of {before}, so that the learning rate would jump"
    return Change("optimizer.schedule_steps", old.optimizer.schedule_steps, new.optimizer.schedule_steps, lengths, True)


def _changes_since_first_format(old: Config, new: Config) -> list[Change]:
    """The settings of a run of the first format whose schedule this version computes in another way."""
    length = new.optimizer.schedule_length(new.training.steps)
    warmup, fraction = old.optimizer.warmup_steps, old.optimizer.decay_steps_fraction
    found = []
    if warmup > length // 2:
        meaning = "a warmup takes at most half of the schedule now, so the learning rate would jump"
        found.append(Change("optimizer.warmup_steps", warmup, length // 2, meaning, True))
    room = length - warmup - 1
    if old.optimizer.schedule == "wsd" and round(length * fraction) > max(room, 1):
        meaning = "the decay never overlaps the warmup now, so the learning rate would jump"
        found.append(Change("optimizer.decay_steps_fraction", fraction, max(room, 0) / length, meaning, True))
    return found


def changes(old: Config, new: Config) -> list[Change]:
    """The fields in which `new` would not simply go on with a run of `old`, in the order of the config."""
    before, after = _values(old), _values(new)
    schedule = _schedule_change(old, new)
    found = []
    for name, value in before.items():
        if name in ("training.steps", "optimizer.schedule_steps"):
            found += [schedule] if schedule and schedule.name == name else []
        elif value != after[name] and not _is_free(name):
            allowable = _is_allowable(name)
            meaning = _MEANING.get(name, "") if allowable else "never: the saved arrays do not fit"
            found.append(Change(name, value, after[name], meaning, allowable))
    return found


def require_resumable(run: RunDir, config: Config, allow_change: Collection[str]) -> list[Change]:
    """Raise InputError, a line for each field, if `run` may not go on as `config`.

    Returns the changes that `allow_change` names, which may be; none where there is no run.
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
    consent = " ".join(f"--allow-change {change.name}" for change in refused)
    fix = f"restore them, or consent: {consent}; or " if all(change.allowable for change in refused) else ""
    lines = "".join(f"\n  {change}" for change in refused)
    raise InputError(f"{run.path} holds a run with another config, and stays as it is:{lines}\n{fix}{_NEW_RUN}")


def recorded_data(record: dict[str, Any]) -> dict[str, Any]:
    """The position in the data that a checkpoint's record holds. Raises InputError if there is none."""
    if not isinstance(record.get("data"), dict):
        raise InputError(
            "the checkpoint does not say which data it was trained on; another version may have written it: use that "
            f"version, or {_NEW_RUN}"
        )
    return record["data"]


def require_same_data(
    recorded: dict[str, Any], found: dict[str, Any], where: epath.PathLike, allow_change: Collection[str]
) -> None:
    """Raise InputError if the data in `where` is not that which a checkpoint was trained on.

    `recorded` and `found` are positions in the data, of the checkpoint and of the loader; see TrainLoader. Other
    data of the same tokenizer may follow where `allow_change` names data.path or another field that chooses data.
    """
    if recorded.get("tokenizer_hash", found["tokenizer_hash"]) != found["tokenizer_hash"]:
        raise InputError(
            f"the data in {where} has another tokenizer than the run, whose embedding belongs to the ids of its own; "
            f"set data.path to data of that tokenizer, or {_NEW_RUN}"
        )
    if recorded.get("data_id") != found["data_id"] and not _NAMES_OF_OTHER_DATA & allowed_fields(allow_change):
        raise InputError(
            f"the checkpoint was trained on other data than {where} holds ({recorded.get('data_id')} -> "
            f"{found['data_id']}); set data.path to the data of the checkpoint, or consent: --allow-change data.path "
            f"({_OTHER_DATA}); or {_NEW_RUN}"
        )
