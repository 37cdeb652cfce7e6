"""Imports models into run directories, quantizes them, and exports them.

Each writes to a temporary path and renames or uploads it at the end, so the output is always complete.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config, DataConfig, ModelConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError, missing_package
from nextllm_jax.hardware import readable_bytes
from nextllm_jax.model.accounting import parameter_bytes
from nextllm_jax.model.calibration import calibrate, calibration_windows
from nextllm_jax.model.quantize import Observer, abstract_quantized, ignore, is_quantized
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import stack_layers
from nextllm_jax.ops.quantized import pack
from nextllm_jax.pretrained.model_card import FILE as CARD
from nextllm_jax.pretrained.model_card import model_card
from nextllm_jax.pretrained.output import new_output, require_new
from nextllm_jax.pretrained.source import ORIGIN, QUANTIZED, Source, open_path
from nextllm_jax.published_models import resolve
from nextllm_jax.sharding import on_device
from nextllm_jax.storage.open_storage import as_path, open_storage
from nextllm_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

Format = Literal["huggingface", "gguf"]
UNKNOWN_LICENSE = "unknown"

LAYOUT = 1
"""Increase it when `import_model` changes its output; cached imports are then rebuilt."""


def import_model(
    source: str,
    output: str,
    *,
    dtype: str = "float32",
    context_length: int | None = None,
    ignore_keys: Collection[str] = (),
) -> None:
    """Write a run directory (config.json, tokenizer, checkpoint 0) from a Hugging Face directory or a GGUF file.

    Parameters are stored in `dtype`. `context_length` may lower the model's own. Unsupported keys of the model's config
    in `ignore_keys` are ignored. Raises InputError for damaged files, for unsupported models, and if the output exists.
    """
    _require_new_run(output)
    opened = open_path(resolve(source), ignore_keys=ignore_keys)
    if opened.is_run:
        raise InputError(f"{source} is a run directory already; give a Hugging Face directory or a .gguf file")
    model = dataclasses.replace(opened.config, param_dtype=dtype)
    if context_length is not None:
        if context_length > model.context_length:
            raise InputError(
                f"context_length {context_length} exceeds that of the model, {model.context_length}; lower it"
            )
        model = dataclasses.replace(model, context_length=context_length)
    tokenizer, params = opened.load_tokenizer(), opened.load_params(_on_cpu(model))
    _write_run(output, model, tokenizer, params, {ORIGIN: _origin(opened)})


def quantize_model(
    source: str,
    output: str,
    quantization: Quantization,
    *,
    step: str | int | None = None,
    calibration: str | None = None,
    observe: Observer = ignore,
) -> None:
    """Write a run directory with the model at `source` and quantized matrices.

    Raises InputError as `open_quantizable` does. `observe` is called for each quantized weight.
    """
    model = open_quantizable(source, output, quantization, step=step, calibration=calibration)
    write_quantized(model, output, quantization, observe)


class Quantizable(NamedTuple):
    """A model that can be quantized."""

    source: Source
    tokenizer: Tokenizer
    windows_BT: np.ndarray | None
    """The windows for `model.calibration.calibrate`, if there is a calibration text."""
    sequence_length: int | None
    """Of the training run; None if it is not a run."""


def open_quantizable(
    source: str,
    output: str,
    quantization: Quantization,
    *,
    step: str | int | None = None,
    calibration: str | None = None,
) -> Quantizable:
    """The model at `source`, checked before any work.

    Raises InputError if the model is already quantized, if the output exists, and for a calibration text that is too
    short or that the scheme does not use.
    """
    _require_new_run(output)
    if calibration is not None and quantization.scheme != "int4":
        raise InputError(f"--calibrate applies to int4 only; the scheme is {quantization.scheme}")
    opened = open_path(resolve(source), step=step)
    opened.require_floats(source)
    _on_cpu(opened.config, quantization)
    tokenizer, windows_BT = opened.load_tokenizer(), None
    if calibration is not None:
        windows_BT = calibration_windows(tokenizer.encode_document(calibration), opened.config.context_length)
    sequence_length = RunDir(resolve(source)).read_config().data.sequence_length if opened.is_run else None
    return Quantizable(opened, tokenizer, windows_BT, sequence_length)


def write_quantized(model: Quantizable, output: str, quantization: Quantization, observe: Observer = ignore) -> None:
    """Write a run directory with quantized matrices. `observe` is called for each of them.

    The float weights are read one at a time; for a calibration, all of them are held in host memory.
    """
    source, config = model.source, model.source.config
    if model.windows_BT is None:
        params = source.load_params(_on_cpu(config, quantization), observe)
    else:
        floats, wanted = (_on_cpu(config, kept, scan_layers=False) for kept in (None, quantization))
        with jax.default_matmul_precision("highest"):
            params = calibrate(config, source.load_params(floats), wanted, model.windows_BT, observe=observe)
        params = stack_layers(config, params)
    params = jax.tree.map(
        lambda leaf: jax.jit(pack)(leaf) if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
    )
    record = {ORIGIN: _origin(source), QUANTIZED: quantization.to_json()}
    _write_run(output, config, model.tokenizer, params, record, window=model.sequence_length)


def _origin(opened: Source) -> dict[str, Any]:
    generation = {"generation": opened.generation} if opened.generation else {}
    return {"model_type": opened.model_type, "vocab_size": opened.vocab_size, **generation}


def _require_new_run(output: str) -> None:
    open_storage(output)  # raises InputError for s3://, where no run can be
    require_new(output)


def _write_run(
    output: str,
    model: ModelConfig,
    tokenizer: Tokenizer,
    params: Any,
    record: dict[str, Any],
    window: int | None = None,
) -> None:
    """Write a run directory with checkpoint 0. `window` is its sequence length for training (None: up to 1024)."""
    window = window or min(model.context_length, 1024)
    data = DataConfig(tokenizer=str(RunDir(as_path(output).absolute()).tokenizer), sequence_length=window)
    with new_output(output) as directory:
        run = RunDir(directory)
        tokenizer.save(run.tokenizer)
        with Checkpoints(run.checkpoints) as checkpoints:
            checkpoints.save(0, {"params": params}, record, validation_loss=None)
        run.write_config(Config(model=model, data=data))


def export_model(
    source: str,
    output: str,
    *,
    file_format: Format,
    dtype: str | None = None,
    step: str | int | None = None,
    model_type: str | None = None,
    shard_bytes: int = 5_000_000_000,
    license: str = UNKNOWN_LICENSE,
) -> None:
    """Write the model at `source` as a Hugging Face directory, with a model card that states `license`, or a GGUF file.

    Embedding and head have one row per id of the tokenizer; for an imported model, as many rows as its files had.
    `dtype` is the type of the matrices; None: that of the source, bfloat16 or float32. `model_type` is the Hugging Face
    family to write; None: the one it was imported from, or else the first that fits.

    Raises InputError if the format cannot represent the model, and if the output exists.
    """
    require_new(output)
    opened = open_path(resolve(source), step=step)
    dtype = dtype or opened.dtype
    # Exported Hugging Face directories hold only floats.
    quantization = opened.quantization if file_format == "gguf" else None
    if opened.quantization is not None and quantization is None:
        _log.warning(f"{source} is quantized ({opened.quantization}); the export stores its values as {dtype}")
    config, tokenizer = opened.config, opened.load_tokenizer()
    params = opened.load_params(_on_cpu(config, quantization))
    options: dict[str, Any] = {
        "vocab_size": opened.vocab_size or min(tokenizer.vocab_size, config.vocab_size),
        "dtype": dtype,
        "model_type": model_type or opened.model_type,
    }
    try:
        if file_format == "gguf":
            from nextllm_jax.interop import gguf
            from nextllm_jax.tokenizer.gguf import to_gguf

            metadata = to_gguf(tokenizer, options["vocab_size"])
            with new_output(output) as file:
                gguf.export(config, params, file, metadata=metadata, **options)
            return
        from nextllm_jax.interop import huggingface
        from nextllm_jax.tokenizer.huggingface import save_huggingface, splits_as_qwen2

        with new_output(output) as directory:
            ids = _token_ids(tokenizer, opened.generation)
            options |= {"token_ids": ids, "generation": opened.generation}
            written = dataclasses.replace(config, vocab_size=options["vocab_size"], param_dtype=dtype)
            _log.info(f"writing {readable_bytes(parameter_bytes(written))} of weights in {dtype} to {output}")
            huggingface.export(config, params, directory, shard_bytes=shard_bytes, **options)
            save_huggingface(tokenizer, directory)
            written_type = huggingface.read_config(directory)[1]
            if written_type == "qwen2" and not splits_as_qwen2(tokenizer):
                _log.warning(
                    "AutoTokenizer of transformers 5 splits text for models of type qwen2 by Qwen's own pattern, not "
                    "by that of this tokenizer; load it with PreTrainedTokenizerFast.from_pretrained"
                )
            _write_card(source, output, opened, written, directory, license=license, model_type=written_type)
    except ModuleNotFoundError as error:
        raise missing_package(f"writing {file_format} needs", error, ".[interop]") from error


def _write_card(
    source: str,
    output: str,
    opened: Source,
    model: ModelConfig,
    directory: Path,
    *,
    license: str,
    model_type: str,
    base: str | None = None,
) -> None:
    """Write a model card into the directory of an export; `base` is the base model of adapters."""
    card = model_card(
        Path(output).name,
        model,
        opened.load_tokenizer(),
        license=license,
        model_type=model_type,
        run=RunDir(resolve(source)) if opened.is_run else None,
        step=opened.step,
        base=base,
        library="transformers" if base is None else "peft",
    )
    (directory / CARD).write_text(card, encoding="utf-8")


def export_adapter(
    source: str,
    output: str,
    *,
    dtype: str | None = None,
    step: str | int | None = None,
    model_type: str | None = None,
    license: str = UNKNOWN_LICENSE,
) -> None:
    """Write the adapters of the run `source` as a PEFT adapter directory, without the base model.

    The other arguments are those of `export_model`. Raises InputError if the run has no adapters, if the format cannot
    represent them, and if the output exists.
    """
    require_new(output)
    opened = open_path(resolve(source), step=step)
    if opened.adapters is None:
        raise InputError(f"{source} has no adapters; leave out --adapter-only")
    try:
        from nextllm_jax.interop import peft
    except ModuleNotFoundError as error:
        raise missing_package("writing adapters needs", error, ".[interop]") from error
    adapters = opened.adapters
    params = adapters.load(functools.partial(on_device, device=jax.local_devices(backend="cpu")[0]))
    with new_output(output) as directory:
        written_type = peft.export_adapters(
            opened.config,
            adapters.config,
            params,
            directory,
            dtype=dtype or "float32",
            model_type=model_type or opened.model_type,
            base=adapters.base,
        )
        options = {"license": license, "model_type": written_type, "base": adapters.base}
        _write_card(source, output, opened, opened.config, directory, **options)


def _on_cpu(config: ModelConfig, quantization: Quantization | None = None, *, scan_layers: bool = True) -> Any:
    """The abstract parameters in the host's memory: converting needs no accelerator."""
    boxed = abstract_params(config, scan_layers=scan_layers)
    return abstract_quantized(boxed, on_device(boxed, jax.local_devices(backend="cpu")[0]), quantization)


def _token_ids(tokenizer: Tokenizer, generation: dict[str, Any]) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id for Hugging Face configs; null for a token that does not exist.

    Those in the imported `generation` config are kept, except for eos_token_id, which lists all ids that end text. The
    tokenizer's bos_id is not BOS without `add_bos`.
    """
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    if bos_id is None:
        bos_id = tokenizer.backend.tokens.get(tokenizer.roles.names.get("bos_token", ""))
    pad_id = generation.get("pad_token_id")
    stops = list(tokenizer.stop_ids)
    return {
        "bos_token_id": generation.get("bos_token_id", bos_id),
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": tokenizer.pad_id if pad_id is None else pad_id,
    }
