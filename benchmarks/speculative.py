"""Speed and acceptance of speculative decoding that guesses from the text so far.

    python benchmarks/speculative.py [--checkpoint smollm2] [--draft-tokens 0 2 4 8] [--repeats 2]

Greedy decoding of 128 tokens after two prompts: a text from the standard library ("new"), and the same text twice, the
second time without its end ("repeated"), which a model that copies continues with the missing part.
"""

import argparse

import nextllm_jax
from nextllm_jax.config import DataConfig, SamplingConfig
from nextllm_jax.data.corpora import held_out_text
from nextllm_jax.inference.llm import LLM

NEW_TOKENS = 128


def measure(llm: LLM, prompt: list[int], repeats: int) -> tuple[float, int]:
    """New tokens per second of the fastest of several calls, and the number of accepted guesses."""
    engine = llm.engine(1, 1024)
    speeds, accepted = [], 0
    for _ in range(repeats + 1):  # the first call compiles
        before = engine.speeds
        stream = llm.stream_tokens(
            [prompt],
            texts=[""],
            max_new_tokens=NEW_TOKENS,
            sampling=SamplingConfig(temperature=0, min_new_tokens=NEW_TOKENS),
            engine=engine,
        )
        (sample,) = [piece.sample for piece in stream if piece.sample is not None]
        speeds.append((engine.speeds - before).decode_tokens_per_second)
        accepted = sample.accepted_drafts or 0
    return max(speeds[1:]), accepted


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="smollm2")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[0, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    llm = nextllm_jax.load(arguments.checkpoint)
    text = llm.tokenizer.encode(held_out_text(DataConfig(), 8192))[:384]
    prompts = {"new": text[:256], "repeated": [*text[:256], *text[:128]]}
    print(f"| text | guesses per step | tokens/s | accepted of {NEW_TOKENS} |\n|---|---|---|---|")
    for name, prompt in prompts.items():
        for count in arguments.draft_tokens:
            speed, accepted = measure(llm.with_drafts(count) if count else llm, prompt, arguments.repeats)
            print(f"| {name} | {count} | {speed:.1f} | {accepted} |", flush=True)


if __name__ == "__main__":
    main()
