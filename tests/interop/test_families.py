"""Every family against transformers: the same tiny random model, saved by it, read by us, logits and greedy text."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")

from safetensors.numpy import load_file, save_file  # noqa: E402

from nextllm_jax.config.model import ModelConfig  # noqa: E402
from nextllm_jax.interop import huggingface  # noqa: E402
from nextllm_jax.interop.canonical import canonical  # noqa: E402
from nextllm_jax.model.kv_cache import KVCache  # noqa: E402
from nextllm_jax.model.transformer import Transformer  # noqa: E402
from tests.interop.families import CASES, EXPERTS, TIME, save_model  # noqa: E402
from tests.interop.models import on_one_device  # noqa: E402

TOLERANCE = 1e-4
"""Of the greatest logit."""
CONTINUED = 24
SPARSE = tuple(case for case, (_, changes) in CASES.items() if EXPERTS.items() <= changes.items())


def load(directory: Path) -> tuple[ModelConfig, Any]:
    config, model_type = huggingface.read_config(directory)
    return config, huggingface.load_params(directory, config, model_type, on_one_device(config))


def our_logits(config: ModelConfig, params: Any, tokens_BT: np.ndarray, *, cached: bool = False) -> np.ndarray:
    return np.asarray(logits_function(config, cached)(params, tokens_BT.astype(np.int32)))


@functools.cache
def logits_function(config: ModelConfig, cached: bool) -> Any:
    model = Transformer(config)

    @jax.jit
    def logits(params: Any, tokens_BT: Any) -> Any:
        B, T = tokens_BT.shape
        positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
        cache = KVCache.create(config, batch_size=B, length=T, dtype=np.float32) if cached else None
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT, positions_BT, cache=cache)
        return model.apply({"params": params}, hidden_BTD, method="logits")

    return logits


def their_logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT)).logits.numpy()


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


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


@pytest.mark.parametrize("case", ["granite", "gemma2", "gemma3", "phi3_longrope_long", "qwen2_moe_window"])
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
    theirs, ours = tensors_in(directories / case), tensors_in(tmp_path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, strict=True)


READ = ("llama3_tied", "phi3_window", "gemma3", "granite", "qwen2_window", "smollm3", *SPARSE)


@pytest.mark.parametrize("case", READ)
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


def swap(one: str, other: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        one_name, other_name = (f"model.layers.2.{name}.weight" for name in (one, other))
        tensors[one_name], tensors[other_name] = tensors[other_name], tensors[one_name]

    return change


def roll(name: str, axis: int, rows: int) -> Callable[[dict[str, np.ndarray]], None]:
    full = f"model.layers.2.{name}.weight"
    return lambda tensors: tensors.update({full: np.roll(tensors[full], rows, axis)})


EXPERTS_OF_MIXTRAL = "block_sparse_moe.experts.3"
MUTATIONS = {
    "gate and up of one expert": ("mixtral_window", swap(f"{EXPERTS_OF_MIXTRAL}.w1", f"{EXPERTS_OF_MIXTRAL}.w3")),
    "one matrix of two experts": ("olmoe", swap("mlp.experts.2.down_proj", "mlp.experts.4.down_proj")),
    "rows of the router": ("qwen2_moe_window", roll("mlp.gate", 0, 1)),
    "gate of the shared expert": ("qwen2_moe_window", roll("mlp.shared_expert_gate", 1, 1)),
    "gate and up of all experts": ("granitemoe", roll("block_sparse_moe.input_linear", 1, 40)),
    "gate and up of the shared expert": ("granitemoe_shared", roll("shared_mlp.input_linear", 0, 56)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_of_experts_is_noticed(mutation, directories, tmp_path):
    case, change = MUTATIONS[mutation]
    tokens_BT, theirs, _ = tokens_and_logits(case, directories / case)
    tensors = tensors_in(directories / case)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(directories / case / "config.json", tmp_path)
    assert relative_difference(our_logits(*load(tmp_path), tokens_BT), theirs) > 30 * TOLERANCE


def test_weights_of_experts_that_are_not_normalized_are_noticed(directories, tmp_path):
    case = "qwen3_moe"
    tokens_BT, theirs, _ = tokens_and_logits(case, directories / case)
    shutil.copytree(directories / case, tmp_path, dirs_exist_ok=True)
    mutate_config(tmp_path, norm_topk_prob=False)
    assert relative_difference(our_logits(*load(tmp_path), tokens_BT), theirs) > 30 * TOLERANCE
