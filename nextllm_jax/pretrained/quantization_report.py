"""Errors and sizes of quantized weights."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nextllm_jax.config import ModelConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.model.accounting import parameter_bytes
from nextllm_jax.model.transformer import abstract_params
from nextllm_jax.model.weights import by_name
from nextllm_jax.ops.quantized import QTensor, dequantize, pack


@dataclasses.dataclass
class _Kind:
    """The tensors of one kind, such as all matrices `q`."""

    errors: list[float] = dataclasses.field(default_factory=list)
    """The relative error of each layer: norm of the difference / norm of the matrix."""
    weights: int = 0
    bytes: int = 0
    """Bytes in files, including scales."""


class QuantizationReport:
    """Collects errors and sizes by kind of tensor with `observe`. `str()` gives a table."""

    def __init__(self, config: ModelConfig, quantization: Quantization) -> None:
        self._config, self._quantization = config, quantization
        boxed = abstract_params(config)
        self._declared = by_name(abstract_params(config, scan_layers=False)) | by_name(boxed)
        self._kinds: dict[str, _Kind] = {}
        quantized = [weight for weight in by_name(boxed).values() if quantization.of_kind(weight.kind)]
        self.total = sum(weight.value.size for weight in quantized)
        """Number of weights to quantize."""
        self.progress: Callable[[int], object] = lambda weights: None
        """Called with the number of weights quantized since the last call."""

    def observe(self, name: str, before: jax.Array | None, after: QTensor) -> None:
        """The Observer to pass to quantization functions; see model/quantize.py."""
        kind = self._kinds.setdefault(name.split("/")[-2], _Kind())
        weight = self._declared[name]
        if before is None:
            kind.errors.append(0.0)
        else:
            errors = _relative_errors(before, after, axes=weight.value.ndim - weight.num_stacked)
            kind.errors += np.ravel(errors).tolist()
        in_files = jax.tree.leaves(jax.eval_shape(pack, after))
        kind.bytes += sum(part.size * part.dtype.itemsize for part in in_files)
        kind.weights += after.q.size
        self.progress(after.q.size)

    def __str__(self) -> str:
        """One line for each kind of tensor, and one for the whole model."""
        width = jnp.dtype(self._config.param_dtype).itemsize
        lines = [f"{'tensors':12} {'number':>6} {'worst error':>12} {'mean error':>12} {'bits/weight':>12}"]
        for name, kind in self._kinds.items():
            worst, mean = max(kind.errors), float(np.mean(kind.errors))
            bits = kind.bytes * 8 / kind.weights
            lines.append(f"{name:12} {len(kind.errors):6} {worst:12.3%} {mean:12.3%} {bits:12.2f}")
        before = parameter_bytes(self._config)
        after = before + sum(kind.bytes - kind.weights * width for kind in self._kinds.values())
        size = f"{before / 1e6:,.1f} MB in {self._config.param_dtype} -> {after / 1e6:,.1f} MB"
        return "\n".join([*lines, f"{self._quantization}: {size}"])


@functools.partial(jax.jit, static_argnames="axes")
def _relative_errors(before: jax.Array, after: QTensor, *, axes: int) -> jax.Array:
    """The norm of the difference / the norm of the matrix, for each matrix if there are axes before the last `axes`."""
    whole = before.astype(jnp.float32)
    norm = functools.partial(jnp.linalg.norm, axis=-1)
    flat = (*before.shape[: before.ndim - axes], -1)
    size = norm(whole.reshape(flat))
    return norm((dequantize(after, jnp.float32) - whole).reshape(flat)) / jnp.where(size == 0, 1, size)
