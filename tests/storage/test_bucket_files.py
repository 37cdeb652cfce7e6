"""What data, imports and exports need from a bucket, of Google and of Amazon."""

import pytest

from nextllm_jax.errors import InputError
from nextllm_jax.storage import s3
from nextllm_jax.storage.interface import StorageError
from nextllm_jax.storage.open_storage import as_path, open_bucket


def test_files(any_bucket):
    bucket = open_bucket(any_bucket)
    assert (bucket.files(), bucket.read("a")) == ({}, b"")
    bucket.write("a", b"first")
    bucket.write("a", b"hello")
    bucket.write("b/c/d", b"deep")
    bucket.write("ab", b"")
    assert {name: found.size for name, found in bucket.files().items()} == {"a": 5, "ab": 0, "b/c/d": 4}
    assert list(bucket.files("b")) == ["c/d"]
    assert [bucket.read_range("a", *part) for part in ((0, 2), (3, 9), (9, 3))] == [b"he", b"lo", b""]
    with pytest.raises(FileNotFoundError):
        bucket.read_range("none", 0, 1)
    assert bucket.create("a", b"other") is None
    assert bucket.create("a", b"hello") == bucket.files()["a"]
    assert bucket.create("new", b"new") == bucket.files()["new"]
    for name in ("a", "b", "none", "ab"):
        bucket.delete(name)
    assert list(bucket.files()) == ["new"]


def test_uploads_and_downloads(any_bucket, tmp_path):
    bucket = open_bucket(any_bucket)
    file, copy = tmp_path / "file", tmp_path / "copy"
    file.write_bytes(bytes(range(256)) * 1000)
    bucket.upload("a/file", file)
    bucket.download("a/file", copy)
    assert copy.read_bytes() == file.read_bytes()
    found = bucket.files()["a/file"]
    assert bucket.matches(found, file)
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    assert not bucket.matches(found, file)
    with pytest.raises(FileNotFoundError):
        bucket.download("none", copy)


def test_a_download_that_breaks_off_again_and_again(s3_bucket, tmp_path, monkeypatch):
    from botocore.exceptions import ReadTimeoutError
    from botocore.response import StreamingBody

    bucket = open_bucket(s3_bucket)
    bucket.write("file", b"content")

    def cut(body, **_):
        body.close()
        raise ReadTimeoutError(endpoint_url="s3")

    monkeypatch.setattr(StreamingBody, "read", cut)
    with pytest.raises(StorageError, match=r"s3://bucket could not be reached .*timeout"):
        bucket.download("file", tmp_path / "copy")


def test_paths_can_be_read(any_bucket):
    path = as_path(any_bucket) / "some"
    (path / "file.txt").write_text("é")
    (path / "deep" / "other").write_bytes(b"12")
    assert sorted(each.name for each in path.iterdir()) == ["deep", "file.txt"]
    assert str(path / "file.txt") == f"{any_bucket}/some/file.txt"
    assert (path / "file.txt").read_text() == "é"
    assert [(path / name).exists() for name in ("file.txt", "deep", "fil")] == [True, True, False]
    assert [(path / name).is_dir() for name in ("file.txt", "deep", "fil")] == [False, True, False]
    with pytest.raises(FileNotFoundError):
        (path / "none").read_bytes()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "bucket s3://no-such-bucket does not exist"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "s3://no-such-bucket could not be reached .*AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "localhost:9000"}, "localhost:9000; AWS_ENDPOINT_URL must begin with http://"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no valid AWS credentials .*aws configure"),
        ({"AWS_PROFILE": "nobody"}, r"no valid AWS credentials \(.*nobody.*\)"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_named(s3_service, monkeypatch, environment, says):
    monkeypatch.setattr(s3, "_ATTEMPTS", 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3.client.cache_clear()
    try:
        with pytest.raises(StorageError, match=says) as error:
            open_bucket("s3://no-such-bucket/data").files()
    finally:
        s3.client.cache_clear()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "says"),
    [("s3:///d", "names no bucket"), ("s3://a b/d", "names no bucket"), ("az://b/d", "nor s3://BUCKET")],
)
def test_addresses_that_are_refused(s3_service, address, says):
    with pytest.raises(InputError, match=says):
        open_bucket(address)
