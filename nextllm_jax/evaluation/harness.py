"""The model `nextllm_jax` for EleutherAI's lm-evaluation-harness.

`nextllm lm_eval --model_args checkpoint=runs/small --tasks arc_easy` is the harness's own command with this model.
`Tasks` runs some of its tasks during a training.
"""

import functools
import random
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nextllm_jax.config import SamplingConfig
from nextllm_jax.config.checks import require_integer, stop_strings
from nextllm_jax.errors import InputError
from nextllm_jax.inference.buckets import bucket
from nextllm_jax.inference.llm import LLM
from nextllm_jax.inference.load import load
from nextllm_jax.model.objective import text_batch, token_scores
from nextllm_jax.progress import progress_bar
from nextllm_jax.sharding import on_mesh
from nextllm_jax.tokenizer.chat import ChatTemplate

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise InputError(f"the harness is not installed ({error}); pip install 'nextllm_jax[lm-eval]'") from error

_SEED = 1234
"""The harness's default for numpy and for few-shot examples."""
_token_scores = jax.jit(token_scores, static_argnames=("model", "vocab_size"))


@register_model("nextllm_jax")
class HarnessModel(TemplateLM):
    """Implements the harness's model interface with an LLM: either `llm`, or the one loaded from `checkpoint`.

    Contexts begin with BOS if the model's prompts do, and are truncated on the left to fit the context, as in the
    harness's own models. The text of a chat is used exactly as the template formats it. `max_gen_toks` limits answers
    if a task does not. The harness sets `device`: its default cuda:0 means jax's default device, and any other value
    must be jax's platform.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        llm: LLM | None = None,
        batch_size: int | str = 8,
        step: str | int | None = None,
        dtype: str | None = None,
        max_gen_toks: int = 256,
        device: str = "cuda:0",
    ) -> None:
        super().__init__()
        platform = jax.default_backend()
        if device.split(":")[0] not in ("cuda", platform):
            raise InputError(f"--device is {device}, but jax runs on {platform}; leave it out, or set JAX_PLATFORMS")
        if llm is None:
            if checkpoint is None:
                raise InputError("no model is given; pass --model_args checkpoint=PATH")
            llm = load(checkpoint, step=step, dtype=dtype)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch_size is {batch_size}; it must be a positive number")
        self.llm = llm
        self.batch_size = int(batch_size)
        require_integer("max_gen_toks", max_gen_toks)
        self.max_gen_toks = max_gen_toks
        self._is_chat = False

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that precedes a text without context: BOS, or EOS if there is no BOS, as in the harness's own models.

        The tokenizer's bos_id may be another: it is EOS unless the model's prompts begin with BOS.
        """
        tokenizer = self.llm.tokenizer
        names, tokens = tokenizer.roles.names, tokenizer.backend.tokens
        return tokens.get(names.get("bos_token", names.get("eos_token", "")), tokenizer.bos_id)

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches chats."""
        return self.llm.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text that begins a context or, without special tokens, continues one."""
        tokenizer = self.llm.tokenizer
        ids = tokenizer.encode(string, recognize="all" if self._is_chat else "added")
        opens = tokenizer.add_bos and not self._is_chat if add_special_tokens is None else add_special_tokens
        return [tokenizer.bos_id, *ids] if opens else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses, for the harness's records."""
        return self.llm.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat. From now on, control tokens in texts are encoded as control tokens."""
        self._is_chat = True
        return self._template.text(chat_history, add_generation_prompt=add_generation_prompt)

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.llm.tokenizer)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log probability, whether greedy decoding would give it) of each continuation after its context."""
        longest = self.llm.config.context_length
        rows = [(context + continuation)[-longest - 1 :] for _, context, continuation in requests]
        counts = [
            min(len(continuation), len(row) - 1) for (_, _, continuation), row in zip(requests, rows, strict=True)
        ]
        if any(count < len(request[2]) for count, request in zip(counts, requests, strict=True)):
            raise InputError(f"a continuation exceeds the model's context_length {longest}; leave the task out")
        results: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for batch in progress_bar(self._batches(rows), desc="loglikelihood", unit=" batches", disable=disable_tqdm):
            logprobs_BT, greedy_BT = self._score([rows[i] for i in batch])
            for i, logprobs_T, greedy_T in zip(batch, logprobs_BT, greedy_BT, strict=False):
                end = len(rows[i]) - 1
                scored = slice(end - counts[i], end)
                results[i] = (float(logprobs_T[scored].sum(dtype=np.float64)), bool(greedy_T[scored].all()))
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each whole text, computed in disjoint windows.

        Each window begins with BOS if the model's prompts do, since some models, such as Gemma, need it.
        """
        longest, tokenizer = self.llm.config.context_length, self.llm.tokenizer
        first = [tokenizer.bos_id] if tokenizer.add_bos else []
        windows: list[tuple[tuple[str, str] | None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            length = longest if len(ids) <= longest else longest - len(first)
            for i, pair in enumerate(get_rolling_token_windows(ids, self.prefix_token_id, length, 1)):
                context, continuation = make_disjoint_window(pair)
                windows.append((None, [*first, *context] if i else context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to one of its stop strings, greedy unless the task samples."""
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1], self.max_gen_toks), []).append(i)
        progress = progress_bar(total=len(requests), desc="generate_until", unit=" requests", disable=disable_tqdm)
        for (stop, max_new_tokens, sampling), members in groups.items():
            room = self.llm.config.context_length - max_new_tokens
            if room < 1:
                raise InputError(f"max_gen_toks {max_new_tokens} leaves no room in the model's context; lower it")
            rows = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in members]
            for batch in self._batches(rows):
                texts = self._generate([rows[j] for j in batch], stop, max_new_tokens, sampling)
                for j, text in zip(batch, texts, strict=True):
                    request = requests[members[j]]
                    answers[members[j]] = text
                    self.cache_hook.add_partial("generate_until", request.args, text)
                progress.update(len(batch))
        progress.close()
        return answers

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Batches of indices of rows, longest first: an out-of-memory error occurs at once or never."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def _score(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The log probability of each row's tokens except the first, and whether each is the most likely; [B, T]."""
        T = min(bucket(max(len(row) for row in rows) - 1, 16), self.llm.config.context_length)
        tokens_BT = np.zeros((self.batch_size, T + 1), np.int32)
        for i, row in enumerate(rows):
            tokens_BT[i, : len(row)] = row
        vocab_size = self.llm.tokenizer.vocab_size
        with on_mesh(self.llm.mesh):
            scores = _token_scores(self.llm.model, self.llm.params, text_batch(tokens_BT), vocab_size=vocab_size)
        logprobs_BT, greedy_BT = scores
        return np.asarray(logprobs_BT), np.asarray(greedy_BT)

    def _generate(
        self, rows: list[list[int]], stop: tuple[str, ...], max_new_tokens: int, sampling: SamplingConfig
    ) -> list[str]:
        pieces = self.llm.stream_tokens(
            rows, texts=[""] * len(rows), max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
        )
        finished = {piece.row: piece.sample.text for piece in pieces if piece.sample is not None}
        return [finished[row] for row in range(len(rows))]


def _settings(arguments: dict[str, Any], max_gen_toks: int) -> tuple[tuple[str, ...], int, SamplingConfig]:
    """(stop strings, maximum number of tokens, sampling config) from a task's generation_kwargs.

    Raises InputError for unsupported ones.
    """
    arguments = dict(arguments)
    until = arguments.pop("until", None) or []
    stops = stop_strings([text for text in until if text != ""] if isinstance(until, list | tuple) else until)
    most = next((arguments.pop(name) for name in ("max_gen_toks", "max_new_tokens") if name in arguments), max_gen_toks)
    require_integer("the task's max_gen_toks", most)
    samples = arguments.pop("do_sample", "temperature" in arguments)
    if not isinstance(samples, bool):
        raise InputError(f"the task's do_sample is {samples!r}; it must be true or false")
    known = {name: arguments.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in arguments}
    if arguments:
        raise InputError(f"the task's generation_kwargs have {', '.join(arguments)}, not supported; leave the task out")
    sampling = (
        SamplingConfig(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **known})
        if samples
        else SamplingConfig(temperature=0)
    )
    return tuple(stops), int(most), sampling


class Tasks:
    """Tasks of the harness, loaded once: `names` are paths of .yaml files, or names of the harness's own tasks.

    Raises InputError for a task that is not there, whose data cannot be read, or that two names have.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        # Reading the list of the harness's own tasks takes ten seconds.
        manager = TaskManager(include_defaults=not all(name.endswith(".yaml") for name in names))
        self._loaded: dict[str, Any] = {}
        owners: dict[str, str] = {}
        for name in names:
            _seed()
            try:
                self._loaded[name] = manager.load([name])
            except Exception as error:
                reason = str(error.args[0] if error.args else error).strip().partition("\n")[0]
                raise InputError(f"the task {name} cannot be loaded ({reason}); correct the file or name") from error
            for task in self._loaded[name]["tasks"]:
                if (owner := owners.setdefault(task, name)) != name:
                    raise InputError(f"{owner} and {name} both have the task {task}; leave one out, or rename its task")

    def run(self, name: str, llm: LLM, batch_size: int) -> dict[str, float]:
        """The metrics of one of the tasks, such as {"arc_easy/acc": 0.3}; of a group, also those of its tasks."""
        model = HarnessModel(llm=llm, batch_size=batch_size)  # pyright: ignore[reportCallIssue]
        # What the harness's simple_evaluate does, without loading the tasks again and describing the machine.
        _seed()
        for task in self._loaded[name]["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(_SEED)
        found: Any = evaluate(model, self._loaded[name], bootstrap_iters=0, log_samples=False)
        return {
            f"{task}/{metric.removesuffix(',none')}": float(value)
            for task, metrics in found["results"].items()
            for metric, value in metrics.items()
            if "," in metric and "_stderr," not in metric and isinstance(value, int | float)
        }


def _seed() -> None:
    """Seed what tasks draw from, as the harness does."""
    random.seed(0)
    np.random.seed(_SEED)  # noqa: NPY002


def run_harness(argv: list[str]) -> None:
    """Run the harness's command line with these arguments, with this model as the default."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    chosen = [] if "--model" in argv else ["--model", "nextllm_jax"]
    sys.argv = ["lm_eval", *argv, *chosen]
    cli_evaluate()
