import jax
import numpy as np
import pytest

from nextllm_jax.config import OptimizerConfig
from nextllm_jax.training.schedule import describe_warmup, schedule


def rates(steps=100, **settings):
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, **settings), steps)
    return np.array([rate(step) for step in range(steps)])


def test_cosine_warms_up_from_the_first_step_and_ends_at_the_final_rate():
    got = rates(final_learning_rate_fraction=0.1)
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-6)
    progress = np.arange(90) / 89
    np.testing.assert_allclose(got[10:], 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-5)


def test_linear_constant_and_wsd():
    np.testing.assert_allclose(rates(schedule="linear", final_learning_rate_fraction=0.0)[10:], 1 - np.arange(90) / 89,
                               atol=1e-6)  # fmt: skip
    np.testing.assert_allclose(rates(schedule="constant")[10:], 1.0)
    wsd = rates(schedule="wsd", decay_steps_fraction=0.2, final_learning_rate_fraction=0.0)
    np.testing.assert_allclose(wsd[10:80], 1.0)
    assert np.all(np.diff(wsd[80:]) < 0)
    assert wsd[-1] == pytest.approx(0, abs=1e-6)


def rates_and_beyond(config, steps):
    """The rates of a schedule's steps, and those of some later steps."""
    later = steps + np.array([0, 1, steps, 10 * steps])
    return np.split(np.array(jax.vmap(schedule(config, steps))(np.r_[:steps, later])), [steps])


@pytest.mark.parametrize(
    ("kind", "fraction"),
    [("cosine", 0.2), ("linear", 0.2), ("constant", 0.2), ("wsd", 0.0), ("wsd", 0.2), ("wsd", 0.6), ("wsd", 1.0)],
)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_schedule_rises_stays_and_falls_to_the_final_rate_at_its_last_step(kind, fraction, steps):
    for asked in (0, 1, 2, 4, 9):
        config = OptimizerConfig(schedule=kind, learning_rate=1.0, warmup_steps=asked, decay_steps_fraction=fraction)
        warmup = config.warmup_length(steps)
        got, beyond = rates_and_beyond(config, steps)
        final = 1.0 if kind == "constant" else np.float32(0.1)
        assert {got[-1], *beyond} == {final}, warmup
        if steps > 1:
            assert got.max() == 1, warmup
        np.testing.assert_allclose(got[:warmup], np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
        assert np.all(np.diff(got[max(warmup - 1, 0) :]) <= 0), warmup
        if kind == "wsd":
            falling = np.flatnonzero(got[warmup:] < 1) + warmup
            assert len(falling) == max(min(round(steps * fraction), steps - warmup - 1), 1), warmup
            np.testing.assert_allclose(np.diff(got[falling]), -0.9 / len(falling), atol=1e-6)


def test_schedule_steps_fixes_the_past_when_a_run_is_extended():
    config = OptimizerConfig(warmup_steps=5, schedule_steps=50)
    short, extended = schedule(config, 50), schedule(config, 80)
    assert [float(short(s)) for s in range(50)] == [float(extended(s)) for s in range(50)]


@pytest.mark.parametrize(
    ("settings", "steps", "warmup"),
    [
        ({"warmup_steps": 50}, 20, 10),
        ({"warmup_steps": 50}, 100, 50),
        ({"warmup_steps": 50}, 99, 49),
        ({"warmup_steps": 50}, 1, 0),
        ({"warmup_steps": 50, "schedule_steps": 30}, 500, 15),
        ({"warmup_steps": 50, "schedule_steps": 500}, 20, 50),
        ({"warmup_steps": 0}, 20, 0),
    ],
)
def test_the_warmup_takes_at_most_half_of_the_schedule_and_says_so(settings, steps, warmup):
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", **settings)
    assert config.warmup_length(steps) == warmup
    rates = np.array(jax.vmap(schedule(config, steps))(np.arange(warmup + 2)))
    np.testing.assert_allclose(rates[:warmup], np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-6)
    assert rates[warmup + 1] < 1
    said = describe_warmup(config, steps)
    assert (said is None) == (warmup == config.warmup_steps)
    assert said is None or said.startswith(f"warming up for {warmup} steps instead of optimizer.warmup_steps 50")
