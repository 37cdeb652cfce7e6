"""Models of other programs in buckets: exported to, imported from and sampled at an address."""

import json

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")

import nextllm_jax
from nextllm_jax.cli.convert import export_command, import_command
from nextllm_jax.cli.text import tokenize_command
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.pretrained.convert import export_model, import_model, quantize_model
from nextllm_jax.storage.open_storage import open_bucket
from tests.interop.models import TOKENIZER, write_huggingface

TEXT = "a cat sat on 12 mats."
TOKENS = [TOKENIZER.encode(TEXT)]


@pytest.fixture
def huggingface(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_huggingface(tmp_path / "hf")
    return str(tmp_path / "hf")


def test_a_hugging_face_directory(huggingface, any_bucket, tmp_path, capsys):
    address = f"{any_bucket}/model"
    export_command(["--checkpoint", huggingface, "--output", address])
    assert capsys.readouterr().out == f"{address}\n"
    export_model(huggingface, str(tmp_path / "model"), file_format="huggingface")
    written = open_bucket(address)
    assert {name: written.read(name) for name in written.files()} == {
        path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()
    }
    expected = nextllm_jax.load(huggingface).logits(TOKENS)
    np.testing.assert_array_equal(nextllm_jax.load(address).logits(TOKENS), expected)
    import_command([address, "--output", str(tmp_path / "run")])
    np.testing.assert_array_equal(nextllm_jax.load(str(tmp_path / "run")).logits(TOKENS), expected)
    with pytest.raises(InputError, match=f"{address} exists; choose another --output"):
        export_command(["--checkpoint", huggingface, "--output", address])
    written.delete("model.safetensors")
    with pytest.raises(InputError, match="safetensors"):
        nextllm_jax.load(address)


def test_a_gguf_file(huggingface, any_bucket):
    address = f"{any_bucket}/model.gguf"
    export_command(["--checkpoint", huggingface, "--output", address])
    assert list(open_bucket(any_bucket).files()) == ["model.gguf"]
    expected = nextllm_jax.load(huggingface).logits(TOKENS)
    np.testing.assert_allclose(nextllm_jax.load(address).logits(TOKENS), expected, atol=1e-5)
    with pytest.raises(InputError, match=f"{any_bucket}/none.gguf does not exist"):
        nextllm_jax.load(f"{any_bucket}/none.gguf")


def test_a_tokenizer_alone_is_copied_without_the_weights(huggingface, any_bucket, tmp_path, capsys):
    export_model(huggingface, any_bucket, file_format="huggingface")
    tokenize_command([TEXT, "--tokenizer", any_bucket, "--json"])
    assert json.loads(capsys.readouterr().out)["ids"] == TOKENS[0]
    copied = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert "tokenizer.json" in copied
    assert "model.safetensors" not in copied


def test_runs(huggingface, bucket, s3_bucket, tmp_path):
    """They can be written to Google Cloud Storage, and not to S3."""
    import_model(huggingface, f"{bucket}/run")
    quantize_model(f"{bucket}/run", f"{bucket}/int8", Quantization(scheme="int8"))
    quantize_model(huggingface, str(tmp_path / "int8"), Quantization(scheme="int8"))
    ours, theirs = nextllm_jax.load(f"{bucket}/int8"), nextllm_jax.load(str(tmp_path / "int8"))
    np.testing.assert_array_equal(ours.logits(TOKENS), theirs.logits(TOKENS))
    for refused in (
        lambda: import_model(huggingface, f"{s3_bucket}/run"),
        lambda: quantize_model(huggingface, f"{s3_bucket}/run", Quantization(scheme="int8")),
        lambda: nextllm_jax.load(f"{s3_bucket}/run"),
    ):
        with pytest.raises(InputError, match=f"^{s3_bucket}/run cannot be a run: orbax writes no checkpoints to S3"):
            refused()
    assert open_bucket(s3_bucket).files() == {}


def test_an_interrupted_upload_leaves_nothing(huggingface, any_bucket, monkeypatch):
    bucket = type(open_bucket(any_bucket))
    upload = bucket.upload

    def interrupted(self, name, path):
        upload(self, name, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(bucket, "upload", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(huggingface, f"{any_bucket}/model", file_format="huggingface")
    assert open_bucket(any_bucket).files() == {}


def test_what_fails_leaves_nothing(huggingface, s3_bucket, monkeypatch):
    def broken(*_):
        raise InputError("broken")

    monkeypatch.setattr("nextllm_jax.tokenizer.huggingface.save_huggingface", broken)
    with pytest.raises(InputError, match="broken"):
        export_model(huggingface, s3_bucket, file_format="huggingface")
    assert open_bucket(s3_bucket).files() == {}
