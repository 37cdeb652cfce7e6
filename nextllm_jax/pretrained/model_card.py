"""The README.md of an export: what the model is, how it was trained, and how good it is, as Hugging Face shows it."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nextllm_jax.checkpoint.run_dir import METRICS, RunDir
from nextllm_jax.config import Config, ModelConfig
from nextllm_jax.model.accounting import parameter_count
from nextllm_jax.tokenizer.tokenizer import Tokenizer

FILE = "README.md"
_BEGIN, _END = "<!-- certificate -->", "<!-- end of the certificate -->"
_PRIVATE = ("workdir", "path", "mixture_paths", "cache_dir", "scratch", "trackers")
"""Fields of a config that name places on the machine of the training."""
_METRICS = ("loss", "perplexity", "bits_per_byte", "tokens_seen")


def model_card(
    name: str,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    license: str,
    model_type: str,
    run: RunDir | None,
    step: int | None,
    base: str | None = None,
    library: str = "transformers",
) -> str:
    """The text of a model card. `run` is the run that was exported at `step`, if it was one; `base` its base model.

    An imported or quantized run has no metrics, and nothing is known about its data.
    """
    config = run.read_config() if run is not None and run.read(METRICS) else None
    header: dict[str, Any] = {"license": license, "library_name": library, "pipeline_tag": "text-generation"}
    header["tags"] = ["nextllm_jax"]
    if base:
        header["base_model"] = base
    sections = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items()) + "---",
        f"# {name}",
        f"Written by `nextllm export` of nextllm_jax. License: {license}.",
        f"## Model\n\n{_table(_model_rows(model, model_type).items())}",
        f"## Tokenizer\n\n{_table(_tokenizer_rows(tokenizer).items())}",
    ]
    if run is not None and config is not None:
        sections.append(f"## Data\n\n{_table(_data_rows(config).items())}")
        if measured := _last_validation(run, step):
            sections.append(f"## Metrics\n\n{_table(measured.items())}")
    sections.append(f"## Certificate\n\n{_BEGIN}\nNot certified yet. `nextllm certify` writes its result here.\n{_END}")
    if config is not None:
        shown = json.dumps(_public(dataclasses.asdict(config)), indent=2, ensure_ascii=False)
        sections.append(f"## Training config\n\n```json\n{shown}\n```")
    return "\n\n".join(sections) + "\n"


def with_certificate(card: str, verdict: str, rows: Iterable[Sequence[str]]) -> str | None:
    """The card with the verdict and the rows of a certificate; None if it is not a card of `model_card`."""
    text = f"{verdict}\n\n{_table(rows)}"
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return f"{before}{begin}\n{text}\n{end}{after}" if end else None


def _table(rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    columns = lines[0].replace("\\|", "").count("|") - 1
    return "\n".join(["|" + " |" * columns, "|" + "---|" * columns, *lines])


def _model_rows(model: ModelConfig, model_type: str) -> dict[str, Any]:
    scaled = "" if model.rope_scaling == "none" else f", scaled by {model.rope_scaling} {model.rope_scaling_factor:g}"
    return {
        "family": model_type,
        "parameters": f"{parameter_count(model):,}",
        "layers": f"{model.num_layers} ({', '.join(model.layer_pattern)})",
        **({"experts": f"{model.num_experts}, {model.experts_per_token} per token"} if model.num_experts else {}),
        "width": f"{model.embed_dim}, MLP {model.mlp_dim}",
        "heads": f"{model.num_heads}, {model.num_kv_heads} for keys and values, of width {model.head_dim}",
        "vocabulary": f"{model.vocab_size:,} rows, {'tied' if model.tie_embeddings else 'with a separate head'}",
        "context": f"{model.context_length:,} tokens",
        "RoPE": f"base {model.rope_theta:g}{scaled}",
    }


def _tokenizer_rows(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = ", ".join(f"`{tokenizer.decode([id])}` ({id})" for id in tokenizer.stop_ids)
    begins = f"`{tokenizer.decode([tokenizer.bos_id])}` ({tokenizer.bos_id})" if tokenizer.add_bos else "nothing"
    return {
        "name": tokenizer.name,
        "tokens": f"{tokenizer.vocab_size:,}",
        "prompts begin with": begins,
        "text ends with": ends,
        "chat template": "no" if tokenizer.chat_template is None else "yes",
    }


def _data_rows(config: Config) -> dict[str, Any]:
    data, training = config.data, config.training
    corpus = ", ".join(data.mixture) or _without_folder(data.corpus)
    tokens = training.steps * training.global_batch_size * data.sequence_length
    rows = {
        "corpus": corpus,
        "held out": f"{data.validation_fraction:.1%} of the documents",
        "windows": f"{data.sequence_length} tokens, {training.global_batch_size} a step",
        "trained on": f"{training.steps:,} steps, up to {tokens:,} tokens",
    }
    base = _without_folder(config.init_from)
    if config.lora.rank:
        rows["adapters"] = f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {base}"
    elif base is not None:
        rows["initial weights"] = base
    return rows


def _last_validation(run: RunDir, step: int | None) -> dict[str, Any]:
    """The last validation up to a step; empty if there is none."""
    found: dict[str, Any] = {}
    for line in run.read(METRICS).splitlines():
        record = json.loads(line)
        if record.get("split") == "validation" and record["step"] <= (step or 0):
            found = record
    shown = {"step": found["step"]} if found else {}
    return shown | {name: f"{found[name]:.4g}" for name in _METRICS if isinstance(found.get(name), int | float)}


def _public(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config without private ones, and with the last part of absolute paths only."""
    return {
        name: _public(value) if isinstance(value, dict) else _without_folder(value)
        for name, value in values.items()
        if name not in _PRIVATE
    }


def _without_folder(value: Any) -> Any:
    """The name of the file or directory if the value is an absolute path, or else the value."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
