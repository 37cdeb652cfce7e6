"""The family of a config: the same model and recipe at any amount of compute. The dial is the number of FLOPs.

Depth and width grow together. Everything else follows from them and from the recipe of the config:

- The ratio of width to depth, the width of a head, the query heads per kv head, the ratio of mlp_dim to embed_dim, and
  the number of experts stay those of the config, up to rounding.
- Tokens are proportional to the parameters that process a token: of the experts, only the chosen ones count.
- The batch grows with tokens^0.4 (Bergsma et al. 2025, arXiv:2505.13738: 0.38 to 0.46), and is rounded to three binary
  digits, so meshes divide it.
- Learning rates are proportional to sqrt(batch / (width x depth)). The square root of the batch is that of Malladi et
  al. 2022 (arXiv:2205.10287). The square roots of width and depth keep the sizes of the changes of activations with
  directions that have a fixed root mean square, as those of Muon here. With `model.parametrization` completep, they are
  those of its base shape, which does not change, so they follow the batch alone.
- learning_rate x weight_decay x steps is proportional to sqrt(tokens per parameter) (Bergsma et al. 2025).
- The warmup takes the same fraction of the steps.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

from nextllm_jax.config import Config, ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.model.accounting import active_parameter_count, flops_per_token, parameter_count

FEWEST_STEPS = 20
_BATCH_EXPONENT = 0.4
_SMALLEST_STEP = 8


class Size(NamedTuple):
    """What a member of a family costs."""

    parameters: int
    active_parameters: int
    """Those that process a token."""
    tokens: int
    flops: float

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens per active parameter, the ratio that the family keeps, up to rounding."""
        return self.tokens / self.active_parameters


def size_of(config: Config) -> Size:
    """The size of a run. The model must state its vocabulary."""
    tokens = config.training.steps * _tokens_per_step(config)
    per_token = flops_per_token(config.model, config.data.sequence_length)
    model = config.model
    return Size(parameter_count(model), active_parameter_count(model), tokens, tokens * per_token)


def member(base: Config, flops: float, tokens_per_parameter: float, *, batch_multiple: int = 1) -> Config:
    """The config of the family of `base` whose training takes about `flops`, with a multiple of a number as its batch.

    Raises InputError if that is too little for `FEWEST_STEPS` steps, or less than the smallest model takes.
    """
    model = _model(base, flops, tokens_per_parameter)
    tokens = flops / flops_per_token(model, base.data.sequence_length)
    return _with_recipe(base, model, tokens, batch_multiple)


def _model(base: Config, flops: float, tokens_per_parameter: float) -> ModelConfig:
    """The model of the family whose training with that many tokens per parameter comes closest to `flops`.

    Of the widths around the one of the family's dial, each with every depth, it is the one that is closest in FLOPs and
    in the ratio of width to depth.
    """
    period = len(base.model.period)

    @functools.cache
    def costs(width: int) -> tuple[_Cost, _Cost]:
        """Of a model with that width: what it costs without layers, and what each period of layers adds."""
        one, two = (_cost(base, _shaped(base.model, width, depth)) for depth in (period, 2 * period))
        return _Cost(2 * one.parameters - two.parameters, 2 * one.flops - two.flops), two.minus(one)

    def relative(width: int, periods: int) -> float:
        """FLOPs of the training in relation to those that are wanted."""
        fixed, layer = costs(width)
        parameters = fixed.parameters + periods * layer.parameters
        return tokens_per_parameter * parameters * (fixed.flops + periods * layer.flops) / flops

    dial = 1.0  # width and depth in relation to the config; FLOPs grow with at most its sixth power
    for _ in range(6):
        periods = max(1, round(dial * base.model.num_layers / period))
        dial *= relative(_width(base.model, dial), periods) ** (-1 / 6)
    aspect = period * base.model.embed_dim / base.model.num_layers
    scores = [
        (abs(math.log(relative(width, periods))) + abs(math.log(width / periods / aspect)) / 4, width, periods)
        for width in sorted({_width(base.model, dial * factor) for factor in (0.88, 1.0, 1.12)})
        for periods in range(1, 2 * max(1, round(dial * base.model.num_layers / period)) + 2)
    ]
    _, width, periods = min(scores)
    if not 1 / 2 < relative(width, periods) < 2:
        raise InputError(
            f"no model of this family takes about {flops:.2g} FLOPs with {tokens_per_parameter:g} tokens per "
            "parameter; give a longer --ladder-minutes or a smaller --data.vocab-size"
        )
    return _shaped(base.model, width, period * periods)


class _Cost(NamedTuple):
    """Active parameters of a model, and FLOPs of training it on a token."""

    parameters: float
    flops: float

    def minus(self, other: "_Cost") -> "_Cost":
        return _Cost(self.parameters - other.parameters, self.flops - other.flops)


def _cost(base: Config, model: ModelConfig) -> _Cost:
    return _Cost(active_parameter_count(model), flops_per_token(model, base.data.sequence_length))


def _width(base: ModelConfig, dial: float) -> int:
    """The width at `dial`: a multiple of a power of two of at most an eighth of it, or of the width per kv head."""
    width = dial * base.embed_dim
    step = 2 ** int(math.log2(width / 8)) if width > 8 * _SMALLEST_STEP else _SMALLEST_STEP
    if base.embed_dim % base.num_kv_heads == 0:
        step = min(step, base.embed_dim // base.num_kv_heads)
    return max(1, round(width / step)) * step


def _shaped(base: ModelConfig, width: int, depth: int) -> ModelConfig:
    """The model with another width and depth, with the ratios of `base`."""
    ratio = width / base.embed_dim
    kv_heads = max(1, round(ratio * base.num_kv_heads))
    step = _SMALLEST_STEP if width < 1024 else 128

    def scaled(dim: int) -> int:
        return max(1, round(ratio * dim / step)) * step if dim else 0

    return dataclasses.replace(
        base,
        num_layers=depth,
        embed_dim=width,
        mlp_dim=scaled(base.mlp_dim),
        expert_mlp_dim=None if base.expert_mlp_dim is None else scaled(base.expert_mlp_dim),
        shared_expert_mlp_dim=scaled(base.shared_expert_mlp_dim),
        num_kv_heads=kv_heads,
        num_heads=kv_heads * (base.num_heads // base.num_kv_heads),
    )


def _with_recipe(base: Config, model: ModelConfig, tokens: float, batch_multiple: int) -> Config:
    """The config with another model and number of tokens, with the recipe scaled as this module says."""
    before, training, optimizer = size_of(base), base.training, base.optimizer
    batch = training.global_batch_size * (tokens / before.tokens) ** _BATCH_EXPONENT
    unit = math.lcm(2 ** max(0, math.floor(math.log2(batch)) - 2), batch_multiple)
    batch = max(1, round(batch / unit)) * unit
    steps = round(tokens / (batch * base.data.sequence_length))
    if steps < FEWEST_STEPS:
        raise InputError(
            f"a run of {tokens:,.0f} tokens has only {steps} steps of {batch} sequences of "
            f"{base.data.sequence_length} tokens, and at least {FEWEST_STEPS} are needed; give a longer "
            "--ladder-minutes, a smaller --training.global-batch-size or a shorter --data.sequence-length"
        )
    area = model.embed_dim * model.num_layers / (base.model.embed_dim * base.model.num_layers)
    if model.parametrization == "completep":
        area = 1.0
    rate = math.sqrt(batch / training.global_batch_size / area)
    ratio = tokens / active_parameter_count(model) / before.tokens_per_parameter
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
