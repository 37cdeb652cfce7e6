"""What a ladder says about the run that it cannot try."""

import pytest

from nextllm_jax.config import Config
from nextllm_jax.scaling.family import Size
from nextllm_jax.scaling.ladder import Rung
from nextllm_jax.scaling.large_run import LargeRun, forecast

FLOPS = (2.8e12, 8.4e12, 2.5e13, 7.6e13)


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([0.3 + 1.4 * (flops / FLOPS[0]) ** -0.12 for flops in FLOPS], False),
        ([1.7194, 1.5588, 1.3869, 1.1572], True),  # measured: each step of compute gains more than the one before
    ],
)
def test_a_warning_if_the_runs_do_not_follow_the_curve(losses, warned):
    rungs = [Rung(Config(), Size(1, 1, 8, flops), loss) for flops, loss in zip(FLOPS, losses, strict=True)]
    run = LargeRun(Config(), Size(1, 1, 8, 1e15), decades=1.1, epochs=1.0)
    assert run.warnings() == []
    warnings = forecast(rungs, run).warnings()
    assert len(warnings) == warned
    assert all("the largest rung reached 1.157 bits per byte, where the others predict 1.22" in w for w in warnings)
