"""Throughput of requests that arrive over time, next to that of fixed batches, with SmolLM2-135M.

    python benchmarks/arrivals.py [--checkpoint smollm2] [--num-slots 8] [--requests 32] [--rounds 3]

Prompts of 128 tokens from the standard library, and 128 new tokens of each, greedily. "fixed": the slots are filled,
and all rows run to their end before the slots are filled again. "over time": a request arrives whenever the average row
has generated 16 more tokens (with 8 slots), so each row is at another position. The
first and the last requests of this side run in fewer rows. They do not count: its time begins when all slots are in use
for the first time, and ends with the last arrival. Both sides include the prefill, and alternate in one process.
"""

import argparse
import statistics
import time
from collections.abc import Iterator

import nextllm_jax
from nextllm_jax.config import DataConfig, SamplingConfig
from nextllm_jax.data.corpora import held_out_text
from nextllm_jax.inference.request import Request
from nextllm_jax.inference.scheduler import Scheduler

TOKENS = 128
"""Tokens of a prompt, and new tokens of a request."""
CHUNK_TOKENS = 8
"""Tokens of a row between two arrivals at most, as in `nextllm serve`."""


def advance(scheduler: Scheduler) -> int:
    """Generate a chunk of each row; the number of new tokens."""
    return sum(len(output.tokens) for output in scheduler.advance(CHUNK_TOKENS).values())


def fixed(scheduler: Scheduler, requests: Iterator[Request], count: int) -> float:
    """Tokens per second of `count` requests in batches of as many as there are slots."""
    started = time.perf_counter()
    for _ in range(count // scheduler.engine.num_slots):
        for _ in range(scheduler.engine.num_slots):
            scheduler.submit(next(requests))
        while not scheduler.done:
            advance(scheduler)
    return count * TOKENS / (time.perf_counter() - started)


def over_time(scheduler: Scheduler, requests: Iterator[Request], count: int) -> float:
    """Tokens per second of `count` requests that arrive one by one, while all slots are in use."""
    slots, generated, arrived, next_arrival = scheduler.engine.num_slots, 0, 0, 0
    started = counted = 0.0
    while arrived < count:
        while next_arrival <= generated:
            scheduler.submit(next(requests))
            arrived += 1
            next_arrival += TOKENS * min(arrived, slots) // slots
        if not started and scheduler.num_running == slots:
            started, counted = time.perf_counter(), generated
        generated += advance(scheduler)
    rate = (generated - counted) / (time.perf_counter() - started)
    scheduler.close()
    return rate


def main() -> None:
    """Print the throughput of both sides in each round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="smollm2")
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    llm = nextllm_jax.load(arguments.checkpoint, dtype="float32")
    needed = 2 * arguments.requests * (arguments.rounds + 1)
    tokens = llm.tokenizer.encode(held_out_text(DataConfig(), 8 * needed * TOKENS))
    assert len(tokens) >= needed * TOKENS, "fewer requests or rounds, please"
    requests = (
        Request(
            tokens=tokens[i * TOKENS : (i + 1) * TOKENS],
            max_new_tokens=TOKENS,
            sampling=SamplingConfig(temperature=0, min_new_tokens=TOKENS),
        )
        for i in range(needed)
    )
    scheduler = Scheduler(llm.engine(arguments.num_slots, 2 * TOKENS))
    rounds: list[tuple[float, float]] = []
    for number in range(arguments.rounds + 1):
        rounds.append(tuple(side(scheduler, requests, arguments.requests) for side in (fixed, over_time)))  # pyright: ignore[reportArgumentType]
        if number:  # the first round compiles
            print(f"{number}: fixed {rounds[-1][0]:.1f} tokens/s, over time {rounds[-1][1]:.1f} tokens/s", flush=True)
    first, second = (statistics.median(side) for side in zip(*rounds[1:], strict=True))
    print(f"over time: {second / first:.0%} of fixed")


if __name__ == "__main__":
    main()
