"""Quantized GGUF files whose blocks llama.cpp made, against what llama.cpp computes with them; and split files."""

import ctypes
import dataclasses
import functools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp is missing; install the extra 'parity'")
pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")
gguf = pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")

import nextllm_jax  # noqa: E402
from nextllm_jax.errors import InputError  # noqa: E402
from nextllm_jax.interop.gguf import GGUFFile, export  # noqa: E402
from nextllm_jax.tokenizer.gguf import to_gguf  # noqa: E402
from tests.interop.models import CONFIG, TOKENIZER, assert_equal_trees, on_one_device, random_params  # noqa: E402
from tests.interop.test_llama_cpp import PROMPT, ask_llama_cpp, compare  # noqa: E402

WIDE = dataclasses.replace(
    CONFIG, num_layers=2, embed_dim=256, mlp_dim=256, head_dim=64, context_length=128, vocab_size=TOKENIZER.vocab_size
)
"""Its rows have whole blocks of 256."""
KINDS = [
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
]  # fmt: skip
OFTEN = ("Q4_K", "IQ4_XS")


@functools.cache
def library() -> Any:
    """The functions of llama.cpp that the package exports."""
    (file,) = Path(llama_cpp.__file__).parent.glob("xllamacpp*.so")
    found = ctypes.CDLL(str(file))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = (
        [ctypes.c_int] + [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    )
    return found


def blocks_of(values: np.ndarray, kind: str) -> np.ndarray:
    """The rows of bytes that llama.cpp quantizes a matrix to, all of whose values count alike."""
    rows, columns = values.shape
    values, weights = np.ascontiguousarray(values, np.float32), np.ones(columns, np.float32)
    shape = gguf.quants.quant_shape_to_byte_shape(values.shape, gguf.GGMLQuantizationType[kind])
    made = np.zeros(shape, np.uint8)
    number = gguf.GGMLQuantizationType[kind].value
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, made, weights)]
    library().ggml_quantize_chunk(number, pointers[0], pointers[1], 0, rows, columns, pointers[2])
    return made


def dequantized(blocks: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """What llama.cpp makes of blocks."""
    function = getattr(library(), f"dequantize_row_{kind.lower() if '_K' not in kind else kind[0].lower() + kind[1:]}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    values = np.zeros(shape, np.float32)
    function(blocks.ctypes.data_as(ctypes.c_void_p), values.ctypes.data_as(ctypes.c_void_p), values.size)
    return values


def rewrite(
    source: Path,
    target: Path,
    change: Any = lambda tensor: [(tensor.name, tensor.data, tensor.tensor_type)],
    **split: int,
) -> None:
    """Write a GGUF file again, perhaps in several parts. `change` makes the tensors in place of each."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama", **split)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        for name, data, kind in change(tensor):
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A file in float32."""
    file = tmp_path_factory.mktemp("types") / "plain.gguf"
    params = random_params(WIDE)
    export(WIDE, params, file, vocab_size=WIDE.vocab_size, dtype="float32", metadata=to_gguf(TOKENIZER))
    return file


@pytest.mark.parametrize(
    "kind", [kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_llama_cpp_computes_with_the_same_weights(kind, plain, tmp_path):
    """Its blocks have the same values here, bit for bit; its likelihoods are near, since it rounds activations too."""
    if kind not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"this version of gguf has no {kind}")
    worth: dict[str, np.ndarray] = {}

    def change(tensor: Any) -> list[tuple[str, np.ndarray, Any]]:
        if tensor.data.ndim == 1 or tensor.name == "token_embd.weight":
            return [(tensor.name, np.array(tensor.data), tensor.tensor_type)]
        blocks = blocks_of(tensor.data, kind)
        worth[tensor.name] = dequantized(blocks, kind, tensor.data.shape)
        return [(tensor.name, blocks, gguf.GGMLQuantizationType[kind])]

    file = tmp_path / "model.gguf"
    rewrite(plain, file, change)
    read = GGUFFile(file)
    down = np.asarray(read.load_params(on_one_device(read.config))["layers"]["block_0"]["mlp"]["down"]["kernel"][1])
    np.testing.assert_array_equal(down.T, worth["blk.1.ffn_down.weight"])

    llm, prompt = nextllm_jax.load(str(file), dtype="float32"), TOKENIZER.encode_prompt(PROMPT)
    difference, _ = compare(llm, file, prompt)
    print(f"{kind}: log probabilities differ by {difference:.1e}")  # pytest -rP shows it
    assert difference < 0.3
    unrounded = nextllm_jax.load(str(plain), dtype="float32").logits([prompt])
    assert np.abs(np.asarray(unrounded) - llm.logits([prompt])).max() > 2 * difference  # the weights are rounded more


def parts(plain: Path, folder: Path) -> list[Path]:
    """The file in parts of at most 8 tensors."""
    rewrite(plain, folder / "split.gguf", split_max_tensors=8)
    return sorted(folder.glob("split-*.gguf"))


def test_a_split_model_is_read_from_any_part(plain, tmp_path):
    files = parts(plain, tmp_path)
    assert len(files) == 3
    expected = GGUFFile(plain).load_params(on_one_device(WIDE))
    for file in (files[0], files[2]):
        read = GGUFFile(file)
        assert read.config == GGUFFile(plain).config
        assert_equal_trees(read.load_params(on_one_device(read.config)), expected)
    prompt = TOKENIZER.encode_prompt(PROMPT)
    assert ask_llama_cpp(files[0], prompt, [])[0] == ask_llama_cpp(plain, prompt, [])[0]
    assert nextllm_jax.load(str(files[1])).tokenizer.encode(PROMPT) == TOKENIZER.encode(PROMPT)


def test_parts_that_are_not_of_one_model_are_refused(plain, tmp_path):
    first, second, third = parts(plain, tmp_path)
    with pytest.raises(InputError, match=r"must end with -00001-of-00003\.gguf, \.\.\.; rename them"):
        GGUFFile(shutil.copy(first, tmp_path / "other.gguf"))
    shutil.copy(third, second)
    with pytest.raises(InputError, match=rf"{second.name} is not part 2 of 3; use the parts of one model"):
        GGUFFile(first)
    second.unlink()
    with pytest.raises(InputError, match=rf"is one of 3 parts, but {re.escape(second.name)} is missing"):
        GGUFFile(first)


def test_a_file_with_one_tensor_per_expert_is_read(tmp_path):
    """As early versions of llama.cpp wrote Mixtral."""
    config = dataclasses.replace(CONFIG, vocab_size=TOKENIZER.vocab_size, num_experts=3, experts_per_token=2)
    params, file = random_params(config), tmp_path / "model.gguf"
    export(config, params, file, vocab_size=config.vocab_size, dtype="float32", metadata=to_gguf(TOKENIZER))

    def change(tensor: Any) -> list[tuple[str, np.ndarray, Any]]:
        if "_exps." not in tensor.name:
            return [(tensor.name, tensor.data, tensor.tensor_type)]
        names = [tensor.name.replace("_exps.", f".{expert}.") for expert in range(3)]
        return [(name, data, tensor.tensor_type) for name, data in zip(names, tensor.data, strict=True)]

    rewrite(file, tmp_path / "early.gguf", change)
    early = GGUFFile(tmp_path / "early.gguf")
    assert "blk.2.ffn_down.1.weight" in early.shapes()
    assert early.config == GGUFFile(file).config
    assert_equal_trees(early.load_params(on_one_device(early.config)), params)
