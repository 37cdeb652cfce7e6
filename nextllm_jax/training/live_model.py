"""The model of a training state, as it is loaded from a checkpoint of that state."""

import jax

from nextllm_jax.inference.llm import LLM
from nextllm_jax.model.transformer import abstract_params, resolve_dtype
from nextllm_jax.model.weights import cast_matrices
from nextllm_jax.training.start import Start
from nextllm_jax.training.state import TrainState, whole_params


def live_model(start: Start, state: TrainState) -> LLM:
    """The evaluated weights of a state for inference on the current mesh, which must be that of `start`.

    Adapters are merged. Every process must call this, since it computes on the mesh.
    """
    config = start.config.model
    dtype = resolve_dtype(config.dtype, jax.default_backend())
    params = cast_matrices(abstract_params(config), whole_params(state, config, start.mesh), dtype)
    return LLM(config, params, lambda: start.tokenizer, dtype)
