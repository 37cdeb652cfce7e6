"""Models by name: where they are found, what the first use keeps, and what happens when that is damaged."""

import concurrent.futures
import json
import os
import shutil

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf is missing; install the extra 'interop'")
pytest.importorskip("tokenizers", reason="tokenizers is missing; install the extra 'interop'")

import nextllm_jax
from nextllm_jax.cli import sample
from nextllm_jax.cli.convert import export_command, import_command
from nextllm_jax.cli.text import evaluate_command, tokenize_command
from nextllm_jax.errors import InputError
from nextllm_jax.interop.gguf import export
from nextllm_jax.pretrained import import_cache
from nextllm_jax.published_models import PUBLISHED_MODELS, PublishedModel, is_published, resolve
from nextllm_jax.tokenizer.gguf import to_gguf
from tests.interop.models import CONFIG, TOKENIZER, random_params

TOKENS_BT = [[1, 2, 3, 250]]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A directory to import from, with a package that holds a small model and cannot be imported."""
    folder = tmp_path_factory.mktemp("site") / "tiny_published"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    export(
        CONFIG, random_params(CONFIG), folder / "tiny.gguf", vocab_size=TOKENIZER.vocab_size, dtype="q8_0",
        metadata=to_gguf(TOKENIZER),
    )  # fmt: skip
    return folder


@pytest.fixture
def models(package, tmp_path, monkeypatch):
    """Where imports are kept, while `tiny` is published and the current directory is empty."""
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setitem(PUBLISHED_MODELS, "tiny", PublishedModel("tiny_published", "tiny.gguf", "pip install tiny"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache" / "nextllm_jax" / "models"


@pytest.fixture(scope="module")
def expected(package):
    """The logits of the file itself."""
    return np.asarray(nextllm_jax.load(str(package / "tiny.gguf")).logits(TOKENS_BT))


def logits():
    return np.asarray(nextllm_jax.load("tiny").logits(TOKENS_BT))


def the_run(models):
    (run,) = models.glob("tiny-*[0-9]")
    return run


def test_a_name_is_the_file_of_its_package_unless_something_of_that_name_is_here(models, package):
    assert resolve("tiny") == str(package / "tiny.gguf")
    assert resolve("runs/small") == "runs/small"
    assert resolve("gs://bucket/tiny") == "gs://bucket/tiny"
    (models.parent.parent.parent / "here" / "tiny").mkdir()
    assert resolve("tiny") == "tiny"
    assert not is_published("tiny")
    with pytest.raises(InputError, match="tiny is not a run directory"):
        nextllm_jax.load("tiny")


def test_a_slip_is_put_right_and_a_missing_package_named(models, package, monkeypatch):
    for slip in ("smolm2", "SmolLM2", "smollm-2"):
        with pytest.raises(InputError, match=f"{slip} is neither .*did you mean smollm2"):
            nextllm_jax.load(slip)
    with pytest.raises(InputError, match=r"nowhere .*is not a run directory.*published model \(smollm2"):
        nextllm_jax.load("nowhere")
    monkeypatch.setitem(PUBLISHED_MODELS, "absent", PublishedModel("no_such_package", "x.gguf", "pip install absent"))
    with pytest.raises(InputError, match="absent is a published model that is not installed; run pip install absent"):
        resolve("absent")
    monkeypatch.setitem(PUBLISHED_MODELS, "empty", PublishedModel("tiny_published", "x.gguf", "pip install empty"))
    with pytest.raises(InputError, match=r"lacks .*x\.gguf; install it again with pip install empty"):
        resolve("empty")


def test_it_is_imported_once(models, expected, monkeypatch, messages):
    np.testing.assert_array_equal(logits(), expected)
    run = the_run(models)
    assert messages.messages == [f"importing tiny into {run} (only once)"]
    messages.clear()
    assert (run / "config.json").is_file()
    monkeypatch.setattr(import_cache, "import_model", None)
    np.testing.assert_array_equal(logits(), expected)
    assert not messages.messages
    with pytest.raises(InputError, match="has no steps; leave the step out"):
        nextllm_jax.load("tiny", step=0)


def flip(run):
    path = max((run / "checkpoints").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": (flip, "its sha256 differs"),
    "no config": (lambda run: os.remove(run / "config.json"), "is not a run directory"),
    "an empty tokenizer": (lambda run: os.truncate(run / "tokenizer" / "encoding.json", 0), "encoding.json is damaged"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "holds no complete checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_file_is_read_where_its_import_is_damaged(models, package, expected, messages, damage):
    logits()
    harm, says = DAMAGES[damage]
    harm(the_run(models))
    messages.clear()
    np.testing.assert_array_equal(logits(), expected)
    assert nextllm_jax.load("tiny").tokenizer.vocab_size > 0
    said = messages.messages[-1]
    assert said.startswith(f"tiny is read from {package / 'tiny.gguf'}, since its cached import cannot be used: ")
    assert says in said
    assert str(the_run(models)) in said


def test_what_an_import_that_was_killed_left_is_no_import(models, expected, monkeypatch):
    def killed(source, output):
        (models / f".{os.path.basename(output)}.partial").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_cache, "import_model", killed)
        with pytest.raises(KeyboardInterrupt):
            nextllm_jax.load("tiny")
    np.testing.assert_array_equal(logits(), expected)
    assert {path.name for path in models.iterdir()} == {the_run(models).name, f"{the_run(models).name}.lock"}


def test_three_at_once_import_once(models, package, monkeypatch):
    imports, real = [], import_cache.import_model
    monkeypatch.setattr(import_cache, "import_model", lambda *paths: (imports.append(paths), real(*paths)))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        runs = set(pool.map(lambda _: import_cache.imported_run("tiny", package / "tiny.gguf"), range(3)))
    assert runs == {the_run(models)}
    assert len(imports) == 1


def test_without_a_place_to_keep_it_the_file_is_read(models, package, expected, monkeypatch, messages):
    models.parent.parent.write_text("a file where the cache directory should be")
    np.testing.assert_array_equal(logits(), expected)
    said = messages.messages[-1]
    assert said.startswith(f"tiny is read from {package / 'tiny.gguf'}, since its cached import cannot be used: ")
    assert "Not a directory" in said


def test_the_commands_take_the_name(models, monkeypatch, capsys):
    sample.sample_command(["--checkpoint", "tiny", "--prompt", "a cat", "--json", "--max-new-tokens", "4"])
    (row, _) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["prompt"] == "a cat"
    with open("text.txt", "w") as file:
        file.write("a cat sat on a mat")
    scores = []
    import_command(["tiny", "--output", "run"])
    export_command(["--checkpoint", "tiny", "--output", "copy.gguf", "--format", "gguf"])
    capsys.readouterr()
    for model in ("tiny", "run", "copy.gguf"):
        evaluate_command(["--checkpoint", model, "--text", "text.txt", "--json"])
        tokenize_command(["--tokenizer", model, "--file", "text.txt", "--json"])
        scores.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert scores[0] == scores[1] == scores[2]
    assert len(scores[0][1]["ids"]) == scores[0][0]["tokens"] - 1
