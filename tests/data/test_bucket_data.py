"""Data in a bucket: prepared with the same bytes as on disk, read with the same batches, damage named."""

import concurrent.futures
import dataclasses
import hashlib
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from nextllm_jax.data import blocks, bucket_output, bucket_shards
from nextllm_jax.data import prepare as prepare_module
from nextllm_jax.data.loader import TrainLoader, validation_batches
from nextllm_jax.data.mixture import Source
from nextllm_jax.data.prepare import ensure_prepared, prepare
from nextllm_jax.data.shards import Dataset
from nextllm_jax.errors import InputError
from nextllm_jax.storage import s3
from nextllm_jax.storage.open_storage import open_bucket
from nextllm_jax.tokenizer.published import load_tokenizer
from tests.data.test_prepare import config, contents  # noqa: F401  # config is a fixture
from tests.faults.bucket_proxy import Fault

RANGES = "GET .*bin.*alt=media"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1024)


@pytest.fixture
def prepared(config, tmp_path, any_bucket):  # noqa: F811
    """The same data on disk, and in a bucket."""
    prepare(config, tmp_path / "out")
    prepare(config, any_bucket)
    return tmp_path / "out", any_bucket


def in_bucket(address):
    bucket = open_bucket(address)
    return {name: bucket.read(name) for name in bucket.files()}


def loader(dataset):
    settings = {"sequence_length": 64, "global_batch_size": 8, "seed": 3}
    return TrainLoader([Source(dataset)], sharding=SingleDeviceSharding(jax.devices()[0]), **settings)


def digest(dataset, steps=20):
    batches = loader(dataset).host_batches(0)
    sharding = SingleDeviceSharding(jax.devices()[0])
    held_out = validation_batches(dataset.split("validation"), sequence_length=64, batch_size=8, sharding=sharding)
    found = hashlib.sha256()
    for batch in [next(batches) for _ in range(steps)] + list(held_out):
        for array in batch:
            found.update(np.asarray(array).tobytes())
    batches.close()
    return found.hexdigest()


def test_it_is_the_data_on_disk(prepared, config, tmp_path, messages):  # noqa: F811
    disk, address = prepared
    assert in_bucket(address) == contents(disk)
    assert not list((tmp_path / "cache" / "nextllm_jax" / "uploads").iterdir())
    ours, theirs = Dataset.open(address, verify="full"), Dataset.open(disk)
    assert (ours.data_id, ours.tokenizer().hash) == (theirs.data_id, theirs.tokenizer().hash)
    assert digest(ours) == digest(theirs)
    assert load_tokenizer(address).hash == theirs.tokenizer_hash
    prepare(config, address)
    assert f"{address} is already prepared" in messages.messages
    used = dataclasses.replace(config, path=address, corpus="stdlib")
    assert str(ensure_prepared(used)) == address
    with pytest.raises(InputError, match=r"holds no prepared data .*nextllm prepare --output .*/none"):
        ensure_prepared(dataclasses.replace(config, path=f"{address}/none"))


def test_other_data_is_never_mixed_with_it(prepared, config):  # noqa: F811
    _, address = prepared
    before, other = in_bucket(address), dataclasses.replace(config, vocab_size=290, tokens_per_shard=2000)
    with pytest.raises(InputError, match=r"was prepared, at least in part, with other settings; .*--overwrite"):
        prepare(other, address)
    open_bucket(address).write("mine.txt", b"1")
    with pytest.raises(InputError, match=r"holds files other than prepared data \(mine.txt\)"):
        prepare(other, address, overwrite=True)
    open_bucket(address).delete("mine.txt")
    assert in_bucket(address) == before
    prepare(config, address, overwrite=True)
    assert in_bucket(address) == before
    prepare(other, address, overwrite=True)
    after = in_bucket(address)
    assert Dataset.open(address, verify="full").vocab_size == 290
    prepare(config, address, overwrite=True)
    assert in_bucket(address) == before
    assert before.keys() != after.keys()


def test_an_interrupted_upload_continues(config, tmp_path, bucket, bucket_service):  # noqa: F811
    prepare(config, tmp_path / "out")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.bin"))
    failing = Fault(f"POST .*{shards[-1]}", 403, count=1000)
    with bucket_service.failing(failing), pytest.raises(InputError, match="no permission for gs://bucket"):
        prepare(config, bucket)
    assert open_bucket(bucket).read("index.json") == b""
    with pytest.raises(InputError, match="holds no prepared data"):
        Dataset.open(bucket)
    with pytest.raises(InputError, match="at least in part, with other settings"):
        prepare(dataclasses.replace(config, vocab_size=290), bucket)
    bucket_service.requests.clear()
    prepare(config, bucket)
    uploads = [each for each in bucket_service.requests if each.startswith("POST")]
    assert [name for name in shards if any(each.endswith(name) for each in uploads)] == [shards[-1]]
    assert in_bucket(bucket) == contents(tmp_path / "out")


def test_files_without_a_checksum_are_published(config, s3_bucket, monkeypatch):  # noqa: F811
    """The entity tag of what was uploaded in parts, or is encrypted with a key, is no checksum."""
    monkeypatch.setattr(s3, "_SINGLE_PUT_BYTES", 1000)
    prepare(config, s3_bucket)
    assert Dataset.open(s3_bucket, verify="full").data_id


def once_uploaded(monkeypatch, meddle):
    """Call `meddle` with the files in the bucket whenever `prepare` checks what it has uploaded."""
    missing = bucket_output._missing

    def meddled(files, source, names, *rest):
        if files.files().keys() >= {*names}:
            meddle(files)
        return missing(files, source, names, *rest)

    monkeypatch.setattr(bucket_output, "_missing", meddled)


def test_another_process_that_writes_other_data_meanwhile(config, bucket, monkeypatch):  # noqa: F811
    once_uploaded(monkeypatch, lambda files: files.write("train-00000.bin", b"other"))
    with pytest.raises(InputError, match="another process prepares other data in gs://bucket"):
        prepare(config, bucket)
    assert open_bucket(bucket).read("index.json") == b""


def test_two_processes_that_overwrite_it_leave_the_data_of_one(config, tmp_path, bucket, monkeypatch):  # noqa: F811
    prepare(config, tmp_path / "out")
    once_uploaded(monkeypatch, lambda files: files.create("index.json", b"of other files, which are replaced"))
    prepare(config, bucket, overwrite=True)
    assert in_bucket(bucket) == contents(tmp_path / "out")


def test_one_of_two_processes_prepares_it(config, tmp_path, bucket, bucket_service):  # noqa: F811
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with bucket_service.failing(Fault("POST .*documents.npy", "wait", seconds=2, count=1)):
            first = pool.submit(prepare, config, bucket)
            while not open_bucket(bucket).files():
                time.sleep(0.01)
            with pytest.raises(InputError, match=f"another process is preparing {bucket}; wait for it"):
                prepare(config, bucket)
        first.result()
    prepare(config, tmp_path / "out")
    assert in_bucket(bucket) == contents(tmp_path / "out")


def test_a_process_that_is_killed_while_it_deletes_its_copy(config, bucket, monkeypatch):  # noqa: F811
    delete = shutil.rmtree

    def killed(path):
        if not (path / "index.json").exists():
            return delete(path)
        (path / "train-00000.bin").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, bucket)
    monkeypatch.undo()
    open_bucket(bucket).delete("")
    prepare(config, bucket)
    assert Dataset.open(bucket, verify="full").data_id


def test_files_that_others_write_meanwhile_are_kept(config, any_bucket, monkeypatch):  # noqa: F811
    checked = prepare_module.check_bucket

    def meddled(*arguments):
        checked(*arguments)
        open_bucket(any_bucket).write("run/config.json", b"{}")
        open_bucket(any_bucket).write("train-00099.bin", b"of older data")

    monkeypatch.setattr(prepare_module, "check_bucket", meddled)
    prepare(config, any_bucket)
    assert open_bucket(any_bucket).read("run/config.json") == b"{}"
    assert "train-00099.bin" not in open_bucket(any_bucket).files()


def test_damage_is_named(prepared):
    disk, address = prepared
    bucket, name = open_bucket(address), "train-00001.bin"
    content = bytearray(bucket.read(name))
    content[1500] ^= 1
    bucket.write(name, bytes(content))
    dataset = Dataset.open(address)
    says = f"^{address}/{name} is damaged or .*: the sha256 of bytes 1,024 to 2,048 differs from .*--overwrite"
    split, start = dataset.split("train"), len((disk / "train-00000.bin").read_bytes()) // 2
    split.tokens(start, start + 512)
    for _ in range(2):
        with pytest.raises(InputError, match=says):
            split.tokens(start + 500, start + 600)
    with pytest.raises(InputError, match=says):
        digest(dataset)
    with pytest.raises(InputError, match=says):
        Dataset.open(address, verify="full")
    bucket.write(name, bytes(content[:-1]))
    with pytest.raises(InputError, match=f"{name} is damaged: .* bytes instead of"):
        Dataset.open(address)
    bucket.delete(name)
    with pytest.raises(InputError, match=f"{name} is missing"):
        Dataset.open(address)
    with pytest.raises(InputError, match=f"{address}/{name} is missing"):
        split.tokens(start + 500, start + 600)


def test_what_is_damaged_on_its_way_is_read_again(config, tmp_path, bucket, bucket_service):  # noqa: F811
    prepare(config, bucket)
    expected = digest(Dataset.open(bucket))
    for fault in (Fault(RANGES, "flip"), Fault(RANGES, "cut"), Fault(RANGES, 503, count=3)):
        with bucket_service.failing(fault):
            assert digest(Dataset.open(bucket)) == expected
        assert fault.struck > fault.count


def test_the_cache_on_disk(config, tmp_path, bucket, bucket_service):  # noqa: F811
    """It is bounded, is used by the next process, and what is damaged in it is not used."""
    prepare(config, bucket)
    expected, directory = digest(Dataset.open(bucket)), tmp_path / "blocks of data"
    file = directory / "blocks"

    def requests(num_blocks):
        bucket_service.requests.clear()
        others = set(threading.enumerate())
        assert digest(Dataset.open(bucket, cache_dir=str(directory), cache_bytes=num_blocks * 1024)) == expected
        for thread in set(threading.enumerate()) - others:
            if thread.name == "data":  # it may still write a block
                thread.join(10)
        assert file.stat().st_size <= num_blocks * 1024
        return sum("alt=media" in each for each in bucket_service.requests) - 1  # without index.json

    first = requests(1000)
    assert first > 20
    assert requests(1000) == 0
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert 0 < requests(1000) < first
    assert requests(1000) == 0
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert requests(1000) in (1, 2)  # it may be read again before it is in the cache
    assert requests(5) >= first - 5
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=r"data.cache_dir .*blocks of data cannot be written"):
        requests(1000)


def test_several_share_the_cache(config, tmp_path, bucket):  # noqa: F811
    prepare(config, bucket)
    expected, caches = digest(Dataset.open(bucket)), [5, 11, 11, 1000]
    datasets = [Dataset.open(bucket, cache_dir=str(tmp_path / "c"), cache_bytes=blocks * 1024) for blocks in caches]
    with concurrent.futures.ThreadPoolExecutor(len(datasets)) as pool:
        assert list(pool.map(digest, datasets)) == [expected] * len(datasets)


def test_a_full_disk_only_ends_caching(config, tmp_path, bucket, monkeypatch, messages):  # noqa: F811
    prepare(config, bucket)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bucket_shards.os, "pwrite", full)
    assert digest(Dataset.open(bucket, cache_dir=str(tmp_path / "c"))) == digest(Dataset.open(bucket))
    assert sum("data is not cached" in each for each in messages.messages) == 1


def test_the_cache_in_memory_is_bounded(config, bucket, bucket_service):  # noqa: F811
    prepare(config, bucket)
    dataset = Dataset.open(bucket, cache_bytes=5 * 1024)
    expected = digest(dataset)
    files = dataset.split("train")._shards[0]._shards
    assert len(files._kept) == 5
    deadline = time.monotonic() + 10
    while len(files._read) > 5 and time.monotonic() < deadline:  # threads let go of what they have read
        time.sleep(0.01)
    assert len(files._read) == 5
    bucket_service.requests.clear()
    whole = Dataset.open(bucket)
    assert digest(whole) == digest(whole) == expected
    asked = len(bucket_service.requests)
    assert digest(whole) == expected
    assert len(bucket_service.requests) == asked


def test_windows_are_read_at_once_and_ahead(config, bucket, bucket_service, monkeypatch):  # noqa: F811
    """If each request takes 0.4 s, so does a batch of 8 windows, and by then the next ones have been asked for."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 128)
    prepare(config, bucket)
    dataset = Dataset.open(bucket, cache_bytes=0)
    assert dataset.split("train").document_starts.size
    bucket_service.requests.clear()
    started = time.monotonic()
    with bucket_service.failing(Fault(RANGES, "wait", count=10**6, seconds=0.4)):
        batches = loader(dataset).host_batches(0)
        next(batches)
        assert time.monotonic() - started < 1.6
        assert sum("alt=media" in each for each in bucket_service.requests) > 40
    batches.close()
