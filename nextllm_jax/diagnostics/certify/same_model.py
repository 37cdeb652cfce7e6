"""Whether two sources hold the same model: settings, weights one part at a time, tokenizer and chat template."""

import dataclasses
from typing import Any

import jax
import numpy as np

from nextllm_jax.config import ModelConfig
from nextllm_jax.diagnostics.certify.certificate import Row, failed, ok
from nextllm_jax.diagnostics.certify.forward import Weights
from nextllm_jax.diagnostics.stress_texts import stress_texts
from nextllm_jax.errors import InputError
from nextllm_jax.interop.canonical import canonical
from nextllm_jax.model.weights import by_name
from nextllm_jax.pretrained.source import Source
from nextllm_jax.tokenizer.tokenizer import Tokenizer

_SHOWN = 3
_EVERY = 10
"""One in so many stress texts is encoded by both tokenizers."""


def same_model(name: str, source: Source, weights: Weights, other: Source, *, tolerance: float = 0.0) -> list[Row]:
    """Rows named `name` that say whether `other` holds the model of `source`, whose `weights` are given.

    Weights may differ by `tolerance` of the greatest of an array. Padding rows of the embedding are not compared.
    """
    return [
        _same_settings(f"{name}: settings", source, other),
        _same_weights(f"{name}: weights", weights, other, tolerance),
        _same_tokenizer(f"{name}: tokenizer", source, other),
    ]


def _same_settings(check: str, source: Source, another: Source) -> Row:
    config, other = source.config, another.config
    left, right = canonical(config), canonical(other)
    names = [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in ("vocab_size", "init_std")
        and not _same(getattr(left, field.name), getattr(right, field.name))
    ]
    if not names:
        return _same_generation(check, source.generation, another.generation)
    said = ", ".join(f"{name} {getattr(config, name)} became {getattr(other, name)}" for name in names)
    fault = None
    if "tie_embeddings" in names:
        fault = "untied head"
    elif any(name.startswith("rope_scaling") for name in names):
        fault = "dropped rope scaling"
    return failed(check, said, fault)


def _same_generation(check: str, settings: dict[str, Any], other: dict[str, Any]) -> Row:
    """Whether the other model, if it has generation settings, has the same. Its end tokens may be more."""
    stated = {name: value for name, value in settings.items() if value is not None and name != "eos_token_id"}
    lost = [name for name, value in stated.items() if other.get(name) != value]
    if not other or not lost:
        return ok(check, "all that affect the logits are equal")
    said = ", ".join(f"{name} {settings[name]} became {other.get(name)}" for name in lost)
    is_id = any(name.endswith("_token_id") for name in lost)
    return failed(check, f"generation_config.json: {said}", "shifted token id" if is_id else None)


def _same(left: Any, right: Any) -> bool:
    """Whether two settings are equal, up to float32."""
    if isinstance(left, float) and isinstance(right, float):
        return bool(np.isclose(left, right, rtol=1e-6, atol=0))
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right


def _same_weights(check: str, weights: Weights, other: Source, tolerance: float) -> Row:
    theirs, compared = Weights(other), 0
    try:
        for part in weights.names:
            if part not in theirs.names:
                return failed(check, f"{part} is missing", "untied head" if part == "lm_head" else None)
            left, right = by_name(jax.device_get(weights.read(part))), by_name(jax.device_get(theirs.read(part)))
            if left.keys() != right.keys():
                return failed(check, f"{part} has other weights: {', '.join(sorted(left.keys() ^ right.keys()))}")
            for leaf, values in left.items():
                if (found := _difference(values, right[leaf], tolerance)) is not None:
                    what, is_permuted = found
                    return failed(check, f"{part}/{leaf} {what}", _permutation(leaf) if is_permuted else None)
                compared += 1
    except InputError as error:
        return failed(check, str(error), fault_of(error))
    return ok(
        check, f"{compared} arrays are equal" + (f" to {tolerance:g} of the greatest" if tolerance else " bit for bit")
    )


def fault_of(error: InputError) -> str | None:
    """The fault that a refusal to read weights names."""
    text = str(error)
    return "untied head" if "lm_head.weight" in text or "output.weight" in text else None


def _permutation(leaf: str) -> str:
    """The name of the fault that an array holds the same values in another order."""
    if "router/" in leaf:
        return "permuted router"
    return "swapped experts" if "experts/" in leaf else "permuted projection"


def _difference(left: np.ndarray, right: np.ndarray, tolerance: float) -> tuple[str, bool] | None:
    """How an array differs from another, and whether only its order does; None if it does not."""
    rows = min(len(left), len(right))
    if left.shape[1:] != right.shape[1:] or (left.shape != right.shape and left.ndim != 2):
        return f"has shape {list(right.shape)}, not {list(left.shape)}", False
    left, right = left[:rows], right[:rows]
    if np.abs(left - right).max() <= tolerance * np.abs(left).max():
        return None
    if left.ndim > 1 and any(_permuted(left, right, axis) for axis in (-1, 0)):
        return "holds the same values in another order", True
    where = np.unravel_index(np.abs(left - right).argmax(), left.shape)
    return f"differs by {np.abs(left - right).max():.2g} at {[int(index) for index in where]}", False


def _permuted(left: np.ndarray, right: np.ndarray, axis: int) -> bool:
    """Whether the slices of two arrays along an axis are the same, in another order."""
    return all(
        np.allclose(np.sort(sums(left)), np.sort(sums(right)), rtol=1e-5)
        for sums in (
            lambda x: (x**2).sum(tuple(i for i in range(x.ndim) if i != axis % x.ndim)),
            lambda x: (x**2).ravel(),
        )
    )


def _same_tokenizer(check: str, source: Source, other: Source) -> Row:
    try:
        mine, theirs = source.load_tokenizer(), other.load_tokenizer()
    except InputError as error:
        return failed(check, str(error))
    return compare_tokenizers(check, mine, theirs)


def compare_tokenizers(check: str, mine: Tokenizer, theirs: Tokenizer) -> Row:
    """Whether two tokenizers have the same ids, roles and chat template."""
    left, right = mine.backend.bytes_of, theirs.backend.bytes_of
    if differing := [id for id in sorted(left.keys() | right.keys()) if left.get(id) != right.get(id)]:
        shown = ", ".join(f"{id} was {left.get(id)!r} and is {right.get(id)!r}" for id in differing[:_SHOWN])
        more = f", and {len(differing) - _SHOWN} more ids" if len(differing) > _SHOWN else ""
        return failed(check, f"{shown}{more}", "shifted token id")
    for name in ("bos_id", "eos_id", "add_bos", "stop_ids"):
        if getattr(mine, name) != getattr(theirs, name):
            said = f"{name} was {getattr(mine, name)} and is {getattr(theirs, name)}"
            return failed(check, said, "shifted token id" if name.endswith("_id") else None)
    if mine.chat_template != theirs.chat_template:
        return failed(check, "the chat template differs")
    for text in stress_texts()[::_EVERY]:
        if mine.encode(text) != theirs.encode(text):
            return failed(check, f"{text[:40]!r} gives other ids")
    return ok(check, f"{len(left):,} ids, the roles of special tokens and the chat template are equal")
