"""Which variants a search tries, and in which order they come."""

import dataclasses
import itertools

from nextllm_jax.plan.search import search, variants
from nextllm_jax.plan.topology import devices_of_kind
from tests.plan.test_training import CONFIG, here


def test_variants_train_the_same() -> None:
    found = list(variants(CONFIG, 8))
    assert len(found) == len(set(found)) > 40
    meshes = {config.mesh.sizes(8) for config in found}
    expected = {(1, 8, 1, 1), (2, 4, 1, 1), (4, 2, 1, 1), (8, 1, 1, 1), (1, 4, 1, 2), (2, 2, 1, 2), (4, 1, 1, 2)}
    assert meshes == {(*sizes, 1) for sizes in expected}
    for config in found:
        same = dataclasses.replace(
            config,
            mesh=CONFIG.mesh,
            model=dataclasses.replace(config.model, remat=CONFIG.model.remat),
            training=dataclasses.replace(config.training, accumulation_steps=1),
        )
        assert same == CONFIG


def test_the_fastest_that_fit_come_first() -> None:
    plans = search(CONFIG, devices_of_kind("NVIDIA H100 80GB HBM3", 8), minutes=0)
    assert all(plan.fits and plan.compile_seconds is None for plan in plans)
    assert all(a.roofline.seconds <= b.roofline.seconds for a, b in itertools.pairwise(plans))


def test_the_best_are_compiled_and_confirmed(monkeypatch) -> None:
    monkeypatch.setattr("nextllm_jax.plan.search.MOST_COMPILED", 1)
    small = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_layers=1))
    plans = search(small, here(), minutes=10)
    assert [plan.memory is not None for plan in plans[:2]] == [True, False]
