"""Batch sampling: what `nextllm sample --prompts-file` writes, how it continues, and what it refuses."""

import io
import json
import logging
import shutil
import signal
import time
from types import SimpleNamespace

import pytest

import nextllm_jax
from nextllm_jax.cli import sample
from nextllm_jax.cli.samples_file import SamplesFile
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.storage.disk import Disk, lock_file

PROMPTS = ["the cat", "", "a dog likes two über balls and", "my café", "Zoë", "the cat sees fish. a dog"]
GREEDY, WARM = ["--temperature", "0"], ["--temperature", "1", "--num-samples", "2", "--seed", "4"]
COMMAND = ["--checkpoint", "runs/config", "--prompts-file", "in.jsonl", "--output", "out.jsonl",
           "--max-new-tokens", "12", "--batch-size", "4"]  # fmt: skip


@pytest.fixture
def directory(trained, tmp_path, monkeypatch):
    """A current directory with the trained run and in.jsonl; nothing is written into the user's cache."""
    (tmp_path / "runs").symlink_to(trained.directory / "runs")
    lines = [json.dumps({"prompt": prompt, "id": 7}, ensure_ascii=False) for prompt in PROMPTS]
    (tmp_path / "in.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(directory):
    return [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]


def interrupt_after(monkeypatch, count):
    """Ctrl-C before sample `count` + 1 is written."""
    append = SamplesFile.append

    def appending(file, row, line):
        if len(file.done) == count:
            raise KeyboardInterrupt
        append(file, row, line)

    monkeypatch.setattr(SamplesFile, "append", appending)


@pytest.mark.parametrize("settings", [GREEDY, WARM], ids=["greedy", "warm"])
def test_an_interrupted_file_is_continued_to_the_same_samples(directory, settings, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "nextllm_jax")
    assert sample.sample_command([*COMMAND, *settings]) == 0
    whole, samples = (directory / "out.jsonl").read_bytes(), rows(directory)
    options = {"temperature": float(settings[1]), "max_new_tokens": 12}
    options |= {"num_samples": 2, "seed": 4} if settings is WARM else {}
    together = nextllm_jax.load("runs/config").generate(PROMPTS, **options)
    assert [(row["prompt"], row["text"], row["finish_reason"]) for row in samples] == [
        (each.prompt, each.text, each.finish_reason) for each in together
    ]
    expected = [(2 * line, number) for line in range(len(PROMPTS)) for number in range(options.get("num_samples", 1))]
    assert [(row["index"], row.get("sample", 0)) for row in samples] == expected
    assert ("sample" in samples[0]) == (settings is WARM)

    (directory / "out.jsonl").unlink()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            sample.sample_command([*COMMAND, *settings])
    total = len(samples)
    assert f"out.jsonl has 5 of {total} samples; the same command continues" in caplog.text
    with open(directory / "out.jsonl", "ab") as file:
        file.write(whole[:40])  # a write that was killed
    assert sample.sample_command([*COMMAND, *settings]) == 0
    assert f"continuing out.jsonl, which has 5 of {total} samples" in caplog.text
    assert (directory / "out.jsonl").read_bytes() == whole

    monkeypatch.setattr(sample, "load_model", None)  # a complete file needs no model
    assert sample.sample_command([*COMMAND, *settings]) == 0
    assert (directory / "out.jsonl").read_bytes() == whole


def test_prompts_come_from_standard_input(directory, monkeypatch, capsys):
    content = (directory / "in.jsonl").read_bytes()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    command = [*COMMAND[:3], "-", *COMMAND[4:], "--max-new-tokens", "1"]
    assert sample.sample_command(command) == 0
    assert [row["prompt"] for row in rows(directory)] == PROMPTS
    for given in (["--prompt", "-"], []):
        stdin = SimpleNamespace(buffer=io.BytesIO(b"a dog\n\n"), isatty=lambda: False)
        monkeypatch.setattr("sys.stdin", stdin)
        sample.sample_command(["--checkpoint", "runs/config", "--max-new-tokens", "1", "--json", *given])
        assert json.loads(capsys.readouterr().out.splitlines()[0])["prompt"] == "a dog\n"


BAD_LINES = {
    "no JSON": ('{"prompt": "a"}\n\n{"prompt": ', r"in\.jsonl line 3 is not JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', r"in\.jsonl line 1 is not JSON"),
    "no prompt": ('{"text": "a"}', r'in\.jsonl line 1 has no text "prompt"'),
    "a number": ('{"prompt": 3}', r'in\.jsonl line 1 has no text "prompt"'),
    "no object": ('["a"]', r'in\.jsonl line 1 has no text "prompt"'),
    "empty": ("\n", r"in\.jsonl holds no prompt"),
    "long": (json.dumps({"prompt": "cat " * 300}), "line 1 of the prompts file has .* context_length 128"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(directory, case, monkeypatch):
    content, message = BAD_LINES[case]
    (directory / "in.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    if case != "long":
        monkeypatch.setattr(sample, "load_model", None)  # which comes later
    with pytest.raises(InputError, match=message):
        sample.sample_command(COMMAND)


BAD_OPTIONS = {
    "no output": (COMMAND[:4], "--prompts-file and --output go together"),
    "no prompts": ([*COMMAND[:2], *COMMAND[4:]], "--prompts-file and --output go together"),
    "no such file": ([*COMMAND, "--prompts-file", "nowhere"], "nowhere cannot be read"),
    "no directory": ([*COMMAND, "--output", "no/where"], "no/where cannot be written"),
    "a directory": ([*COMMAND, "--output", "runs"], "runs is not a regular file"),
    "a prompt": ([*COMMAND, "--prompt", "x"], "--prompt does not go with --prompts-file"),
    "chat": ([*COMMAND, "--chat"], "--chat does not go with --prompts-file"),
    "log probabilities": ([*COMMAND, "--top-logprobs", "0"], "--top-logprobs does not go with --prompts-file"),
    "log probabilities, in a chat": (["--checkpoint", "x", "--chat", "--top-logprobs", "0"], "is not for a chat"),
    "no step": ([*COMMAND, "--step", "7"], "no checkpoint '7'"),
    "batch": ([*COMMAND, "--batch-size", "0"], "batch_size is 0"),
    "tokens": ([*COMMAND, "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "stop": ([*COMMAND, "--stop", ""], "stop string is empty"),
    "stop, in a chat": (["--checkpoint", "nowhere", "--chat", "--stop", ""], "stop string is empty"),
    "seed": ([*COMMAND, "--seed", "4294967296"], "seed is 4294967296; it must be between"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_refused(directory, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(InputError, match=message):
        sample.sample_command(options)


def test_samples_of_other_settings_prompts_or_weights_are_not_mixed(directory, monkeypatch):
    sample.sample_command([*COMMAND, "--max-new-tokens", "1"])
    written = (directory / "out.jsonl").read_bytes()
    monkeypatch.setattr(sample, "load_model", None)

    def refused(message, *options):
        with pytest.raises(InputError, match=message):
            sample.sample_command([*COMMAND, "--max-new-tokens", "1", *options])
        assert (directory / "out.jsonl").read_bytes() == written

    settings = json.loads((directory / "out.jsonl.settings.json").read_text())
    earlier = {name: settings[name] for name in settings if name not in ("min_new_tokens", "logit_bias")}
    (directory / "out.jsonl.settings.json").write_text(json.dumps(earlier))
    assert sample.sample_command([*COMMAND, "--max-new-tokens", "1"]) == 0
    refused("was sampled with --seed 0, not 1; use the old options", "--seed", "1")
    biases = ("--logit-bias", "5:1", "--logit-bias", "6:-inf")
    refused(r'was sampled with --logit-bias \[\], not \["5:1", "6:-inf"\]', *biases)
    refused(r'was sampled with --stop \[\], not \["x"\]', "--stop", "x")
    refused("was sampled from another checkpoint", "--step", "30")
    with open("out.jsonl") as file:
        lock_file(file.fileno())
        refused("out.jsonl is in use by another process")
    (directory / "in.jsonl").write_text('{"prompt": "other"}')
    refused("out.jsonl line 1 has another prompt than line 1 of the prompts file")
    (directory / "out.jsonl").write_bytes(written := b"[]\n")
    refused("out.jsonl line 1 is not a sample")
    (directory / "out.jsonl.settings.json").unlink()
    refused("out.jsonl was not written by nextllm sample")


def test_a_full_disk_is_one_sentence_and_the_file_stays_whole(directory, monkeypatch):
    append = Disk.append

    def appending(disk, name, content):
        if disk.read(name).count(b"\n") == 2:
            raise OSError(28, "No space left on device")
        append(disk, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "append", appending)
        with pytest.raises(RunFailed, match=r"out\.jsonl cannot be written \(No space"):
            sample.sample_command([*COMMAND, *GREEDY])
    assert len(rows(directory)) == 2
    sample.sample_command([*COMMAND, *GREEDY])
    assert [row["prompt"] for row in rows(directory)] == PROMPTS


def test_a_line_break_as_stop_is_not_a_backslash(directory, caplog):
    sample.sample_command(["--checkpoint", "runs/config", "--prompt", "x", "--stop", "\\n", "--max-new-tokens", "1"])
    assert r"for that, write --stop $'\n'" in caplog.text


def test_ctrl_c_keeps_what_is_written(trained, door):
    shutil.copytree(trained.directory / "runs", door.directory / "runs")
    (door.directory / "in.jsonl").write_text('{"prompt": "the cat"}\n' * 400)
    command = ("sample.py", *COMMAND[:-4], "--max-new-tokens", "100", "--batch-size", "2", "--stop", "q")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    process = door.start(*command)
    signal.signal(signal.SIGINT, previous)
    output = door.directory / "out.jsonl"
    while process.poll() is None and not (output.exists() and output.read_bytes()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "of 400 samples; the same command continues\nerror: interrupted\n" in errors
    assert "Traceback" not in errors
    before = rows(door.directory)
    assert 0 < len(before) < 400
    door.run(*command)
    assert [row["index"] for row in rows(door.directory)] == list(range(400))
    assert rows(door.directory)[: len(before)] == before
