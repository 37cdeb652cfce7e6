"""The harness's own runs of tasks from local files, against direct computations."""

import dataclasses
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nextllm_jax.config import ModelConfig
from nextllm_jax.errors import InputError
from nextllm_jax.inference.llm import LLM
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.tokenizer import Roles, Tokenizer

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
pytest.importorskip("lm_eval", reason="pip install '.[lm-eval]'")
pytestmark = pytest.mark.filterwarnings("default")  # of the harness's many dependencies

CONFIG = ModelConfig(
    vocab_size=264, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8, context_length=64,
    init_std=0.3, dtype="float32",
)  # fmt: skip
SPECIAL = {"<s>": 256, "</s>": 257}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
QUESTIONS = [
    {"question": "one", "choices": [" a", " bb", " ccc"], "answer": 1, "text": "a text of some length, " * 9},
    {"question": "two and more", "choices": [" xyz", " q"], "answer": 0, "text": "short"},
    {"question": "über", "choices": ["!", " ü", "?"], "answer": 2, "text": "e" * 64},
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "until": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["%s"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def llm() -> LLM:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    roles = Roles(bos_id=256, eos_id=257, stop_ids=(257,), names=names, chat_template=TEMPLATE)
    tokenizer = Tokenizer("bytes", ByteBPE({bytes([i]): i for i in range(256)}, r"[\s\S]", SPECIAL), roles)
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    params = nn.meta.unbox(jax.jit(Transformer(CONFIG).init)(jax.random.key(0), tokens_BT, tokens_BT))["params"]
    return LLM(CONFIG, params, lambda: tokenizer, np.dtype("float32"))


def run(llm, directory, name, *, stop="zz", **kwargs):
    """What the harness logs for each document of a task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from nextllm_jax.evaluation.harness import HarnessModel

    (directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    source = f"task: local_{name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: "
    source += f"{directory}/questions.jsonl}}, cache_dir: {directory}/cache}}\n{TASKS[name]}"
    (directory / f"{name}.yaml").write_text(source.replace("%s", stop))
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    results = simple_evaluate(
        HarnessModel(llm=llm, batch_size=2), tasks=[f"local_{name}"], task_manager=manager, bootstrap_iters=0, **kwargs
    )
    assert results is not None
    return results["results"][f"local_{name}"], sorted(results["samples"][f"local_{name}"], key=lambda s: s["doc_id"])


def logprob(llm, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits_TV = llm.logits([(context + continuation)[:-1]])[0][len(context) - 1 :]
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    greedy = np.argmax(np.asarray(logits_TV)[:, :258], axis=-1).tolist() == continuation
    return float(sum(logprobs_TV[i, token] for i, token in enumerate(continuation))), greedy


def test_multiple_choice_is_the_likelihood_of_the_choices(llm, tmp_path):
    result, samples = run(llm, tmp_path, "choice")
    right = []
    for sample, row in zip(samples, QUESTIONS, strict=True):
        context = [256, *f"Q: {row['question']}\nA:".encode()]
        expected = [logprob(llm, context, list(choice.encode())) for choice in row["choices"]]
        for (found,), (likelihood, greedy) in zip(sample["resps"], expected, strict=True):
            assert float(found[0]) == pytest.approx(likelihood, rel=1e-4)
            assert str(found[1]) == str(greedy)
        right.append(int(np.argmax([likelihood for likelihood, _ in expected])) == row["answer"])
    assert result["acc,none"] == pytest.approx(np.mean(right))


def test_rolling_is_the_likelihood_of_the_text(llm, tmp_path):
    result, samples = run(llm, tmp_path, "rolling")
    total = 0.0
    for sample, row in zip(samples, QUESTIONS, strict=True):
        ids = list(row["text"].encode())
        length = 64 if len(ids) <= 64 else 63  # each further window has BOS and one token before it
        windows = [([256, *ids[max(i - 1, 0) : i]], ids[i : i + length]) for i in range(0, len(ids), length)]
        if len(windows) > 1:  # the last window reaches back to be full
            rest = len(ids) % length
            windows[-1] = ([256, *ids[-length - 1 : -rest]], ids[-rest:])
        expected = sum(logprob(llm, context, continuation)[0] for context, continuation in windows)
        assert float(sample["resps"][0][0]) == pytest.approx(expected, rel=1e-4)
        total += expected
    num_bytes = sum(len(row["text"].encode()) for row in QUESTIONS)
    assert result["bits_per_byte,none"] == pytest.approx(-total / num_bytes / np.log(2), rel=1e-4)


NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
PREFIXES = [(NAMES, True, 256), (NAMES, False, 256), ({"eos_token": "</s>"}, False, 257), ({}, False, 257)]


@pytest.mark.parametrize(("names", "add_bos", "prefix"), PREFIXES)
def test_the_prefix_is_bos_or_eos_as_in_the_harness_s_own_models(llm, names, add_bos, prefix):
    from nextllm_jax.evaluation.harness import HarnessModel

    roles = Roles(bos_id=256 if add_bos else 257, eos_id=257, add_bos=add_bos, names=names)
    other = dataclasses.replace(llm, load_tokenizer=lambda: Tokenizer("bytes", llm.tokenizer.backend, roles))
    assert HarnessModel(llm=other).prefix_token_id == prefix
    assert HarnessModel(llm=other).tok_encode("a") == ([256, 97] if add_bos else [97])


def test_generation_ends_at_the_task_s_stop_strings(llm, tmp_path):
    free = [
        sample.text for sample in llm.generate([r["question"] for r in QUESTIONS], max_new_tokens=12, temperature=0)
    ]
    _, samples = run(llm, tmp_path, "until")
    assert [sample["resps"][0][0] for sample in samples] == free
    stop = next(letter for letter in "".join(text[2:] for text in free) if letter.isascii() and letter.isalnum())
    _, samples = run(llm, tmp_path, "until", stop=stop)
    assert [sample["resps"][0][0] for sample in samples] == [text.split(stop)[0] for text in free]


def test_a_chat_s_control_tokens_are_meant(llm, tmp_path):
    pytest.importorskip("jinja2", reason="pip install '.[interop]'")
    from nextllm_jax.evaluation.harness import HarnessModel

    model = HarnessModel(llm=llm)
    text = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert model.tok_encode(text) == [256, *b"hi", 257]
    _, samples = run(llm, tmp_path, "until", apply_chat_template=True)
    expected = llm.logits([[256, *b"one", 257]])[0, -1, :258].argmax()
    assert samples[0]["resps"][0][0].startswith(llm.tokenizer.decode([int(expected)])[:1])


def test_settings_that_cannot_be_honoured_are_refused(llm):
    from nextllm_jax.evaluation.harness import HarnessModel, _settings

    with pytest.raises(InputError, match="num_beams, not supported"):
        _settings({"until": ["x"], "num_beams": 4}, 8)
    with pytest.raises(InputError, match="batch_size is auto"):
        HarnessModel(llm=llm, batch_size="auto")
    with pytest.raises(InputError, match="checkpoint=PATH"):
        HarnessModel()
    with pytest.raises(InputError, match="nowhere does not exist"):
        HarnessModel(checkpoint="nowhere")
    for wrong in ({"until": 5}, {"until": [5]}, {"max_gen_toks": 1.5}, {"max_gen_toks": "x"}, {"do_sample": "false"}):
        with pytest.raises(InputError, match="must be"):
            _settings(wrong, 8)
    assert _settings({"until": ["", "x"]}, 8)[0] == ("x",)
    assert _settings({"until": "x", "temperature": 0.5, "top_p": 0.9}, 8)[2].temperature == 0.5


def test_the_command_scores_a_task_of_a_file(trained, tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    source = "task: local_choice\ndataset_path: json\ntest_split: test\ndataset_kwargs: {data_files: {test: "
    (tmp_path / "choice.yaml").write_text(
        source + f"{tmp_path}/questions.jsonl}}, cache_dir: {tmp_path}/cache}}\n{TASKS['choice']}"
    )
    command = ("nextllm_jax.cli", "lm_eval", "--include_path", tmp_path, "--tasks", "local_choice", "--model_args")
    assert "|local_choice|" in trained.run(*command, "checkpoint=runs/config").stdout
