"""The counts of requests are those that the service sees, and retries are counted too."""

import re

from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.storage import costs
from nextllm_jax.storage.open_storage import open_storage
from tests.checkpoint.tree import abstract, save, tree
from tests.faults.bucket_proxy import Fault


def seen(requests):
    """(writes and lists, reads), as they are billed."""
    writes = [each for each in requests if re.match(r"POST|GET [^?]*/o\?", each)]
    return len(writes), len([each for each in requests if not each.startswith("DELETE")]) - len(writes)


def test_requests_are_counted_as_the_service_sees_them(bucket, bucket_service, messages):
    before, start = costs.total(), len(bucket_service.requests)
    with bucket_service.failing(Fault("POST .*name=.*_METADATA", 503, count=2)), Checkpoints(bucket) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": tree(size=10_000)}, {}, validation_loss=None)
    assert checkpoints.saves == 2
    checkpoints.restore(2, "params", abstract(tree(size=10_000)))
    open_storage(bucket).delete("2")
    spent = costs.total().plus(before, -1)
    assert (spent.writes, spent.reads) == seen(bucket_service.requests[start:])
    assert spent.bytes_read > 160_000
    assert 0 < checkpoints.spent.requests < spent.requests
    assert any(
        re.match(r"saved step 1: \d+ writes and lists, \d+ reads, [\d.]+ KiB written", each)
        for each in messages.messages
    )


def test_nothing_is_counted_on_disk(tmp_path, messages):
    before = costs.total()
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    assert costs.total() == before
    assert (checkpoints.spent, messages.messages) == (costs.Costs(), [])
