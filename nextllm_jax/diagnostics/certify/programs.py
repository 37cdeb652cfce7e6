"""Comparisons of logits, token ids and conversations with transformers and llama.cpp."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nextllm_jax.config import ModelConfig
from nextllm_jax.diagnostics.certify import text
from nextllm_jax.diagnostics.certify.certificate import Row, failed, ok, skipped
from nextllm_jax.diagnostics.certify.forward import Weights, explain, relative_difference
from nextllm_jax.diagnostics.certify.outside import Answer, ask
from nextllm_jax.diagnostics.certify.probes import KEPT, Probe
from nextllm_jax.tokenizer.tokenizer import Tokenizer

LOGITS = 1e-4
"""Greatest difference of logits that are computed in float32, relative to the greatest logit."""
MARGIN = 1e-5
"""Choices between experts whose scores are nearer than this, relative to the greater, may differ between programs."""
LOG_PROBABILITIES = {"silu": 2e-3, "gelu_tanh": 5e-2}
"""Greatest difference of a log probability in llama.cpp. Its GELU is a table of float16."""
_SPECIAL = 20
"""Number of special tokens whose spellings transformers encodes."""
QUANTIZED_LOG_PROBABILITIES = 0.5
"""The same for a quantized file, whose products llama.cpp rounds to 8 bits too."""


def ask_transformers(
    directory: Path,
    probes: Sequence[Probe],
    tokenizer: Tokenizer | None,
    *,
    python: str | None = None,
    memory_bytes: int | None = None,
    adapter: Path | None = None,
) -> Answer:
    """What transformers makes of a Hugging Face directory, perhaps with an adapter in the format of PEFT."""
    question: dict[str, Any] = {"directory": str(directory), "probes": probes, "kept": KEPT}
    question |= {"memory_bytes": memory_bytes, "adapter": None if adapter is None else str(adapter)}
    if tokenizer is not None:
        question["texts"] = texts_with_tokens(tokenizer)
        question["messages"] = text.MESSAGES if tokenizer.chat_template else None
    return ask("ask_transformers.py", question, python)


def compare_transformers(
    name: str, answer: Answer, weights: Weights, probes: Sequence[Probe], logits: list[np.ndarray]
) -> list[Row]:
    """Rows about the logits of transformers, or of a package on top of it named `name`."""
    check = name
    if answer.missing or answer.error:
        return [_unanswered(check, answer)]
    theirs = [answer.arrays[f"logits_{i}"] for i in range(len(probes))]
    switched = _switched(weights.config, probes)
    rows = []
    for i, probe in enumerate(probes):
        if i in switched:
            rows.append(skipped(f"{check}, {probe}", f"{name} switches its RoPE factors at the original context"))
            continue
        count = min(theirs[i].shape[-1], logits[i].shape[-1])  # the files may have more rows, or fewer
        difference = relative_difference(logits[i][:, :count], theirs[i][:, :count])
        rows.append(logits_row(f"{check}, {probe}", difference))
    if any(row.status == "FAILED" for row in rows):
        rows = _named(rows, functools.partial(_explain_transformers, weights, probes, theirs, switched))
    return rows


def _switched(config: ModelConfig, probes: Sequence[Probe]) -> set[int]:
    """The probes for which transformers uses the short factors of longrope, where this package uses the long ones."""
    original = config.rope_original_context_length
    if config.rope_scaling != "longrope" or config.context_length <= original:
        return set()
    return {i for i, probe in enumerate(probes) if probe.positions[-1] < original}


def _explain_transformers(weights: Weights, probes: Any, theirs: Any, switched: set[int]) -> str | None:
    def measure(logits: list[np.ndarray]) -> float:
        return max(
            relative_difference(found[:, : other.shape[-1]], other[:, : found.shape[-1]])
            for i, (found, other) in enumerate(zip(logits, theirs, strict=True))
            if i not in switched
        )

    return explain(weights, probes, measure, LOGITS)


def compare_transformers_text(answer: Answer, tokenizer: Tokenizer, rows_of_embedding: int) -> list[Row]:
    """Rows about the token ids and the rendered conversation of transformers' AutoTokenizer."""
    if answer.missing or answer.error:
        return []
    if "text_error" in answer.values:
        return [failed("token ids: transformers", answer.values["text_error"])]
    theirs = answer.values["text"]
    program = f"{theirs['class']} of transformers {answer.values['version']}"
    check, begins = "token ids: transformers", [tokenizer.bos_id] if tokenizer.add_bos else []
    rows = [ok(check, f"the ids of {len(theirs['ids'])} prompts are those of {program}")]
    added = {token: id for token, id in theirs["added"].items() if id < rows_of_embedding}
    if missing := {token: id for token, id in added.items() if tokenizer.backend.tokens.get(token) != id}:
        rows = [failed(check, f"{program} also has the tokens {missing}", "shifted token id")]
    elif plain := {token for token in theirs["special"] if token in tokenizer.backend.added_tokens}:
        rows = [failed(check, f"{program} treats {sorted(plain)} as special tokens, so no text contains them")]
    for each, ids in zip(texts_with_tokens(tokenizer), theirs["ids"], strict=True):
        mine = begins + tokenizer.encode(each, recognize="all")
        if mine != ids:
            rows = [text.different_ids(check, each, mine, ids, program)]
            break
    return rows + ([text.compare_chat(tokenizer, theirs, "transformers")] if "chat" in theirs else [])


def texts_with_tokens(tokenizer: Tokenizer) -> list[str]:
    """Plain texts, and texts with special tokens."""
    spelled = [f"a{token}b" for token in [*tokenizer.backend.tokens][:_SPECIAL]]
    return [*text.PLAIN_TEXTS, *spelled]


def ask_llama_cpp(
    file: Path, config: ModelConfig, probes: Sequence[Probe], tokenizer: Tokenizer, *, python: str | None = None
) -> Answer:
    """What llama.cpp makes of a GGUF file: its own continuation of each plain probe."""
    # It says nothing of tokens in the middle of a character.
    partial = [id for id in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([id])]
    original, context = config.rope_original_context_length, max(len(probe.tokens) for probe in probes) + KEPT
    if config.rope_scaling == "longrope" and config.context_length > original:
        context = max(context, original + 256)  # it chooses the factors by the length of its cache
    question = {
        "file": str(file),
        "prompts": [probe.prompt for probe in probes if probe.is_plain],
        "new_tokens": KEPT,
        "context": context,
        "banned": partial,
        "texts": text.PLAIN_TEXTS,
    }
    return ask("ask_llama_cpp.py", question, python)


def with_continuations(probes: Sequence[Probe], answer: Answer) -> list[Probe]:
    """The probes, in which llama.cpp's own tokens follow each plain prompt."""
    found = iter(answer.values.get("probes", ()))
    return [
        probe.continued(next(found)["tokens"][: KEPT - 1]) if probe.is_plain and answer.values else probe
        for probe in probes
    ]


def compare_llama_cpp(
    name: str,
    answer: Answer,
    weights: Weights,
    probes: Sequence[Probe],
    logits: list[np.ndarray],
    *,
    rows_in_file: int,
    quantized: bool = False,
) -> list[Row]:
    """Rows about the log probabilities of llama.cpp for a file with `rows_in_file` rows of the embedding.

    For a quantized file, its continuation may be another one, so only the token after the prompt is compared.
    """
    check = name
    if answer.missing or answer.error:
        return [_unanswered(check, answer)]
    tolerance = QUANTIZED_LOG_PROBABILITIES if quantized else LOG_PROBABILITIES[weights.config.activation]
    plain = [i for i, probe in enumerate(probes) if probe.is_plain]
    likeliest = [np.array(found["likeliest"][: 1 if quantized else KEPT]) for found in answer.values["probes"]]

    def difference(all_logits: list[np.ndarray], number: int) -> float:
        return _log_probability_difference(all_logits[plain[number]][:, :rows_in_file], likeliest[number])

    rows = [
        _row(f"{check}, {probes[i]}", difference(logits, number), tolerance, "log probabilities differ by {}")
        for number, i in enumerate(plain)
    ]
    rows += [
        skipped(f"{check}, {probe}", "llama.cpp takes no positions with gaps; give --tokens to compare them all")
        for probe in probes
        if not probe.is_plain
    ]
    if any(row.status == "FAILED" for row in rows):

        def worst(all_logits: list[np.ndarray]) -> float:
            return max(difference(all_logits, number) for number in range(len(plain)))

        rows = _named(rows, lambda: explain(weights, probes, worst, tolerance))
    return rows


def _log_probability_difference(logits_TV: np.ndarray, likeliest_TK2: np.ndarray) -> float:
    steps = len(likeliest_TK2)
    logits_TV = logits_TV[:steps]
    greatest_T1 = logits_TV.max(axis=-1, keepdims=True)
    totals_T1 = np.log(np.exp(logits_TV - greatest_T1).sum(axis=-1, keepdims=True))
    ours_TK = np.take_along_axis(logits_TV - greatest_T1 - totals_T1, likeliest_TK2[..., 0].astype(int), axis=1)
    found = np.abs(ours_TK - likeliest_TK2[..., 1]).max()
    return float(found) if np.isfinite(found) else float("inf")


def _unanswered(check: str, answer: Answer) -> Row:
    if answer.missing:
        return skipped(check, f"the package {answer.missing} is not installed")
    return failed(check, answer.error or "no answer")


def logits_row(check: str, difference: float, *, remark: str = "") -> Row:
    """A row about logits whose greatest difference, relative to the greatest logit, is given."""
    return _row(check, difference, LOGITS, "logits differ by {} of the greatest", remark)


def margins_row(margins: list[float]) -> Row:
    """A row about how clearly experts are chosen, from the margins of `forward.Comparison`."""
    check, close = "choice of experts", sum(margin < MARGIN for margin in margins)
    if not close:
        return ok(check, f"{len(margins):,} choices, by at least {min(margins):.1e} of a score")
    detail = f"{close} of {len(margins):,} choices are made by less than {MARGIN:g} of a score"
    return skipped(check, f"{detail}; other programs may choose other experts, and logits then differ")


def _row(check: str, difference: float, tolerance: float, what: str, remark: str = "") -> Row:
    detail = f"{what.format(f'{difference:.1e}')} (at most {tolerance:g})"
    return ok(check, detail) if difference <= tolerance else failed(check, f"{detail}{remark}")


def _named(rows: list[Row], explained: Any) -> list[Row]:
    """The rows, in which failures have the fault that explains them, if any does."""
    fault = explained()
    return [dataclasses.replace(row, fault=fault) if row.status == "FAILED" else row for row in rows]
