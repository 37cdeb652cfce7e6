"""train.py, sample.py and nextllm as a user runs them."""

import importlib.metadata
import json
import re
import shutil
import signal

import numpy as np
import pytest

from tests.runs import assert_same_end, contents, interrupt, metrics

ISSUED_FIELDS = {"step", "split", "loss", "perplexity", "tokens_seen", "elapsed_seconds"}


def test_a_run_leaves_what_the_readme_promises(trained):
    run = trained.directory / "runs" / "config"
    for name in ("config.json", "metrics.jsonl", "loss.png", "samples.txt", "tensorboard", "tokenizer", "checkpoints"):
        assert (run / name).exists(), name
    train, validation = metrics(run, "train"), metrics(run, "validation")
    assert [line["step"] for line in train] == list(range(1, 41))
    assert [line["step"] for line in validation] == [20, 40]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "mfu", "input_wait_fraction"} | ISSUED_FIELDS <= train[
        0
    ].keys()
    assert {"bits_per_byte"} | ISSUED_FIELDS <= validation[0].keys()
    assert validation[-1]["loss"] < validation[0]["loss"] < np.log(320)
    assert train[0]["mfu"] is None
    assert all(0 <= line["input_wait_fraction"] <= 1 for line in train if line["tokens_per_second"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit()) == ["30", "40"]
    assert re.search(r"step\D+40\b.*ETA|finished at step 40", trained.log.stderr)


def test_a_finished_run_says_so_and_changes_nothing(trained):
    run = trained.directory / "runs" / "config"
    before = (run / "metrics.jsonl").read_bytes()
    again = trained.run("train.py", "--config", "config.py")
    assert "finished at step 40" in again.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_attention_is_named_at_the_start_and_two_devices_of_a_sequence_learn_the_same(trained, door):
    assert "xla attention (auto on cpu)" in trained.log.stderr
    refused = door.run("train.py", "--config", "config.py", "--model.attention", "splash", exit_code=2)
    assert refused.stderr.strip().endswith("splash, but it needs TPUs and the devices are cpu; set it to auto")
    split = door.run(
        "train.py", "--config", "config.py", "--mesh.data", "1", "--mesh.sequence", "2", "--training.steps", "4",
        "--optimizer.schedule-steps", "40", "--training.sample-tokens", "0",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )  # fmt: skip
    assert "blockwise attention (auto on cpu, gathering keys)" in split.stderr
    ours, theirs = (
        [line["loss"] for line in metrics(where.directory / "runs" / "config", "train")[:4]]
        for where in (door, trained)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("fault", "steps"),
    [
        pytest.param("SIGINT", 1, marks=pytest.mark.slow),
        ("SIGTERM+SIGTERM", 25),  # two as `timeout` sends them, to the process and to its group
    ],
)
def test_interrupted_and_continued_ends_where_an_uninterrupted_run_ends(trained, door, fault, steps):
    code, output = interrupt(door, fault, steps)
    assert code == 75, output
    run = door.directory / "runs" / "config"
    assert not (run / "checkpoints" / "40").exists()
    assert any(path.name.isdigit() for path in (run / "checkpoints").iterdir())
    door.run("train.py", "--config", "config.py")
    assert_same_end(run, trained.directory / "runs" / "config", 40)


@pytest.mark.slow
def test_killed_and_continued_ends_where_an_uninterrupted_run_ends(trained, door):
    code, output = interrupt(door, "kill", 30)
    assert code == -signal.SIGKILL, output
    door.run("train.py", "--config", "config.py")
    assert_same_end(door.directory / "runs" / "config", trained.directory / "runs" / "config", 40)


def test_best_and_latest_both_survive(door):
    """With a learning rate that diverges the best is early; the latest two are the last ones."""
    log = door.run("train.py", "--config", "config.py", "--training.evaluate-every-steps", "10",
                   "--training.sample-tokens", "0", "--optimizer.learning-rate", "20",
                   "--optimizer.warmup-steps", "30").stderr  # fmt: skip
    assert "warming up for 20 steps instead of optimizer.warmup_steps 30, since" in log
    run = door.directory / "runs" / "config"
    losses = {line["step"]: line["loss"] for line in metrics(run, "validation")}
    best = min(losses, key=losses.get)
    assert best not in (30, 40), losses
    kept = {int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {best, 30, 40}


@pytest.mark.slow
def test_simulated_devices_give_the_same_losses(trained, door):
    door.run("train.py", "--config", "config.py", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--training.steps", "20",
             "--optimizer.schedule-steps", "40", XLA_FLAGS="--xla_force_host_platform_device_count=8")  # fmt: skip
    eight = metrics(door.directory / "runs" / "config", "train")
    one = metrics(trained.directory / "runs" / "config", "train")[:20]
    np.testing.assert_allclose([line["loss"] for line in eight], [line["loss"] for line in one], rtol=1e-4)


def test_non_finite_steps_end_the_run_and_leave_the_checkpoint(trained, door):
    run = door.directory / "runs" / "config"
    shutil.copytree(trained.directory / "runs" / "config", run)
    before = contents(run / "checkpoints" / "40")
    higher = ("--optimizer.learning-rate", "1e38", "--allow-change", "optimizer.learning_rate")
    longer = ("--training.steps", "60", "--optimizer.schedule-steps", "4000")
    failed = door.run("train.py", "--config", "config.py", *higher, *longer, "--training.max-skipped-steps", "3",
                      "--allow-change", "optimizer.schedule_steps", exit_code=1)  # fmt: skip
    assert "3 consecutive steps" in failed.stderr
    assert "the last checkpoint is step 40" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert {path: path.read_bytes() for path in before} == before  # its pin is added


def test_sample_streams_text(trained):
    text = trained.run(
        "sample.py", "--checkpoint", "runs/config", "--prompt", "the cat", "--max-new-tokens", "16"
    ).stdout
    assert text.startswith("the cat") or "the cat" in text
    assert len(text) > len("the cat") + 8


def test_sample_json_rows_and_speeds(trained):
    arguments = ("--prompt", "the cat", "--prompt", "a dog", "--num-samples", "2", "--max-new-tokens", "12", "--json")
    out = trained.run("sample.py", "--checkpoint", "runs/config", *arguments).stdout
    *rows, speeds = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat", "the cat", "a dog", "a dog"]
    assert all(row.keys() == {"prompt", "text", "tokens", "finish_reason"} for row in rows)
    assert rows[0]["text"] != rows[1]["text"]
    assert speeds.keys() == {"prefill_tokens_per_second", "decode_tokens_per_second"}
    alone = trained.run("sample.py", "--checkpoint", "runs/config", "--prompt", "a dog", *arguments[4:]).stdout
    assert [json.loads(line) for line in alone.splitlines()][:2] == rows[2:]


BAD_TRAIN = {
    "missing config": (["--config", "nowhere.py"], "nowhere.py does not exist"),
    "broken config": (["--config", "broken.py"], "broken.py fails with ZeroDivisionError"),
    "unknown field": (["--config", "config.py", "--training.stepz", "3"], "--training.steps"),
    "bad value": (["--config", "config.py", "--model.num-kv-heads", "3"], "3 does not divide model.num_heads 4"),
    "vocabulary": (
        ["--config", "config.py", "--model.vocab-size", "300"],
        "data.vocab_size 320 exceeds model.vocab_size 300",
    ),
    "vocabulary of the data": (
        ["--config", "config.py", "--model.vocab-size", "300", "--data.vocab-size", "300", "--data.path", "data/known"],
        "tokenizer has 320 tokens, but model.vocab_size is 300",
    ),
    "sample prompts": (
        ["--config", "config.py", "--training.sample-tokens", "126", "--training.sample-prompts", "the cat"],
        "must fit model.context_length 128",
    ),
    "rows and mesh": (
        ["--config", "config.py", "--training.accumulation-steps", "8", "--training.global-batch-size", "12"],
        "8 does not divide training.global_batch_size 12",
    ),
    "a path that is too long": (["--config", "config.py", "--workdir", "x" * 300], "File name too long"),
    "two configs": (["--config", "config.py", "--config", "config.py"], "--config is given 2 times"),
    "no such platform": (["--config", "config.py"], "jax found no device", {"JAX_PLATFORMS": "tpu"}),
    "remote workdir": (["--config", "config.py", "--workdir", "s3://bucket/run"], "cannot be a run"),
    "batch and mesh": (["--config", "config.py", "--mesh.data", "2"], "does not use 1 devices"),
    "platform": (["--config", "config.py", "--platform", "tpu"], "platform is tpu, but jax found cpu"),
}


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_bad_input_to_train_is_one_sentence_and_exit_2(door, case):
    (door.directory / "broken.py").write_text("1 / 0")
    arguments, sentence, *environment = BAD_TRAIN[case]
    failed = door.run("train.py", *arguments, exit_code=2, **(environment[0] if environment else {}))
    assert re.search(sentence, failed.stderr + failed.stdout), failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (door.directory / "runs").exists()


REFUSED = {
    "seed": (["--seed", "7"], "  seed 0 -> 7"),
    "fewer steps": (["--training.steps", "9"], "  training.steps 40 -> 9"),
    "longer schedule": (["--training.steps", "90"], "  training.steps 40 -> 90 .*--optimizer.schedule-steps 40"),
    "batch": (["--training.global-batch-size", "16"], "  training.global_batch_size 8 -> 16"),
    "data": (["--data.corpus", "books"], "  data.corpus corpus -> books"),
    "tokenizer": (["--data.tokenizer", "gpt2"], "  data.tokenizer train -> gpt2"),
    "model": (["--model.mlp-dim", "48", "--optimizer.b1", "0.8"], r"(?s)  model.mlp_dim 64 -> 48 .*  optimizer.b1 0"),
    "wrong name": (["--allow-change", "sed"], "did you mean seed"),
    "overwriting a bad config": (["--overwrite", "--optimizer.schedule-steps", "-9"], "schedule_steps is -9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_continuation_leaves_everything_as_it_was(trained, case):
    def contents():
        return {path: path.read_bytes() for path in trained.directory.rglob("*") if path.is_file()}

    change, message = REFUSED[case]
    before = contents()
    refused = trained.run("train.py", "--config", "config.py", *change, exit_code=2)
    assert re.search(message, refused.stderr), refused.stderr
    assert contents() == before


def learning_rates(run):
    return {line["step"]: line["learning_rate"] for line in metrics(run, "train")}


def test_a_finished_run_is_extended_and_changed_by_consent(trained, door):
    """Its learning rates are those of the first part, and go on from there; so do its batches."""
    run = door.directory / "runs" / "config"
    shutil.copytree(trained.directory / "runs" / "config", run)
    changed = [*("--training.steps", "48", "--optimizer.schedule-steps", "40", "--training.sample-tokens", "0"),
               *("--training.global-batch-size", "16", "--seed", "3")]  # fmt: skip
    refused = door.run("train.py", "--config", "config.py", *changed, exit_code=2).stderr
    assert "allow the changes: --allow-change seed --allow-change training.global_batch_size" in refused
    override = ["--allow-change", "seed", "--allow-change", "training.global-batch-size"]
    code, output = interrupt(door, "SIGTERM", 4, *changed, *override)
    assert "changed: seed 0 -> 3" in output
    assert code == 75
    door.run("train.py", "--config", "config.py", *changed)  # the override is recorded, so it is not needed again
    rates = learning_rates(run)
    assert {step: rates[step] for step in range(1, 41)} == learning_rates(trained.directory / "runs" / "config")
    assert rates[40] == rates[41] == rates[48]
    lines = metrics(run, "train")
    assert [line["step"] for line in lines] == list(range(1, 49))
    tokens = {line["step"]: line["tokens_seen"] for line in lines}
    assert 1.5 < (tokens[48] - tokens[44]) / (tokens[40] - tokens[36]) < 2.5


def test_overwrite_starts_over(trained, door):
    run, other = door.directory / "runs" / "config", ["--seed", "7", "--optimizer.schedule-steps", "40"]
    shutil.copytree(trained.directory / "runs" / "config", run)
    failed = door.run("train.py", "--config", "config.py", *other, exit_code=2)
    assert "--overwrite" in failed.stderr
    door.run("train.py", "--config", "config.py", *other, "--training.steps", "5", "--overwrite")
    assert json.loads((run / "config.json").read_text())["seed"] == 7
    assert [line["step"] for line in metrics(run, "train")] == [1, 2, 3, 4, 5]
    old = {path.relative_to(run / "overwritten" / "1"): content
           for path, content in contents(run / "overwritten" / "1").items()}  # fmt: skip
    reference = trained.directory / "runs" / "config"
    assert old == {path.relative_to(reference): content for path, content in contents(reference).items()}


BAD_SAMPLE = {
    "not a run": (["--checkpoint", "nowhere", "--prompt", "x"], "nowhere"),
    "no such step": (["--checkpoint", "runs/config", "--step", "7", "--prompt", "x"], "no checkpoint '7'"),
    "long prompt": (["--checkpoint", "runs/config", "--prompt", "cat " * 300], "context_length 128"),
    "bad top-p": (["--checkpoint", "runs/config", "--prompt", "x", "--top-p", "2"], "top_p is 2"),
}


@pytest.mark.parametrize("case", BAD_SAMPLE)
def test_bad_input_to_sample_is_one_sentence_and_exit_2(trained, case):
    arguments, sentence = BAD_SAMPLE[case]
    failed = trained.run("sample.py", *arguments, exit_code=2)
    assert re.search(sentence, failed.stderr), failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_corrupt_shard_is_refused_by_name(trained, door):
    (door.directory / "data").unlink()
    shutil.copytree(trained.directory / "data", door.directory / "data", symlinks=True)
    shard = next(path for path in (door.directory / "data").rglob("*.bin") if "train" in str(path))
    shard.write_bytes(shard.read_bytes()[:-10])
    failed = door.run("train.py", "--config", "config.py", exit_code=2)
    assert shard.name in failed.stderr
    assert not (door.directory / "runs").exists()


def test_a_full_disk_fails_with_a_sentence_and_the_checkpoint_stands(trained, door):
    """A limit on the size of files stands in for a disk without room: the arrays of a checkpoint exceed it."""
    shutil.copytree(trained.directory / "runs", door.directory / "runs")
    checkpoints = door.directory / "runs" / "config" / "checkpoints"
    before = contents(checkpoints)
    longer = ("--training.steps", "44", "--optimizer.schedule-steps", "40", "--training.sample-tokens", "0")
    process = door.start("train.py", "--config", "config.py", *longer, most_kib=40)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    assert "the last checkpoint is step 40" in err
    assert {path: path.read_bytes() for path in before} == before


def test_a_misspelt_data_path_is_refused(door):
    failed = door.run("train.py", "--config", "config.py", "--data.path", "data/knwon", exit_code=2)
    assert "data/knwon holds no prepared data" in failed.stderr


def test_prepare_prints_tokens_per_second_and_refuses_to_replace(door):
    made = door.run("nextllm_jax.cli", "prepare", "--corpus", "corpus", "--tokenizer", "train", "--vocab-size", "300",
                    "--output", "prepared")  # fmt: skip
    assert re.search(r"tokens/s", made.stderr + made.stdout)
    index = (door.directory / "prepared" / "index.json").read_bytes()
    door.run(
        "nextllm_jax.cli", "prepare", "--corpus", "corpus", "--vocab-size", "310", "--output", "prepared", exit_code=2
    )
    assert (door.directory / "prepared" / "index.json").read_bytes() == index


def test_help_explains(trained):
    out = trained.run("train.py", "--config", "config.py", "--help").stdout
    assert "GLIBC_TUNABLES" in out
    listed = trained.run("nextllm_jax.cli", "--help").stdout
    assert "  prepare   Turn a corpus into tokenized shards." in listed
    versions = trained.run("nextllm_jax.cli", "--version").stdout.splitlines()
    assert versions[0].startswith("nextllm_jax ")
    assert f"jax {importlib.metadata.version('jax')}" in versions


def test_a_misspelt_command_gets_a_suggestion(trained):
    assert "did you mean prepare" in trained.run("nextllm_jax.cli", "prepar", exit_code=2).stderr


def test_tokenize_shows_ids_and_pieces(trained):
    out = trained.run("nextllm_jax.cli", "tokenize", "--tokenizer", "runs/config", "the cat", "--json").stdout
    assert "".join(json.loads(out)["pieces"]) == "the cat"


def test_evaluate_scores_the_data_as_training_did(trained):
    command = ("nextllm_jax.cli", "evaluate", "--checkpoint", "runs/config", "--data", "data/known", "--json")
    score = json.loads(trained.run(*command).stdout)
    logged = metrics(trained.directory / "runs" / "config", "validation")[-1]
    assert score.keys() == {"tokens", "nll", "perplexity", "bits_per_byte"}
    assert score["nll"] == pytest.approx(logged["loss"], rel=1e-6)
    for name in ("perplexity", "bits_per_byte"):
        assert score[name] == pytest.approx(logged[name], rel=1e-6)


def test_chat_converses_through_a_pipe(trained):
    pytest.importorskip("jinja2", reason="pip install '.[interop]'")
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    (trained.directory / "chat.jinja").write_text(template)
    chat = ("nextllm_jax.cli", "chat", "--checkpoint", "runs/config", "--chat-template", "chat.jinja")
    typed = "the cat\n\na dog\n/reset\n/restart\nthe cat\n" + "long " * 100 + "\n/exit\nnot read\n"
    talked = trained.run(*chat, "--temperature", "0", "--max-new-tokens", "12", "--json", typed=typed, exit_code=1)
    rows = [json.loads(line) for line in talked.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["the cat", "a dog", "the cat"]
    assert rows[0] == rows[2]
    assert "/restart is not a command; the commands are /reset and /exit" in talked.stderr
    assert "leaves no room for an answer in the model's context of 128" in talked.stderr
    assert "Traceback" not in talked.stderr
