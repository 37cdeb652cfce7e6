"""samples.txt: texts that the model continues at every evaluation."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from nextllm_jax.checkpoint.run_dir import SAMPLES, RunDir
from nextllm_jax.config import ModelConfig
from nextllm_jax.inference.llm import LLM
from nextllm_jax.model.transformer import abstract_params, resolve_dtype
from nextllm_jax.model.weights import cast_matrices
from nextllm_jax.tokenizer.tokenizer import Tokenizer
from nextllm_jax.training.hooks import Hook, OptionalOutput
from nextllm_jax.training.start import Start
from nextllm_jax.training.state import TrainState, whole_params

_HEADER = re.compile(rb"^===== step (\d+) =====$")
_INDENT = "    "


class Samples(Hook):
    """Appends the continuations of `training.sample_prompts` to samples.txt at every evaluation.

    `initial_step` is the step from which a run resumes, None for a new run. The file is truncated after it. With
    `enabled` False (in all processes except process 0), the file is neither read nor written.
    """

    def __init__(self, run: RunDir, start: Start, initial_step: int | None = None, *, enabled: bool = True) -> None:
        self._run, self._start, self._enabled = run, start, enabled
        self._last_step: int | None = None
        """The last step in samples.txt; None if it is empty."""
        self._output = OptionalOutput(SAMPLES)
        if enabled:
            self._output.write(lambda: self._truncate(initial_step))

    def after_evaluation(self, step: int, state: TrainState) -> None:
        """Write the samples of a step, unless the file has them already."""
        config, training = self._start.config, self._start.config.training
        if not (training.sample_tokens and training.sample_prompts):
            return

        def make_texts() -> list[tuple[str, str]]:
            params = whole_params(state, config.model, self._start.mesh)
            return sample_text(
                config.model, params, self._start.tokenizer, training.sample_prompts, training.sample_tokens
            )

        written = self._last_step == step
        if jax.process_count() == 1:
            if not written:
                self._output.write(lambda: self.write(step, make_texts()))
            return
        # All processes sample together, unless process 0 has written the block. If one did not, the others would hang.
        if not multihost_utils.broadcast_one_to_all(np.array(written)):
            texts = make_texts()
            if self._enabled:
                self._output.write(lambda: self.write(step, texts))

    def write(self, step: int, texts: Iterable[tuple[str, str]]) -> None:
        """Append a block of (prompt, continuation) pairs, indented. Raises RunFailed if it cannot be written."""
        blocks = [f"===== step {step} =====\n"]
        for prompt, text in texts:
            indented = (prompt + text).replace("\n", "\n" + _INDENT)
            blocks.append(f"prompt: {prompt!r}\n{_INDENT}{indented}\n")
        self._run.append(SAMPLES, ("\n".join(blocks) + "\n").encode(errors="replace"))
        self._last_step = step

    def _truncate(self, last_step: int | None) -> None:
        """Remove the blocks after `last_step` (None: all blocks)."""
        content = self._run.read(SAMPLES)
        kept, keep = [], last_step is not None
        for line in content.split(b"\n"):
            if header := _HEADER.match(line):
                step = int(header.group(1))
                keep = last_step is not None and step <= last_step
                self._last_step = step if keep else self._last_step
            if keep:
                kept.append(line)
        if content and len(kept) < content.count(b"\n") + 1:
            self._run.write(SAMPLES, b"\n".join([*kept, b""]) if kept else b"")


def sample_text(
    config: ModelConfig, params: Any, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> list[tuple[str, str]]:
    """(prompt, continuation) for each prompt. Every process must call it, since it computes on the mesh."""
    dtype = resolve_dtype(config.dtype, jax.default_backend())
    llm = LLM(config, cast_matrices(abstract_params(config), params, dtype), lambda: tokenizer, dtype)
    return [(sample.prompt, sample.text) for sample in llm.generate(prompts, max_new_tokens=max_new_tokens)]
