"""What a run reports: its trackers, and evaluations in addition to the validation loss."""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

from nextllm_jax.config.checks import check_types, require, require_positive
from nextllm_jax.config.mixture import short_names

TRACKERS = ("wandb", "trackio")
"""Names of the trackers, which are also those of their packages and extras."""
_TEXT = re.compile(r"(?P<name>[\w.-]+):(?P<path>.+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Trackers that show the run, in addition to TensorBoard."""

    trackers: tuple[str, ...] = ()
    """Trackers that get the config, the metrics, the samples and the pictures: wandb (Weights & Biases), trackio. Each
    needs the extra of its name. none: only files in the run directory."""
    project: str = "nextllm_jax"
    """Project of the run in its trackers."""

    def __post_init__(self) -> None:
        check_types(self, "logging.")
        for name in self.trackers:
            require(name in TRACKERS, f"logging.trackers has {name!r}; the trackers are {' and '.join(TRACKERS)}")
            require(self.trackers.count(name) == 1, f"logging.trackers has {name} twice; leave one out")
        require(bool(self.project), "logging.project is empty; give a name, or leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluations of the live weights, in addition to the validation loss."""

    texts: tuple[str, ...] = ()
    """Text files, each scored as one document, such as README.md or readme:README.md, where readme names its result,
    bits_per_byte/readme. By default, that is the name of the file."""
    lm_eval_tasks: tuple[str, ...] = ()
    """Tasks of the lm-evaluation-harness: paths of .yaml files, or names of the harness's own tasks, such as arc_easy.
    The extra lm-eval is needed."""
    every_steps: int | None = None
    """Steps between these evaluations, a multiple of training.evaluate_every_steps; none: the same. Training also
    evaluates at the end."""

    def __post_init__(self) -> None:
        check_types(self, "evaluation.")
        require_positive(self, "evaluation.", "every_steps")
        for task in self.lm_eval_tasks:
            require(bool(task), "evaluation.lm_eval_tasks has an empty name; leave it out")
            require(self.lm_eval_tasks.count(task) == 1, f"evaluation.lm_eval_tasks has {task} twice; leave one out")
        names = [text.name for text in parse_texts(self.texts)]
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"evaluation.texts has two texts named {twice}; write NAME:PATH with another name")


class EvaluationText(NamedTuple):
    """An entry of evaluation.texts."""

    name: str
    path: str


def parse_texts(entries: Sequence[str]) -> list[EvaluationText]:
    """The texts of evaluation.texts. Raises InputError for an empty path and for a bucket, where no text can be."""
    texts = []
    for entry in entries:
        require(entry.strip() not in ("", ":"), "evaluation.texts has an empty path; leave it out")
        require("://" not in entry, f"evaluation.texts {entry} is in a bucket; give a local file")
        found = _TEXT.fullmatch(entry)
        (default,) = short_names([entry])
        texts.append(EvaluationText(found["name"], found["path"]) if found else EvaluationText(default, entry))
    return texts
