"""Preparing is deterministic, restartable and all or nothing."""

import base64
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nextllm_jax.config import DataConfig
from nextllm_jax.data import parts
from nextllm_jax.data import prepare as prepare_module
from nextllm_jax.data.corpora import document_hash, read_documents, validation_limit
from nextllm_jax.data.prepare import ensure_prepared, prepare
from nextllm_jax.data.settings import default_data_path
from nextllm_jax.data.shards import SPLITS, Dataset
from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.bpe import train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    """Forty files of a few hundred words, one process, a vocabulary of 300."""
    rng = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        words = [f"wörd{value}" for value in rng.integers(0, 50, rng.integers(1, 300))]
        (tmp_path / "texts" / f"{number:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return DataConfig(
        corpus=str(tmp_path / "texts"), vocab_size=300, num_processes=1, validation_fraction=0.2, tokens_per_shard=3000
    )


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of about 5,000 characters, so that a small corpus has many."""
    monkeypatch.setattr(parts, "PART_CHARACTERS", 5000)


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_shards_hold_the_documents(config, tmp_path, small_parts, messages):
    output = tmp_path / "out"
    prepare(config, output)
    dataset = Dataset.open(output)
    tokenizer = dataset.tokenizer()
    documents = list(read_documents(config))
    limit = validation_limit(documents, config.validation_fraction)
    for name in SPLITS:
        expected = [d.text for d in documents if (document_hash(d) <= limit) == (name == "validation")]
        split = dataset.split(name)
        assert (split.num_documents, split.num_bytes) == (len(expected), sum(len(text.encode()) for text in expected))
        for number, text in enumerate(expected):
            start, stop = split.document_starts[number : number + 2]
            assert split.tokens(start, stop).tolist() == tokenizer.encode_document(text)
    training_texts = [d.text for d in documents if document_hash(d) > limit]
    assert tokenizer.hash == train_tokenizer(training_texts, 300).hash, "the tokenizer learns from training text alone"
    assert re.search(r"process 1: .* tokens/s", messages.text)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "texts"]


def test_any_number_of_processes_gives_the_same_bytes(config, tmp_path, small_parts):
    prepare(config, tmp_path / "one")
    prepare(dataclasses.replace(config, num_processes=2), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("damage", [lambda part: part[:2], lambda part: part[:300] + b"?" + part[301:]])
def test_a_failed_run_goes_on_from_its_parts(config, tmp_path, small_parts, monkeypatch, damage):
    prepare(config, tmp_path / "expected")
    real = prepare_module.tokenize_part
    done = []

    def stops_at_the_third(part, **settings):
        if len(done) == 2:
            raise RuntimeError("stopped")
        done.append(part.path.name)
        return real(part, **settings)

    monkeypatch.setattr(prepare_module, "tokenize_part", stops_at_the_third)
    with pytest.raises(RuntimeError, match="stopped"):
        prepare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first = list(done)
    # A part cut short by a power failure, or damaged, is made again.
    part = tmp_path / "out.partial" / "parts" / first[0]
    part.write_bytes(damage(part.read_bytes()))
    done[:] = ["the count starts behind the stop"] * 3
    prepare(config, tmp_path / "out")
    assert first[0] in done
    assert first[1] not in done
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_run_that_failed_at_the_very_end_is_finished(config, tmp_path, monkeypatch):
    prepare(config, tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", lambda *args: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            prepare(config, tmp_path / "out")
    prepare(config, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


KILLED_RUN = """
import sys, time
from pathlib import Path
from nextllm_jax.config import DataConfig
from nextllm_jax.data import parts, prepare as module

if __name__ == "__main__":
    assert "jax" not in sys.modules, "preparing must not import jax"
    parts.PART_CHARACTERS = 5000
    documents = module.read_documents
    def slowly(config, skipped):
        for number, document in enumerate(documents(config, skipped)):
            time.sleep(0.1 if number > 20 else 0)
            yield document
    module.read_documents = slowly
    config = DataConfig(corpus=sys.argv[1], vocab_size=300, num_processes=2, validation_fraction=0.2,
                        tokens_per_shard=3000)
    module.prepare(config, Path(sys.argv[2]))
"""


def test_a_killed_run_leaves_no_output_and_no_workers_and_goes_on(config, tmp_path, small_parts):
    prepare(config, tmp_path / "expected")
    script = tmp_path / "killed.py"
    script.write_text(KILLED_RUN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = tmp_path / "out"
    process = subprocess.Popen([sys.executable, str(script), config.corpus, str(output)], env=environment)
    parts = tmp_path / "out.partial" / "parts"
    deadline = time.monotonic() + 60
    while not list(parts.glob("*.npz")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(parts.glob("*.npz"))
    assert not output.exists()
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [worker for worker in workers if is_running(worker)]
    prepare(config, output)
    assert contents(output) == contents(tmp_path / "expected")


def children_of(process):
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process):
    return Path(f"/proc/{process}").exists()


def test_preparing_again_does_nothing_and_other_settings_are_refused(config, tmp_path, messages):
    output = tmp_path / "out"
    prepare(config, output)
    before = contents(output)
    stamp = (output / "index.json").stat().st_mtime_ns
    prepare(config, output)
    assert "already prepared" in messages.text
    assert (output / "index.json").stat().st_mtime_ns == stamp
    other = dataclasses.replace(config, vocab_size=290)
    with pytest.raises(InputError, match="other settings"):
        prepare(other, output)
    assert contents(output) == before
    prepare(other, output, overwrite=True)
    assert Dataset.open(output).vocab_size == 290
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "texts"]


def test_directories_with_other_files_are_left_alone(config, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    prepare(config, output)
    for directory, message in [(tmp_path / "mine", "not prepared data"), (tmp_path / "new.partial", "other files")]:
        directory.mkdir()
        (directory / "thesis.txt").write_text("precious")
        with pytest.raises(InputError, match=message):
            prepare(config, directory.with_name(directory.name.removesuffix(".partial")), overwrite=True)
        assert (directory / "thesis.txt").read_text() == "precious"


def test_parts_of_other_settings_are_not_used(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", lambda *args: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            prepare(config, tmp_path / "out")
    prepare(dataclasses.replace(config, vocab_size=290), tmp_path / "out")
    assert Dataset.open(tmp_path / "out").vocab_size == 290


def test_an_address_is_refused(config):
    with pytest.raises(InputError, match="az://bucket/data is neither a local path nor gs:"):
        prepare(config, default_data_path(dataclasses.replace(config, path="az://bucket/data")))


def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(config, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_split", full)
        with pytest.raises(InputError, match=r"disk of .* is full"):
            prepare(config, tmp_path / "out")
    assert list((tmp_path / "out.partial" / "parts").glob("*.npz"))
    prepare(config, tmp_path / "out")
    Dataset.open(tmp_path / "out")


def _dies(part, **settings):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_sentence(config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "tokenize_part", _dies)
    with pytest.raises(InputError, match=r"smaller data.num_processes"):
        prepare(dataclasses.replace(config, num_processes=2), tmp_path / "out")


def test_a_corpus_of_one_document_is_refused(config, tmp_path):
    (tmp_path / "one.txt").write_text("only one")
    with pytest.raises(InputError, match="one document"):
        prepare(dataclasses.replace(config, corpus=str(tmp_path / "one.txt")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_trained_on_a_bounded_sample(config, monkeypatch):
    monkeypatch.setattr(prepare_module, "TOKENIZER_SAMPLE_CHARACTERS", 1000)
    texts = list(prepare_module._sample_training_texts(read_documents(config), 0))
    assert sum(map(len, texts)) == 1000


def test_a_saved_tokenizer_is_used_and_large_vocabularies_take_four_bytes(config, tmp_path):
    ranks = {bytes([value]): value for value in range(256)} | {b"w": 119, b"zz": 70_000}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (tmp_path / "big.tiktoken").write_text("".join(lines))
    prepare(dataclasses.replace(config, tokenizer=str(tmp_path / "big.tiktoken")), tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.vocab_size == 70_003
    assert dataset.split("train").tokens(0, 1).tolist() == [70_001]
    assert dataset.split("train").tokens(0, 1).dtype == np.uint32


def test_the_settings_are_kept_beside_the_data(config, tmp_path):
    prepare(config, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["corpus"] == config.corpus
    assert settings["vocab_size"] == 300


def test_an_interrupted_run_starts_over_if_its_files_changed(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "publish", lambda *args: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            prepare(config, tmp_path / "out")
    (Path(config.corpus) / "00.txt").write_text("edited since")
    prepare(config, tmp_path / "out")
    prepare(config, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_missing_corpus_leaves_nothing(config, tmp_path):
    with pytest.raises(InputError, match="holds no text"):
        prepare(dataclasses.replace(config, corpus=str(tmp_path / "nowhere")), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_data_that_is_not_there_is_prepared_in_its_default_place_only(config, tmp_path, monkeypatch, messages):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"data.path typo holds no prepared data.*nextllm prepare --output typo"):
        ensure_prepared(dataclasses.replace(config, path="typo"))
    assert not list(tmp_path.glob("typo*"))
    path = ensure_prepared(config)
    assert path == default_data_path(config)
    Dataset.open(path)
    stamp = (path / "index.json").stat().st_mtime_ns
    messages.clear()
    assert ensure_prepared(config) == path
    assert (path / "index.json").stat().st_mtime_ns == stamp
    assert not messages.messages


def test_how_shards_are_cut_does_not_change_the_data_id(config, tmp_path):
    prepare(config, tmp_path / "a")
    prepare(dataclasses.replace(config, tokens_per_shard=1024), tmp_path / "b")
    a, b = Dataset.open(tmp_path / "a"), Dataset.open(tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.bin"))) > len(list((tmp_path / "a").glob("*.bin")))
    assert a.data_id == b.data_id


KILLED_AT_EVERY_CHANGE = """
import os, shutil, signal, sys
from pathlib import Path
from tqdm import tqdm
from nextllm_jax.config import DataConfig
from nextllm_jax.data import parts, prepare as module

parts.PART_CHARACTERS = 5000
tqdm.monitor_interval = 0  # its thread would not live on in the forks
corpus, directory = sys.argv[1], Path(sys.argv[2])
config = DataConfig(corpus=corpus, vocab_size=300, num_processes=1, validation_fraction=0.2, tokens_per_shard=3000)

def kill_before_change(number):
    left = number
    def counted(change):
        def before(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)
        return before
    for owner, name in [(Path, "rename"), (Path, "replace"), (Path, "write_bytes"), (Path, "write_text"),
                        (Path, "mkdir"), (shutil, "rmtree"), (parts.np, "savez")]:
        setattr(owner, name, counted(getattr(owner, name)))

replacing = len(sys.argv) > 3

def prepare_in_a_fork(output, killed_before=None):
    process = os.fork()  # always: the threads of the tokenizer trainer do not live on in a fork of a process with them
    if process == 0:
        if killed_before is not None:
            kill_before_change(killed_before)
        module.prepare(config, output, overwrite=replacing)
        os._exit(0)
    return os.waitpid(process, 0)[1]

for number in range(200):
    output = directory / f"{number}"
    if replacing:
        shutil.copytree(sys.argv[3], output)
    status = prepare_in_a_fork(output, killed_before=number)
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0
    print("killed" if killed else "finished", number, flush=True)
    assert not killed or prepare_in_a_fork(output) == 0
    if not killed:
        break
"""


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_before_any_change_of_a_file_it_goes_on_to_the_same_bytes(config, tmp_path, small_parts, replacing):
    prepare(config, tmp_path / "expected")
    older = []
    if replacing:
        prepare(dataclasses.replace(config, vocab_size=290), tmp_path / "older")
        older = [str(tmp_path / "older")]
    (tmp_path / "outputs").mkdir()
    script = tmp_path / "killed.py"
    script.write_text(KILLED_AT_EVERY_CHANGE)
    done = subprocess.run([sys.executable, script, config.corpus, tmp_path / "outputs", *older],
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    moments = [line.split() for line in done.stdout.splitlines() if line.startswith(("killed", "finished"))]
    assert moments[-1][0] == "finished"
    assert len(moments) > 20
    for _, number in moments:
        assert contents(tmp_path / "outputs" / number) == contents(tmp_path / "expected"), number
    assert sorted(entry.name for entry in (tmp_path / "outputs").iterdir()) == sorted(number for _, number in moments)
