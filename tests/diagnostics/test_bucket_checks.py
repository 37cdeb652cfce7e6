"""What doctor finds about a bucket, each against a service that has that fault."""

import dataclasses
import http.server
import re
import threading

import pytest

from nextllm_jax.config.files import load_config_file
from nextllm_jax.diagnostics import bucket as checks
from nextllm_jax.diagnostics.doctor import diagnose
from nextllm_jax.errors import InputError
from nextllm_jax.storage import service as service_module
from nextllm_jax.storage.open_storage import open_bucket, open_storage
from tests.faults.bucket_proxy import Fault

SOUND = [
    "gs://bucket exists, and files can be listed",
    "files can be written",
    "files can be read",
    "writes can depend on conditions",
    "files can be deleted",
    "gs://bucket is in US-CENTRAL1; the zone of this machine is unknown",
    "deleted files are not kept: versioning and soft delete are off",
]


@pytest.fixture
def service(bucket_service):
    yield bucket_service
    bucket_service.settings, bucket_service.ignores_conditions = {}, False


def test_a_sound_bucket(service, bucket):
    for address in (bucket, "gs://bucket", "gs://bucket/"):
        assert list(checks.check_run(address)) == [(message, "ok") for message in SOUND]
    assert open_storage(bucket).names() == []
    assert not any(".doctor-" in name for name in open_storage("gs://bucket").names())


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (Fault(r"GET [^&]*/o\?", 403, count=9), "files cannot be listed: no permission for gs://bucket"),
        (Fault("POST", 403, count=9), "files cannot be written: no permission for gs://bucket"),
        (Fault("GET .*alt=media", 403, count=9), "files cannot be read: no permission"),
        (Fault("GET .*alt=media", "flip", count=9), "files cannot be read: "),
        (Fault("DELETE", 403, count=9), "files cannot be deleted: no permission for gs://bucket"),
    ],
)
def test_a_missing_right_is_named(service, bucket, monkeypatch, fault, problem):
    monkeypatch.setattr(service_module, "FIRST_LIMIT_SECONDS", 1.0)
    monkeypatch.setattr(service_module, "LIMIT_SECONDS", 1.0)
    with service.failing(fault):
        found = [message for message, status in checks.check_run(bucket) if status == "PROBLEM"]
    assert found[0].startswith(problem), found


def test_a_bucket_that_does_not_exist(service):
    (found,) = checks.check_run("gs://nowhere/run")
    assert found[1] == "PROBLEM"
    assert "bucket gs://nowhere does not exist" in found[0]


def test_a_service_that_ignores_conditions(service, bucket):
    service.ignores_conditions = True
    (found,) = [message for message, status in checks.check_run(bucket) if status == "PROBLEM"]
    assert found.startswith("writes cannot depend on conditions: the service ignores conditions")


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"versioning": {"enabled": True}}, "object versioning keeps deleted .* gs://bucket --no-versioning"),
        (
            {"softDeletePolicy": {"retentionDurationSeconds": "604800"}},
            "soft delete keeps deleted checkpoints for 7 days, .*--clear-soft-delete",
        ),
    ],
)
def test_settings_that_multiply_the_bill(service, bucket, settings, warning):
    service.settings = settings
    (found,) = [message for message, status in checks.check_run(bucket) if status == "warning"]
    assert re.match(warning, found), found
    assert SOUND[-1] not in str(list(checks.check_run(bucket)))


def test_settings_that_may_not_be_read(service, bucket):
    with service.failing(Fault(r"GET /storage/v1/b/bucket\?", 403, count=9)):
        assert list(checks.check_run(bucket))[-1] == (
            "its location and settings are unknown, since storage.buckets.get is not permitted",
            "ok",
        )


class _Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert (self.path, self.headers["Metadata-Flavor"]) == ("/computeMetadata/v1/instance/zone", "Google")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"projects/7/zones/us-west4-a")

    def log_message(self, *_):
        """Nothing is printed."""


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server that says us-west4-a."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metadata)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("settings", "says", "status"),
    [
        ({"location": "US-WEST4"}, "gs://bucket is in US-WEST4, near this machine in us-west4-a", "ok"),
        ({"location": "US"}, "gs://bucket is in US, which includes this machine in us-west4-a", "ok"),
        (
            {"location": "US", "customPlacementConfig": {"dataLocations": ["US-WEST4", "US-EAST1"]}},
            "gs://bucket is in US, near this machine",
            "ok",
        ),
        ({"location": "EU"}, "gs://bucket is in EU, but this machine is in us-west4-a: traffic is slower", "warning"),
        ({}, "gs://bucket is in US-CENTRAL1, but this machine is in us-west4-a", "warning"),
    ],
)
def test_a_bucket_far_away(service, bucket, metadata, settings, says, status):
    service.settings = settings
    (found,) = [finding for finding in checks.check_run(bucket) if "this machine" in finding[0]]
    assert (found[0][: len(says)], found[1]) == (says, status)


def test_elsewhere_no_metadata_server_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(checks.urllib.request, "build_opener", lambda *_: pytest.fail("asked"))
    for content, name in ((None, "none"), ("QEMU\n", "other")):
        monkeypatch.setattr(checks, "_PRODUCT_FILE", tmp_path / name)
        if content:
            (tmp_path / name).write_text(content)
        assert checks._zone() is None


def test_data_in_a_bucket(any_bucket, door, monkeypatch):
    monkeypatch.chdir(door.directory)
    config = load_config_file("config.py")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=any_bucket))
    (found,) = [finding.message for finding in diagnose(config) if finding.message.startswith("data.path ")]
    assert found.startswith(f"data.path {any_bucket} holds no prepared data")
    open_bucket(any_bucket).write("data.json", b"{}")
    assert list(checks.check_data(any_bucket)) == [(f"{any_bucket} can be read", "ok")]


def test_data_that_may_not_be_read(service, bucket):
    open_bucket(bucket).write("data.json", b"{}")
    with service.failing(Fault("GET .*alt=media", 403, count=9)), pytest.raises(InputError, match="no permission"):
        list(checks.check_data(bucket))


def test_doctor_checks_the_bucket_first(service, bucket, door, monkeypatch):
    monkeypatch.chdir(door.directory)
    config = dataclasses.replace(load_config_file("config.py"), workdir=bucket)
    found = diagnose(config)
    assert [finding.message for finding in found if finding.name == "bucket"] == SOUND
    assert {finding.status for finding in found} == {"ok"}
    assert [finding.name for finding in found][-3:] == ["run", "disk", "clock"]
    scratch = dataclasses.replace(config.checkpoint, scratch="gs://elsewhere/run")
    found = diagnose(dataclasses.replace(config, workdir="gs://nowhere/run", checkpoint=scratch))
    problems = [(finding.name, finding.message[:24]) for finding in found if finding.status == "PROBLEM"]
    assert problems == [("bucket", "files cannot be listed: "), ("scratch", "files cannot be listed: ")]
    assert found[-1].name == "save"
