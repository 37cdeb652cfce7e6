"""The proof holds for a real kill, and it can fail."""

import json
import shutil

import jax.numpy as jnp

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.config.files import read_config
from nextllm_jax.diagnostics.resume_proof import compare, hash_of_arrays


def test_the_proof_of_a_killed_training(door):
    out = door.run("nextllm_jax.cli", "doctor", "--resume-proof", "--config", "config.py", "--steps", "12",
                   "--optimizer.warmup-steps", "3")  # fmt: skip
    assert any(line.startswith("killed at step ") for line in out.stderr.splitlines())
    lines = out.stdout.splitlines()
    rows = [line.split() for line in lines if line.endswith(" equal")]
    assert [row[-3] == row[-2] for row in rows] == [True] * 4
    assert len({row[-3] for row in rows}) == 4
    assert lines[-1].startswith("equal: ")
    assert sorted(path.name for path in door.directory.iterdir()) == ["config.py", "corpus", "data"]


def test_too_few_steps_are_refused(door):
    refused = door.run(
        "nextllm_jax.cli", "doctor", "--resume-proof", "--config", "config.py", "--steps", "5", exit_code=2
    )
    assert "--steps is 5" in refused.stderr


def test_each_difference_is_found(trained, tmp_path):
    run = trained.directory / "runs" / "config"
    other = shutil.copytree(run, tmp_path / "run")
    config = read_config(run / "config.json")
    assert all(comparison.equal for comparison in compare(config, RunDir(run), RunDir(other)))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    line = json.loads(lines[6])
    lines[6] = json.dumps({**line, "loss": line["loss"] + 1e-7})
    (other / "metrics.jsonl").write_text("\n".join(lines))
    (other / "samples.txt").write_text("the cat")
    losses, params, rest, text = compare(config, RunDir(run), RunDir(other))
    assert not losses.equal
    assert "first at step 7" in str(losses)
    assert params.equal
    assert rest.equal
    assert not text.equal


def test_the_hash_of_arrays_sees_a_bit_a_name_a_type_and_a_shape():
    tree = {"a": jnp.arange(6.0), "b": jnp.zeros(2)}
    others = [
        {"a": jnp.arange(6.0).at[3].set(jnp.nextafter(jnp.float32(3), 4)), "b": jnp.zeros(2)},
        {"a": jnp.arange(6.0), "c": jnp.zeros(2)},
        {"a": jnp.arange(6), "b": jnp.zeros(2)},
        {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(2)},
        {"a": jnp.arange(6.0), "b": -jnp.zeros(2)},
    ]
    assert hash_of_arrays(tree) == hash_of_arrays({"b": jnp.zeros(2), "a": jnp.arange(6.0)})
    assert len({hash_of_arrays(tree), *map(hash_of_arrays, others)}) == 6
