"""Where prepared data cannot be written, one sentence says where and what to do."""

import builtins
import errno
import io
import os
import shutil
from pathlib import Path

import pytest

from nextllm_jax.config import DataConfig
from nextllm_jax.data.data_directory import writing
from nextllm_jax.data.prepare import ensure_prepared, prepare
from nextllm_jax.data.shards import Dataset
from nextllm_jax.errors import InputError
from tests.conftest import write_corpus


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "corpus", documents=4)
    corpus = str(tmp_path / "corpus")
    return DataConfig(corpus=corpus, vocab_size=300, num_processes=1, validation_fraction=0.3)


OPEN = builtins.open
CHANGES = [
    *((os, name) for name in ("mkdir", "open", "rename", "replace")),
    *((io, "open"), (builtins, "open"), (shutil, "rmtree")),
]


def fail_at(patch, number):
    """Have the change of a file with this number fail, as in a directory that others own; whether it has."""
    left, failed = number, []

    def failing(change):
        def fails(path, *args, **settings):
            nonlocal left
            reads = change is OPEN and (args or [settings.get("mode", "r")])[0].startswith("r")
            if "out" in str(path) and "dir_fd" not in settings and not reads:
                left -= 1
                if left == -1:
                    failed.append(path)
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return change(path, *args, **settings)

        return fails

    for owner, name in CHANGES:
        patch.setattr(owner, name, failing(getattr(owner, name)))
    return failed


def test_every_change_that_is_not_permitted_is_one_sentence(config, tmp_path, monkeypatch):
    for number in range(100):
        output = tmp_path / f"out{number}"
        with monkeypatch.context() as patch:
            failed = fail_at(patch, number)
            try:
                prepare(config, output)
            except InputError as error:
                caught = str(error)
        if not failed:
            break
        assert caught.startswith(f"data directory {output} cannot be written ({tmp_path}"), failed
        assert "Permission denied); make " in caught
    assert number > 12
    Dataset.open(output)


def in_the_way(directory):
    (directory / "parent").write_text("a file")
    return "parent/out", "parent: Not a directory"


def partial_in_the_way(directory):
    (directory / "out.partial").write_text("a file")
    return "out", "out.partial: File exists"


def long_name(directory):
    return "n" * 250, ".: File name too long"


@pytest.mark.parametrize("obstacle", [in_the_way, partial_in_the_way, long_name])
def test_what_is_in_the_way_is_named(config, tmp_path, monkeypatch, obstacle):
    monkeypatch.chdir(tmp_path)
    output, place = obstacle(tmp_path)
    with pytest.raises(InputError) as caught:
        prepare(config, Path(output))
    assert str(caught.value).startswith(f"data directory {output} cannot be written ({place}); make ")
    assert str(caught.value).endswith(
        "prepare elsewhere: nextllm prepare --output DIR, then train with --data.path DIR"
    )


@pytest.mark.parametrize("name", [".", "/"])
def test_a_directory_that_cannot_be_replaced_is_refused(config, tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(InputError, match=f"{name} cannot be replaced by prepared data; name a new directory inside it"):
        prepare(config, Path(name))


def test_a_link_to_an_empty_directory_is_followed(config, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    prepare(config, tmp_path / "out")
    prepare(config, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    Dataset.open(tmp_path / "disk")


def test_training_where_no_data_can_be_written(config, tmp_path, monkeypatch):
    def mkdir(path, *args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(InputError, match=r"data directory data/.* cannot be written \(.: Read-only file system\)"):
        ensure_prepared(config)


def test_errors_that_are_not_about_the_output_pass(config, tmp_path):
    for error in (BrokenPipeError(errno.EPIPE, "Broken pipe"), PermissionError(errno.EACCES, "no", "tokenizer.json")):
        with pytest.raises(type(error)), writing(tmp_path / "out"):
            raise error
    for number in (errno.EIO, errno.EFBIG):  # as a write to an open file fails
        with pytest.raises(InputError, match="out cannot be written"), writing(tmp_path / "out"):
            raise OSError(number, os.strerror(number))
