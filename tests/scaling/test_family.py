"""The members of a family keep the ratios of its config; the config itself is one of them."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest

from nextllm_jax.config import Config, ModelConfig
from nextllm_jax.config.files import load_config_file
from nextllm_jax.errors import InputError
from nextllm_jax.scaling.family import member, size_of, spread

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def config(name: str) -> Config:
    found = load_config_file(str(CONFIGS / f"{name}.py"))
    rows = found.model.vocab_size or found.data.vocab_size
    return dataclasses.replace(found, model=dataclasses.replace(found.model, vocab_size=rows))


@pytest.mark.parametrize("name", ["tiny", "small", "llama2_7b", "llama3_8b", "tiny_moe"])
def test_the_config_is_the_member_of_its_own_compute(name):
    base = config(name)
    size = size_of(base)
    own = member(base, size.flops, size.tokens_per_parameter)
    accumulation = dataclasses.replace(base.training, accumulation_steps=1)
    expected = dataclasses.replace(base, training=accumulation)
    assert dataclasses.replace(own, optimizer=expected.optimizer) == expected
    for field in ("learning_rate", "adamw_learning_rate", "weight_decay", "warmup_steps"):
        assert getattr(own.optimizer, field) == pytest.approx(getattr(base.optimizer, field))


@pytest.mark.parametrize(("name", "budgets"), [("tiny", (1e12, 1e17)), ("llama3_8b", (1e19, 1e24))])
def test_members_keep_the_ratios_and_spend_the_compute(name, budgets):
    base = config(name)
    members = [member(base, flops, 10) for flops in budgets]
    assert all(a.model.num_layers <= b.model.num_layers for a, b in itertools.pairwise(members))
    for flops, found in zip(budgets, members, strict=True):
        size, model = size_of(found), found.model
        assert size.flops == pytest.approx(flops, rel=0.02)
        assert size.tokens_per_parameter == pytest.approx(10, rel=0.25)
        assert model.head_dim == base.model.head_dim
        assert model.num_heads / model.num_kv_heads == base.model.num_heads / base.model.num_kv_heads
        ratios = ("mlp_dim", 0.04), ("num_layers", 0.6), ("num_kv_heads", 1.0)
        for field, tolerance in ratios:
            wanted = getattr(base.model, field) / base.model.embed_dim
            unit = 1 / model.embed_dim if field != "mlp_dim" else 0
            assert getattr(model, field) / model.embed_dim == pytest.approx(wanted, abs=tolerance * wanted / 2 + unit)


@pytest.mark.parametrize("parametrization", ["standard", "completep"])
def test_the_recipe_follows_the_size(parametrization):
    base = config("tiny")
    if parametrization == "completep":
        scaled = {"parametrization": "completep", "base_width": 128, "base_depth": 4}
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, **scaled))
    small, large = member(base, 1e13, 8), member(base, 1e17, 8)
    area = [each.model.embed_dim * each.model.num_layers for each in (small, large)]
    tokens = [size_of(each).tokens for each in (small, large)]
    batch = [each.training.global_batch_size for each in (small, large)]
    assert batch[1] / batch[0] == pytest.approx((tokens[1] / tokens[0]) ** 0.4, rel=0.25)
    factor = math.sqrt(batch[1] / batch[0] * (1 if parametrization == "completep" else area[0] / area[1]))
    assert large.optimizer.learning_rate / small.optimizer.learning_rate == pytest.approx(factor, rel=0.01)
    assert large.optimizer.adamw_learning_rate == pytest.approx(2.5 * large.optimizer.learning_rate, rel=0.01)
    averaged = [
        each.optimizer.learning_rate * each.optimizer.weight_decay * each.training.steps for each in (small, large)
    ]
    ratio = size_of(large).tokens_per_parameter / size_of(small).tokens_per_parameter
    assert averaged[1] / averaged[0] == pytest.approx(math.sqrt(ratio), rel=0.02)
    warmup = [each.optimizer.warmup_steps / each.training.steps for each in (small, large)]
    assert warmup == pytest.approx([50 / 700] * 2, rel=0.02)


def test_whole_periods_of_a_layer_pattern():
    base = config("tiny")
    pattern = ("local", "local", "global")
    base = dataclasses.replace(base, model=dataclasses.replace(base.model, layer_pattern=pattern, num_layers=6))
    assert all(member(base, flops, 8).model.num_layers % 3 == 0 for flops in (1e13,))


def test_the_rungs_are_evenly_spaced_and_spend_the_total():
    found = spread(4e13, 4, 3.0)
    assert sum(found) == pytest.approx(4e13)
    assert [after / before for before, after in itertools.pairwise(found)] == pytest.approx([3.0] * 3)


def test_too_little_compute():
    with pytest.raises(InputError, match=r"no model of this family takes about 1e\+06 FLOPs"):
        member(config("tiny"), 1e6, 8)
    long = dataclasses.replace(config("tiny"), model=ModelConfig(vocab_size=2048, num_layers=4, embed_dim=128))
    long = dataclasses.replace(long, training=dataclasses.replace(long.training, global_batch_size=8192))
    with pytest.raises(InputError, match=r"has only \d+ steps of \d+ sequences"):
        member(long, 1e12, 8)
