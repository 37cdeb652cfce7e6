"""Adapters in the format of PEFT, read and written, against the package peft on tiny models."""

import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", reason="peft is missing; install the extra 'parity'")
pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")

from safetensors.numpy import load_file, save_file  # noqa: E402

from nextllm_jax.config import LoraConfig  # noqa: E402
from nextllm_jax.errors import InputError  # noqa: E402
from nextllm_jax.interop import huggingface  # noqa: E402
from nextllm_jax.interop.peft import export_adapters, load_adapters, read_adapter_config  # noqa: E402
from nextllm_jax.model import lora  # noqa: E402
from nextllm_jax.model.transformer import Transformer, abstract_params  # noqa: E402
from nextllm_jax.sharding import on_device  # noqa: E402
from tests.interop.families import save_model  # noqa: E402
from tests.interop.models import on_one_device  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

TOKENS = np.random.default_rng(1).integers(3, 97, (1, 48))
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "alpha unequal to rank, all matrices": (
        "llama_mqa_head_dim_24",
        {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
        {"rank": 3, "alpha": 7.0, "targets": ()},
    ),
    "rsLoRA, some matrices": (
        "qwen2",
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        {"rank": 4, "alpha": 8.0, "rank_stabilized": True, "targets": ("q", "o", "down")},
    ),
    "a pattern with several kinds of layers": (
        "gemma3",
        {"r": 2, "lora_alpha": 1, "target_modules": r".*\.(k_proj|gate_proj|up_proj)"},
        {"rank": 2, "alpha": 1.0, "targets": ("k", "gate", "up")},
    ),
}


def theirs(directory: Path, **options: Any) -> Any:
    """The base model of a directory in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **options).eval()


@functools.cache
def made_by_peft(case: str, folder: Path) -> tuple[Path, Path, np.ndarray]:
    """A base model, an adapter of it with random weights, and their logits."""
    family, settings, _ = CASES[case]
    base, adapter = folder / f"{case} base", folder / f"{case} adapter"
    save_model(family, base)
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = peft.get_peft_model(theirs(base), config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape) / weight.shape[1] ** 0.5 / 2
    model.save_pretrained(adapter)
    with torch.no_grad():
        return base, adapter, model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("peft")


def ours(base: Path, adapter: Path, dtype: str = "float32") -> tuple[Any, LoraConfig, Any, Any]:
    """(model config, lora config, frozen weights, adapters) of two directories."""
    config, model_type = huggingface.read_config(base)
    config = dataclasses.replace(config, param_dtype=dtype)
    lora_config = LoraConfig(**read_adapter_config(adapter, config))
    params = huggingface.load_params(base, config, model_type, on_one_device(config))
    boxed = jax.eval_shape(lambda: lora.create(lora_config, abstract_params(config), jax.random.key(0)))
    adapters = load_adapters(adapter, config, on_device(boxed, jax.devices()[0]))
    return config, lora_config, lora.Frozen(params, lora_config.scale), adapters


def our_logits(config: Any, variables: Any) -> np.ndarray:
    model, tokens = Transformer(config, jnp.dtype("float32")), TOKENS.astype(np.int32)
    hidden, _ = model.apply(variables, tokens, np.arange(tokens.shape[1], dtype=np.int32)[None])
    return np.asarray(model.apply(variables, hidden, method="logits"))


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_the_same_logits(case, folder):
    base, adapter, expected = made_by_peft(case, folder)
    config, lora_config, frozen, adapters = ours(base, adapter)
    for name, value in CASES[case][2].items():
        assert getattr(lora_config, name) == value, name
    found = our_logits(config, lora.variables(adapters, frozen))
    plain = our_logits(config, {"params": frozen.params})
    assert np.abs(plain - expected).max() > 0.1 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_same_adapter_and_peft_reads_it(case, folder, tmp_path):
    base, adapter, expected = made_by_peft(case, folder)
    config, lora_config, _, adapters = ours(base, adapter)
    export_adapters(config, lora_config, adapters, tmp_path, dtype="float32", base=str(base))
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    model = peft.PeftModel.from_pretrained(theirs(base), tmp_path).eval()
    assert model.peft_config["default"].base_model_name_or_path == str(base)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(TOKENS)).logits.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_into_bfloat16_weights(dtype, folder, tmp_path):
    """With adapters of either type: peft computes with them in float32."""
    base, adapter, _ = made_by_peft("rsLoRA, some matrices", folder)
    config, lora_config, frozen, adapters = ours(base, adapter, "bfloat16")
    export_adapters(config, lora_config, adapters, tmp_path / "adapter", dtype=dtype)
    _, _, _, adapters = ours(base, tmp_path / "adapter", "bfloat16")
    model = peft.PeftModel.from_pretrained(theirs(base, dtype=torch.bfloat16), tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = lora.merge(abstract_params(config), adapters, frozen, jnp.bfloat16)
    _, model_type = huggingface.read_config(tmp_path / "merged")
    expected = huggingface.load_params(tmp_path / "merged", config, model_type, on_one_device(config))
    changed = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(merged)):
        right = functools.reduce(lambda tree, step: tree[step.key], path, expected)
        before = functools.reduce(lambda tree, step: tree[step.key], path, frozen.params)
        assert leaf.dtype == jnp.bfloat16
        assert (np.asarray(leaf) != np.asarray(right)).mean() <= 0.001, path  # where a sum lies between two numbers
        np.testing.assert_allclose(np.asarray(leaf, np.float32), np.asarray(right, np.float32), rtol=2**-7)
        changed += (np.asarray(leaf) != np.asarray(before)).mean() > 0.9
    assert changed == 3


def change(adapter: Path, **changes: Any) -> None:
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(values | changes))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "all"}, "bias is 'all'; only none is supported"),
    "kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    "dora": ({"use_dora": True}, "use_dora is True; adapters with this key are not supported"),
    "ranks": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is "),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is "),
    "base weights": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "rank": ({"r": 5}, r"lora_A\.weight has shape \[4, 48\], but the config needs \[5, 48\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_lora_is_refused_by_name(name, folder, tmp_path):
    base, adapter, _ = made_by_peft("rsLoRA, some matrices", folder)
    for file in adapter.glob("adapter_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changes, message = REFUSED[name]
    change(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        ours(base, tmp_path)


def test_other_files_are_refused_by_name(folder, tmp_path):
    base, adapter, _ = made_by_peft("rsLoRA, some matrices", folder)
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        ours(base, tmp_path)
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors \(adapter_model\.bin is a pickle"):
        ours(base, tmp_path)
    tensors = load_file(adapter / "adapter_model.safetensors")
    extra = {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 48), np.float32)}
    save_file(tensors | extra, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"does not have the tensor base_model\.model\.lm_head\.lora_A\.weight"):
        ours(base, tmp_path)
