"""Scores of a model on a text or on prepared data: the story of `nextllm evaluate`."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from nextllm_jax.data.loader import validation_batches
from nextllm_jax.data.packing import count_windows
from nextllm_jax.data.shards import Dataset
from nextllm_jax.errors import InputError
from nextllm_jax.evaluation.evaluate import evaluate
from nextllm_jax.inference.llm import LLM, Score, check_windows
from nextllm_jax.model.objective import make_eval_step, next_token
from nextllm_jax.model.transformer import Transformer, resolve_dtype
from nextllm_jax.sharding import num_parts, on_mesh, sharding


def score_data(
    llm: LLM,
    path: str,
    *,
    window: int,
    batch_size: int = 8,
    dtype: str | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, total: batches,
) -> Score:
    """How well the model predicts the validation split of the prepared data at `path`, as training scores it.

    That is in windows of `window` tokens within which documents do not see each other, and without `dtype` in the
    type that training multiplies in. `progress` wraps the batches, of which there are `total`.

    Raises InputError if there is no such data, if another tokenizer made it, or if the window is over the context.
    """
    dataset = Dataset.open(path)
    if dataset.tokenizer_hash != llm.tokenizer.hash:
        raise InputError(
            f"the data in {path} was made with another tokenizer than the model's; prepare the text again with "
            "--tokenizer set to the model's directory"
        )
    check_windows(window, batch_size, llm.config.context_length)
    training_dtype = resolve_dtype(dtype or llm.config.dtype, jax.default_backend(), training=True)
    model = Transformer(llm.config.without_remat(), training_dtype, llm.scan_layers)
    split = dataset.split("validation")
    if llm.mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    else:
        place, parts = sharding(llm.mesh, "batch", "seq"), num_parts(llm.mesh, "batch")
        batch_size = -(-batch_size // parts) * parts
    batches = validation_batches(split, sequence_length=window, batch_size=batch_size, sharding=place)
    total = -(-count_windows(split, window, partial=True) // batch_size)
    with on_mesh(llm.mesh):
        result = evaluate(make_eval_step(next_token, model), llm.params, progress(batches, total), split.num_bytes)
    return Score(result.loss, result.num_tokens, result.bits_per_byte)
