"""The command `nextllm quantize`."""

import dataclasses
import math
from typing import Annotated

import tyro

from nextllm_jax.cli.help import parse
from nextllm_jax.cli.text import read_text
from nextllm_jax.config import DataConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.process import use_compilation_cache
from nextllm_jax.progress import phase, progress_bar

_TEXT_CHARACTERS = 32_768


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeArguments:
    """Write a run directory whose matrices are small integers, for sampling, evaluation and export.

    Prints how much each kind of matrix was rounded, the sizes, and the perplexity before and after.
    """

    checkpoint: str
    """Run directory, Hugging Face directory, GGUF file, or a published model: smollm2."""
    output: str
    """Run directory to write: config.json, tokenizer, and the weights as checkpoint 0."""
    quantization: Annotated[Quantization, tyro.conf.arg(name="")]
    step: str | None = None
    """Checkpoint to use: best, latest, or a step number; none: best, or latest while none has a validation loss."""
    calibrate: str | None = None
    """int4 only: text file typical of the model's input. GPTQ uses up to 128 windows of 512 tokens of it to compensate
    for rounding errors. Takes minutes and holds the float model in memory; none: weights are rounded independently."""
    text: str | None = None
    """File to measure the perplexity on; none: 32,768 characters of Python's standard library, from the files that
    training on it holds out."""
    perplexity: bool = True
    """Measure the perplexity before and after; measuring before loads the float model."""


def quantize_command(argv: list[str]) -> int:
    """Write a run directory with int8 or int4 weights.

    Returns the exit code.
    """
    arguments = parse(QuantizeArguments, argv, prog="nextllm quantize")
    text, calibration = (None if path is None else read_text(path) for path in (arguments.text, arguments.calibrate))

    from nextllm_jax.data.corpora import held_out_text
    from nextllm_jax.pretrained.convert import open_quantizable, write_quantized
    from nextllm_jax.pretrained.quantization_report import QuantizationReport

    use_compilation_cache()
    output, quantization = arguments.output, arguments.quantization
    model = open_quantizable(arguments.checkpoint, output, quantization, step=arguments.step, calibration=calibration)
    if text is None:
        text = held_out_text(DataConfig(), _TEXT_CHARACTERS) if arguments.perplexity else ""
    before = _perplexity(arguments.checkpoint, arguments.step, text) if arguments.perplexity else None
    report = QuantizationReport(model.source.config, quantization)
    total = report.total
    with phase("quantizing"), progress_bar(total=total, desc="quantizing", unit=" weights", unit_scale=True) as bar:
        report.progress = bar.update
        write_quantized(model, output, quantization, report.observe)
    print(report)
    if before is not None:
        after = _perplexity(output, None, text)
        change = f" ({after / before - 1:+.2%})" if math.isfinite(before) else ""
        print(f"perplexity {before:.3f} -> {after:.3f}{change}")
    print(output)
    return 0


def _perplexity(checkpoint: str, step: str | None, text: str) -> float:
    from nextllm_jax.inference.load import load

    llm = load(checkpoint, step=step)
    with phase(f"measuring the perplexity of {checkpoint}"):
        return llm.score(text, window=min(llm.config.context_length, 1024), progress=True).perplexity
