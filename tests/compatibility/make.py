"""Writes the fixture of test_compatibility.py with the version that is on PYTHONPATH; see README.md."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

CONFIG = """
from nextllm_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(vocab_size=272, num_layers=5, embed_dim=8, mlp_dim=16, num_heads=2, num_kv_heads=1,
                          head_dim=4, context_length=64, dtype="float32",
                          layer_pattern=("global", "global", "global", "global_nope")),
        data=DataConfig(corpus="corpus", vocab_size=270, sequence_length=32, num_processes=1, validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=5, schedule_steps=60),
        training=TrainingConfig(steps=40, global_batch_size=4, log_every_steps=5, evaluate_every_steps=20,
                                evaluation_batch_size=4, sample_prompts=("the ",), sample_tokens=8),
        checkpoint=CheckpointConfig(every_steps=40, keep_last=1),
    )
"""
LORA = ("--workdir", "runs/lora", "--init-from", "runs/config", "--lora.rank", "2", "--lora.targets", "q", "gate")
TEXT = "the cat sees a fish; a dog has two balls."


def hardware() -> list[str]:
    """What the bits of a result depend on: the version of jax, and the features of the processor."""
    import jax

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    features = [line for line in lines if line.startswith(("model name", "flags"))][:2]
    return [jax.__version__, hashlib.sha256("".join(features).encode()).hexdigest()[:16]]


def outcome(path: str) -> dict:
    """What a model predicts and samples."""
    import nextllm_jax

    llm = nextllm_jax.load(path)
    (greedy,) = llm.generate("a", max_new_tokens=24, temperature=0.0)
    drawn = llm.generate("a", max_new_tokens=24, temperature=1.0, num_samples=3)
    return {"nll": llm.score(TEXT).nll, "texts": [sample.text for sample in (greedy, *drawn)]}


def losses(run: Path) -> list:
    """[step, split, loss] of each line of a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line["step"], line["split"], line["loss"]] for line in lines]


def _train(code: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, code / "train.py", "--config", "config.py", *arguments], check=True)


def _without_pictures(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    member.uid, member.gid, member.uname, member.gname = 0, 0, "", ""
    return None if member.name.endswith(("tensorboard", ".png", ".lock")) else member


def main(code: Path, output: Path) -> None:
    """Train two runs half way, export one, pack all of it, and record how they go on."""
    rng = random.Random(0)
    Path("corpus").mkdir()
    for i in range(24):
        words = rng.choices(["the cat", "a dog", "sees", "has", "two balls", "Zoë", "a fish"], k=40)
        Path(f"corpus/{i:02}.txt").write_text(" ".join(words))
    Path("config.py").write_text(CONFIG)
    for arguments in ((), LORA):
        _train(code, *arguments)
    from nextllm_jax.convert import export_model

    for path, file_format in (("exported", "huggingface"), ("exported.gguf", "gguf")):
        export_model("runs/config", path, file_format=file_format, dtype="float32")
    with tarfile.open("fixture.tar.xz", "w:xz") as archive:
        for name in ("corpus", "config.py", "data", "runs", "exported", "exported.gguf"):
            archive.add(name, filter=_without_pictures)
    record = {"hardware": hardware()}
    record["outcomes"] = {path: outcome(path) for path in ("runs/config", "runs/lora", "exported", "exported.gguf")}
    for arguments in ((), LORA):
        _train(code, *arguments, "--training.steps", "60")
    record["losses"] = {path: losses(Path(path)) for path in ("runs/config", "runs/lora")}
    (output / "recorded.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copy("fixture.tar.xz", output)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
