"""Import and export at the user's door: what is written loads as the same model, and failures leave nothing behind."""

import dataclasses
import errno
import json
import os
import signal
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")
pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")
pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")

import nextllm_jax
from nextllm_jax.cli.convert import export_command, import_command
from nextllm_jax.errors import InputError, RunFailed
from nextllm_jax.hardware import readable_bytes
from nextllm_jax.model.accounting import parameter_count
from nextllm_jax.pretrained.convert import export_model, import_model
from nextllm_jax.pretrained.output import new_output
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.huggingface import save_huggingface
from nextllm_jax.tokenizer.patterns import QWEN2_PATTERN
from nextllm_jax.tokenizer.tokenizer import Tokenizer
from tests.interop.models import CONFIG, TOKENIZER, assert_equal_trees, write_huggingface

TEXT = "a cat sat on 12 mats."


@pytest.fixture
def huggingface(tmp_path):
    write_huggingface(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_foreign_directory_loads_as_the_run_that_it_is_imported_as(huggingface, tmp_path):
    import_model(str(huggingface), str(tmp_path / "run"))
    direct, imported = nextllm_jax.load(str(huggingface)), nextllm_jax.load(str(tmp_path / "run"))
    assert_equal_trees(direct.params, imported.params)
    assert direct.tokenizer.hash == imported.tokenizer.hash
    tokens = TOKENIZER.encode(TEXT)
    assert direct.tokenizer.encode(TEXT) == tokens
    np.testing.assert_allclose(direct.logits([tokens]), imported.logits([tokens]), atol=1e-6)
    assert imported.config.context_length == CONFIG.context_length


def test_what_is_imported_and_exported_is_the_same_bit_for_bit(huggingface, tmp_path):
    """Rows of the vocabulary beyond the tokenizer too, which were the model's own."""
    import_model(str(huggingface), str(tmp_path / "run"))
    export_model(str(tmp_path / "run"), str(tmp_path / "again"), file_format="huggingface", dtype="float32")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (huggingface / name).read_bytes()
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert values["vocab_size"] == CONFIG.vocab_size > TOKENIZER.vocab_size
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == values["eos_token_id"] == TOKENIZER.eos_id


def test_a_sparse_model_is_the_same_bit_for_bit_after_both_formats(tmp_path):
    """From a Hugging Face directory to a run, a GGUF file, another run and a directory again, by commands."""
    experts = {"num_experts": 4, "expert_mlp_dim": 32, "shared_expert_mlp_dim": 96, "shared_expert_gate": True}
    changes = {"attention_bias": True, "tie_embeddings": False, "normalize_expert_weights": False}
    write_huggingface(tmp_path / "hf", dataclasses.replace(CONFIG, **experts, **changes))
    source, float32 = tmp_path / "hf", ["--dtype", "float32"]
    for name in ("run", "model.gguf", "run2", "hf2"):
        output = ["--output", str(tmp_path / name)]
        if name.startswith("run"):
            assert import_command([str(source), *output]) == 0
        else:
            assert export_command(["--checkpoint", str(source), *output, *float32]) == 0
        source = tmp_path / name
    before, after = (tmp_path / name for name in ("hf", "hf2"))
    assert (after / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    values, values_after = (json.loads((path / "config.json").read_text()) for path in (before, after))
    assert values.items() <= values_after.items()


def test_generation_settings_and_bos_are_kept(huggingface, tmp_path):
    settings = {"bos_token_id": 7, "pad_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (huggingface / "generation_config.json").write_text(json.dumps(settings))
    import_model(str(huggingface), str(tmp_path / "run"))
    for source in (huggingface, tmp_path / "run"):
        output = tmp_path / f"from {source.name}"
        export_model(str(source), str(output), file_format="huggingface", dtype="float32")
        written = json.loads((output / "generation_config.json").read_text())
        assert written == {**settings, "eos_token_id": TOKENIZER.eos_id}
        assert json.loads((output / "config.json").read_text())["bos_token_id"] == 7


@pytest.mark.parametrize("names", [{}, {"bos_token": "<|begin_of_text|>"}])
def test_a_model_whose_prompts_begin_without_bos_is_not_given_eos_for_it(huggingface, tmp_path, names):
    names = names | {"eos_token": "<|end_of_text|>"}
    roles = dataclasses.replace(TOKENIZER.roles, add_bos=False, bos_id=TOKENIZER.eos_id, names=names)
    save_huggingface(Tokenizer("no BOS", TOKENIZER.backend, roles), huggingface)
    export_model(str(huggingface), str(tmp_path / "out"), file_format="huggingface", dtype="float32")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["bos_token_id"] == (TOKENIZER.bos_id if "bos_token" in names else None)


def test_an_unsupported_key_can_be_ignored(huggingface, tmp_path):
    values = json.loads((huggingface / "config.json").read_text()) | {"my_notes": "x"}
    (huggingface / "config.json").write_text(json.dumps(values))
    command = ["import", str(huggingface), "--output", str(tmp_path / "run")]
    with pytest.raises(InputError, match="--ignore-key my_notes"):
        import_command(command[1:])
    assert import_command([*command[1:], "--ignore-key", "my_notes"]) == 0
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("is_qwen", [False, True])
def test_a_warning_says_that_transformers_splits_text_in_another_way(is_qwen, tmp_path, messages):
    write_huggingface(tmp_path / "hf", dataclasses.replace(CONFIG, attention_bias=True))
    if is_qwen:
        ranks, special = TOKENIZER.backend.ranks, TOKENIZER.special_tokens
        save_huggingface(Tokenizer("qwen", ByteBPE(ranks, QWEN2_PATTERN, special)), tmp_path / "hf")
    export_model(str(tmp_path / "hf"), str(tmp_path / "out"), file_format="huggingface")
    assert ("splits text for models of type qwen2 by Qwen's own pattern" in messages.text) == (not is_qwen)


def test_a_token_without_a_row_is_left_out_of_a_run_too(huggingface, tmp_path, caplog):
    import_model(str(huggingface), str(tmp_path / "run"))
    special = {**TOKENIZER.special_tokens, "<extra>": CONFIG.vocab_size}
    backend = ByteBPE(TOKENIZER.backend.ranks, TOKENIZER.backend.pattern, special)
    Tokenizer("more", backend, TOKENIZER.roles).save(tmp_path / "run" / "tokenizer")
    llm = nextllm_jax.load(str(tmp_path / "run"))
    assert np.isfinite(llm.score("a <extra> cat").nll)
    assert "left out: <extra>" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_export_has_the_type_of_its_source_and_says_its_size(tmp_path, dtype, messages):
    write_huggingface(tmp_path / "hf", dtype=dtype)
    assert export_command(["--checkpoint", str(tmp_path / "hf"), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tmp_path / "hf" / "model.safetensors").read_bytes()
    count = parameter_count(CONFIG) * (2 if dtype == "bfloat16" else 4)
    assert f"writing {readable_bytes(count)} of weights in {dtype}" in messages.text
    assert count < len(written) < 1.2 * count


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_gguf_from_and_to_other_formats(huggingface, tmp_path, dtype):
    export_model(str(huggingface), str(tmp_path / "model.gguf"), file_format="gguf", dtype=dtype)
    import_model(str(tmp_path / "model.gguf"), str(tmp_path / "run"), dtype="bfloat16", context_length=32)
    llm = nextllm_jax.load(str(tmp_path / "model.gguf"))
    assert llm.tokenizer.encode(TEXT) == TOKENIZER.encode(TEXT)
    if dtype == "float32":
        assert_equal_trees(llm.params, nextllm_jax.load(str(huggingface)).params)
    imported = nextllm_jax.load(str(tmp_path / "run"))
    assert imported.config.context_length == 32
    rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), llm.params)
    assert_equal_trees(imported.params["embed"], rounded["embed"])


def test_a_failed_import_or_export_leaves_nothing(huggingface, tmp_path):
    os.truncate(huggingface / "model.safetensors", 20_000)
    with pytest.raises(InputError, match="damaged or truncated"):
        import_model(str(huggingface), str(tmp_path / "run"))
    with pytest.raises(InputError, match="damaged or truncated"):
        export_model(str(huggingface), str(tmp_path / "out.gguf"), file_format="gguf", dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_that_cannot_be_said_leaves_nothing(huggingface, tmp_path):
    with pytest.raises(InputError, match=r"no Hugging Face model_type can represent this model; .* qwen3"):
        export_model(
            str(huggingface), str(tmp_path / "out"), file_format="huggingface", dtype="float32", model_type="qwen3"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_output_that_exists_is_refused_and_kept(huggingface, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("run", "dangling", "link"):
        with pytest.raises(InputError, match="exists; choose another --output"):
            import_model(str(huggingface), str(tmp_path / name))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


def test_an_output_that_cannot_be_written_is_named_with_what_is_in_the_way(huggingface, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match=r"run cannot be written \(.*/file: .*make .*/file a writable directory"):
        import_model(str(huggingface), str(tmp_path / "file" / "run"))
    with monkeypatch.context() as patch:
        patch.setattr("nextllm_jax.pretrained.convert.open_path", lambda *_, **__: pytest.fail("it has begun to work"))
        with pytest.raises(RunFailed, match="export cannot be written"):
            export_model(str(huggingface), str(tmp_path / "file" / "export"), file_format="gguf", dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", not_permitted)
        patch.setattr(Path, "is_dir", not_permitted)
        with (
            pytest.raises(RunFailed, match=r"run cannot be written \(.*: Permission denied\)"),
            new_output(tmp_path / "run"),
        ):
            pass
    monkeypatch.setattr("nextllm_jax.interop.huggingface.save_file", full_disk)
    with pytest.raises(RunFailed, match=r"out cannot be written \(.*No space left.*make room"):
        export_model(str(huggingface), str(tmp_path / "out"), file_format="huggingface", dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf"]


def test_an_incomplete_output_is_removed_at_sigterm_and_if_threads_create_it_again(tmp_path):
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        write_and(tmp_path / "run", raise_sigterm)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(RunFailed, match="No space left"):
        write_and(tmp_path / "run", fail_while_a_thread_writes)
    assert list(tmp_path.iterdir()) == []


def write_and(output, fail):
    with new_output(output) as partial:
        partial.mkdir()
        fail(partial)


def raise_sigterm(partial):
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # which would end the tests
    signal.raise_signal(signal.SIGTERM)


def fail_while_a_thread_writes(partial):
    threading.Timer(0.1, partial.mkdir).start()
    raise OSError(errno.ENOSPC, "No space left on device", str(partial))


def not_permitted(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def full_disk(*args, **settings):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(InputError, match="is not a run directory"):
        import_model(str(tmp_path), str(tmp_path / "run"))
    with pytest.raises(InputError, match="is not a run directory"):
        export_model(str(tmp_path), str(tmp_path / "out"), file_format="gguf", dtype="float32")
    write_huggingface(tmp_path / "hf")
    with pytest.raises(InputError, match=r"context_length 4096 exceeds that of the model, 64"):
        import_model(str(tmp_path / "hf"), str(tmp_path / "run"), context_length=4096)


def test_a_trained_model_is_the_same_to_transformers_and_as_gguf(trained, door):
    """Through the commands: train here, export, sample from the export; transformers finds the same logits."""
    run = trained.directory / "runs" / "config"
    door.run("nextllm_jax.cli", "export", "--checkpoint", run, "--output", "hf")
    door.run("nextllm_jax.cli", "export", "--checkpoint", run, "--output", "model.gguf")
    greedy = ("--prompt", "the cat ", "--temperature", 0, "--max-new-tokens", 12)
    texts = {door.run("sample.py", "--checkpoint", path, *greedy).stdout for path in (run, "hf", "model.gguf")}
    assert len(texts) == 1
    tokenizer = Tokenizer.load(run / "tokenizer")
    config = json.loads((door.directory / "hf" / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.vocab_size
    torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
    transformers = pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
    model = transformers.AutoModelForCausalLM.from_pretrained(door.directory / "hf").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(door.directory / "hf")(TEXT)["input_ids"]
    assert tokens == tokenizer.encode_prompt(TEXT)
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits.numpy()
    ours = nextllm_jax.load(str(run)).logits([tokens])[..., : tokenizer.vocab_size]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_refusal_at_the_door_is_a_sentence_and_exit_code_2(door):
    write_huggingface(door.directory / "hf")
    (door.directory / "hf" / "model.safetensors").rename(door.directory / "hf" / "pytorch_model.bin")
    failed = door.run("nextllm_jax.cli", "import", "hf", "--output", "run", exit_code=2)
    assert failed.stderr.startswith("error: hf has its weights in the pickle pytorch_model.bin")
    assert failed.stderr.count("\n") == 1
    assert not (door.directory / "run").exists()
