"""tokenize, evaluate and sample.py --chat in this process: what they print, and what they refuse."""

import io
import json
import re

import pytest

import nextllm_jax
from nextllm_jax.cli import sample
from nextllm_jax.cli.text import evaluate_command, tokenize_command
from nextllm_jax.errors import InputError

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def directory(trained, monkeypatch):
    """The trained run's directory as the current one, with nothing written into the user's cache."""
    monkeypatch.chdir(trained.directory)
    return trained.directory


def test_more_tokens_than_the_context_are_refused_before_the_weights_are_read(directory, capsys, monkeypatch):
    asked = ["--checkpoint", "runs/config", "--prompt", "a dog", "--max-new-tokens", "140", "--json"]
    sample.sample_command([*asked, "--slide"])
    assert len(json.loads(capsys.readouterr().out.splitlines()[0])["tokens"]) > 128
    monkeypatch.setattr("nextllm_jax.inference.load.load_source", None)
    with pytest.raises(
        InputError, match=r"prompt 'a dog' has \d+ tokens, .* 140 exceeds .* context_length 128; .*--slide"
    ):
        sample.sample_command(asked)
    with pytest.raises(InputError, match="--slide is not for a chat"):
        sample.sample_command([*asked, "--slide", "--chat"])


def test_tokenize_prints_a_line_a_token(directory, capsys):
    (directory / "text.txt").write_text("a dog ü\n", encoding="utf-8")
    tokenize_command(["--tokenizer", "runs/config", "--file", "text.txt"])
    *lines, total = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{len(lines)} tokens, 9 bytes, \d\.\d\d bytes per token", total)
    assert re.fullmatch(r" +\d+  \"a.*", lines[0])
    tokenize_command(["--tokenizer", "data/known", "<|end_of_text|>", "--special", "--json"])
    assert json.loads(capsys.readouterr().out) == {"ids": [319], "pieces": ["<|end_of_text|>"]}
    tokenize_command(["--tokenizer", "runs/config/tokenizer", "<|end_of_text|>", "--json"])
    assert 319 not in json.loads(capsys.readouterr().out)["ids"]


BAD_TOKENIZE = {
    "no tokenizer": (["--tokenizer", "nowhere", "x"], "tokenizer nowhere is not an existing file"),
    "no file": (["--tokenizer", "runs/config", "--file", "nowhere.txt"], "nowhere.txt cannot be read"),
    "two texts": (["--tokenizer", "runs/config", "x", "--file", "text.txt"], "both a text and --file"),
    "empty directory": (["--tokenizer", "corpus", "x"], "corpus holds no tokenizer"),
    "damaged GGUF": (["--tokenizer", "broken.gguf", "x"], "broken.gguf cannot be read as GGUF"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZE)
def test_bad_input_to_tokenize_is_refused(directory, case):
    if case == "damaged GGUF":
        pytest.importorskip("gguf", reason="pip install '.[interop]'")
        (directory / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    arguments, sentence = BAD_TOKENIZE[case]
    with pytest.raises(InputError, match=sentence):
        tokenize_command(arguments)


def test_evaluate_scores_a_text_as_the_python_face_does(directory, capsys):
    text = (directory / "corpus" / "003.txt").read_text(encoding="utf-8")
    command = ["--checkpoint", "runs/config", "--text", "corpus/003.txt"]
    evaluate_command([*command, "--json", "--window", "40"])
    score = json.loads(capsys.readouterr().out)
    expected = nextllm_jax.load("runs/config").score(text, window=40)
    assert score["tokens"] == expected.tokens
    assert score["nll"] == pytest.approx(expected.nll, rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    evaluate_command([*command, "--step", "latest", "--window", "40"])
    line = capsys.readouterr().out
    assert re.fullmatch(r"[\d,]+ tokens, nll \d\.\d{4}, perplexity [\d.]+, \d\.\d{4} bits per byte\n", line)


def test_evaluate_of_data_depends_on_the_window_and_not_on_the_batch(directory, capsys):
    scores = []
    for change in ([], ["--batch-size", "3"], ["--window", "32"]):
        evaluate_command(["--checkpoint", "runs/config", "--data", "data/known", "--json", *change])
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)
    assert scores[2]["nll"] > scores[0]["nll"]


BAD_EVALUATE = {
    "nothing": ([], "give either --text FILE or --data DIR"),
    "both": (["--text", "config.py", "--data", "data/known"], "give either --text FILE or --data DIR"),
    "no text": (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
    "no data": (["--data", "corpus"], "corpus holds no prepared data"),
    "window": (["--data", "data/known", "--window", "129"], "window is 129"),
    "batch": (["--text", "config.py", "--batch-size", "0"], "batch_size is 0"),
}


@pytest.mark.parametrize("case", BAD_EVALUATE)
def test_bad_input_to_evaluate_is_refused(directory, case):
    arguments, sentence = BAD_EVALUATE[case]
    with pytest.raises(InputError, match=sentence):
        evaluate_command(["--checkpoint", "runs/config", *arguments])


def test_data_of_another_tokenizer_is_refused(directory, tmp_path):
    from nextllm_jax.config import DataConfig
    from nextllm_jax.data.prepare import prepare

    prepare(DataConfig(corpus="corpus", vocab_size=300, num_processes=1, validation_fraction=0.2), tmp_path / "other")
    with pytest.raises(InputError, match="has another tokenizer than the model"):
        evaluate_command(["--checkpoint", "runs/config", "--data", str(tmp_path / "other")])


CHAT = ["--checkpoint", "runs/config", "--chat", "--chat-template", "chat.jinja", "--temperature", "0",
        "--max-new-tokens", "12"]  # fmt: skip


def test_chat_answers_each_prompt_on_its_own(directory, capsys, monkeypatch):
    pytest.importorskip("jinja2", reason="pip install '.[interop]'")
    (directory / "chat.jinja").write_text(TEMPLATE)
    sample.sample_command([*CHAT, "--prompt", "the cat", "--prompt", "the cat", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == rows[1]
    assert rows[0]["prompt"] == "the cat"
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n/exit\nno\n"))
    assert sample.sample_command(CHAT) == 0
    assert capsys.readouterr().out == rows[0]["text"] + "\n"


BAD_CHAT = {
    "no template": (["--chat", "--prompt", "x"], "has no chat template; pass --chat-template FILE"),
    "no file": (["--chat", "--chat-template", "nowhere", "--prompt", "x"], "nowhere cannot be read"),
    "template of evil": (["--chat", "--chat-template", "evil.jinja", "--prompt", "x"], "a forbidden attribute"),
    "no chat": (["--system", "x", "--prompt", "x"], "--system and --chat-template are for a chat"),
    "samples": (["--chat", "--num-samples", "2", "--prompt", "x"], "a chat answers once"),
}


@pytest.mark.parametrize("case", BAD_CHAT)
def test_bad_input_to_a_chat_is_refused(directory, case):
    pytest.importorskip("jinja2", reason="pip install '.[interop]'")
    (directory / "evil.jinja").write_text("{{ ''.__class__.__mro__ }}")
    arguments, sentence = BAD_CHAT[case]
    with pytest.raises(InputError, match=sentence):
        sample.sample_command(["--checkpoint", "runs/config", *arguments])
