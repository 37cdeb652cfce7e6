"""Sparse layers: a router chooses a few experts, each a SwiGLU, for each token (Shazeer et al. 2017, arXiv:1701.06538).

Parameters of a sparse layer, in place of the MLP's of a dense one; E experts of width F:

    mlp/router/kernel               [D, E]     in float32 products, like all of the router
    mlp/router/selection_bias       [E]        with model.selection_bias
    mlp/experts/gate/kernel         [E, D, F]
    mlp/experts/up/kernel           [E, D, F]
    mlp/experts/down/kernel         [E, F, D]
    mlp/shared/{gate,up,down}/kernel           the shared expert, with the shapes of a dense MLP
    mlp/shared_gate/kernel          [D, 1]     with model.shared_expert_gate
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nextllm_jax.config import ModelConfig
from nextllm_jax.model.layers import SwiGLU, activation_of, hidden_init_std, residual_init_std
from nextllm_jax.model.weights import EXPERTS, declare
from nextllm_jax.ops.grouped import Matrix, Product, apply_experts, arrange
from nextllm_jax.ops.quantized import QTensor, dequantize
from nextllm_jax.ops.routing import Choice, choose, probabilities, within_capacity
from nextllm_jax.sharding import RULES, is_divisible, per_shard

Names = tuple[str | None, ...]
"""The logical axes of an array."""

ROUTING = "routing"
"""The name under which a router records its `RouterSums`, among the intermediates."""


class RouterSums(NamedTuple):
    """What a router records, float32: sums over the tokens of a batch, without padding."""

    tokens_E: jax.Array
    """Number of tokens that chose an expert."""
    probability_E: jax.Array
    """Probabilities of the experts, with a gradient."""
    z: jax.Array
    """Squared log-sum-exp of the logits, with a gradient."""
    entropy: jax.Array
    """Entropies of the probabilities, in nats."""
    dropped: jax.Array
    """Choices of an expert that has no room left."""
    counted: jax.Array
    """Tokens."""


class Router(nn.Module):
    """Chooses the experts of each token. All of it is computed in float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> Choice:
        """Return the choice. Tokens with segment id 0, which are padding, are not counted in what it records."""
        config = self.config
        E = config.num_experts
        kernel_DE = _router_matrix(self, config, E)
        logits_BTE = _float32_product(x_BTD, kernel_DE)
        score_BTE = probabilities(logits_BTE, config.router_scores)
        bias_E = None
        if config.selection_bias:
            zeros = nn.initializers.zeros
            bias_E = declare(self, "selection_bias", "selection_bias", zeros, ("router_experts",), (E,), jnp.float32)
        choice = choose(
            score_BTE,
            bias_E,
            config.experts_per_token,
            normalize=config.normalize_expert_weights,
            scale=config.expert_weight_scale,
        )
        limited = choice
        if config.capacity_factor is not None:
            limited = within_capacity(choice, E, config.capacity_factor)
        if self.is_mutable_collection("intermediates"):
            counted_BT = jnp.ones(x_BTD.shape[:2], bool) if segment_ids_BT is None else segment_ids_BT > 0
            sums = _sums(logits_BTE, score_BTE, choice.expert_BTK, limited.expert_BTK, counted_BT.astype(jnp.float32))
            self.sow("intermediates", ROUTING, sums)
        return limited


def _router_matrix(module: nn.Module, config: ModelConfig, num_outputs: int) -> jax.Array:
    shape, init = (config.embed_dim, num_outputs), nn.initializers.normal(config.init_std * config.width_ratio)
    axes = ("embed", "router_experts")
    return declare(module, "kernel", "router", init, axes, shape, jnp.dtype(config.param_dtype), num_inputs=1)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _float32_product(x_BTD: jax.Array, kernel_DE: jax.Array) -> jax.Array:
    """A product in float32, whose backward pass converts `x_BTD` again instead of saving it twice."""
    operands = x_BTD.astype(jnp.float32), kernel_DE.astype(jnp.float32)
    return jnp.einsum("BTD,DE->BTE", *operands, precision=jax.lax.Precision.HIGHEST)


def _sums(
    logits_BTE: jax.Array,
    score_BTE: jax.Array,
    chosen_BTK: jax.Array,
    taken_BTK: jax.Array,
    counted_BT: jax.Array,
) -> RouterSums:
    E = logits_BTE.shape[-1]
    probability_BTE = score_BTE / jnp.sum(score_BTE, axis=-1, keepdims=True)
    surprise_BTE = -jnp.log(jnp.maximum(probability_BTE, jnp.finfo(jnp.float32).tiny))
    entropy_BT = jnp.sum(probability_BTE * surprise_BTE, axis=-1)
    chosen_BTE = jnp.sum(chosen_BTK[..., None] == jnp.arange(E).reshape(1, 1, 1, E), axis=2, dtype=jnp.float32)
    dropped_BT = jnp.sum(taken_BTK == E, axis=-1, dtype=jnp.float32)
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
    return RouterSums(
        tokens_E=jnp.sum(chosen_BTE * counted_BT[..., None], axis=(0, 1)),
        probability_E=jnp.sum(probability_BTE * counted_BT[..., None], axis=(0, 1)),
        z=jnp.sum(z_BT * counted_BT),
        entropy=jax.lax.stop_gradient(jnp.sum(entropy_BT * counted_BT)),
        dropped=jnp.sum(dropped_BT * counted_BT),
        counted=jnp.sum(counted_BT),
    )


class ExpertMatrix(nn.Module):
    """One matrix of each expert, [E, I, O], and the adapters of it, [E, I, R] and [E, R, O], if there are any."""

    config: ModelConfig
    shape: tuple[int, int]
    axes: tuple[str, str]
    init_std: float

    @nn.compact
    def __call__(self) -> list[tuple[Any, Names]]:
        """Return the matrices and, if the collection "adapters" is given, their two factors, with logical axes."""
        config, init = self.config, nn.initializers.normal(self.init_std)
        (inputs, outputs), dtype = self.axes, jnp.dtype(config.param_dtype)
        shape, axes = (config.num_experts, *self.shape), (EXPERTS, inputs, outputs)
        parts: list[tuple[Any, Names]] = [
            (declare(self, "kernel", "matrix", init, axes, shape, dtype, num_inputs=1), axes)
        ]
        if self.has_variable("adapters", "a"):
            parts += [(self.get_variable("adapters", "a"), (EXPERTS, inputs, "rank"))]
            parts += [(self.get_variable("adapters", "b"), (EXPERTS, "rank", outputs))]
        return parts


class Experts(nn.Module):
    """The experts of a layer, applied to the tokens that chose them. No token is dropped here, whatever their load.

    On a mesh, the devices along "expert" have some of the experts each. They gather each other's tokens, apply their
    own experts, then add up and scatter the results. This sends more than an exchange of only the tokens that other
    devices need, but its shapes do not depend on the load, and it runs on any device.
    """

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, choice: Choice) -> jax.Array:
        """Return the weighted sum of the outputs of each token's experts, [B, T, D]."""
        config = self.config
        width, std = config.expert_mlp_dim or config.mlp_dim, hidden_init_std(config)
        into = {"shape": (config.embed_dim, width), "axes": ("expert_embed", "mlp"), "init_std": std}
        gate, up = (ExpertMatrix(config, **into, name=name)() for name in ("gate", "up"))
        down = ExpertMatrix(
            config, (width, config.embed_dim), ("mlp", "expert_embed"), residual_init_std(config), name="down"
        )()
        # An axis that the mesh cannot shard evenly stays whole, such as the one position of a decode step.
        axes_BT = zip(x_BTD.shape, ("batch", "seq"), strict=False)
        batch, seq = (name if is_divisible((size,), (name,)) else None for size, name in axes_BT)
        arguments: list[tuple[Any, Names]] = [
            (x_BTD.astype(self.dtype), (batch, seq, "activation_embed")),
            (choice.expert_BTK, (batch, seq, None)),
            (choice.weight_BTK, (batch, seq, None)),
            *((self._cast(part, axes), axes) for matrix in (gate, up, down) for part, axes in matrix),
        ]
        leaves = [leaf for array, axes in arguments for leaf in _leaves(array, axes)]
        arrays, names = zip(*leaves, strict=True)
        whole = [array for array, _ in arguments]
        apply = functools.partial(_apply, activation_of(config))
        if not all(is_divisible(leaf.shape, axes) for leaf, axes in leaves):
            return apply(*whole)  # `sharding.placed` refuses such matrices
        is_split = is_divisible((x_BTD.shape[1],), ("residual_seq",))
        out = (batch, "residual_seq" if is_split else seq, "activation_embed")
        on_shard = functools.partial(_apply_on_shard, apply, jax.tree.structure(whole), names, is_split)
        # The backward pass gathers matrices and tokens again, whatever `remat` is; see also `apply_experts`.
        return per_shard(jax.checkpoint(on_shard, prevent_cse=False), names, out)(*arrays)

    def _cast(self, part: jax.Array | QTensor, axes: Names) -> jax.Array | QTensor:
        """A matrix in the type of the products, but a quantized one as it is if its scales can be sharded evenly."""
        if isinstance(part, QTensor) and all(is_divisible(leaf.shape, names) for leaf, names in _leaves(part, axes)):
            return part
        return dequantize(part, self.dtype)


def _leaves(array: jax.Array | QTensor, axes: Names) -> list[tuple[jax.Array, Names]]:
    """The parts of an argument with their logical axes. A scale that all inputs share is not sharded along them."""
    found: list[tuple[jax.Array, Names]] = []
    for leaf in jax.tree.leaves(array):
        sizes = zip(leaf.shape, array.shape, axes, strict=True)
        found.append((leaf, tuple(None if part == 1 < whole else name for part, whole, name in sizes)))
    return found


def _apply_on_shard(
    apply: Callable[..., jax.Array], structure: Any, names: Sequence[Names], is_split: bool, *arrays: jax.Array
) -> jax.Array:
    """`apply` on the shards of one device, or on whole arrays if there is no mesh; see `Experts`.

    `arrays` are the leaves of the arguments of `apply`, which have this structure.
    """
    present = [axis for axis, size in jax.sharding.get_abstract_mesh().shape.items() if size > 1]
    tokens, matrices = list(arrays[:3]), list(arrays[3:])
    for axis in RULES["expert_embed"]:
        if axis in present:
            matrices = [_gathered(part, axes, axis) for part, axes in zip(matrices, names[3:], strict=True)]
    (axis,), (tensor,) = RULES[EXPERTS], RULES["mlp"]
    if axis in present:
        tokens = [jax.lax.all_gather(x, axis, axis=0, tiled=True) for x in tokens]
        num_local = len(matrices[0])
        local = tokens[1] - jax.lax.axis_index(axis) * num_local
        tokens[1] = jnp.where((local >= 0) & (local < num_local), local, num_local)
    y_BTD = apply(*jax.tree.unflatten(structure, [*tokens, *matrices]))
    if axis in present:
        y_BTD = jax.lax.psum_scatter(y_BTD, axis, scatter_dimension=0, tiled=True)
    if tensor in present:
        scatter = functools.partial(jax.lax.psum_scatter, scatter_dimension=1, tiled=True)
        y_BTD = (scatter if is_split else jax.lax.psum)(y_BTD, tensor)
    return y_BTD


def _gathered(x: jax.Array, axes: Names, axis: str) -> jax.Array:
    """A matrix with the shards of all devices along a mesh axis."""
    if "expert_embed" not in axes:
        return x
    dim = axes.index("expert_embed")
    # XLA for TPUs does not scatter a gradient along its last axis, but sums all of it on each device.
    return jnp.moveaxis(jax.lax.all_gather(jnp.moveaxis(x, dim, 1), axis, axis=1, tiled=True), 1, dim)


def _apply(
    activation: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    expert_BTK: jax.Array,
    weight_BTK: jax.Array,
    *parts: Matrix,
) -> jax.Array:
    """The experts' weighted outputs [B, T, D]. The number of experts stands for no expert.

    `parts` are the matrices of gate, up and down, each perhaps with two adapters.
    """
    (B, T, D), K, count = x_BTD.shape, expert_BTK.shape[-1], len(parts) // 3
    groups = arrange(expert_BTK.reshape(-1), parts[0].shape[0])

    def mlp(product: Product, x_RD: jax.Array, weight_R1: jax.Array, parts: list[Matrix]) -> jax.Array:
        def adapted(x: jax.Array, kernel: Matrix, *adapters: Matrix) -> jax.Array:
            y = product(x, kernel)
            return y + functools.reduce(product, adapters, x) if adapters else y

        gate, up, down = (parts[i * count : (i + 1) * count] for i in range(3))
        return adapted(weighted(adapted(x_RD, *gate), adapted(x_RD, *up), weight_R1), *down)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def weighted(gate_RF: jax.Array, up_RF: jax.Array, weight_R1: jax.Array) -> jax.Array:
        return (activation(gate_RF) * up_RF * weight_R1).astype(gate_RF.dtype)

    rows = x_BTD.reshape(B * T, D), weight_BTK.reshape(B * T * K, 1)
    y_MD: jax.Array = apply_experts(mlp, *rows, list(parts), groups)  # pyright: ignore[reportAssignmentType]
    return y_MD.reshape(B, T, D)


class MixtureOfExperts(nn.Module):
    """The routed experts of a layer, plus the shared expert if the model has one."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
        """Return [B, T, D]. Segment id 0 is padding, which the statistics of the router leave out."""
        config = self.config
        with jax.named_scope("router"):
            choice = Router(config, name="router")(x_BTD, segment_ids_BT)
        with jax.named_scope("experts"):
            y_BTD = Experts(config, self.dtype, name="experts")(x_BTD, choice)
        if not config.shared_expert_mlp_dim:
            return y_BTD
        shared_BTD = SwiGLU(config, config.shared_expert_mlp_dim, self.dtype, name="shared")(x_BTD)
        if config.shared_expert_gate:
            shared_BTD = shared_BTD * SharedGate(config, name="shared_gate")(x_BTD).astype(self.dtype)
        return y_BTD + shared_BTD


class SharedGate(nn.Module):
    """The sigmoid of a learned product with each token."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 [B, T, 1]."""
        return jax.nn.sigmoid(_float32_product(x_BTD, _router_matrix(self, self.config, 1)))
