"""What must hold before a run starts, each as one sentence where it does not."""

import jax
from jax.sharding import AbstractMesh, Mesh

from nextllm_jax.config import Config
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.tokenizer import Tokenizer


def check_platform(config: Config) -> None:
    """Raise InputError if jax finds no device, or another platform than the config's."""
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise InputError(f"jax finds no device to run on ({str(error).splitlines()[0]}); see JAX_PLATFORMS") from error
    if config.platform not in ("auto", found):
        raise InputError(
            f"platform is {config.platform}, but jax found {found}; install jax for it, set JAX_PLATFORMS, or "
            "change --platform"
        )


def check_fits(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> None:
    """Raise InputError, before anything is written, if data, model and mesh do not go together."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"the data's tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size is "
            f"{config.model.vocab_size}; set --model.vocab-size {tokenizer.vocab_size} or more"
        )
    check_divides(config, mesh)
    training = config.training
    for prompt in training.sample_prompts if training.sample_tokens else ():
        needed = 1 + len(tokenizer.encode(prompt)) + training.sample_tokens
        if needed > config.model.context_length:
            raise InputError(
                f"training.sample_prompts has {prompt[:20]!r}..., which needs {needed} tokens with "
                f"training.sample_tokens, over model.context_length {config.model.context_length}"
            )


def check_divides(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raise InputError if the mesh does not divide the batch and the sequences of a step."""
    rows = config.training.global_batch_size // config.training.accumulation_steps
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise InputError(
            f"training.global_batch_size / accumulation_steps is {rows}, which mesh.data x mesh.fsdp = {parts} "
            "does not divide"
        )
    length, parts = config.data.sequence_length, mesh.shape["sequence"]
    if length % parts:
        raise InputError(f"data.sequence_length {length} is not divisible by mesh.sequence {parts}")


def check_not_beyond(config: Config, step: int) -> None:
    """Raise InputError if a run at `step` has passed its end."""
    if step > config.training.steps:
        raise InputError(f"the run is at step {step} already, beyond training.steps {config.training.steps}")
