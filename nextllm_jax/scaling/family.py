"""The family of a config: the same model and recipe at any amount of compute. The dial is the number of FLOPs.

Depth and width grow together. Everything else follows from them and from the recipe of the config:

- The ratio of width to depth, the width of a head, the query heads per kv head, and the ratio of mlp_dim to embed_dim
  stay those of the config, up to rounding.
- Tokens are proportional to parameters.
- The batch grows with tokens^0.4 (Bergsma et al. 2025, arXiv:2505.13738: 0.38 to 0.46), rounded to a power of two.
- Learning rates are proportional to sqrt(batch / (width x depth)). The square root of the batch is that of Malladi et
  al. 2022 (arXiv:2205.10287). The square roots of width and depth keep the sizes of the changes of activations with
  directions that have a fixed root mean square, as those of Muon here.
- learning_rate x weight_decay x steps is proportional to sqrt(tokens per parameter) (Bergsma et al. 2025).
- The warmup takes the same fraction of the steps.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

from nextllm_jax.config import Config, ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.accounting import flops_per_token, parameter_count

FEWEST_STEPS = 20
_BATCH_EXPONENT = 0.4
_SMALLEST_STEP = 8


class Size(NamedTuple):
    """What a member of a family costs."""

    parameters: int
    tokens: int
    flops: float

    @property
    def tokens_per_parameter(self) -> float:
        """The ratio that the family keeps, up to rounding."""
        return self.tokens / self.parameters


def size_of(config: Config) -> Size:
    """The size of a run. The model must state its vocabulary."""
    tokens = config.training.steps * _tokens_per_step(config)
    per_token = flops_per_token(config.model, config.data.sequence_length)
    return Size(parameter_count(config.model), tokens, tokens * per_token)


def member(base: Config, flops: float, tokens_per_parameter: float) -> Config:
    """The config of the family of `base` whose training takes about `flops`.

    Raises InputError if that is too little for `FEWEST_STEPS` steps, or less than the smallest model takes.
    """
    model = _model(base, flops, tokens_per_parameter)
    tokens = flops / flops_per_token(model, base.data.sequence_length)
    return _with_recipe(base, model, tokens)


def _model(base: Config, flops: float, tokens_per_parameter: float) -> ModelConfig:
    """The model of the family whose training with that many tokens per parameter comes closest to `flops`.

    Of the depths around the one that the ratio of width to depth asks for, each with the best width, it is the one that
    is closest in FLOPs and in that ratio.
    """
    length = base.data.sequence_length

    def relative(width: int, depth: int) -> float:
        model = _shaped(base.model, width, depth)
        return tokens_per_parameter * parameter_count(model) * flops_per_token(model, length) / flops

    scale = 1.0  # of width and depth; FLOPs grow with its sixth power if the layers dominate, else more slowly
    for _ in range(5):
        depth, width = _depth(base.model, scale), _width(base.model, scale * base.model.embed_dim)
        scale *= relative(width, depth) ** (-1 / 6)
    period = len(base.model.layer_pattern)
    depths = sorted({max(period, depth + period * more) for more in (-1, 0, 1)})
    found: list[tuple[float, int, int]] = []
    for depth in depths:
        width = scale * base.model.embed_dim
        for _ in range(3):
            width *= relative(_width(base.model, width), depth) ** (-1 / 5)
        widths = {_width(base.model, width * factor) for factor in (0.9, 1, 1.1)}
        for width in widths:
            aspect = width / depth / (base.model.embed_dim / base.model.num_layers)
            found.append((abs(math.log(relative(width, depth))) + abs(math.log(aspect)) / 4, depth, width))
    _, depth, width = min(found)
    if not 1 / 2 < relative(width, depth) < 2:
        raise InputError(
            f"no model of this family takes about {flops:.2g} FLOPs with {tokens_per_parameter:g} tokens per "
            "parameter; give a longer --ladder-minutes or a smaller --data.vocab-size"
        )
    return _shaped(base.model, width, depth)


def _depth(base: ModelConfig, scale: float) -> int:
    period = len(base.layer_pattern)
    return max(1, round(scale * base.num_layers / period)) * period


def _width(base: ModelConfig, width: float) -> int:
    """A width near `width`: a multiple of a power of two that is at most an eighth, or of the width per kv head."""
    step = 2 ** int(math.log2(max(width, 1) / 8)) if width > 8 * _SMALLEST_STEP else _SMALLEST_STEP
    if base.embed_dim % base.num_kv_heads == 0:
        step = min(step, base.embed_dim // base.num_kv_heads)
    return max(1, round(width / step)) * step


def _shaped(base: ModelConfig, width: int, depth: int) -> ModelConfig:
    """The model with another width and depth, with the ratios of `base`."""
    ratio = width / base.embed_dim
    kv_heads = max(1, round(ratio * base.num_kv_heads))
    step = _SMALLEST_STEP if width < 1024 else 128
    return dataclasses.replace(
        base,
        num_layers=depth,
        embed_dim=width,
        mlp_dim=max(1, round(ratio * base.mlp_dim / step)) * step,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * (base.num_heads // base.num_kv_heads),
    )


def _with_recipe(base: Config, model: ModelConfig, tokens: float) -> Config:
    """The config with another model and number of tokens, with the recipe scaled as this module says."""
    before, training, optimizer = size_of(base), base.training, base.optimizer
    batch = training.global_batch_size * (tokens / before.tokens) ** _BATCH_EXPONENT
    batch = 2 ** max(0, round(math.log2(batch)))
    steps = round(tokens / (batch * base.data.sequence_length))
    if steps < FEWEST_STEPS:
        raise InputError(
            f"a run of {tokens:,.0f} tokens has only {steps} steps of {batch} sequences of "
            f"{base.data.sequence_length} tokens, and at least {FEWEST_STEPS} are needed; give a longer "
            "--ladder-minutes, a smaller --training.global-batch-size or a shorter --data.sequence-length"
        )
    area = model.embed_dim * model.num_layers / (base.model.embed_dim * base.model.num_layers)
    rate = math.sqrt(batch / training.global_batch_size / area)
    ratio = tokens / parameter_count(model) / before.tokens_per_parameter
    decay = math.sqrt(ratio) * training.steps / (rate * steps)
    adamw = optimizer.adamw_learning_rate
    return dataclasses.replace(
        base,
        model=model,
        training=dataclasses.replace(training, steps=steps, global_batch_size=batch, accumulation_steps=1),
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate=_short(rate * optimizer.learning_rate),
            adamw_learning_rate=None if adamw is None else _short(rate * adamw),
            weight_decay=_short(decay * optimizer.weight_decay),
            warmup_steps=round(steps * optimizer.warmup_length(training.steps) / training.steps),
            schedule_steps=None,
        ),
    )


def _short(value: float) -> float:
    """The number with three significant digits."""
    return float(f"{value:.3g}")


def _tokens_per_step(config: Config) -> int:
    return config.training.global_batch_size * config.data.sequence_length


def spread(total_flops: float, rungs: int, spacing: float) -> list[float]:
    """FLOPs of `rungs` runs, each `spacing` times the one before, that add up to `total_flops`."""
    powers = list(itertools.accumulate([1.0] * rungs, lambda power, _: power * spacing))
    return [total_flops * power / sum(powers) for power in powers]
