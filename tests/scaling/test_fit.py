"""The fit against curves whose parameters are known."""

import numpy as np
import pytest

from nextllm_jax.errors import InputError
from nextllm_jax.scaling.fit import FEWEST_POINTS, fit

FLOPS = 1e14 * 3.0 ** np.arange(-3, 1)


def curve(flops, irreducible, alpha, level=1.55):
    """The loss of a power law that has `level` at 1e14 FLOPs."""
    return irreducible + (level - irreducible) * (flops / 1e14) ** -alpha


@pytest.mark.parametrize(("irreducible", "alpha"), [(0.4, 0.08), (0.9, 0.2), (1.0, 0.25)])
def test_a_long_curve_without_noise_gives_its_parameters(irreducible, alpha):
    flops = np.geomspace(1e10, 1e14, 12)
    found = fit(flops, curve(flops, irreducible, alpha))
    assert found.irreducible.low < irreducible < found.irreducible.high
    assert found.irreducible.median == pytest.approx(irreducible, abs=0.06)
    assert found.exponent.median == pytest.approx(alpha, rel=0.1)
    for flop in (1e13, 1e15):
        assert found.curve(flop).median == pytest.approx(curve(flop, irreducible, alpha), abs=0.03)


def test_the_band_of_four_noisy_runs_holds_the_truth():
    """90% is promised, and 60 curves measure that to about 4%."""
    rng, inside, errors = np.random.default_rng(0), {3: [], 100: []}, []
    for _ in range(60):
        truth = rng.uniform(0.3, 1.2), np.exp(rng.uniform(np.log(0.06), np.log(0.35)))
        losses = curve(FLOPS, *truth) + rng.choice([0.003, 0.006, 0.012]) * rng.standard_normal(4)
        if np.any(np.diff(losses) >= 0):
            continue
        found = fit(FLOPS, losses)
        for factor, each in inside.items():
            loss = found.curve(factor * 1e14)
            each.append(loss.low <= curve(factor * 1e14, *truth) <= loss.high)
        errors.append(found.curve(3e14).median - curve(3e14, *truth))
    assert len(errors) > 40
    assert all(np.mean(each) > 0.85 for each in inside.values())
    assert np.mean(np.abs(errors)) < 0.02


def test_the_band_widens_away_from_the_runs_and_with_fewer_of_them():
    losses = curve(FLOPS, 0.8, 0.15)
    found, fewer = fit(FLOPS, losses), fit(FLOPS[:3], losses[:3])
    widths = [loss.high - loss.low for loss in map(found.curve, [1e14, 1e15, 1e16, 1e18])]
    assert widths == sorted(widths)
    assert widths[2] > 5 * widths[0]
    assert fewer.curve(1e14).high - fewer.curve(1e14).low > 1.5 * widths[0]
    run, mean = found.predict(1e15), found.curve(1e15)
    assert run.high - run.low > mean.high - mean.low


def test_the_same_runs_give_the_same_fit():
    losses = curve(FLOPS, 0.8, 0.15)
    assert fit(FLOPS, losses).predict(1e16) == fit(FLOPS, losses).predict(1e16)


def test_too_few_runs():
    with pytest.raises(InputError, match=f"2 runs are too few .* at least {FEWEST_POINTS}"):
        fit([1e12, 3e12], [2.0, 1.9])


def test_a_larger_run_that_is_not_better():
    with pytest.raises(InputError, match=r"rung 3 reached 1\.9100 .* not below the 1\.9000 .* rung 2"):
        fit([1e12, 3e12, 9e12, 27e12], [2.0, 1.9, 1.91, 1.8])
