"""Both storages do the same, and a bucket that fails is retried or named in one line."""

import subprocess
import sys

import pytest

from nextllm_jax.cli.samples_file import SamplesFile
from nextllm_jax.errors import InputError
from nextllm_jax.storage import service
from nextllm_jax.storage.interface import StorageError
from nextllm_jax.storage.open_storage import as_path, open_storage
from tests.faults.bucket_proxy import Fault


@pytest.fixture(params=["disk", "bucket"])
def where(request, tmp_path):
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("bucket")


def test_files(where):
    storage = open_storage(where)
    assert (storage.names(), storage.read("a"), storage.exists("a"), storage.identity("a")) == ([], b"", False, None)
    storage.write("a", b"first")
    storage.write("a", b"hello")
    storage.write("b/c/d", b"deep")
    storage.write("ab", b"")
    assert [storage.read(name) for name in ("a", "b/c/d", "ab")] == [b"hello", b"deep", b""]
    assert sorted(storage.names()) == ["a", "ab", "b"]
    assert storage.names("b") == ["c"]
    assert storage.names("c") == []
    assert {name: found.size for name, found in storage.files().items()} == {"a": 5, "ab": 0, "b/c/d": 4}
    assert list(storage.files("b")) == ["c/d"]
    assert [storage.exists(name) for name in ("a", "b", "b/c/d", "c", "b/c/")] == [True, True, True, False, True]
    assert [storage.read_range("a", *part) for part in ((0, 2), (3, 9), (9, 3))] == [b"he", b"lo", b""]
    with pytest.raises(FileNotFoundError):
        storage.read_range("none", 0, 1)
    storage.move("b", "e/f")
    storage.move("a", "e/a")
    assert list(storage.files()) == ["ab", "e/a", "e/f/c/d"]
    storage.delete("e/f")
    storage.delete("e/a")
    storage.delete("none")
    assert list(storage.files()) == ["ab"]
    storage.make_directory("empty")
    storage.make_directory("empty")
    assert storage.exists("empty")
    assert storage.names("empty") == []
    assert list(storage.files()) == ["ab"]
    storage.write("empty/file", b"")
    storage.move("empty", "moved")
    assert list(storage.files()) == ["ab", "moved/file"]
    with storage.local_directory("traced") as directory:
        (as_path(directory) / "inner").mkdir(parents=True)
        (as_path(directory) / "inner" / "file").write_text("trace")
    assert storage.read("traced/inner/file") == b"trace"


def test_conditional_writes(where):
    storage = open_storage(where)
    created = storage.create("a", b"one")
    assert created
    assert created == storage.identity("a")
    assert storage.create("a", b"two") is None
    replaced = storage.replace("a", b"three", created)
    assert replaced
    assert storage.replace("a", b"four", created) is None
    assert storage.read("a") == b"three"


def test_appending(where):
    storage = open_storage(where)
    with storage.lock(".lock"):
        storage.write("a", b"0")
        for number in range(1, 4):
            storage.append("a", str(number).encode())
        assert storage.read("a") == b"0123"
        storage.sync()
        assert open_storage(where).read("a") == b"0123"
        storage.append("a", b"4")
        storage.append("b", b"new")
    assert open_storage(where).read("a") == b"01234"
    assert open_storage(where).read("b") == b"new"


def test_paths_of_a_bucket(bucket):
    path = as_path(bucket) / "some"
    (path / "file.txt").write_text("é")
    (path / "deep" / "other").write_bytes(b"12")
    assert sorted(each.name for each in path.iterdir()) == ["deep", "file.txt"]
    assert str(path / "file.txt") == f"{bucket}/some/file.txt"
    assert path.absolute() == path
    assert (path / "file.txt").read_text() == "é"
    assert (path / "file.txt").stat().length == 2
    assert path.is_dir()
    assert path.exists()
    assert not (path / "file.txt").is_dir()
    assert not (path / "fil").exists()
    assert [each.name for each in path.glob("*.txt")] == ["file.txt"]
    (path / "file.txt").rename(path / "moved")
    (path / "deep").rmtree()
    assert [each.name for each in path.iterdir()] == ["moved"]
    for missing in (path / "file.txt").read_bytes, (path / "file.txt").unlink, (path / "file.txt").stat:
        with pytest.raises(FileNotFoundError):
            missing()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET .*alt=media", "flip"),
        Fault("GET .*alt=media", "cut"),
        Fault("GET", 429, count=2),
        Fault("GET", 503),
        Fault("POST", "cut"),
        Fault("POST", 503),
        Fault("POST", 503, after=True),
        Fault("DELETE", 503, after=True),
    ],
    ids=lambda fault: f"{fault.pattern[:4].strip()} {fault.action}{' after' * fault.after}",
)
def test_failing_requests_are_retried(bucket, bucket_service, fault):
    storage = open_storage(bucket)
    with bucket_service.failing(fault):
        created = storage.create("a", b"content")
        assert created
        assert storage.read("a") == b"content"
        storage.delete("a")
        assert storage.identity("a") is None
    assert fault.struck > fault.count


@pytest.mark.parametrize(
    ("status", "says", "exit_code"),
    [
        (401, "no valid Google Cloud credentials", 2),
        (403, "no permission for gs://bucket .*roles/storage.objectAdmin", 2),
        (404, "bucket gs://bucket does not exist", 2),
        (503, r"gs://bucket failed for 1 s \(HTTP 503\)", 1),
        ("cut", "gs://bucket could not be reached for 1 s", 1),
    ],
)
def test_a_bucket_that_cannot_be_used_is_named(bucket, bucket_service, monkeypatch, status, says, exit_code):
    monkeypatch.setattr(service, "LIMIT_SECONDS", 1.0)
    storage = open_storage(bucket)
    with bucket_service.failing(Fault(".", status, count=1000)):
        for operation in (storage.names, lambda: storage.write("a", b"1")):
            with pytest.raises(StorageError, match=says) as error:
                operation()
            assert "\n" not in str(error.value)
            assert error.value.exit_code == exit_code


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("gs://no-such-bucket/run", "bucket gs://no-such-bucket does not exist"),
        ("gs:///run", "names no bucket"),
        ("gs://<bucket>/run", "names no bucket"),
        ("gs:/bucket/run", "is neither a local path nor gs://BUCKET/DIRECTORY"),
        ("gs://bucket/run#1", "gs://bucket/run#1 cannot be a run: orbax takes '#' for a part of a URL"),
        ("gs://bucket/runs//a", "has an empty part"),  # else its lease would not protect gs://bucket/runs/a
        ("gs://bucket/runs/../a", "has an empty part, '.' or '..'"),
        ("az://bucket/run", "is neither a local path nor gs://BUCKET/DIRECTORY"),
        ("s3://bucket/run", "s3://bucket/run cannot be a run: orbax writes no checkpoints to S3"),
    ],
)
def test_addresses_that_are_refused(bucket_service, path, says):
    with pytest.raises(InputError, match=says):
        open_storage(path).read("config.json")


def test_outputs_on_disk_are_not_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^--output gs:/+b.* is not a local path"):
        SamplesFile("gs://b/x", {}, {"num_samples": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("opening", "package", "extra"),
    [("open_storage('gs://bucket/run')", "google.cloud", "gcs"), ("open_bucket('s3://bucket/data')", "boto3", "s3")],
)
def test_a_client_is_imported_only_for_addresses(opening, package, extra):
    program = f"""
import sys
from nextllm_jax.errors import InputError
from nextllm_jax.storage.open_storage import as_path, open_bucket, open_storage
open_storage("runs/tiny").names(), as_path("runs/tiny").exists()
assert not {{"google.cloud.storage", "requests", "boto3"}} & set(sys.modules)
sys.modules["{package}"] = None  # as if it was not installed
try:
    {opening}
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    scheme = opening.split("'")[1].partition("bucket")[0]
    assert done.stdout == (
        f"{scheme} paths need the package {package}; install the extra with pip install 'nextllm_jax[{extra}]'\n"
    )
