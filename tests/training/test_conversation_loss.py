"""The loss on conversations against transformers, which gets them one at a time with labels of -100."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is missing; install the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="transformers is missing; install the extra 'parity'")
pytest.importorskip("safetensors", reason="safetensors is missing; install the extra 'interop'")

from nextllm_jax.data.packing import count_windows, read_batch  # noqa: E402
from nextllm_jax.evaluation.evaluate import evaluate  # noqa: E402
from nextllm_jax.model.objective import make_eval_step, next_token  # noqa: E402
from nextllm_jax.model.transformer import Transformer  # noqa: E402
from tests.data.test_conversations import documents, prepared  # noqa: E402
from tests.interop import models  # noqa: E402

CONFIG = dataclasses.replace(models.CONFIG, context_length=512)
T = 256


def test_loss_and_bits_per_byte_count_what_the_assistant_says(tmp_path):
    split = prepared(tmp_path).split("train")
    params = models.write_huggingface(tmp_path / "hf", CONFIG)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    nll, count = 0.0, 0
    for ids, in_loss in documents(split):
        labels = torch.tensor([[token if said else -100 for token, said in zip(ids, in_loss, strict=True)]])
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nll += float(theirs(torch.tensor([ids]), labels=labels).loss) * scored
        count += scored

    windows = count_windows(split, T, partial=True)
    assert 1 < windows < split.num_documents  # several conversations in a window
    batch = read_batch(split, np.arange(windows), T)
    found = evaluate(
        make_eval_step(next_token, Transformer(CONFIG)), jax.tree.map(np.asarray, params), [batch], split.num_bytes
    )
    assert found.num_tokens == count
    assert found.loss == pytest.approx(nll / count, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nll / np.log(2) / split.num_bytes, rel=1e-5)
