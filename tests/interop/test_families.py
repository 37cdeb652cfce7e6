"""Every family against transformers: the same tiny random model, saved by it, read by us, logits and greedy text."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")

from nextllm_jax.config.model import ModelConfig  # noqa: E402
from nextllm_jax.interop import huggingface  # noqa: E402
from nextllm_jax.interop.huggingface_config import canonical  # noqa: E402
from nextllm_jax.model.kv_cache import KVCache  # noqa: E402
from nextllm_jax.model.transformer import Transformer  # noqa: E402
from tests.interop.families import CASES, TIME, save_model  # noqa: E402
from tests.interop.models import on_one_device  # noqa: E402

TOLERANCE = 1e-4
"""Of the greatest logit."""
CONTINUED = 24


def load(directory: Path) -> tuple[ModelConfig, Any]:
    config, model_type = huggingface.read_config(directory)
    return config, huggingface.load_params(directory, config, model_type, on_one_device(config))


def our_logits(config: ModelConfig, params: Any, tokens_BT: np.ndarray, *, cached: bool = False) -> np.ndarray:
    model = Transformer(config)
    positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)

    @jax.jit
    def logits(params: Any) -> Any:
        cache = None
        if cached:
            cache = KVCache.create(config, batch_size=len(tokens_BT), length=tokens_BT.shape[1], dtype=np.float32)
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT.astype(np.int32), positions_BT, cache=cache)
        return model.apply({"params": params}, hidden_BTD, method="logits")

    return np.asarray(logits(params))


def their_logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT)).logits.numpy()


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@functools.cache
def tokens_and_logits(case: str, directory: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Random tokens continued by transformers' greedy choices, the logits of all of them, and where choices begin."""
    model = save_model(case, directory, max_shard_size="40KB")
    prompt = torch.from_numpy(np.random.default_rng(1).integers(3, 97, (1, TIME - CONTINUED)))
    tokens = model.generate(
        prompt, max_new_tokens=CONTINUED, min_new_tokens=CONTINUED, do_sample=False, eos_token_id=None
    ).numpy()
    return tokens, their_logits(model, tokens), TIME - CONTINUED


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_continuation_are_those_of_transformers(case, directories):
    directory = directories / case
    tokens_BT, theirs, start = tokens_and_logits(case, directory)
    assert len(list(directory.glob("*.safetensors"))) > 1  # sharded files
    config, params = load(directory)
    ours = our_logits(config, params, tokens_BT)
    difference = relative_difference(ours, theirs)
    print(f"{case}: greatest difference {difference:.1e} of the greatest logit")  # pytest -rP shows it
    assert 0.3 < theirs.std() < 2  # else the tolerance would mean something else
    assert difference < TOLERANCE
    # Given the same tokens so far, the choice is the same at every place, so the continuation is.
    np.testing.assert_array_equal(ours[0, start - 1 : -1].argmax(-1), tokens_BT[0, start:])


@pytest.mark.parametrize("case", ["granite", "gemma2", "gemma3", "phi3_longrope_long"])
def test_logits_through_the_cache_are_the_same(case, directories):
    tokens_BT, theirs, _ = tokens_and_logits(case, directories / case)
    config, params = load(directories / case)
    assert relative_difference(our_logits(config, params, tokens_BT, cached=True), theirs) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_same_files_again(case, directories, tmp_path):
    """Bit for bit, whatever the files were cut into; and its config says what the original's did."""
    tokens_and_logits(case, directories / case)
    config, params = load(directories / case)
    _, model_type = huggingface.read_config(directories / case)
    huggingface.export(config, params, tmp_path, vocab_size=97, model_type=model_type)
    again, params_again = load(tmp_path)
    assert canonical(again) == canonical(config)
    assert jax.tree.structure(params) == jax.tree.structure(params_again)
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(params_again), strict=True):
        np.testing.assert_array_equal(left, right)
    theirs, ours = (huggingface.SafetensorsSource(path) for path in (directories / case, tmp_path))
    assert ours.shapes() == theirs.shapes()
    for name, shape in theirs.shapes().items():
        rows, columns = slice(0, shape[0]), slice(0, shape[-1])
        np.testing.assert_array_equal(ours.read(name, rows, columns), theirs.read(name, rows, columns))


@pytest.mark.parametrize("case", ["llama3_tied", "phi3_window", "gemma3", "granite", "qwen2_window", "smollm3"])
def test_transformers_reads_an_export(case, directories, tmp_path):
    from transformers import AutoModelForCausalLM

    tokens_BT, theirs, _ = tokens_and_logits(case, directories / case)
    config, params = load(directories / case)
    ids = {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": None}
    huggingface.export(config, params, tmp_path, vocab_size=97, shard_bytes=40_000, token_ids=ids)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    np.testing.assert_allclose(their_logits(model, tokens_BT), theirs, atol=1e-5)


def mutate_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "drop"}))


@pytest.mark.parametrize("mutation", ["permuted q_proj", "no rope_scaling", "untied head"])
def test_a_mutation_is_noticed(mutation, directories, tmp_path, monkeypatch):
    """What the tests above compare would tell each of these wrongs."""
    case = "llama3_tied"
    tokens_BT, theirs, _ = tokens_and_logits(case, directories / case)
    model = save_model(case, tmp_path)
    if mutation == "no rope_scaling":
        mutate_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    if mutation == "permuted q_proj":
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.data = weight.data.reshape(6, 2, -1, 48).swapaxes(1, 2).reshape(weight.shape)
        model.save_pretrained(tmp_path)
    if mutation == "untied head":
        mutate_config(tmp_path, tie_word_embeddings=False)
        with pytest.raises(Exception, match=r"lacks the tensor lm_head\.weight"):
            load(tmp_path)
        return
    assert relative_difference(our_logits(*load(tmp_path), tokens_BT), theirs) > 100 * TOLERANCE
