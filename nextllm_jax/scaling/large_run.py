"""The large run: its config from the family, its loss from the fit, and its plan on devices that are not here."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from nextllm_jax.config import Config
from nextllm_jax.data.mixture import Source
from nextllm_jax.errors import InputError
from nextllm_jax.plan.search import search
from nextllm_jax.plan.topology import Target
from nextllm_jax.plan.training import TrainingPlan
from nextllm_jax.scaling.family import Size, member, size_of
from nextllm_jax.scaling.fit import Fit, Interval, fit
from nextllm_jax.scaling.ladder import Rung

MOST_DECADES, MOST_EPOCHS = 2.0, 4.0
"""How far the fit is trusted: powers of ten in compute beyond the largest rung, and passes over the training data.
Repeating data up to four times is about as good as new data (Muennighoff et al. 2023)."""
MOST_ERROR = 0.02
"""Bits per byte by which the prediction of the largest rung may miss, where the interval does not hold the truth."""


class LargeRun(NamedTuple):
    """A run that is too large to try, and its predicted loss."""

    config: Config
    size: Size
    decades: float
    """Powers of ten by which its compute exceeds that of the largest rung."""
    epochs: float
    """Passes over the training data; of a mixture, over the source that repeats most."""

    def warnings(self) -> list[str]:
        """Sentences on why the predicted loss may be wrong, as known before the ladder; empty if there are none."""
        found = []
        if self.decades > MOST_DECADES:
            found.append(
                f"the large run takes {10**self.decades:,.0f} times the compute of the largest rung, and the fit is "
                f"trusted up to {10**MOST_DECADES:,.0f} times"
            )
        if self.epochs > MOST_EPOCHS:
            found.append(
                f"the large run repeats the training data {self.epochs:,.1f} times; beyond {MOST_EPOCHS:g} times, its "
                "loss is higher than predicted"
            )
        return found


def large_run(
    base: Config, flops: float, tokens_per_parameter: float, largest_rung: float, sources: Sequence[Source]
) -> LargeRun:
    """The member of the family with that compute. `largest_rung` is the compute of the largest small run."""
    if flops <= largest_rung:
        raise InputError(
            f"the large run has {flops:.2g} FLOPs, which is not more than the {largest_rung:.2g} of the largest rung; "
            "give a larger --budget or --days, or a smaller --ladder-flops with another --workdir"
        )
    config = member(base, flops, tokens_per_parameter)
    training = config.training
    every = max(1, training.steps // 20)
    config = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(base.evaluation, every_steps=None),
        training=dataclasses.replace(training, evaluate_every_steps=every),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=every),
    )
    size = size_of(config)
    return LargeRun(config, size, math.log10(size.flops / largest_rung), _epochs(size.tokens, sources))


def _epochs(tokens: int, sources: Sequence[Source]) -> float:
    weight = sum(source.weight for source in sources)
    return max(tokens * source.weight / weight / source.dataset.split("train").num_tokens for source in sources)


class Forecast(NamedTuple):
    """What a ladder says about a large run. Losses are in bits per byte."""

    fit: Fit
    check: Interval
    """Loss of the largest rung, predicted from the others."""
    check_error: float
    """That prediction minus the measured loss."""
    run: LargeRun
    loss: Interval
    """Predicted loss of the large run."""
    price: float | None
    """Price of a device and hour."""
    plan: TrainingPlan | None = None

    def warnings(self) -> list[str]:
        """Sentences on why the predicted loss may be wrong; empty if the fit is trusted."""
        found, low, high = self.run.warnings(), self.check.low, self.check.high
        measured = self.check.median - self.check_error
        if abs(self.check_error) > MOST_ERROR and not low <= measured <= high:
            found.append(
                f"the largest rung reached {measured:.3f} bits per byte, where the others predict {low:.3f} to "
                f"{high:.3f}, so no curve of compute describes these runs; give more --ladder-minutes or --rungs"
            )
        return found

    @property
    def least_days(self) -> float | None:
        """A lower bound on the time of the large run; None without a plan."""
        if self.plan is None or self.plan.roofline is None:
            return None
        return self.run.config.training.steps * self.plan.roofline.seconds / 86_400

    @property
    def least_cost(self) -> float | None:
        """A lower bound on its cost; None without a plan or a price."""
        if self.price is None or self.plan is None or self.least_days is None:
            return None
        return self.least_days * 24 * self.plan.num_devices * self.price


def forecast(rungs: Sequence[Rung], run: LargeRun, price: float | None = None) -> Forecast:
    """The forecast from finished rungs, without a plan. Raises InputError if no curve fits them."""
    flops = [rung.size.flops for rung in rungs]
    losses = [rung.loss for rung in rungs if rung.loss is not None]
    found, others = fit(flops, losses), fit(flops[:-1], losses[:-1])
    check = others.predict(flops[-1])
    return Forecast(found, check, check.median - losses[-1], run, found.predict(run.size.flops), price)


def planned(run: LargeRun, target: Target, minutes: float) -> TrainingPlan:
    """The fastest plan of the run on the devices. It is compiled, unless `minutes` is 0 or nothing compiles for them.

    Raises InputError if the run does not fit.
    """
    plans = search(run.config, target, minutes)
    if not plans:
        raise InputError(f"none of the compiled variants of the large run fits {target.name}; give more devices")
    return plans[0]
