"""What an earlier version wrote loads, goes on and samples as it did in that version; see compatibility/README.md."""

import json
import tarfile

import numpy as np
import pytest

from tests.compatibility.make import LORA, hardware, losses, outcome
from tests.conftest import ROOT, Door

FIXTURE = ROOT / "tests" / "compatibility"
RECORDED = json.loads((FIXTURE / "recorded.json").read_text())


@pytest.fixture
def old(tmp_path, compilation_cache, monkeypatch):
    """A directory with what the earlier version left, which is the current one."""
    with tarfile.open(FIXTURE / "fixture.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Door(tmp_path, compilation_cache)


@pytest.mark.parametrize("path", RECORDED["outcomes"])
def test_models_predict_and_sample_as_before(old, path):
    if path.startswith("exported"):
        pytest.importorskip("gguf" if path.endswith(".gguf") else "safetensors", reason="install the extra 'interop'")
    found, recorded = outcome(path), RECORDED["outcomes"][path]
    np.testing.assert_allclose(found["nll"], recorded["nll"], rtol=0, atol=1e-5)
    assert found["texts"] == recorded["texts"]


@pytest.mark.parametrize(
    ("run", "arguments"), [("runs/config", ()), pytest.param("runs/lora", LORA, marks=pytest.mark.slow)]
)
def test_runs_go_on_as_before(old, run, arguments):
    prepared = sorted(old.directory.glob("data/*"))
    old.run("train.py", "--config", "config.py", *arguments, "--training.steps", 60)
    found, recorded = losses(old.directory / run), RECORDED["losses"][run]
    assert [line[:2] for line in found] == [line[:2] for line in recorded]
    atol = 0 if RECORDED["hardware"] == hardware() else 1e-5
    np.testing.assert_allclose([line[2] for line in found], [line[2] for line in recorded], rtol=0, atol=atol)
    assert sorted(old.directory.glob("data/*")) == prepared
