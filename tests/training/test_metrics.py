import json
import math

import jax
import jax.numpy as jnp
import pytest

from nextllm_jax.training.metrics import TrainMeter
from nextllm_jax.training.step import StepMetrics


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def step_metrics(nll_sum, num_tokens, *, grad_norm=1.0, learning_rate=0.1, skipped=False, norms=0.0):
    return StepMetrics(
        nll_sum=jnp.float32(nll_sum),
        num_tokens=jnp.int32(num_tokens),
        grad_norm=jnp.float32(grad_norm),
        learning_rate=jnp.float32(learning_rate),
        skipped=jnp.bool(skipped),
        skipped_in_a_row=jnp.int32(skipped),
        reason=jnp.int32(skipped),
        loss_limit=jnp.float32(math.nan),
        gradient_norms=jnp.full(4, norms),
        activation_rms=jnp.full(3, norms),
    )


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter(clock):
    return TrainMeter(tokens_per_step=60, flops_per_token=6.0, peak_flops=1200.0, clock=clock)


def test_loss_is_weighted_by_tokens(meter):
    meter.add(step_metrics(30.0, 10, grad_norm=5.0, learning_rate=0.25))
    meter.add(step_metrics(2.0, 90, grad_norm=3.0, learning_rate=0.5))
    record = meter.read(2)
    assert record["loss"] == pytest.approx(0.32)
    assert record["perplexity"] == pytest.approx(math.exp(0.32))
    assert (record["step"], record["grad_norm"], record["learning_rate"]) == (2, 3.0, 0.5)
    meter.add(step_metrics(8.0, 4))
    assert meter.read(3)["loss"] == 2.0  # since the last read alone


def test_skipped_steps_count_as_tokens_but_not_as_loss(meter):
    meter.add(step_metrics(10.0, 10))
    meter.add(step_metrics(math.nan, 20, grad_norm=math.inf, skipped=True))
    record = meter.read(2)
    assert (record["loss"], record["tokens_seen"]) == (1.0, 30)
    meter.add(step_metrics(math.nan, 20, skipped=True))
    record = meter.read(3)
    assert math.isnan(record["loss"])
    assert math.isnan(record["perplexity"])
    assert record["tokens_seen"] == 50


def test_norms_of_layers_are_those_of_the_last_skipped_step_if_there_is_one(meter):
    for norms, skipped in ((1.0, False), (math.nan, True), (math.inf, True), (2.0, False)):
        meter.add(step_metrics(1.0, 10, norms=norms, skipped=skipped))
    record = meter.read(4)
    assert (record["gradient_norms"], record["activation_rms"]) == ([math.inf] * 4, [math.inf] * 3)
    for norms in (3.0, 4.0):
        meter.add(step_metrics(1.0, 10, norms=norms))
    assert meter.read(6)["gradient_norms"] == [4.0] * 4


def test_throughput_leaves_out_what_is_paused(meter, clock):
    clock.now = 100.0  # compiling
    meter.add(step_metrics(1.0, 1000))
    meter.resume()
    for _ in range(4):
        clock.now += 0.5
        meter.add(step_metrics(1.0, 50))
    meter.pause()
    clock.now += 1000.0  # evaluating and saving
    meter.pause()
    meter.resume()
    clock.now += 1.0
    meter.resume()  # runs already
    meter.add(step_metrics(1.0, 100))
    record = meter.read(6)
    assert record["tokens_per_second"] == pytest.approx(300 / 3.0)
    assert record["processed_tokens_per_second"] == pytest.approx(5 * 60 / 3.0)
    assert record["mfu"] == pytest.approx(100 * 6 / 1200)
    assert record["tokens_seen"] == 1300
    assert record["elapsed_seconds"] == 1103.0
    clock.now += 2.0
    meter.add(step_metrics(1.0, 40))
    assert meter.read(7)["tokens_per_second"] == pytest.approx(20.0)  # since the last read alone


def test_the_share_of_time_that_the_host_waits_for_data(meter, clock):
    def slow_batches():
        while True:
            clock.now += 0.25
            yield "a batch"

    batches = slow_batches()
    meter.wait_for(batches)  # the clock is still paused
    meter.add(step_metrics(1.0, 10))
    meter.resume()
    for _ in range(3):
        assert meter.wait_for(batches) == "a batch"
        clock.now += 0.75
        meter.add(step_metrics(1.0, 10))
    assert meter.read(4)["input_wait_fraction"] == pytest.approx(0.25)
    clock.now += 1.0
    meter.add(step_metrics(1.0, 10))
    assert meter.read(5)["input_wait_fraction"] == 0.0  # since the last read alone


def test_without_timed_steps_there_is_no_throughput(meter):
    meter.add(step_metrics(1.0, 10))
    record = meter.read(1)
    assert (record["tokens_per_second"], record["input_wait_fraction"]) == (None, None)
    record = meter.read(1)
    assert record["mfu"] is None
    assert math.isnan(record["loss"])
    assert (record["grad_norm"], record["gradient_norms"]) == (None, None)


def test_unknown_chip_has_no_mfu(clock):
    meter = TrainMeter(tokens_per_step=60, flops_per_token=6.0, peak_flops=None, clock=clock)
    meter.resume()
    meter.add(step_metrics(1.0, 10))
    clock.now = 1.0
    record = meter.read(1)
    assert record["tokens_per_second"] == 10.0
    assert record["mfu"] is None


def test_totals_continue_those_of_an_earlier_part(clock):
    before = {"tokens_seen": 10**12, "elapsed_seconds": 50.0}  # a checkpoint of before there was "unread"
    meter = TrainMeter(tokens_per_step=60, flops_per_token=1.0, peak_flops=None, record=before, clock=clock)
    clock.now = 8.0
    meter.add(step_metrics(1.0, 10))
    assert meter.totals() == {"tokens_seen": 10**12 + 10, "elapsed_seconds": 58.0}
    record = meter.read(1)  # totals did not use the step up
    assert (record["loss"], record["tokens_seen"], record["elapsed_seconds"]) == (0.1, 10**12 + 10, 58.0)


def test_a_window_continues_where_an_earlier_part_was_saved(clock):
    steps = [step_metrics(1.0, 10), step_metrics(7.0, 20), step_metrics(3.0, 5)]
    whole = TrainMeter(tokens_per_step=60, flops_per_token=1.0, peak_flops=None, clock=clock)
    for step in steps:
        whole.add(step)
    first = TrainMeter(tokens_per_step=60, flops_per_token=1.0, peak_flops=None, clock=clock)
    for step in steps[:2]:
        first.add(step)
    saved = json.loads(json.dumps(first.state()))
    second = TrainMeter(
        tokens_per_step=60,
        flops_per_token=1.0,
        peak_flops=None,
        record=saved,
        clock=clock,
    )
    second.add(steps[2])
    assert second.read(3) == whole.read(3)
    assert second.state()["unread"] == [0.0, 0]


def test_nothing_is_read_from_the_device_before_it_is_asked_for(meter, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(len(tree)) or device_get(tree))
    meter.resume()
    for _ in range(10):
        meter.add(step_metrics(1.0, 10))
        meter.resume()
    assert fetched == [0]
    meter.read(10)
    assert fetched == [0, 10, 0]
