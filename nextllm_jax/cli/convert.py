"""The commands `nextllm import` and `nextllm export`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from nextllm_jax.cli.help import parse
from nextllm_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Convert a Hugging Face directory or a GGUF file to a run directory, for sampling and training."""

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """Hugging Face directory (config.json, safetensors, tokenizer.json), GGUF file, or the name of a published model:
    smollm2."""
    output: str
    """Run directory to write: config.json, tokenizer, and the weights as checkpoint 0."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters."""
    context_length: int | None = None
    """Maximum context length of the model; none: its own."""
    ignore_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Key of the model's config that is not supported and does not affect the logits; may be repeated."""


def import_command(argv: list[str]) -> int:
    """Convert a Hugging Face or GGUF model to a run directory.

    Returns the exit code.
    """
    arguments = parse(ImportArguments, argv, prog="nextllm import")

    from nextllm_jax.pretrained.convert import import_model

    import_model(
        arguments.source,
        arguments.output,
        dtype=arguments.dtype,
        context_length=arguments.context_length,
        ignore_keys=arguments.ignore_key,
    )
    print(arguments.output)
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write a model for transformers, vLLM and llama.cpp."""

    checkpoint: str
    """Run directory, Hugging Face directory, GGUF file, or a published model: smollm2."""
    output: str
    """Directory (huggingface) or file (gguf) to write."""
    format: Literal["huggingface", "gguf"] | None = None
    """A directory with config.json, safetensors and tokenizer.json, or one GGUF file; none: gguf if the name of the
    output ends with .gguf, else huggingface."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    """Dtype of the matrices; none: that of the source (bfloat16, or float32 for any other). float16 and q8_0 only with
    --format gguf. In a GGUF file, quantized matrices keep their bits as Q8_0, Q4_0 or Q4_1 blocks; to get these, run
    nextllm quantize first."""
    step: str | None = None
    """Checkpoint to use: best, latest, or a step number; none: best, or latest while none has a validation loss."""
    model_type: str | None = None
    """Model family to write, such as llama; none: the one it was imported from, or else the first that fits."""
    shard_gigabytes: float = 5.0
    """Maximum size of one safetensors file in GB."""
    license: str = "unknown"
    """License of the model for its card, README.md, such as apache-2.0."""
    adapter_only: bool = False
    """Write only the adapters of a run, as a PEFT adapter directory."""


def export_command(argv: list[str]) -> int:
    """Write a model for transformers, vLLM or llama.cpp.

    Returns the exit code.
    """
    arguments = parse(ExportArguments, argv, prog="nextllm export")
    file_format = arguments.format or ("gguf" if arguments.output.lower().endswith(".gguf") else "huggingface")
    if file_format == "huggingface" and arguments.dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype {arguments.dtype} is for --format gguf; huggingface takes float32 and bfloat16")
    if arguments.shard_gigabytes <= 0:
        raise InputError(f"shard_gigabytes is {arguments.shard_gigabytes}; it must be positive")
    if arguments.adapter_only and file_format == "gguf":
        raise InputError("--adapter-only writes a PEFT directory, not GGUF; leave out --format gguf")

    from nextllm_jax.pretrained.convert import export_adapter, export_model

    if arguments.adapter_only:
        export_adapter(
            arguments.checkpoint,
            arguments.output,
            dtype=arguments.dtype,
            step=arguments.step,
            model_type=arguments.model_type,
            license=arguments.license,
        )
        print(arguments.output)
        return 0
    export_model(
        arguments.checkpoint,
        arguments.output,
        file_format=file_format,
        dtype=arguments.dtype,
        step=arguments.step,
        model_type=arguments.model_type,
        shard_bytes=int(arguments.shard_gigabytes * 1e9),
        license=arguments.license,
    )
    print(arguments.output)
    return 0
