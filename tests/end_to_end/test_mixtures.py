"""Training on a mixture by the commands that a user types."""

import json

import pytest

from nextllm_jax.checkpoint.run_dir import RunDir
from nextllm_jax.checkpoint.saved_steps import SavedSteps
from tests.conftest import write_corpus

SHORT = ("--optimizer.schedule-steps", "40", "--training.sample-tokens", "0")


@pytest.fixture
def place(trained, tmp_path):
    """A directory with the shared prepared data, one more corpus, and its own data/."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "known").symlink_to(trained.directory / "data" / "known")
    (tmp_path / "config.py").symlink_to(trained.directory / "config.py")
    write_corpus(tmp_path / "books", documents=15)
    return trained.at(tmp_path)


def test_a_mixture_is_trained_validated_by_source_and_continued_with_other_weights(place):
    train = ("train.py", "--config", "config.py", *SHORT, "--data.mixture", "data/known:0.75")
    said = place.run(*train, "books:0.25:3", "--training.steps", "6").stderr
    (prepared,) = [path.name for path in (place.directory / "data").iterdir() if path.name != "known"]
    assert prepared.startswith("books-known-")
    assert "books: 55 windows of 64 tokens; 6 steps of 8 with weight 0.25 are 0.22 epochs" in said
    run = place.directory / "runs" / "config"
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("loss", "bits_per_byte"):
        mean = 0.75 * record[f"{name}/known"] + 0.25 * record[f"{name}/books"]
        assert record[name] == pytest.approx(mean, rel=1e-12)
    assert record["loss/known"] != record["loss/books"]
    (place.directory / "books" / "000.txt").write_text("changed")  # a run keeps its data
    said = place.run(*train, "books:0.5:1", "--allow-change", "data.mixture", "--training.steps", "24").stderr
    assert "changed: data.mixture ('data/known:0.75', 'books:0.25:3') -> ('data/known:0.75', 'books:0.5:1')" in said
    assert "books is exhausted after step 20, since its limit of epochs is 1" in said  # 12 + 0.4 x 8 x 13.4 = 55
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["mixture_paths"] == ["data/known", f"data/{prepared}"]
    sources = SavedSteps(RunDir(run).checkpoints).record(24)["data"]["sources"]
    assert [(source["first"], source["windows"]) for source in sources] == [(36, 137), (12, 55)]
