"""Fits the loss of runs against their compute, L = E + A C^-alpha, and predicts the loss of a larger run.

Four runs cannot determine three parameters and the noise, and the best fit alone would not show that. So the fit is the
posterior distribution of the parameters, on a grid, and every result is a median with the interval that holds 90% of
it. The priors are:

- E, the loss that no compute removes, is anywhere between none and all of the loss of the largest run.
- alpha is between 0.03 and 0.5, uniformly in its logarithm. Published exponents are 0.05 (Kaplan et al. 2020) and 0.15
  (Hoffmann et al. 2022, from the exponents of parameters and tokens).
- The noise of a run, such as that of its seed, is about 0.008 bits per byte, within a factor of four.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nextllm_jax.errors import InputError

FEWEST_POINTS = 3
INTERVAL = 0.9
_ALPHAS = np.geomspace(0.03, 0.5, 240)
_SHARES = np.linspace(0, 1, 151)[:-1]
_NOISES = np.geomspace(0.001, 0.05, 12)
_USUAL_NOISE, _NOISE_FACTOR = 0.008, 2.0
"""Median of the prior of the noise, and the factor of one standard deviation."""
_NUM_SAMPLES = 4000


class Interval(NamedTuple):
    """A median, and the bounds of the interval that holds 90% of the posterior."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


class Fit(NamedTuple):
    """Samples of the posterior: the parameters of equally likely curves."""

    reference_flops: float
    """Compute of the largest run that was fitted."""
    level: np.ndarray
    """Loss of each curve at `reference_flops`."""
    share: np.ndarray
    """Fraction of that loss which no compute removes."""
    alpha: np.ndarray
    noise: np.ndarray
    """Standard deviation of the loss of a run around the curve."""

    @property
    def irreducible(self) -> Interval:
        """E in bits per byte."""
        return _interval(self.level * self.share)

    @property
    def exponent(self) -> Interval:
        """Alpha, the slope of the reducible loss over compute in a log-log plot."""
        return _interval(self.alpha)

    def curve(self, flops: float) -> Interval:
        """The loss that the family reaches with this compute."""
        return _interval(self._losses(flops))

    def predict(self, flops: float) -> Interval:
        """The loss of one run with this compute, which differs from the curve by its noise."""
        normal = np.random.default_rng(1).standard_normal(_NUM_SAMPLES)
        return _interval(self._losses(flops) + self.noise * normal)

    def _losses(self, flops: float) -> np.ndarray:
        return self.level * _relative_loss(self.share, self.alpha, flops / self.reference_flops)


def fit(flops: Sequence[float], losses: Sequence[float]) -> Fit:
    """The fit of runs with these FLOPs, in ascending order, that reached these losses in bits per byte.

    Raises InputError for fewer than `FEWEST_POINTS` runs, and if a loss is not below that of the smaller run before it.
    """
    if len(flops) < FEWEST_POINTS:
        raise InputError(f"{len(flops)} runs are too few for a fit of three parameters; give at least {FEWEST_POINTS}")
    for number, (before, after) in enumerate(itertools.pairwise(losses), 2):
        if not after < before:
            raise InputError(
                f"rung {number} reached {after:.4f} bits per byte, which is not below the {before:.4f} of the smaller "
                f"rung {number - 1}, so no curve of compute fits them; give a longer --ladder-minutes or a lower "
                "--optimizer.learning-rate, and another --workdir"
            )
    reference = max(flops)
    compute, measured = np.asarray(flops) / reference, np.asarray(losses)
    share, alpha = (grid.ravel() for grid in np.meshgrid(_SHARES, _ALPHAS, indexing="ij"))
    shape = _relative_loss(share[:, None], alpha[:, None], compute)
    # The loss is linear in its level at the reference, whose prior is flat, so the level is integrated exactly.
    squared = np.square(shape).sum(1)
    level = shape @ measured / squared
    misfit = np.square(measured - level[:, None] * shape).sum(1)
    log_weight = -misfit[:, None] / (2 * _NOISES**2) - np.log(squared)[:, None] / 2
    log_weight -= (len(flops) - 1) * np.log(_NOISES)
    log_weight -= np.square(np.log(_NOISES / _USUAL_NOISE) / np.log(_NOISE_FACTOR)) / 2
    weight = np.exp(log_weight - log_weight.max()).ravel()
    random = np.random.default_rng(0)
    chosen, of_noise = np.divmod(random.choice(len(weight), _NUM_SAMPLES, p=weight / weight.sum()), len(_NOISES))
    noise = _NOISES[of_noise]
    spread = noise / np.sqrt(squared[chosen]) * random.standard_normal(_NUM_SAMPLES)
    return Fit(reference, level[chosen] + spread, share[chosen], alpha[chosen], noise)


def _relative_loss(share: np.ndarray, alpha: np.ndarray, compute: float | np.ndarray) -> np.ndarray:
    """The loss in relation to that at the reference; `compute` is in relation to that of the reference."""
    return share + (1 - share) * np.power(compute, -alpha)


def _interval(samples: np.ndarray) -> Interval:
    low, median, high = np.quantile(samples, [(1 - INTERVAL) / 2, 0.5, (1 + INTERVAL) / 2])
    return Interval(float(median), float(low), float(high))
