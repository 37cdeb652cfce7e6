"""Damaged checkpoints and failing saves as a user meets them."""

import json
import shutil

import pytest

from tests.runs import contents


@pytest.fixture
def damaged(trained, door):
    """A finished run with two checkpoints of which the latest has one flipped bit, and the damaged file's name."""
    run = door.directory / "runs" / "config"
    shutil.copytree(trained.directory / "runs" / "config", run)
    step = run / "checkpoints" / "40"
    path = max((step / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return run, path.relative_to(step).as_posix()


def test_a_flipped_bit_is_named_by_every_command(trained, door, damaged):
    run, name = damaged
    before = contents(run)
    found = f"damaged ({name} is not what was saved (its sha256 differs)); use another step: 30"
    sample = ("sample.py", "--checkpoint", "runs/config", "--prompt", "the", "--max-new-tokens", "4")
    refused = door.run(*sample, exit_code=2)
    assert found in refused.stderr
    strict = door.run("train.py", "--config", "config.py", "--checkpoint.strict", exit_code=2)
    assert f"{found}; leave out --checkpoint.strict" in strict.stderr
    assert "Traceback" not in refused.stderr + strict.stderr
    verified = door.run("nextllm_jax.cli", "verify", "runs/config", exit_code=1).stdout.splitlines()
    assert verified[0].startswith("runs/config/checkpoints/30: ok, ")
    assert verified[1:] == [f"runs/config/checkpoints/40: damaged: {name} is not what was saved (its sha256 differs)"]
    assert contents(run) == before
    # Asking jax for a device would fail with this platform.
    rows = door.run("nextllm_jax.cli", "verify", "runs/config", "--json", exit_code=1, JAX_PLATFORMS="none").stdout
    row = json.loads(rows.splitlines()[1])
    assert (row["state"], [damage["file"] for damage in row["damaged"]]) == ("damaged", [name])
    whole = trained.run("nextllm_jax.cli", "verify", "runs/config/checkpoints/40").stdout
    assert whole.startswith("runs/config/checkpoints/40: ok, ")
    nothing = door.run("nextllm_jax.cli", "verify", "corpus", exit_code=2)
    assert nothing.stderr.startswith("error: corpus is not a run; give a run directory")
    shutil.rmtree(run / "checkpoints")
    lost = door.run("nextllm_jax.cli", "verify", "runs/config", exit_code=1)
    assert lost.stderr == "error: runs/config holds no checkpoint\n"


def test_the_only_checkpoint_damaged_ends_in_a_sentence_and_nothing_changes(door, damaged):
    run, name = damaged
    shutil.rmtree(run / "checkpoints" / "30")
    before = contents(run)
    refused = door.run("train.py", "--config", "config.py", exit_code=2).stderr
    assert f"damaged ({name} is not what was saved" in refused
    assert "there is no other step; restore the file, or start over with --overwrite" in refused
    assert contents(run) == before


def test_a_save_that_fails_in_the_background_ends_the_run_with_a_sentence(door):
    """The directory of the checkpoints is removed while the first is saved."""
    program = door.directory / "program.py"
    program.write_text(
        "import shutil\n"
        "from nextllm_jax.checkpoint import step_files\n"
        "from nextllm_jax.cli.main import run_main, train_command\n"
        "seal = step_files.seal\n"
        "step_files.seal = lambda path, content: (shutil.rmtree(path.parent), seal(path, content))\n"
        "run_main(train_command)\n"
    )
    failed = door.run(str(program), "--config", "config.py", "--training.sample-tokens", "0", exit_code=1)
    sentence = failed.stderr.splitlines()[-1]
    assert sentence.startswith("error: step 15 could not be saved in ")
    assert "(No such file or directory); there is no earlier checkpoint; make room or fix the directory" in sentence
