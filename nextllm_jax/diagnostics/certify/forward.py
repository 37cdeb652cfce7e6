"""Forward passes one layer at a time: the package's own layers in JAX, and the numpy model, on the same weights.

Weights of Hugging Face and GGUF files are read one layer at a time, so a model of any size needs the memory of one
layer. Those of a run are read once and kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nextllm_jax.config import ModelConfig
from nextllm_jax.diagnostics import reference
from nextllm_jax.diagnostics.certify.probes import KEPT, Probe
from nextllm_jax.diagnostics.reference import Observer
from nextllm_jax.model.attention_kernel import AttentionKernel
from nextllm_jax.model.transformer import Block, Transformer, abstract_params, ropes
from nextllm_jax.pretrained.source import Source
from nextllm_jax.sharding import on_device

States = list[Any]
"""The residual stream of each probe, or finally its logits."""


class Weights:
    """The float32 weights of a source, by the names of an unstacked tree: embed, remainder_0, ..., final_norm."""

    def __init__(self, source: Source) -> None:
        self._source, self.config = source, source.config
        exact = dataclasses.replace(source.config, param_dtype="float32")
        boxed = abstract_params(exact, scan_layers=False)
        self._abstract = on_device(boxed, jax.local_devices(backend="cpu")[0])
        self.names = [name for name in self._abstract if name.startswith("remainder_")]
        self.names.sort(key=lambda name: int(name.rpartition("_")[2]))
        self.names = ["embed", *self.names, *(name for name in ("final_norm", "lm_head") if name in self._abstract)]

    @functools.cached_property
    def _whole(self) -> Any:
        return self._source.load_params(self._abstract)

    def read(self, name: str) -> Any:
        """One part of the tree."""
        if self._source.is_run:
            return self._whole[name]
        return self._source.load_params({name: self._abstract[name]})[name]

    def layers(self) -> Iterator[tuple[int, Any]]:
        """(number, weights) of each layer."""
        for layer in range(self.config.num_layers):
            yield layer, self.read(f"remainder_{layer}")

    def head(self) -> Any:
        """The embedding that makes logits."""
        return self.read("embed" if self.config.tie_embeddings else "lm_head")


class Change(NamedTuple):
    """A hypothesis about another implementation: how its model differs from this one."""

    fault: str
    config: Callable[[ModelConfig], ModelConfig] = lambda config: config
    block: Callable[[Any, ModelConfig], Any] = lambda block, config: block
    tokens: int = 0
    """Added to each token id."""


def numpy_states(
    weights: Weights, probes: Sequence[Probe], change: Change | None = None, observe: Observer = lambda _: None
) -> Iterator[States]:
    """The residual streams in float64 before the first layer and after each, and finally the last logits."""
    change = change or Change("none")
    config = change.config(weights.config)
    embed = weights.read("embed")
    states = []
    for probe in probes:
        ids = (np.array(probe.tokens) + change.tokens) % len(embed["embedding"])
        states.append(reference.embedded(embed, config, ids[None]))
    yield states
    for layer, block in weights.layers():
        block = change.block(jax.device_get(block), config)
        states = [
            reference.block_forward(
                block, config, layer, x_1TD, positions_BT=np.array([probe.positions]), observe=observe
            )
            for x_1TD, probe in zip(states, probes, strict=True)
        ]
        yield states
    head = weights.read("embed" if config.tie_embeddings else "lm_head")
    final_norm = weights.read("final_norm")
    yield [reference.logits(final_norm, head, config, x_1TD[:, -KEPT:])[0] for x_1TD in states]


def our_states(weights: Weights, probes: Sequence[Probe]) -> Iterator[States]:
    """As `numpy_states`, by the modules of this package in float32."""
    config = weights.config.for_inference()
    model = Transformer(config, jnp.dtype("float32"), scan_layers=False)
    arrays = [[jnp.array([part], jnp.int32) for part in (probe.tokens, probe.positions)] for probe in probes]
    embed = {"params": {"embed": weights.read("embed")}}
    states: States = [model.apply(embed, tokens, method="embedded") for tokens, _ in arrays]
    yield states
    for layer, block in weights.layers():
        kinds = config.period[layer % len(config.period)]
        states = [_block(config, kinds, block, x, positions) for x, (_, positions) in zip(states, arrays, strict=True)]
        yield states
    last = {name: weights.read(name) for name in ("final_norm", "embed" if config.tie_embeddings else "lm_head")}
    yield [_logits(model, last, x_1TD[:, -KEPT:])[0] for x_1TD in states]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(config: ModelConfig, kinds: Any, params: Any, x_1TD: jax.Array, positions_1T: jax.Array) -> Any:
    kind, mlp_kind = kinds
    block = Block(config, kind, mlp_kind, jnp.dtype("float32"), AttentionKernel())
    return block.apply({"params": params}, x_1TD, ropes(config, positions_1T), positions_1T, None, None, 0)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params: Any, x_1TD: jax.Array) -> Any:
    return model.apply({"params": params}, x_1TD, method=lambda model, x: model.logits(model.final_norm(x)))


class Comparison(NamedTuple):
    """The greatest difference of each probe's logits, relative to the greatest logit, and where it begins."""

    logits: list[np.ndarray]
    """Of the numpy model, float64 [KEPT, V] for each probe."""
    differences: list[float]
    first: str | None
    """The first layer whose output differs; None if none does."""
    margins: list[float]
    """By how much each token's last chosen expert has a greater score than the first that is not chosen, relative to
    it, in all layers with experts."""


def compare_layers(weights: Weights, probes: Sequence[Probe], tolerance: float) -> Comparison:
    """Compare the package's layers with the numpy model, layer by layer."""
    first, mine, theirs = None, [], []
    margins: list[float] = []

    def observe(scores_BTE: np.ndarray) -> None:
        ascending_EBT, K = np.moveaxis(np.sort(scores_BTE), -1, 0), weights.config.experts_per_token
        if len(ascending_EBT) > K:
            last_BT, next_BT = ascending_EBT[-K], ascending_EBT[-K - 1]
            margins.extend(((last_BT - next_BT) / (np.abs(last_BT) + 1e-30)).ravel().tolist())

    states = our_states(weights, probes), numpy_states(weights, probes, observe=observe)
    places = ["the embedding", *(f"layer {layer}" for layer in range(weights.config.num_layers)), "the logits"]
    for place, mine, theirs in zip(places, *states, strict=True):
        if first is None and max(map(relative_difference, mine, theirs)) > tolerance:
            first = place
    return Comparison(theirs, [*map(relative_difference, mine, theirs)], first, margins)


def relative_difference(ours: Any, theirs: Any) -> float:
    """The greatest difference of two arrays, divided by the greatest magnitude in the second; inf if not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    found = np.abs(ours - theirs).max() / np.abs(theirs).max()
    return float(found) if np.isfinite(found) else float("inf")


def explain(
    weights: Weights, probes: Sequence[Probe], measure: Callable[[list[np.ndarray]], float], tolerance: float
) -> str | None:
    """The fault under which the numpy model agrees with the other implementation; None if no known one does.

    `measure` gives the difference of the other implementation from logits of the probes.
    """
    for change in _changes(weights.config):
        *_, logits = numpy_states(weights, probes, change)
        if measure(logits) <= tolerance:
            return change.fault
    return None


def _changes(config: ModelConfig) -> list[Change]:
    changes = [
        Change("permuted projection", block=functools.partial(_with_permuted, to_pairs=True)),
        Change("permuted projection", block=functools.partial(_with_permuted, to_pairs=False)),
        Change("shifted token id", tokens=1),
        Change("shifted token id", tokens=-1),
        Change("swapped gate and up", block=_with_swapped),
    ]
    if config.rope_scaling != "none":
        unscaled: dict[str, Any] = {"rope_scaling": "none", "rope_short_factors": (), "rope_long_factors": ()}
        changes.append(Change("dropped rope scaling", lambda config: dataclasses.replace(config, **unscaled)))
    if not config.tie_embeddings:
        changes.append(Change("untied head", lambda config: dataclasses.replace(config, tie_embeddings=True)))
    if config.num_experts:
        other: dict[str, Any] = {"normalize_expert_weights": not config.normalize_expert_weights}
        changes.append(Change("other expert weights", lambda config: dataclasses.replace(config, **other)))
    if "local" in config.layer_pattern:
        pattern: Any = tuple("global" if kind == "local" else kind for kind in config.layer_pattern)
        changes.append(
            Change("ignored sliding window", lambda config: dataclasses.replace(config, layer_pattern=pattern))
        )
    return changes


def _with_permuted(block: Any, config: ModelConfig, *, to_pairs: bool) -> Any:
    """The layer with the two halves of each head of q and k interleaved, or put apart."""
    half = np.arange(config.head_dim).reshape(2, -1)
    order = half.T.ravel() if to_pairs else half.reshape(-1, 2).T.ravel()
    attention = dict(block["attention"])
    for name in "qk":
        attention[name] = {leaf: np.asarray(values)[..., order] for leaf, values in attention[name].items()}
    return {**block, "attention": attention}


def _with_swapped(block: Any, config: ModelConfig) -> Any:
    """The layer with the gate and up of its MLP, or of its experts, exchanged."""
    mlp = block["mlp"]
    if "experts" in mlp:
        return {**block, "mlp": {**mlp, "experts": _with_swapped({"mlp": mlp["experts"]}, config)["mlp"]}}
    return {**block, "mlp": {**mlp, "gate": mlp["up"], "up": mlp["gate"]}}
