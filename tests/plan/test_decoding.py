"""Prefill and a decode step, on simulated devices of this machine."""

import dataclasses

import pytest

from nextllm_jax.config import MeshConfig
from nextllm_jax.errors import InputError
from nextllm_jax.plan.decoding import Request, plan_decoding
from nextllm_jax.plan.report import decoding_json, decoding_table
from tests.plan.test_training import CONFIG, here, silent

REQUEST = Request(batch_size=4, prompt_tokens=16, new_tokens=16)


def test_prefill_and_a_decode_step() -> None:
    model = dataclasses.replace(CONFIG.model, remat="full", remat_offload=True)  # which decoding has no use for
    config = dataclasses.replace(CONFIG, model=model, mesh=MeshConfig(data=4, tensor=2))
    plan = plan_decoding(config, here(), REQUEST, silent)
    assert plan.decode is not None
    # Keys and values of 4 layers, 2 heads of 16, 4 rows of 32 slots, in float32; a row and a head on a device.
    assert plan.cache_bytes == 2 * 4 * 2 * 16 * 4 * 32 * 4
    cache_on_a_device = plan.cache_bytes / 8
    decode, prefill = plan.decode.compiled.memory, plan.prefill.compiled.memory
    in_a_cache = decode.argument_bytes - plan.parameter_bytes
    assert cache_on_a_device < in_a_cache < 1.2 * cache_on_a_device
    assert decode.alias_bytes >= cache_on_a_device  # both are written in place
    assert cache_on_a_device < prefill.output_bytes < 1.2 * cache_on_a_device
    assert {collective.axes for collective in plan.decode.traffic} >= {"tensor"}
    values = decoding_json(plan)
    assert values["decode"]["tokens"] == 4
    assert values["prefill"]["tokens"] == 4 * 16
    assert values["decode"]["roofline"]["bound"] in ("hbm", "network")
    assert "a decode step" in decoding_table(plan)


def test_rows_and_lengths_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="batch_size 4 is not divisible by"):
        plan_decoding(CONFIG, here(), REQUEST, silent)
    long = dataclasses.replace(REQUEST, batch_size=8, new_tokens=4000)
    with pytest.raises(InputError, match="context_length 2048"):
        plan_decoding(CONFIG, here(), long, silent)
