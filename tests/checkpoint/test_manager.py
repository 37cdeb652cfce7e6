import json
import math
import resource
import shutil
import subprocess
import sys
import textwrap
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.saved_steps import DamagedCheckpoint
from nextllm_jax.errors import InputError, RunFailed
from tests.checkpoint.tree import abstract, names, save, tree


def test_what_is_saved_comes_back(tmp_path):
    params = tree()
    rest = {
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "key": jax.random.key(3),
        "step": jnp.int32(7),
    }
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": params, "rest": rest}, {"data": [1, "x"]}, validation_loss=2.5)
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.steps() == [7]
    assert again.record(7) == {"data": [1, "x"]}
    assert again.validation_loss(7) == 2.5
    restored = {
        "params": again.restore(7, "params", abstract(params)),
        "rest": again.restore(7, "rest", abstract(rest)),
    }
    saved = {"params": params, "rest": rest}
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert got.dtype == want.dtype
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_restores_onto_other_devices(tmp_path):
    mesh_8 = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    mesh_2_4 = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    kernel = jnp.arange(64.0).reshape(8, 8)
    sharded = {"kernel": jax.device_put(kernel, NamedSharding(mesh_8, PartitionSpec("fsdp")))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": sharded}, {}, validation_loss=None)
    target = NamedSharding(mesh_2_4, PartitionSpec("tensor", "fsdp"))
    restored = Checkpoints(tmp_path).restore(1, "params", abstract(sharded, target))
    assert restored["kernel"].sharding == target
    np.testing.assert_array_equal(np.asarray(restored["kernel"]), np.asarray(kernel))


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    value = jnp.arange(1_000_000.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"x": value}}, {}, validation_loss=None)
        for _ in range(5):
            value = overwrite(value)
        value.block_until_ready()
    restored = Checkpoints(tmp_path).restore(1, "params", abstract({"x": value}))
    np.testing.assert_array_equal(np.asarray(restored["x"]), np.arange(1_000_000.0, dtype=np.float32))


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 2.0, 1.0], 3),
        ([1.0, 2.0, 3.0], 1),
        ([2.0, 1.0, 3.0, 4.0], 2),
        ([2.0, math.nan, 3.0], 1),
        ([math.nan, 3.0, -math.inf], 2),
        ([2.0, None, None], 1),
        ([2.0, 2.0, 2.0], 1),
        ([None, None], None),
        ([math.nan], None),
    ],
)
def test_keeps_latest_and_best(tmp_path, losses, best):
    latest = len(losses)
    with Checkpoints(tmp_path) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            save(checkpoints, step, loss)
    for again in (checkpoints, Checkpoints(tmp_path)):
        assert again.latest_step() == latest
        assert again.best_step() == best
        assert again.steps() == sorted({latest, best} - {None})
        assert names(tmp_path) == [str(step) for step in again.steps()]
        assert again.resolve("latest") == latest
        assert again.resolve(latest) == again.resolve(str(latest)) == latest
    for step in again.steps():
        kernel = again.restore(step, "params", abstract(tree()))["layers"]["kernel"]
        np.testing.assert_array_equal(np.asarray(kernel), np.full((8, 4), step))
    # JSON proper: a NaN loss is null.
    manifest = (tmp_path / str(latest) / "manifest.json").read_text()
    json.loads(manifest, parse_constant=lambda name: pytest.fail(f"{name} in the manifest"))


def test_best_survives_a_restart(tmp_path):
    for step, loss in enumerate([2.0, 1.0, 3.0, 4.0], start=1):
        with Checkpoints(tmp_path) as checkpoints:
            save(checkpoints, step, loss)
    assert Checkpoints(tmp_path).steps() == [2, 4]
    assert Checkpoints(tmp_path).best_step() == 2


def test_old_step_stands_until_the_new_one_is_committed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        checkpoints.save(2, {"params": tree()}, {}, validation_loss=None)
        assert 1 in checkpoints.steps()
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_a_saved_step_is_not_replaced(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 5, 1.0, value=5)
        with pytest.raises(ValueError, match="step 5 is already saved"):
            save(checkpoints, 5, 0.5, value=6)
        assert checkpoints.validation_loss(5) == 1.0
        assert checkpoints.set_aside(5).name == "5.damaged"
        assert checkpoints.steps() == []
        save(checkpoints, 5, 0.5, value=6)
    assert checkpoints.validation_loss(5) == 0.5
    assert names(tmp_path) == ["5", "5.damaged"]


def test_what_is_not_complete_is_ignored_and_leftovers_go(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
    (tmp_path / "3").mkdir()
    (tmp_path / "4" / "params").mkdir(parents=True)
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "6.deleted" / "params").mkdir(parents=True)
    (tmp_path / "9.unfinished").mkdir()
    (tmp_path / "9.unfinished.manifest.new").write_text("")
    (tmp_path / "07").mkdir()
    (tmp_path / "8").write_text("a file")
    again = Checkpoints(tmp_path)
    assert again.steps() == [1]
    assert len(names(tmp_path)) == 10  # looking changes nothing
    with again:
        save(again, 3, 0.5)
    assert again.steps() == [3]
    assert names(tmp_path) == ["07", "3", "3.damaged", "4", "8", "notes"]


def test_resolve_says_what_is_there(tmp_path):
    with pytest.raises(InputError, match="nowhere holds no complete checkpoint"):
        Checkpoints(tmp_path / "nowhere").resolve("latest")
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 4)
        with pytest.raises(InputError, match=r"has no checkpoint '5'.*its steps are 4"):
            checkpoints.resolve(5)
        with pytest.raises(InputError, match=r"has no checkpoint 'first'"):
            checkpoints.resolve("first")
        with pytest.raises(InputError, match=r"validation loss; use latest"):
            checkpoints.resolve("best")
        with pytest.raises(InputError, match=r"has no checkpoint '5'"):
            checkpoints.restore(5, "params", abstract(tree()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"norm": jnp.ones((3,), jnp.float32)}, r"norm is bfloat16\[3\], but float32\[3\] is expected"),
        (lambda t: t | {"layers": {"kernel": jnp.ones((4, 4))}}, r"layers/kernel is float32\[8, 4\], but"),
        (lambda t: t | {"more": jnp.ones(1)}, "more is missing"),
        (lambda t: {"layers": t["layers"]}, "norm is not in the model"),
    ],
)
def test_a_tree_that_does_not_fit_names_the_leaf(tmp_path, change, message):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(InputError, match=message):
            checkpoints.restore(1, "params", abstract(change(tree())))
        with pytest.raises(InputError, match="has no rest; it has params"):
            checkpoints.restore(1, "rest", abstract(tree()))


def test_files_out_of_reach_are_not_damage(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
    errors = [PermissionError(13, "Permission denied"), ValueError("UNAVAILABLE: no answer")]
    for error in errors:
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", mock.Mock(side_effect=error))
        with pytest.raises(InputError, match=r"/1 cannot be read \(params: .*\); there is no other step") as caught:
            checkpoints.restore(1, "params", abstract(tree()))
        assert not isinstance(caught.value, DamagedCheckpoint)


def test_failed_save_is_raised_and_the_checkpoint_before_it_stands(tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as on a full disk: writes fail
        try:
            noise = jax.random.normal(jax.random.key(0), (1_000_000,))
            checkpoints.save(2, {"params": {"x": noise}}, {}, validation_loss=0.5)
            with pytest.raises(RunFailed, match=r"could not be saved in .* \(File too large\); .* is step 1"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not caplog.records  # the sentence is all that a user sees
        assert checkpoints.steps() == [1]
        assert names(tmp_path) == ["1"]  # and the room that it took is free again
        save(checkpoints, 3, 0.5)
    assert checkpoints.steps() == [3]


def test_a_full_disk_is_nothing_but_a_sentence(tmp_path):
    """Arrays that were under way when the first one failed say nothing, but other threads' errors are shown."""
    script = textwrap.dedent(
        """
        import resource, sys, threading
        import jax
        from nextllm_jax.checkpoint.manager import Checkpoints
        from nextllm_jax.errors import RunFailed

        arrays = {str(i): jax.random.normal(jax.random.key(i), (20_000,)) for i in range(12)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            with Checkpoints(sys.argv[1]) as checkpoints:
                checkpoints.save(1, {"params": arrays, "rest": arrays}, {}, validation_loss=None)
        except RunFailed as error:
            print(error)
        raise RuntimeError("another error")
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "step 1 could not be saved" in done.stdout
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert done.stderr.endswith("RuntimeError: another error\n")


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"step 1 could not be saved in .*there is no earlier checkpoint"):
        save(Checkpoints(tmp_path / "file" / "checkpoints"), 1)


def test_step_deleted_while_it_is_looked_at(tmp_path, monkeypatch):
    """Sampling from a run that trains: a step may go between listing and reading."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 1.0)
        save(checkpoints, 2, 2.0)
    monkeypatch.setattr(checkpoints, "steps", lambda: [1, 2])
    shutil.rmtree(tmp_path / "1")
    assert checkpoints.best_step() == 2


def test_validation_loss_may_come_after_the_save(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 2.0)
        save(checkpoints, 2)
        assert checkpoints.steps() == [1, 2]
        checkpoints.add_validation_loss(2, math.nan, {"evaluated": True})
        checkpoints.wait()
        assert checkpoints.best_step() == 1
        checkpoints.add_validation_loss(2, 1.0, {"evaluated": "again"})
        checkpoints.wait()
        assert checkpoints.steps() == [2]  # the old best is superseded
        with pytest.raises(InputError, match="has no checkpoint '3'"):
            checkpoints.add_validation_loss(3, 1.0, {})
    again = Checkpoints(tmp_path)
    assert (again.best_step(), again.validation_loss(2)) == (2, 1.0)
    assert again.record(2) == {"evaluated": "again"}
    again.restore(2, "params", abstract(tree()))
