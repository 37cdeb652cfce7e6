"""What the recorder writes, when, and how much; replays of a run that truly diverges, at the user's door."""

import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config import Config, ModelConfig, TrainingConfig
from nextllm_jax.diagnostics.replay import Bundle, replay
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.model.objective import Batch
from nextllm_jax.training.flight_recorder import MAX_BUNDLES, FlightRecorder
from nextllm_jax.training.step import SKIP_REASONS, StepMetrics
from tests.runs import metrics

CONFIG = Config(model=ModelConfig(num_layers=1), training=TrainingConfig(global_batch_size=2, max_skipped_steps=4))


class Loader:
    directories = (Path("data"),)

    def position(self, step):
        return {"data_id": "0123"}

    def whole_batch(self, step):
        return np.array([step, 7]), Batch(*(np.full((2, 4), step) for _ in range(5)))


class Saved:
    """Checkpoints at given steps, which remembers what was pinned."""

    def __init__(self, *steps):
        self._steps, self.pinned = steps, []

    def wait(self):
        pass

    def steps(self):
        return list(self._steps)

    def latest_step(self):
        return max(self._steps, default=None)

    def pin(self, step):
        self.pinned.append(step)


def step_metrics(reason="none", consecutive=1, loss=2.5):
    return StepMetrics(
        nll_sum=jnp.float32(10 * loss),
        num_tokens=jnp.int32(10),
        grad_norm=jnp.float32(math.nan if reason == "gradient" else 1),
        learning_rate=jnp.float32(0.1),
        skipped=jnp.bool(reason != "none"),
        skipped_in_a_row=jnp.int32(consecutive if reason != "none" else 0),
        reason=jnp.int32(SKIP_REASONS.index(reason)),
        loss_limit=jnp.float32(2.0 if reason == "spike" else math.nan),
        gradient_norms=jnp.array([1.0, math.inf, math.nan, 0.1]),
        activation_rms=jnp.array([1.0, 2.0, 3.0]),
    )


@pytest.fixture
def saved():
    return Saved(5, 10, 40)


def make_recorder(run, saved, before_failure=None):
    return FlightRecorder(RunDir(run), CONFIG, Loader(), saved, {"devices": "1 x cpu"}, before_failure)  # pyright: ignore


def look(recorder, step, metrics):
    """Have the recorder check a step."""
    recorder.after_step(step, metrics)
    recorder.pause()


def bundles(run):
    return sorted(path.name for path in (run / "flight").glob("*"))


def test_the_first_step_of_each_bad_stretch_is_kept_with_the_checkpoint_before_it(tmp_path, saved, messages):
    recorder = make_recorder(tmp_path, saved)
    for step, reason, consecutive in (
        (20, "loss", 1),
        (21, "loss", 2),
        (22, "none", 0),
        (23, "spike", 1),
    ):
        assert f"step {step}" not in messages.text
        recorder.after_step(step, step_metrics(reason, consecutive))
    recorder.pause()
    recorder.pause()
    assert bundles(tmp_path) == ["step-20", "step-23"]
    assert saved.pinned == [10, 10]
    first, second, third = messages.messages
    assert "step 20: its loss is not finite; skipped (1 consecutive)" in first
    assert f"nextllm replay {tmp_path}/flight/step-20" in first
    assert "replay" not in second
    assert "spike (loss 2.5000, limit 2.0000)" in third
    content = json.loads((tmp_path / "flight" / "step-20" / "bundle.json").read_text())
    assert (content["step"], content["checkpoint"], content["windows"]) == (20, 10, [19, 7])
    assert content["measured"]["gradient_norms"] == [1.0, "inf", "nan", float(np.float32(0.1))]
    assert content["measured"]["places"] == ["embedding", "layer 0 attention", "layer 0 mlp", "final norm"]
    arrays = np.load(tmp_path / "flight" / "step-20" / "batch.npz")
    np.testing.assert_array_equal(arrays["tokens_BT"], np.full((2, 4), 19))


def test_before_the_first_checkpoint_a_replay_starts_at_step_0(tmp_path, saved):
    recorder = make_recorder(tmp_path, saved)
    look(recorder, 5, step_metrics("gradient"))
    assert json.loads((tmp_path / "flight" / "step-5" / "bundle.json").read_text())["checkpoint"] is None
    assert saved.pinned == []


def test_the_same_step_met_again_is_not_kept_twice_and_another_is(tmp_path, saved, messages):
    for loss in (2.5, 2.5, 3.5):
        recorder = make_recorder(tmp_path, saved)
        look(recorder, 20, step_metrics("gradient", loss=loss))
    assert bundles(tmp_path) == ["step-20", "step-20-2"]
    assert messages.messages[-1].endswith("step-20-2")
    assert len(saved.pinned) == 2


def test_bundles_are_bounded(tmp_path, saved, messages):
    recorder = make_recorder(tmp_path, saved)
    for step in range(11, 41, 2):
        look(recorder, step, step_metrics("loss"))
        look(recorder, step + 1, step_metrics())
    assert len(bundles(tmp_path)) == len(saved.pinned) == MAX_BUNDLES
    assert "no bundle is written" in messages.messages[-1]
    recorder = make_recorder(tmp_path, saved)
    look(recorder, 50, step_metrics("loss"))
    assert "no bundle is written" in messages.messages[-1]


def test_a_bundle_that_cannot_be_written_does_not_end_the_run(tmp_path, saved, messages):
    (tmp_path / "flight").write_text("in the way")
    recorder = make_recorder(tmp_path, saved)
    look(recorder, 20, step_metrics("loss"))
    assert "cannot be written" in messages.messages[0]


def test_training_gives_up_after_too_many(tmp_path, saved):
    failed = []
    recorder = make_recorder(tmp_path, saved, failed.append)
    look(recorder, 20, step_metrics("loss", 3))
    with pytest.raises(RunFailed, match=r"4 consecutive steps up to step 21 .* the last checkpoint is step 40"):
        look(recorder, 21, step_metrics("loss", 4))
    assert failed == [21]


@pytest.fixture(scope="module")
def diverged(trained, tmp_path_factory):
    """A run with a learning rate that makes its second step overflow, and checkpoints that outlive it."""
    directory = tmp_path_factory.mktemp("diverged")
    door = trained.beside(directory)
    failed = door.run(
        "train.py", "--config", "config.py", "--optimizer.learning-rate", "1e6", "--checkpoint.every-steps", "1",
        "--checkpoint.keep-last", "1", "--training.max-skipped-steps", "4", "--training.sample-tokens", "0",
        "--training.log-every-steps", "10", exit_code=1,
    )  # fmt: skip
    assert "nextllm replay runs/config/flight/step-2" in failed.stderr
    assert "4 consecutive steps" in failed.stderr
    assert "Traceback" not in failed.stderr
    return door


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_divergence_is_replayed_bit_for_bit_from_its_pinned_checkpoint(diverged):
    run = diverged.directory / "runs" / "config"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"1", "4"}, "2 and 3 went, and 1 is pinned"
    before = contents(run)
    done = diverged.run("nextllm_jax.cli", "replay", "runs/config/flight/step-2", "--json")
    found = json.loads(done.stdout)
    assert (found["reproduced"], found["bit_for_bit"], found["differences"]) == (True, True, [])
    assert found["recorded"] == found["replayed"]
    assert found["recorded"]["reason"] == "gradient"
    assert (found["first"]["pass"], found["first"]["place"]) == ("forward", "layer 0 mlp (residual stream after it)")
    assert len(found["windows"]) == 8
    assert contents(run) == before


def test_a_run_that_fails_shows_in_which_layers(diverged):
    run = diverged.directory / "runs" / "config"
    (line,) = metrics(run, "train")  # written for the failure: none was due
    assert line["step"] == 5
    assert line["activation_rms"][0] is not None
    assert line["activation_rms"][2:] == [None] * 3
    assert (run / "layers.png").stat().st_size > 1000


def copy_of(diverged, tmp_path, change=None):
    """A copy of the run, its bundle's JSON changed; the bundle's path."""
    shutil.copytree(diverged.directory / "runs" / "config", tmp_path / "run", dirs_exist_ok=True)
    bundle = tmp_path / "run" / "flight" / "step-2"
    content = json.loads((bundle / "bundle.json").read_text())
    content |= change(content) if change else {}
    (bundle / "bundle.json").write_text(json.dumps(content))
    return bundle


@pytest.mark.slow
def test_a_step_that_is_fine_now_is_not_reproduced(diverged, tmp_path):
    def gentle(content):
        return {"config": content["config"] | {"optimizer": content["config"]["optimizer"] | {"learning_rate": 1e-3}}}

    bundle = copy_of(diverged, tmp_path, lambda content: gentle(content) | {"checkpoint": None})
    done = diverged.run("nextllm_jax.cli", "replay", bundle, exit_code=1)
    assert "step 2 is NOT reproduced" in done.stdout
    assert "layer 1 mlp" in done.stdout


UNUSABLE = {
    "a checkpoint that is gone": (lambda content: {"checkpoint": 0}, "checkpoint 0, which .* is not in"),
    "a later checkpoint": (lambda content: {"checkpoint": 3}, "'checkpoint' is not before 'step'"),
    "other data": (lambda content: {"data_id": "0" * 16}, "holds other data"),
    "another seed": (lambda content: {"config": content["config"] | {"seed": 1}, "checkpoint": None}, "another batch"),
    "the seed of another run": (lambda content: {"config": content["config"] | {"seed": 1}}, "another batch"),
    "another model": (
        lambda content: {"config": content["config"] | {"model": content["config"]["model"] | {"mlp_dim": 48}}},
        "does not fit",
    ),
    "another format": (lambda content: {"format": "nextllm-flight-0"}, "format"),
    "a damaged field": (lambda content: {"measured": 3}, "'measured'"),
    "a field from elsewhere": (lambda content: {"config": {"modle": {}}}, "did you mean model"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_does_not_belong_together_is_refused(diverged, tmp_path, case):
    change, sentence = UNUSABLE[case]
    bundle = copy_of(diverged, tmp_path, change)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=sentence):
        replay(bundle)
    assert contents(tmp_path) == before


def test_a_damaged_checkpoint_is_refused_and_stays_where_it_is(diverged, tmp_path):
    bundle = copy_of(diverged, tmp_path)
    file = next(path for path in (tmp_path / "run" / "checkpoints" / "1" / "params" / "d").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="damaged"):
        replay(bundle)
    assert contents(tmp_path) == before


def test_what_is_no_bundle_is_refused(diverged, tmp_path):
    with pytest.raises(InputError, match=r"is not a bundle .*step-N"):
        Bundle.read(tmp_path)
    with pytest.raises(InputError, match=r"is not a bundle .*try .*flight/step-2"):
        Bundle.read(diverged.directory / "runs" / "config")
    bundle = copy_of(diverged, tmp_path)
    (bundle / "batch.npz").write_bytes(b"PK not a zip")
    with pytest.raises(InputError, match="cannot be read as a bundle"):
        Bundle.read(bundle)
