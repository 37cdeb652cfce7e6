"""samples.txt: texts that the model continues at every evaluation.

Unless the config states prompts, they are the beginnings of held-out documents; of conversations, what precedes the
first answer, as the chat template writes it.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from nextllm_jax.checkpoint.run_dir import SAMPLES, RunDir
from nextllm_jax.config import SamplingConfig
from nextllm_jax.data.shards import Split
from nextllm_jax.inference.llm import LLM
from nextllm_jax.progress import phase
from nextllm_jax.tokenizer.tokenizer import Tokenizer
from nextllm_jax.training.hooks import Hook, OptionalOutput
from nextllm_jax.training.live_model import live_model
from nextllm_jax.training.start import Start
from nextllm_jax.training.state import TrainState
from nextllm_jax.training.trackers import Tracker

_HEADER = re.compile(rb"^===== step (\d+) =====$")
_INDENT = "    "
_NUM_PROMPTS = 3
_PROMPT_TOKENS = 16
"""Tokens of the beginning of a document, without BOS."""
_NUM_CONVERSATIONS = 100
"""Number of held-out conversations to choose from; those with the shortest first turns are answered."""


class Prompt(NamedTuple):
    """A prompt as text and as ids."""

    text: str
    ids: list[int]


def held_out_prompts(split: Split, tokenizer: Tokenizer, context_length: int) -> list[Prompt]:
    """The beginnings of the first documents of a split. For conversations: the shortest that precede an answer."""
    if not split.holds_conversations:
        num_tokens = min(_PROMPT_TOKENS, context_length // 2)
        starts = [document[:-1][: 1 + num_tokens] for document, _ in _documents(split, _NUM_PROMPTS)]
        return [Prompt(tokenizer.decode(ids[1:]), ids) for ids in starts]
    found = [ids[: mask.index(True)] for ids, mask in _documents(split, _NUM_CONVERSATIONS) if True in mask]
    shortest = sorted((ids for ids in found if 0 < len(ids) < context_length), key=len)[:_NUM_PROMPTS]
    return [Prompt(tokenizer.decode(ids), ids) for ids in shortest]


def _documents(split: Split, count: int) -> Iterator[tuple[list[int], list[bool]]]:
    """The ids and the loss mask of the first documents of a split."""
    starts = split.document_starts[: count + 1].tolist()
    for start, stop in itertools.pairwise(starts):
        yield split.tokens(start, stop).tolist(), split.loss_mask(start, stop).tolist()


class Samples(Hook):
    """Appends continuations of the prompts to samples.txt at every evaluation.

    `initial_step` is the step from which a run resumes, None for a new run. The file is truncated after it. With
    `enabled` False (in all processes except process 0), the file is neither read nor written.
    """

    def __init__(
        self,
        run: RunDir,
        start: Start,
        initial_step: int | None = None,
        *,
        enabled: bool = True,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._run, self._start, self._enabled, self._trackers = run, start, enabled, trackers
        self._last_step: int | None = None
        """The last step in samples.txt; None if it is empty."""
        self._output = OptionalOutput(SAMPLES)
        if enabled:
            self._output.write(lambda: self._truncate(initial_step))

    @functools.cached_property
    def _prompts(self) -> list[Prompt]:
        start, config = self._start, self._start.config
        stated, tokenizer = config.training.sample_prompts, start.tokenizer
        if stated is not None:
            return [Prompt(text, tokenizer.encode_prompt(text)) for text in stated]
        splits = [source.dataset.split("validation") for source in start.sources]
        prompts = [held_out_prompts(split, tokenizer, config.model.context_length) for split in splits]
        alternating = itertools.chain.from_iterable(itertools.zip_longest(*prompts))
        return list(filter(None, alternating))[: max(_NUM_PROMPTS, len(splits))]

    def after_evaluation(self, step: int, state: TrainState) -> None:
        """Write the samples of a step, unless the file has them already."""
        training = self._start.config.training
        if not (training.sample_tokens and self._prompts):
            return

        def make_texts() -> list[tuple[str, str]]:
            with phase("sampling for samples.txt"):
                return sample_text(live_model(self._start, state), self._prompts, training.sample_tokens)

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

    def write(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Append a block of (prompt, continuation) pairs, indented. Raises RunFailed if it cannot be written."""
        blocks = [f"===== step {step} =====\n"]
        for prompt, text in texts:
            indented = (prompt + text).replace("\n", "\n" + _INDENT)
            blocks.append(f"prompt: {prompt!r}\n{_INDENT}{indented}\n")
        self._run.append(SAMPLES, ("\n".join(blocks) + "\n").encode(errors="replace"))
        self._last_step = step
        for tracker in self._trackers:
            tracker.samples(step, texts)

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


def sample_text(llm: LLM, prompts: Sequence[Prompt], max_new_tokens: int) -> list[tuple[str, str]]:
    """(prompt, continuation) for each prompt, up to the context length. Every process must call it, since it
    computes on the mesh."""
    room = llm.config.context_length - max(len(prompt.ids) for prompt in prompts)
    stream = llm.stream_tokens(
        [prompt.ids for prompt in prompts],
        texts=[prompt.text for prompt in prompts],
        max_new_tokens=min(max_new_tokens, room),
        sampling=SamplingConfig(),
    )
    samples = {piece.row: piece.sample for piece in stream if piece.sample is not None}
    return [(prompt.text, samples[row].text) for row, prompt in enumerate(prompts)]
