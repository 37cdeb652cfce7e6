"""A small random model that is served in the tests' process."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from starlette.applications import Starlette
from starlette.testclient import TestClient

from nextllm_jax.config import ModelConfig
from nextllm_jax.inference.llm import LLM
from nextllm_jax.model.transformer import Transformer
from nextllm_jax.pretrained import convert
from nextllm_jax.serving.app import Limits, Service
from nextllm_jax.serving.metrics import Metrics
from nextllm_jax.serving.model import ServedModel
from nextllm_jax.serving.worker import Worker
from nextllm_jax.tokenizer.backends import ByteBPE
from nextllm_jax.tokenizer.tokenizer import Roles, Tokenizer

CONFIG = ModelConfig(
    vocab_size=264, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8,
    context_length=2048, init_std=0.3, dtype="float32",
)  # fmt: skip
SPECIAL = {"<s>": 256, "</s>": 257, "<|im_start|>": 258, "<|im_end|>": 259}
TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.arguments.items() | list }}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SLOTS, LENGTH, WAITING = 4, 240, 8


def make_llm(template: str | None = TEMPLATE) -> LLM:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    roles = Roles(bos_id=256, eos_id=257, stop_ids=(257, 259), names=names, chat_template=template)
    tokenizer = Tokenizer("bytes", ByteBPE({bytes([i]): i for i in range(256)}, r"[\s\S]", SPECIAL), roles)
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    params = nn.meta.unbox(jax.jit(Transformer(CONFIG).init)(jax.random.key(0), tokens_BT, tokens_BT))["params"]
    return LLM(CONFIG, params, lambda: tokenizer, np.dtype("float32"))


@contextlib.contextmanager
def served_app(llms: Mapping[str, LLM], **settings: Any) -> Iterator[tuple[Starlette, dict[str, ServedModel]]]:
    """The application of a server of these models. `settings` are those of Limits, `keys` and `local_only`."""
    access = {name: settings.pop(name) for name in ("keys", "local_only") if name in settings}
    metrics = Metrics()
    models = {
        name: ServedModel(
            name,
            llm,
            Worker(llm, num_slots=SLOTS, max_length=LENGTH, max_waiting=WAITING, metrics=metrics.of_model(name)),
        )
        for name, llm in llms.items()
    }
    limits = Limits(**{"body_bytes": 10_000, "seconds": 60.0} | settings)
    yield Service(models, metrics=metrics, limits=limits, **access).app(), models
    for model in models.values():
        model.worker.close(10)


@contextlib.contextmanager
def serving(llms: Mapping[str, LLM], **settings: Any) -> Iterator[TestClient]:
    """A client of a server in this process, with its `models`."""
    with served_app(llms, **settings) as (app, models), TestClient(app, raise_server_exceptions=False) as client:
        client.models = models  # pyright: ignore[reportAttributeAccessIssue]
        yield client


def write_run(path: Path) -> None:
    """Write the model of `make_llm` as a run directory."""
    llm = make_llm()
    convert._write_run(str(path), CONFIG, llm.tokenizer, llm.params, {})
