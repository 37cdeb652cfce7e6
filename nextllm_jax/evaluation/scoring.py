"""Scores a model on prepared data, for `nextllm evaluate`."""

import jax

from nextllm_jax.data.loader import validation_batches
from nextllm_jax.data.packing import count_windows
from nextllm_jax.data.shards import Dataset
from nextllm_jax.errors import InputError
from nextllm_jax.evaluation.evaluate import evaluate
from nextllm_jax.inference.llm import LLM
from nextllm_jax.inference.score import Score, check_windows
from nextllm_jax.model.objective import make_eval_step, next_token
from nextllm_jax.model.transformer import Transformer, resolve_dtype
from nextllm_jax.progress import progress_bar
from nextllm_jax.sharding import on_mesh, padded_size, sharding


def score_data(
    llm: LLM,
    path: str,
    *,
    window: int,
    batch_size: int = 8,
    dtype: str | None = None,
    progress: bool = False,
) -> Score:
    """The score of the model on the validation split of the prepared data at `path`, as training computes it.

    The text is split into windows of `window` tokens, in which documents do not attend to each other. `dtype` defaults
    to the matmul type of training. `progress` shows a bar.

    Raises InputError if there is no such data, if it has another tokenizer, or if the window exceeds the context.
    """
    dataset = Dataset.open(path)
    if dataset.tokenizer_hash != llm.tokenizer.hash:
        raise InputError(
            f"the data in {path} has another tokenizer than the model; prepare the text again with "
            "--tokenizer set to the model's directory"
        )
    check_windows(window, batch_size, llm.config.context_length)
    training_dtype = resolve_dtype(dtype or llm.config.dtype, jax.default_backend(), training=True)
    model = Transformer(llm.config.for_inference(), training_dtype, llm.scan_layers)
    split = dataset.split("validation")
    if llm.mesh is None:
        batch_sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    else:
        batch_sharding = sharding(llm.mesh, "batch", "seq")
    with on_mesh(llm.mesh):
        batch_size = padded_size(batch_size, "batch")
    batches = validation_batches(split, sequence_length=window, batch_size=batch_size, sharding=batch_sharding)
    total = -(-count_windows(split, window, partial=True) // batch_size)
    shown = progress_bar(batches, total=total, desc="scoring", unit=" batches", disable=not progress)
    with on_mesh(llm.mesh):
        result = evaluate(make_eval_step(next_token, model), llm.params, shown, split.num_bytes)
    return Score(result.loss, result.num_tokens, result.bits_per_byte)
