"""`nextllm quantize` and `--quantize`: what is written loads everywhere, blocks of GGUF files are kept bit for bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")
pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")
pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")

import gguf

import nextllm_jax
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.cli.quantize import quantize_command
from nextllm_jax.cli.text import evaluate_command
from nextllm_jax.config import Config, DataConfig, LoraConfig, MeshConfig
from nextllm_jax.config.quantization import Quantization
from nextllm_jax.errors import InputError
from nextllm_jax.interop import huggingface
from nextllm_jax.model.quantize import is_quantized
from nextllm_jax.model.weights import by_name
from nextllm_jax.ops.quantized import dequantize
from nextllm_jax.pretrained import convert
from nextllm_jax.pretrained.convert import export_model, import_model, quantize_model
from nextllm_jax.pretrained.init_from import initial_params, with_source
from nextllm_jax.sharding import on_device
from tests.conftest import Door
from tests.interop.models import CONFIG as TINY
from tests.interop.models import assert_equal_trees, write_huggingface

TEXT = "a cat sat on 12 mats."
SCHEMES = {"int8": Quantization(scheme="int8"), "int4": Quantization(scheme="int4", embeddings="int8")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with the same model as hf, run, int8 and int4."""
    directory = tmp_path_factory.mktemp("models")
    write_huggingface(directory / "hf")
    import_model(str(directory / "hf"), str(directory / "run"))
    for name, quantization in SCHEMES.items():
        quantize_model(str(directory / "hf"), str(directory / name), quantization)
    return directory


def stored(path):
    """The weights of a quantized run as they are, layer by layer, where `load` on a CPU rounds groups to channels."""
    source = convert.open_path(str(path))
    return source.load_params(convert._on_cpu(source.config, source.quantization, scan_layers=False))


@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_a_quantized_directory_is_what_quantizing_on_the_fly_makes_of_any_source(models, scheme):
    written = nextllm_jax.load(str(models / scheme))
    for source in ("hf", "run"):
        assert_equal_trees(nextllm_jax.load(str(models / source), quantize=SCHEMES[scheme]).params, written.params)
        opened = convert.open_path(str(models / source))
        wanted = convert._on_cpu(opened.config, SCHEMES[scheme], scan_layers=False)
        assert_equal_trees(opened.load_params(wanted), stored(models / scheme))
    weights, floats = by_name(written.params), by_name(nextllm_jax.load(str(models / "run")).params)
    for name, leaf in weights.items():
        assert is_quantized(leaf) == (name.endswith("kernel") or (scheme == "int4" and "embed" in name))
        if is_quantized(leaf):
            error = np.linalg.norm(dequantize(leaf, jnp.float32) - floats[name]) / np.linalg.norm(floats[name])
            assert 0 < error < {"int8": 0.01, "int4": 0.1}[scheme]
    assert stored(models / scheme)["remainder_0"]["mlp"]["up"]["kernel"].q.dtype == scheme
    up = written.params["remainder_0"]["mlp"]["up"]["kernel"]
    assert (up.q.dtype, up.scale.shape) == ("int8", (1, 64))
    tokens = np.arange(12)[None]
    exact, rounded = (nextllm_jax.load(str(models / name)).logits(tokens) for name in ("run", scheme))
    assert np.abs(exact - rounded).mean() < {"int8": 0.03, "int4": 0.3}[scheme]
    assert written.generate([TEXT], max_new_tokens=4, temperature=0.0)[0].tokens
    assert 2 < written.score(TEXT).perplexity < 1e4


def test_every_command_takes_a_quantized_directory(models, tmp_path, compilation_cache, capsys, messages):
    int4, door = str(models / "int4"), Door(tmp_path, compilation_cache)
    sampled = door.run("sample.py", "--checkpoint", int4, "--prompt", TEXT, "--max-new-tokens", 4, "--json")
    assert json.loads(sampled.stdout.splitlines()[0])["prompt"] == TEXT
    (tmp_path / "text").write_text(TEXT)
    evaluate_command(["--checkpoint", int4, "--text", str(tmp_path / "text"), "--json"])
    expected = nextllm_jax.load(int4).score(TEXT)
    assert json.loads(capsys.readouterr().out)["nll"] == pytest.approx(expected.nll, rel=1e-4)
    export_model(int4, str(tmp_path / "hf"), file_format="huggingface", dtype="float32")
    assert f"is quantized ({SCHEMES['int4']}); the export stores its values as float32" in messages.text
    assert nextllm_jax.load(str(tmp_path / "hf")).score(TEXT).nll == pytest.approx(expected.nll, rel=2e-3)
    export_model(int4, str(tmp_path / "gguf"), file_format="gguf", dtype="float32")
    reader = gguf.GGUFReader(tmp_path / "gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_1
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (types["token_embd.weight"], types["blk.0.ffn_up.weight"]) == ("Q8_0", "Q4_1")
    assert nextllm_jax.load(str(tmp_path / "gguf")).score(TEXT).nll == pytest.approx(
        expected.nll, rel=2e-2
    )  # "o" is rounded again


def test_the_command_says_what_it_did(models, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT * 20)
    arguments = ["--checkpoint", str(models / "run"), "--output", str(tmp_path / "q"), "--scheme", "int4"]
    assert quantize_command([*arguments, "--text", str(tmp_path / "text"), "--group-size", "16", "--symmetric"]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in out}
    assert rows.keys() >= {"q", "k", "v", "o", "gate", "up", "down", "perplexity"}
    number, worst, mean, bits = rows["down"]
    assert (number, bits) == ("3", "5.00")  # 4 bits, and a float16 for 16 weights
    assert 5 < float(mean.rstrip("%")) <= float(worst.rstrip("%")) < 15
    assert any(line.startswith("int4 in groups of 16, symmetric: ") for line in out)
    assert str(SCHEMES["int4"]) == "int4 in groups of 32, asymmetric; embeddings int8 by output channel"
    before, after = (nextllm_jax.load(str(path)).score(TEXT * 20) for path in (models / "run", tmp_path / "q"))
    assert f"perplexity {before.perplexity:.3f} -> {after.perplexity:.3f}" in "\n".join(out)


def test_calibrating_rounds_for_a_text(models, tmp_path):
    text = tmp_path / "text"
    text.write_text(TEXT * 200)
    plain, calibrated = tmp_path / "plain", tmp_path / "calibrated"
    int4 = ["--checkpoint", str(models / "run"), "--scheme", "int4", "--no-perplexity"]
    assert quantize_command([*int4, "--output", str(plain)]) == 0
    assert quantize_command([*int4, "--output", str(calibrated), "--calibrate", str(text)]) == 0
    tokens = [convert.open_path(str(plain)).load_tokenizer().encode_document(TEXT * 5)[:40]]
    exact, *found = (nextllm_jax.load(str(path)).logits(tokens) for path in (models / "run", plain, calibrated))
    errors = [np.square(one - exact).mean() for one in found]
    assert errors[1] < 0.8 * errors[0]
    text.write_text(TEXT)
    with pytest.raises(InputError, match=r"the calibration text has .* tokens; at least 64 are needed"):
        quantize_command([*int4, "--output", str(tmp_path / "new"), "--calibrate", str(text)])
    with pytest.raises(InputError, match="--calibrate applies to int4 only; the scheme is int8"):
        quantize_command([*int4, "--scheme", "int8", "--output", str(tmp_path / "new"), "--calibrate", str(text)])
    assert not (tmp_path / "new").exists()


def test_records_of_earlier_versions_say_whether_embeddings_are_quantized():
    fields = {"scheme": "int4", "group_size": None, "symmetric": False}
    for before, today in ((True, "int4"), (False, "none"), ("int8", "int8")):
        assert Quantization.upgraded(fields | {"embeddings": before}) == fields | {"embeddings": today}


@pytest.mark.parametrize("scheme", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_eight_devices_load_what_one_does(models, scheme):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    alone = nextllm_jax.load(str(models / scheme))
    for source, quantize in ((scheme, "none"), ("hf", SCHEMES[scheme]), ("run", SCHEMES[scheme])):
        sharded = nextllm_jax.load(str(models / source), mesh=mesh, quantize=quantize)
        assert_equal_trees(sharded.params, alone.params)
        up = sharded.params["remainder_0"]["mlp"]["up"]["kernel"]
        assert up.q.addressable_shards[0].data.size * 4 == up.q.size
    tokens = np.arange(12)[None].repeat(2, 0)
    np.testing.assert_allclose(sharded.logits(tokens), alone.logits(tokens), atol=1e-4)


KEPT = {
    "Q8_0": Quantization(scheme="int8", group_size=32),
    "Q4_0": Quantization(scheme="int4", symmetric=True),
    "Q4_1": Quantization(scheme="int4"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_blocks_of_gguf_files_are_kept_bit_for_bit(models, tmp_path, kind):
    quantize_model(str(models / "hf"), str(tmp_path / "first"), KEPT[kind])
    file = tmp_path / "model.gguf"
    export_model(str(tmp_path / "first"), str(file), file_format="gguf", dtype="float32")
    rng = np.random.default_rng(0)
    worth = {}
    for tensor in gguf.GGUFReader(file, "r+").tensors:
        if len(tensor.shape) == 2 and "embd" not in tensor.name:
            assert tensor.tensor_type.name == kind
            blocks = tensor.data.reshape(-1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])
            blocks[:] = rng.integers(0, 256, blocks.shape)  # no block that we would make
            blocks[:, :4].view(np.float16)[:] = rng.normal(0, 0.02, (len(blocks), 2))
            worth[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    quantize_model(str(file), str(tmp_path / "run"), KEPT[kind])
    loaded = stored(tmp_path / "run")
    for name, ours in (("ffn_down", "mlp/down"), ("attn_output", "attention/o"), ("attn_v", "attention/v")):
        weight = by_name(loaded)[f"remainder_2/{ours}/kernel"]
        expected = worth[f"blk.2.{name}.weight"]
        found = np.asarray(dequantize(weight, jnp.float32)).reshape(expected.shape[::-1]).T
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    export_model(str(tmp_path / "run"), str(tmp_path / "again.gguf"), file_format="gguf", dtype="float32")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


def test_other_blocks_become_what_is_asked_for(models, tmp_path, messages):
    """Q8_0 as whole channels, and int4 that no block holds as blocks that are close."""
    file = tmp_path / "model.gguf"
    export_model(str(models / "hf"), str(file), file_format="gguf", dtype="q8_0")
    llm = nextllm_jax.load(str(file), quantize="int8")
    assert llm.params["remainder_0"]["mlp"]["up"]["kernel"].scale.shape == (1, 64)
    quantize_model(str(models / "hf"), str(tmp_path / "q"), Quantization(scheme="int4", group_size=16))
    export_model(str(tmp_path / "q"), str(tmp_path / "q.gguf"), file_format="gguf", dtype="q8_0")
    assert "21 matrices were rounded again, because their groups of inputs are smaller" in messages.text
    ours, theirs = (nextllm_jax.load(str(tmp_path / name)).logits([[1, 2, 3]]) for name in ("q", "q.gguf"))
    assert np.abs(ours - theirs).mean() < 0.3


def test_the_float_model_is_never_whole_in_memory(models):
    """Float arrays that live while weights are quantized: norms, the embedding, and what is being quantized."""
    held = []

    def weigh(name, before, after):
        arrays = [array for array in jax.live_arrays() if array.dtype == jnp.float32 and array not in earlier]
        held.append(sum(array.nbytes for array in arrays))

    for source in ("hf", "run"):
        opened = convert.open_path(str(models / source))
        wanted = convert._on_cpu(opened.config, SCHEMES["int8"])
        earlier = IdentitySet(jax.live_arrays())
        opened.load_params(wanted, weigh)
    weights = by_name(nextllm_jax.load(str(models / "run")).params)
    total = sum(leaf.nbytes for leaf in weights.values())
    kept = sum(leaf.nbytes for name, leaf in weights.items() if not name.endswith("kernel"))
    largest = 3 * 32 * 64 * 4  # a stack of three layers
    assert max(held) < kept + 2 * largest < total


class IdentitySet:
    def __init__(self, items):
        self._items = items
        self._ids = set(map(id, items))

    def __contains__(self, item):
        return id(item) in self._ids


def test_mistakes_are_a_line_and_leave_nothing(models, tmp_path, monkeypatch):
    int8, output = str(models / "int8"), tmp_path / "out"
    with pytest.raises(InputError, match=r"int8 is already quantized \(int8 by output channel\); quantize the model"):
        quantize_model(int8, str(output), SCHEMES["int4"])
    with pytest.raises(InputError, match="is already quantized"):
        nextllm_jax.load(int8, quantize="int4")
    with pytest.raises(InputError, match="scheme is 'int5'"):
        nextllm_jax.load(str(models / "hf"), quantize="int5")
    with pytest.raises(InputError, match=r"does not divide the 32 inputs of .*; use nextllm quantize --group-size 32,"):
        quantize_model(str(models / "hf"), str(output), Quantization(scheme="int4", group_size=64))
    odd = dataclasses.replace(TINY, mlp_dim=33)
    with pytest.raises(
        InputError, match=r"32 does not divide the 33 inputs of .*down/kernel; use int8 by output channel"
    ):
        convert._on_cpu(odd, SCHEMES["int4"])
    with pytest.raises(InputError, match="exists; choose another --output"):
        quantize_model(str(models / "hf"), int8, SCHEMES["int8"])
    monkeypatch.setattr(Checkpoints, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_model(str(models / "hf"), str(output), SCHEMES["int8"])
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_the_scales_of_groups_are_an_error_that_names_them(tmp_path):
    params = write_huggingface(tmp_path / "hf")
    params["layers"]["block_0"]["mlp"]["up"]["kernel"][1, 3, 5] = 1e6
    huggingface.export(TINY, params, tmp_path / "hf", vocab_size=TINY.vocab_size)
    model, message = str(tmp_path / "hf"), "mlp/up/kernel holds values that exceed the float16 scales of groups"
    for calibration in (None, TEXT * 20):
        with pytest.raises(InputError, match=message):
            quantize_model(model, str(tmp_path / "q"), SCHEMES["int4"], calibration=calibration)
    with pytest.raises(InputError, match=message):
        nextllm_jax.load(model, quantize="int4")
    assert np.isfinite(nextllm_jax.load(model, quantize="int8").logits([[1, 2, 3]])).all()


def test_quantized_weights_are_not_trained_but_adapters_on_them_are(models):
    config = Config(data=DataConfig(sequence_length=16), init_from=str(models / "int8"), workdir="run")
    with pytest.raises(InputError, match=r"holds quantized weights .* cannot be trained; train adapters on them"):
        with_source(config, config)
    written = by_name(convert.open_path(str(models / "int8")).load_params(convert._on_cpu(TINY, SCHEMES["int8"])))
    for frozen in ("unquantized", "int8"):
        lora = LoraConfig(rank=2, frozen=frozen)
        config = Config(data=config.data, init_from=config.init_from, workdir="run", lora=lora)
        whole, source = with_source(config, config)
        params = by_name(initial_params(whole, source, lambda boxed: on_device(boxed, jax.devices()[0])))
        for name, leaf in params.items():
            assert is_quantized(leaf) == (frozen == "int8" and name.endswith("kernel"))
            ours, theirs = (dequantize(tree, jnp.float32) for tree in (leaf, written[name]))
            np.testing.assert_array_equal(ours, theirs)
