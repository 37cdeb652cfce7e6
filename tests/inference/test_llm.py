"""The Python face: load a run directory, generate, stream, score, and refuse what cannot be."""

import dataclasses
import functools
import io
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm

import nextllm_jax
import nextllm_jax.inference.llm
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, SamplingConfig
from nextllm_jax.config.model import EXECUTION_FIELDS
from nextllm_jax.errors import InputError
from nextllm_jax.inference.llm import LLM
from nextllm_jax.inference.load import decoding_model
from nextllm_jax.interop.canonical import canonical
from nextllm_jax.model.transformer import Transformer, abstract_params
from nextllm_jax.model.weights import cast_matrices, unstack_layers
from nextllm_jax.sharding import make_mesh, placed
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.tokenizer import Tokenizer
from tests.inference.reference_sampling import next_token

CONFIG = ModelConfig(
    vocab_size=264,
    num_layers=2,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context_length=48,
    init_std=0.3,
    tie_embeddings=False,
    dtype="float32",
)
TOKENIZER = Tokenizer(
    "bytes",
    ByteBPE(
        {bytes([value]): value for value in range(256)}, r"[\s\S]", {"<|begin_of_text|>": 256, "<|end_of_text|>": 257}
    ),
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    variables = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), tokens_BT, tokens_BT)
    return LLM(CONFIG, nn.meta.unbox(variables)["params"], lambda: TOKENIZER, np.dtype("float32"))


@pytest.fixture(scope="module")
def run_directory(llm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    config = Config(model=CONFIG, data=DataConfig(sequence_length=32, tokenizer="gpt2"))
    (directory / "config.json").write_text(config.to_json())
    TOKENIZER.save(directory / "tokenizer")
    worse = jax.tree.map(lambda leaf: leaf * 0.5, llm.params)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": llm.params}, {}, validation_loss=2.0)
        checkpoints.save(5, {"params": worse}, {}, validation_loss=3.0)
    return directory


def equal(left, right) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), left, right))


def test_load_takes_the_best_the_latest_or_a_step(llm, run_directory):
    best = nextllm_jax.load(str(run_directory))
    assert best.config == CONFIG
    assert best.tokenizer.hash == TOKENIZER.hash
    expected = unstack_layers(CONFIG, llm.params)
    assert equal(best.params, expected)
    assert equal(nextllm_jax.load(str(run_directory), step="best").params, expected)
    assert equal(nextllm_jax.load(str(run_directory), step=3).params, expected)
    assert not equal(nextllm_jax.load(str(run_directory), step="latest").params, expected)


def test_how_a_model_was_trained_does_not_matter_to_its_use(run_directory, tmp_path):
    """No setting of how training computes, nor two of them that only go together, stand in the way of anything."""
    execution = {"dtype": "float32", "remat": "full", "remat_offload": True, "attention": "blockwise",
                 "attention_blocks": (16, 16)}  # fmt: skip
    assert execution.keys() == set(EXECUTION_FIELDS)
    config = dataclasses.replace(CONFIG, **execution)
    shutil.copytree(run_directory, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(
        Config(model=config, data=DataConfig(tokenizer="gpt2", sequence_length=32)).to_json()
    )
    trained_so, plain = nextllm_jax.load(str(tmp_path / "run")), nextllm_jax.load(str(run_directory))
    assert trained_so.score("some text") == plain.score("some text")
    assert canonical(config) == canonical(CONFIG)  # so exports can say it


def test_without_any_validation_loss_load_takes_the_latest(llm, run_directory, tmp_path):
    for name in ("config.json", "tokenizer"):
        (tmp_path / name).symlink_to(run_directory / name)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, {"params": llm.params}, {}, validation_loss=None)
    assert equal(nextllm_jax.load(str(tmp_path)).params, unstack_layers(CONFIG, llm.params))
    with pytest.raises(InputError, match="has a validation loss; use latest"):
        nextllm_jax.load(str(tmp_path), step="best")


def test_layers_are_unrolled_up_to_a_depth_and_say_the_same(llm, run_directory, monkeypatch):
    unrolled = nextllm_jax.load(str(run_directory))
    monkeypatch.setattr(nextllm_jax.inference.load, "MAX_UNROLLED_LAYERS", CONFIG.num_layers - 1)
    scanned = nextllm_jax.load(str(run_directory))
    assert equal(scanned.params, llm.params)
    assert unrolled.params.keys() > {"remainder_0", "remainder_1"}
    samples = unrolled.generate(["ab", "c"], max_new_tokens=8)
    assert samples == scanned.generate(["ab", "c"], max_new_tokens=8)
    np.testing.assert_allclose(unrolled.logits([[1, 2, 3]]), scanned.logits([[1, 2, 3]]), atol=1e-5)
    assert unrolled.score("some text").nll == pytest.approx(scanned.score("some text").nll, rel=1e-5)


def test_load_says_what_is_missing(run_directory, tmp_path):
    with pytest.raises(InputError, match="nothing does not exist, so it is not a run directory"):
        nextllm_jax.load(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no checkpoint '4'"):
        nextllm_jax.load(str(run_directory), step=4)
    with pytest.raises(InputError, match="is neither a local path nor gs://"):
        nextllm_jax.load("https://huggingface.co/some/model")
    with pytest.raises(InputError, match="float16"):
        nextllm_jax.load(str(run_directory), dtype="float16")


def test_bfloat16_casts_the_matrices_and_not_the_norms(llm, run_directory):
    loaded = nextllm_jax.load(str(run_directory), dtype="bfloat16")
    assert loaded.params["embed"]["embedding"].dtype == jnp.bfloat16
    assert loaded.params["final_norm"]["scale"].dtype == jnp.float32
    assert equal(
        loaded.params, unstack_layers(CONFIG, cast_matrices(abstract_params(CONFIG), llm.params, jnp.dtype("bfloat16")))
    )
    # The cast at load is the cast that the model makes at each use.
    tokens_BT = np.arange(20)[None]
    uncast = dataclasses.replace(loaded, params=unstack_layers(CONFIG, llm.params))
    np.testing.assert_array_equal(loaded.logits(tokens_BT), uncast.logits(tokens_BT))


def test_logits_are_causal_and_checked(llm):
    tokens_BT = np.arange(40).reshape(2, 20)
    logits_BTV = llm.logits(tokens_BT)
    assert logits_BTV.shape == (2, 20, 264)
    assert logits_BTV.dtype == jnp.float32
    np.testing.assert_allclose(llm.logits(tokens_BT[:, :7].tolist()), logits_BTV[:, :7], atol=1e-5)
    with pytest.raises(InputError, match="integers"):
        llm.logits([1, 2, 3])
    with pytest.raises(InputError, match="49 tokens exceed"):
        llm.logits(np.zeros((1, 49), int))
    with pytest.raises(InputError, match="0 to 263"):
        llm.logits([[264]])


def test_generate_is_greedy_argmax_and_repeats_itself(llm):
    [sample] = llm.generate("ab", max_new_tokens=6, temperature=0.0)
    tokens = [256, *b"ab"]
    for token in sample.tokens:
        assert token == int(jnp.argmax(llm.logits([tokens])[0, -1, :258]))
        tokens.append(token)
    assert sample.prompt == "ab"
    assert sample.finish_reason == "length"
    assert sample.text == TOKENIZER.decode(sample.tokens)
    first = llm.generate(["ab", ""], num_samples=2, max_new_tokens=6, seed=3)
    assert [sample.prompt for sample in first] == ["ab", "ab", "", ""]
    assert len({tuple(sample.tokens) for sample in first}) == 4
    assert llm.generate(["ab", ""], num_samples=2, max_new_tokens=6, seed=3) == first
    assert llm.generate(["ab"], num_samples=2, max_new_tokens=6, seed=3) == first[:2]


def test_stop_strings_end_samples(llm):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    [free] = llm.generate(["ab"], **options)
    stop = free.text[4:6]
    [stopped] = llm.generate(["ab"], stop=stop, **options)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]


def test_stream_is_generate_in_pieces(llm):
    stream = llm.stream(["ab", ""], max_new_tokens=12, chunk_tokens=2)
    pieces = list(stream)
    assert len(pieces) > 4
    expected = llm.generate(["ab", ""], max_new_tokens=12)
    for row, sample in enumerate(expected):
        assert "".join(piece.text for piece in pieces if piece.row == row) == sample.text
    assert [piece.sample for piece in pieces if piece.sample is not None] == expected
    assert stream.speeds.decode_tokens == 24


def test_bad_requests_are_refused(llm, monkeypatch):
    with pytest.raises(InputError, match="no prompts"):
        llm.generate([])
    with pytest.raises(InputError, match="num_samples is 0"):
        llm.generate("a", num_samples=0)
    with pytest.raises(InputError, match="temperature is -1"):
        llm.generate("a", temperature=-1)
    with pytest.raises(InputError, match="context_length 48"):
        llm.generate("a" * 40, max_new_tokens=8)
    monkeypatch.setattr(nextllm_jax.inference.llm, "Engine", None)  # what follows must not reach the prefill
    with pytest.raises(InputError, match="stop string is empty"):
        llm.generate("a", max_new_tokens=4, stop=[""])


def test_sliding_keeps_the_last_half_of_a_full_context(llm):
    """A loop over whole windows without a cache, and one random key for each position of the whole text."""
    prompts, seed, count = ["ab" * 20, "c" * 48, "d" * 100], 3, 40
    settings = SamplingConfig(temperature=1.0, repetition_penalty=1.3)
    samples = llm.generate(
        prompts, max_new_tokens=count, seed=seed, temperature=1.0, repetition_penalty=1.3, slide=True, progress=True
    )
    for prompt, sample in zip(prompts, samples, strict=True):
        tokens = TOKENIZER.encode_prompt(prompt)
        length = len(tokens)
        start = len(tokens) - 24 if len(tokens) > 48 else 0
        kept = tokens[start:]
        for token in sample.tokens:
            start = len(tokens) - 24 if len(tokens) - start > 48 else start
            logits_V = llm.logits([tokens[start:]])[0, -1, :258]
            assert token == next_token(logits_V, kept, tokens[length:], settings, (seed, 0, len(tokens)))
            tokens.append(token)
        assert sample.finish_reason == "stop" or len(sample.tokens) == count


def test_progress_counts_the_tokens_of_all_rows(llm, monkeypatch):
    bars = []

    def bar(**options):
        bars.append(tqdm.tqdm(**options | {"file": io.StringIO(), "leave": False}))
        return bars[-1]

    monkeypatch.setattr(nextllm_jax.inference.llm, "progress_bar", bar)
    assert llm.generate(["ab", ""], max_new_tokens=12, progress=True) == llm.generate(["ab", ""], max_new_tokens=12)
    assert [(each.n, each.total) for each in bars] == [(24, 24), (0, 24)]  # the second is disabled


# (method, its first argument, others, the message)
WRONG = [
    ("generate", 5, {}, "prompts is 5; it must be a string or a list"),
    ("generate", None, {}, "prompts is None; it must be"),
    ("generate", ["a", 5], {}, "a prompt is 5; it must be a string"),
    ("generate", b"a", {}, "prompts is b'a'; it must be"),
    ("generate", "a", {"stop": 5}, "stop is 5; it must be a string or a list"),
    ("generate", "a", {"stop": [None]}, "a stop string is None; it must be a string"),
    ("generate", "a", {"stop": ""}, "a stop string is empty"),
    ("generate", "a", {"max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be an integer"),
    ("generate", "a", {"max_new_tokens": "8"}, "max_new_tokens is '8'; it must be an integer"),
    ("generate", "a", {"num_samples": True}, "num_samples is True; it must be an integer"),
    ("generate", "a", {"seed": 1.5}, "seed is 1.5; it must be an integer"),
    ("generate", "a", {"seed": 2**32}, "seed is 4294967296; it must be between 0 and"),
    ("generate", "a", {"seed": -1}, "seed is -1; it must be at least 0"),
    ("generate", "a", {"temperature": math.inf}, "temperature is inf; it must be at least 0 and less than 1e30"),
    ("generate", "a", {"temperature": math.nan}, "temperature is nan"),
    ("generate", "a", {"temperature": "hot"}, "temperature is 'hot'; it must be float"),
    ("generate", "a", {"repetition_penalty": 1e-46}, "repetition_penalty is 1e-46; it must be between"),
    ("generate", "a", {"repetition_penalty": math.inf}, "repetition_penalty is inf; it must be between"),
    ("generate", "a", {"top_k": 2**31}, "top_k is 2147483648; it must be in 0 to 2147483647"),
    ("generate", "a", {"min_new_tokens": 2**31}, "min_new_tokens is 2147483648; it must be in 0 to"),
    ("generate", "a", {"logit_bias": ("5:1e39",)}, "logit_bias has '5:1e39'; it must be ID:BIAS"),
    ("generate", "a", {"logit_bias": ("5:-1e39",)}, "logit_bias has '5:-1e39'; it must be ID:BIAS"),
    ("generate", "a", {"json_schema": [*range(99)]}, " 21, 2; it must be str | None"),
    ("stream", "a", {"chunk_tokens": 0}, "chunk_tokens is 0; it must be positive"),
    ("stream", "a", {"sampling": {"top_k": 1}}, "sampling is {'top_k': 1}; it must be a SamplingConfig"),
    ("score", 5, {}, "text is 5; it must be a string or a list"),
    ("score", ["a", 5], {}, "the text to score is 5; it must be a string"),
    ("score", [], {}, "there are no texts"),
    ("score", "a", {"prefix": 5}, "prefix is 5; it must be a string"),
    ("score", "a", {"prefix": "b" * 47}, "the prefix and the text have 50 tokens with EOS"),
    ("next_token", 5, {}, "the prompt is 5; it must be a string"),
    ("next_token", "a", {"top": 0}, "top is 0; it must be positive"),
    ("next_token", "a" * 48, {}, "49 tokens exceed"),
    ("score", "a", {"window": 1.5}, "window is 1.5; it must be an integer"),
    ("score", "a", {"batch_size": "8"}, "batch_size is '8'; it must be an integer"),
    ("logits", [[1], [1, 2]], {}, "tokens must be integers of shape"),
    ("logits", None, {}, "tokens must be integers of shape"),
]


@pytest.mark.parametrize(("method", "argument", "others", "message"), WRONG, ids=[each[3][:40] for each in WRONG])
def test_arguments_of_other_types_are_refused(llm, method, argument, others, message):
    with pytest.raises(InputError, match=re.escape(message)):
        getattr(llm, method)(argument, **others)


def test_load_refuses_other_types():
    for wrong in ({"path": 5}, {"path": None}, {"path": "x", "mesh": {"fsdp": 2}}):
        with pytest.raises(InputError, match=r"(path|mesh) is .*; it must be a"):
            nextllm_jax.load(**wrong)
    with pytest.raises(InputError, match="nowhere"):
        nextllm_jax.load(Path("nowhere"))
    with pytest.raises(InputError, match="the text is 5; it must be a string"):
        TOKENIZER.encode(5)  # pyright: ignore[reportArgumentType]


def test_numpy_integers_are_integers(llm):
    one = np.int64(1)
    (sample,) = llm.generate("a", max_new_tokens=one, num_samples=one, seed=np.uint32(2**32 - 1), stop=("x",))
    assert len(sample.tokens) == 1


def test_a_lone_surrogate_counts_as_the_character_that_is_scored(llm):
    assert llm.score("a\ud800") == llm.score("a\ufffd")
    assert llm.score("a\ud83d\ude00") == llm.score("a\N{GRINNING FACE}")


@pytest.mark.parametrize(("length", "add_bos"), [(5, True), (46, True), (100, True), (100, False)])
def test_score_is_the_mean_over_windows_which_begin_with_bos_if_prompts_do(llm, length, add_bos):
    roles = dataclasses.replace(TOKENIZER.roles, add_bos=add_bos)
    other = dataclasses.replace(llm, load_tokenizer=lambda: Tokenizer("other", TOKENIZER.backend, roles))
    text = ("é" + "the quick brown fox " * 10)[:length]
    document = TOKENIZER.encode_document(text)
    targets = document[1:]
    size = 47 if add_bos and len(targets) > 48 else 48
    nll = 0.0
    for start in range(0, len(targets), size):
        before = [TOKENIZER.bos_id] if add_bos and start else []
        scored = targets[start : start + size]
        inputs = [*before, *document[start : start + len(scored)]]
        log_probabilities = jax.nn.log_softmax(llm.logits([inputs])[0])[len(before) :]
        nll -= float(sum(log_probabilities[i, target] for i, target in enumerate(scored)))
    score = other.score(text)
    assert score.tokens == len(targets) == len(text.encode()) + 1
    assert score.nll == pytest.approx(nll / score.tokens, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / len(text.encode()), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.nll))


def test_score_does_not_depend_on_the_batch(llm):
    text = "some words in a row, " * 12
    assert llm.score(text, window=16, batch_size=3).nll == pytest.approx(llm.score(text, window=16).nll, rel=1e-6)
    with pytest.raises(InputError, match="empty"):
        llm.score("")
    with pytest.raises(InputError, match="window is 49"):
        llm.score("text", window=49)
    with pytest.raises(InputError, match="window is 1, which leaves no room"):
        llm.score("text", window=1)


def test_several_texts_are_scored_as_each_alone(llm):
    texts = ["a", "some words", "many words " * 8]
    for together, alone in zip(llm.score(texts, batch_size=2), map(llm.score, texts), strict=True):
        assert together.token_ids == alone.token_ids
        np.testing.assert_allclose(together.logprobs, alone.logprobs, rtol=1e-4)
        assert together.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-5)


def test_log_probabilities_are_those_of_transformers(llm, without_tokenizer):
    """The ids are those that `generate` reads; a prefix is not scored, and EOS is."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(without_tokenizer, dtype=torch.float32)
    prefix, text = "a prompt", " and more"
    ids = [256, *prefix.encode(), *text.encode(), 257]
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0].double()
    expected = torch.log_softmax(logits[:-1], -1)[range(len(ids) - 1), ids[1:]].numpy()
    for score, start in ((llm.score(prefix + text), 1), (llm.score(text, prefix=prefix), 1 + len(prefix))):
        assert score.token_ids == tuple(ids[start:])
        np.testing.assert_allclose(score.logprobs, expected[start - 1 :], atol=2e-4)
        assert score.nll == pytest.approx(-expected[start - 1 :].mean(), abs=1e-4)
        num_bytes = len(ids) - 1 - start
        assert score.bits_per_byte == pytest.approx(-expected[start - 1 :].sum() / math.log(2) / num_bytes, abs=1e-3)

    known = torch.softmax(logits[len(prefix), :258], -1)  # without the rows that only pad the embedding
    found = llm.next_token(prefix, top=5)
    assert [token.id for token in found] == known.argsort(descending=True)[:5].tolist()
    assert [token.text for token in found] == [TOKENIZER.decode([token.id]) for token in found]
    np.testing.assert_allclose([token.probability for token in found], known.sort(descending=True)[0][:5], rtol=1e-3)
    assert sum(token.probability for token in llm.next_token(prefix, top=1000)) == pytest.approx(1, abs=1e-5)


def test_importing_the_package_and_its_config_does_not_import_jax():
    code = "import sys, nextllm_jax, nextllm_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert nextllm_jax.__version__
    with pytest.raises(AttributeError, match="no attribute lod"):
        nextllm_jax.lod  # noqa: B018


@pytest.fixture(scope="module")
def without_tokenizer(llm, tmp_path_factory):
    """A Hugging Face directory with weights alone."""
    huggingface = pytest.importorskip("nextllm_jax.interop.huggingface", exc_type=ImportError)
    directory = tmp_path_factory.mktemp("huggingface")
    huggingface.export(CONFIG, llm.params, directory, vocab_size=CONFIG.vocab_size, dtype="float32")
    return str(directory)


def test_without_a_tokenizer_there_are_logits_and_no_text(llm, without_tokenizer):
    loaded = nextllm_jax.load(without_tokenizer)
    tokens_BT = np.arange(20)[None]
    np.testing.assert_allclose(loaded.logits(tokens_BT), llm.logits(tokens_BT), atol=1e-4)
    uses = (lambda: loaded.tokenizer, lambda: loaded.generate("a"), lambda: loaded.score("a"))
    for use in uses:
        with pytest.raises(InputError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
            use()


MESHES = pytest.param({"data": 8}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_on_a_mesh_a_model_computes_what_it_does_on_one_device(run_directory, without_tokenizer, sizes):
    mesh = MeshConfig(**sizes)
    one, loaded = nextllm_jax.load(str(run_directory)), nextllm_jax.load(str(run_directory), mesh=mesh)
    _, planned = decoding_model(CONFIG, loaded.dtype, functools.partial(placed, make_mesh(mesh)))
    shardings = jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, loaded.params, planned)
    assert all(jax.tree.leaves(shardings))
    up = loaded.params["remainder_1"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size == up.size // (sizes.get("fsdp", 1) * sizes.get("tensor", 1))
    assert equal(jax.device_get(nextllm_jax.load(without_tokenizer, mesh=mesh).params), jax.device_get(one.params))

    tokens_BT = np.arange(60).reshape(3, 20)
    for rows in (1, 3):  # numbers that the mesh does not divide
        np.testing.assert_allclose(loaded.logits(tokens_BT[:rows]), one.logits(tokens_BT[:rows]), atol=1e-4)
    assert loaded.score("some text").nll == pytest.approx(one.score("some text").nll, rel=1e-5)
    prompts = ["ab", "c", "defg"]
    for settings in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        assert loaded.generate(prompts, max_new_tokens=12, **settings) == one.generate(
            prompts, max_new_tokens=12, **settings
        )


def test_a_mesh_that_does_not_fit_is_refused(run_directory):
    with pytest.raises(InputError, match=r"kv_heads.*2.*4 devices"):
        nextllm_jax.load(str(run_directory), mesh=MeshConfig(data=2, tensor=4))
    with pytest.raises(InputError, match="devices"):
        nextllm_jax.load(str(run_directory), mesh=MeshConfig(data=3))
