"""`nextllm certify`: tiny models are certified against other programs, and each fault fails by its name."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")
pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")
pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")

from safetensors.numpy import load_file, save_file

from nextllm_jax.cli.certify import certify_command
from nextllm_jax.config import ModelConfig
from nextllm_jax.diagnostics import reference
from nextllm_jax.diagnostics.certify import outside, programs, text
from nextllm_jax.diagnostics.certify.certify import Settings, certify
from nextllm_jax.diagnostics.certify.probes import KEPT, make_probes
from nextllm_jax.diagnostics.stress_texts import stress_texts
from nextllm_jax.errors import InputError
from nextllm_jax.interop import gguf, huggingface, huggingface_config
from nextllm_jax.ops.routing import choose, probabilities
from nextllm_jax.pretrained.convert import export_model
from nextllm_jax.tokenizer import chat
from nextllm_jax.tokenizer import gguf as gguf_tokenizer
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.huggingface import save_huggingface
from nextllm_jax.tokenizer.tokenizer import Tokenizer
from tests.interop.models import CONFIG, TOKENIZER, random_params

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
COMPOSED = TEMPLATE.replace("{{ m.role }}: ", "{{ '<|' + m.role + '|>' }}").replace("assistant: ", "<|assistant|>")
"""It writes the tokens of roles in parts."""
SCALED = dataclasses.replace(
    CONFIG,
    rope_scaling="llama3",
    rope_scaling_factor=8.0,
    rope_original_context_length=48,
    context_length=256,
    tie_embeddings=False,
)
"""Its longer probe is beyond the original context."""
SPARSE = dataclasses.replace(CONFIG, num_experts=4, expert_mlp_dim=32, tie_embeddings=False)


def write(directory: Path, config: ModelConfig = SCALED, template: str | None = TEMPLATE) -> Path:
    """A Hugging Face directory with a random model and a chat template."""
    huggingface.export(config, random_params(config), directory, vocab_size=config.vocab_size)
    roles = dataclasses.replace(TOKENIZER.roles, chat_template=template)
    save_huggingface(Tokenizer("chat", TOKENIZER.backend, roles), directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(autouse=True)
def few_texts(monkeypatch, request) -> None:
    """Fewer texts, to save time, except in the test of the command."""
    if "every_program" not in request.node.name:
        texts = stress_texts()[::50]
        monkeypatch.setattr(text, "stress_texts", lambda: texts)


@pytest.fixture
def without_programs(monkeypatch) -> None:
    """As on a machine without transformers and llama.cpp."""
    monkeypatch.setattr(programs, "ask", lambda script, *_: outside.Answer({}, {}, missing=script))


def rows_of(path: Path | str, **settings: Any) -> dict[str, Any]:
    """The rows of a model by their checks."""
    return {row.check: row for row in certify(str(path), Settings(**settings)).rows}


def failures(path: Path | str, **settings: Any) -> dict[str, str | None]:
    """The faults of the rows that failed, by their checks."""
    return {check: row.fault for check, row in rows_of(path, **settings).items() if row.status == "FAILED"}


def needs_programs() -> None:
    for package in ("torch", "transformers", "xllamacpp"):
        pytest.importorskip(package, reason=f"{package} is missing; install the extra 'parity'")


def test_the_command_certifies_a_model_against_every_program(model, capsys):
    needs_programs()
    assert certify_command([str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["check"]: row for row in found["checks"]}
    assert {row["status"] for row in rows.values()} == {"ok"}, found
    for program in ("numpy", "nextllm_jax.load", "transformers", "llama.cpp"):
        compared = [check for check in rows if check.startswith(program) and "tokens" in check]
        assert [check.rpartition(", ")[2] for check in compared] == ["48 tokens", "80 tokens"], program
    assert "assistant: ⟦It is 42.<|end_of_text|>⟧\n" in found["conversation"]
    written = json.loads((model / "certificate.json").read_text())
    assert written["checks"] == found["checks"]
    assert written["files"].keys() == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def without_packages(folder: Path) -> str:
    """An interpreter that finds no packages."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_another_environment_without_the_programs_is_named(model, tmp_path):
    rows = rows_of(model, python=without_packages(tmp_path))
    assert [rows[name].status for name in ("transformers", "llama.cpp")] == ["skipped", "skipped"]
    assert rows["llama.cpp"].detail == "the package xllamacpp is not installed"
    with pytest.raises(InputError, match="--python nowhere/python is not a program"):
        certify_command([str(model), "--python", "nowhere/python"])
    other = shutil.which("true")
    assert outside.ask("ask_transformers.py", {}, other).error == (
        f"{other} did not run ask_transformers.py; give a Python interpreter"
    )


@pytest.mark.usefixtures("without_programs")
def test_a_large_model_is_read_layer_by_layer(model, tmp_path, monkeypatch):
    """No part of the tree that is read is larger than a layer or the embedding, and nothing is exported."""
    read, plain = [], huggingface.read_params

    def read_params(source, parts, abstract, *rest):
        read.append({part.leaf.partition("/")[0] for part in parts})
        return plain(source, parts, abstract, *rest)

    monkeypatch.setattr(huggingface, "read_params", read_params)
    rows = rows_of(model, memory_bytes=1000)
    assert all(len(names) == 1 for names in read)
    assert {row.status for check, row in rows.items() if check.startswith("numpy")} == {"ok"}
    assert {rows[check].status for check in ("export to GGUF", "export to Hugging Face")} == {"skipped"}
    export_model(str(model), str(tmp_path / "model.gguf"), file_format="gguf")
    assert not failures(tmp_path / "model.gguf", memory_bytes=1000)


def change_config(directory: Path, file: str = "config.json", **changes: Any) -> None:
    values = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(values | changes))


def permute(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    rows = tensors[name].reshape(4, 2, 4, -1).swapaxes(1, 2).reshape(tensors[name].shape)
    save_file(tensors | {name: np.ascontiguousarray(rows)}, directory / "model.safetensors")


def shift_tokens(directory: Path) -> None:
    values = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    names = {id: token for token, id in vocabulary.items()}
    vocabulary[names[270]], vocabulary[names[271]] = 271, 270
    (directory / "tokenizer.json").write_text(json.dumps(values))


DAMAGED: dict[str, Any] = {
    "permuted projection": permute,
    "dropped rope scaling": lambda directory: change_config(directory, rope_scaling=None),
    "untied head": lambda directory: change_config(directory, tie_word_embeddings=True),
    "shifted token id": shift_tokens,
}


@pytest.mark.usefixtures("without_programs")
@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_export_is_not_the_model_that_it_was_made_from(fault, model, tmp_path):
    export_model(str(model), str(tmp_path / "out"), file_format="huggingface")
    DAMAGED[fault](tmp_path / "out")
    assert fault in failures(tmp_path / "out", against=str(model)).values()


@pytest.mark.usefixtures("without_programs")
def test_files_alone_show_some_faults(model, tmp_path):
    out = write(tmp_path / "no_end", template=TEMPLATE.replace("{{ eos_token }}", ""))
    assert failures(out) == {"loss mask": "untrained end token"}
    change_config(out, "generation_config.json", eos_token_id=270)
    assert failures(out)["special tokens"] == "shifted token id"
    tied = write(tmp_path / "tied", dataclasses.replace(SCALED, tie_embeddings=True))
    change_config(tied, tie_word_embeddings=False)
    assert failures(tied) == {"files": "untied head", "weights": "untied head"}
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][TOKENIZER.eos_id] = 0
    export_model(str(model), str(tmp_path / "zero"), file_format="huggingface")
    save_file(tensors, tmp_path / "zero" / "model.safetensors")
    assert failures(tmp_path / "zero") == {"rows of end tokens": "untrained end token"}


def exchange(directory: Path, *pairs: tuple[str, str]) -> None:
    tensors = load_file(directory / "model.safetensors")
    swapped = {new: tensors[old] for pair in pairs for old, new in (pair, pair[::-1])}
    save_file(tensors | swapped, directory / "model.safetensors")


def swap_experts(directory: Path) -> None:
    prefix = "model.layers.1.block_sparse_moe.experts"
    exchange(directory, *((f"{prefix}.0.{name}.weight", f"{prefix}.2.{name}.weight") for name in ("w1", "w2", "w3")))


def permute_router(directory: Path) -> None:
    tensors, name = load_file(directory / "model.safetensors"), "model.layers.1.block_sparse_moe.gate.weight"
    save_file(tensors | {name: tensors[name][[0, 2, 1, 3]]}, directory / "model.safetensors")


@pytest.mark.usefixtures("without_programs")
def test_faults_of_experts_are_named(tmp_path, monkeypatch):
    model = write(tmp_path / "model", SPARSE)
    export_model(str(model), str(tmp_path / "model.gguf"), file_format="gguf")
    for path in (model, tmp_path / "model.gguf"):
        rows = rows_of(path)
        assert {row.status for row in rows.values()} <= {"ok", "skipped"}, rows
        assert rows["files: experts"].status == rows["choice of experts"].status == "ok"
    for fault, damage in {"swapped experts": swap_experts, "permuted router": permute_router}.items():
        damage(write(tmp_path / fault, SPARSE))
        assert failures(tmp_path / fault, against=str(model), memory_bytes=1000) == {"as model: weights": fault}
    read = huggingface.SafetensorsSource.read

    def of_another_expert(self: Any, tensor: str, *where: Any) -> Any:
        return read(self, re.sub(r"experts\.(\d)", lambda found: f"experts.{3 - int(found[1])}", tensor), *where)

    def rolled_router(self: Any, tensor: str, *where: Any) -> Any:
        return np.roll(read(self, tensor, *where), 1, axis=0) if ".gate." in tensor else read(self, tensor, *where)

    for fault, wrong in {"swapped experts": of_another_expert, "permuted router": rolled_router}.items():
        monkeypatch.setattr(huggingface.SafetensorsSource, "read", wrong)
        assert failures(model, memory_bytes=1000) == {"files: experts": fault}


def test_equal_scores_of_experts_are_equal_in_float32():
    """In float64 they differ, and the numpy model would choose another expert than all programs do."""
    config = dataclasses.replace(SPARSE, num_experts=2, experts_per_token=1, router_scores="sigmoid")
    x_BTD, kernel_DE = np.ones((1, 1, 1)), np.array([[20.0, 30.0]])
    assert reference.routed({"kernel": kernel_DE}, x_BTD, config).tolist() == [[[1.0, 0.0]]]
    assert "2 of 3 choices" in programs.margins_row([1e-6, 0.0, 0.1]).detail
    score_BTE = probabilities(jnp.asarray(x_BTD @ kernel_DE, jnp.float32), "sigmoid")
    assert choose(score_BTE, None, 1, normalize=True, scale=1).expert_BTK.tolist() == [[[0]]]


def without_scaling(*args: Any) -> dict[str, Any]:
    return {"rope_theta": 1e4}


def shifted(encode: Any) -> Any:
    return lambda self, text, recognize: [id + 1 for id in encode(self, text, recognize)]


UNDONE: dict[str, tuple[Any, str, Any]] = {
    "dropped rope scaling": (huggingface_config, "read_rope", without_scaling),
    "shifted token id": (ByteBPE, "encode", shifted(ByteBPE.encode)),
    "untrained end token": (ChatTemplate, "_up_to_end", lambda self, ids, first, last: last),
    "untied head": (huggingface, "_require_tied", lambda source: None),
}


@pytest.mark.usefixtures("without_programs")
@pytest.mark.parametrize("fault", UNDONE)
def test_a_fix_that_is_undone_is_named(fault, model, tmp_path, monkeypatch):
    if fault == "untied head":
        export_model(str(model), str(tmp_path / "out"), file_format="huggingface")
        change_config(tmp_path / "out", tie_word_embeddings=True)
        model = tmp_path / "out"
    monkeypatch.setattr(*UNDONE[fault])
    assert fault in failures(model).values()


def test_a_gguf_file_without_padding_tokens_does_not_load(model, monkeypatch):
    needs_programs()
    plain = gguf_tokenizer.to_gguf
    monkeypatch.setattr(gguf_tokenizer, "to_gguf", lambda tokenizer, rows: plain(tokenizer))
    ask, missing = programs.ask, outside.Answer({}, {}, missing="transformers")
    monkeypatch.setattr(programs, "ask", lambda script, *rest: missing if "transf" in script else ask(script, *rest))
    rows = rows_of(model)
    assert (rows["llama.cpp"].status, rows["numpy, 80 tokens"].status) == ("FAILED", "ok")


@pytest.mark.usefixtures("without_programs")
def test_parts_of_a_tokenizer_that_gguf_lacks_are_named(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [tokenizers.normalizers.Lowercase(), tokenizers.normalizers.Prepend("▁")]
    made.normalizer = tokenizers.normalizers.Sequence([*steps, tokenizers.normalizers.Replace(" ", "▁")])
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    made.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=288, special_tokens=special, show_progress=False)
    made.train_from_iterator(["a cat sat on a mat"] * 4, trainer)
    values = json.loads(made.to_str())
    values["added_tokens"] = values["added_tokens"][:3]
    huggingface.export(SCALED, random_params(SCALED), tmp_path, vocab_size=SCALED.vocab_size)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert "text is prepared by Lowercase" in rows_of(tmp_path)["export to GGUF"].detail
    monkeypatch.setattr(gguf_tokenizer, "_differences", lambda mine, other: [])
    assert failures(tmp_path) == {"export to GGUF: tokenizer": None}


@pytest.mark.usefixtures("without_programs")
def test_a_message_that_can_write_the_token_of_a_role_is_named(tmp_path, monkeypatch):
    roles = dataclasses.replace(TOKENIZER.roles, chat_template=COMPOSED)
    backend = ByteBPE(
        TOKENIZER.backend.ranks,
        TOKENIZER.backend.pattern,
        TOKENIZER.special_tokens,
        {f"<|{role}|>": 280 + n for n, role in enumerate(("user", "assistant", "system"))},
    )
    huggingface.export(SCALED, random_params(SCALED), tmp_path, vocab_size=SCALED.vocab_size)
    save_huggingface(Tokenizer("chat", backend, roles), tmp_path)
    assert not failures(tmp_path)
    monkeypatch.setattr(chat, "_composed", lambda *_: [])
    assert failures(tmp_path).keys() == {"control tokens in messages"}


@pytest.mark.usefixtures("without_programs")
def test_ids_beyond_the_embedding_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Tokenizer, "within", lambda self, rows: self)
    write(tmp_path / "out", dataclasses.replace(SCALED, vocab_size=TOKENIZER.vocab_size))
    values = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][-1], "id": 279, "content": "<extra>"})
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(values))
    assert rows_of(tmp_path / "out")["special tokens"].detail == "ids up to 279, but the embedding has 279 rows"


def test_llama_cpp_shows_that_q_and_k_were_not_permuted(model, tmp_path, monkeypatch):
    """Our own round trips do not: what the importer forgets, the exporter forgets too."""
    needs_programs()
    export_model(str(model), str(tmp_path / "model.gguf"), file_format="gguf")
    monkeypatch.setattr(gguf, "_permuted_rows", lambda rows, head_dim: rows)
    ask = programs.ask
    missing = outside.Answer({}, {}, missing="transformers")
    monkeypatch.setattr(programs, "ask", lambda script, *rest: missing if "transf" in script else ask(script, *rest))
    found = failures(tmp_path / "model.gguf")
    assert len(found) == 4  # the file and a float32 export, at two lengths
    assert set(found.values()) == {"permuted projection"}


def test_the_longer_probe_is_beyond_the_original_context():
    def ends(longest: int = 640, **changes: Any) -> list[tuple[int, int]]:
        found = make_probes(dataclasses.replace(CONFIG, **changes), 288, longest)
        assert all(max(probe.tokens) < 288 and len(probe.prompt) == len(probe.tokens) - KEPT + 1 for probe in found)
        return [(len(probe.tokens), probe.positions[-1] + 1) for probe in found]

    assert ends() == [(64, 64)]
    assert ends(context_length=2048) == [(64, 64), (192, 192)]
    scaled: dict[str, Any] = {"rope_scaling": "llama3", "context_length": 131_072}
    assert ends(**scaled) == [(64, 64), (640, 8224)]
    assert ends(10_000, **scaled) == [(64, 64), (8224, 8224)]
    assert ends(rope_scaling="linear", rope_scaling_factor=4.0, context_length=400) == [(64, 64), (132, 132)]
    local: dict[str, Any] = {"layer_pattern": ("local",), "sliding_window": 300, "context_length": 2048}
    assert ends(**local) == [(64, 64), (332, 332)]


@pytest.mark.slow
def test_the_memory_is_that_of_a_layer(tmp_path):
    """Of a model of 1 GB, whose layers take 40 MB each."""
    program = """
import re, sys
from pathlib import Path
from nextllm_jax.cli.certify import certify_command
code = certify_command([sys.argv[1], "--memory-gigabytes", "0.1", "--python", sys.argv[2], "--json"])
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
sys.exit(code)
"""
    peaks = []
    for num_layers in (1, 24):
        config = dataclasses.replace(
            SCALED, num_layers=num_layers, embed_dim=1024, mlp_dim=2400, num_heads=16, num_kv_heads=4, head_dim=64
        )
        write(tmp_path / str(num_layers), config)
        arguments = [sys.executable, "-c", program, str(tmp_path / str(num_layers)), without_packages(tmp_path)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]))
    print(f"peak memory {peaks[0]} MB with 1 layer, {peaks[1]} MB with 24")  # pytest -rP shows it
    assert peaks[1] - peaks[0] < 250
