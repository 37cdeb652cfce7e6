"""Small tokenizers of the `tokenizers` package, trained here; import it after checking that the package is there."""

import json

import tokenizers as hf

from nextllm_jax.tokenizer.patterns import LLAMA3_PATTERN, O200K_PATTERN, QWEN2_PATTERN

TEXT = (
    "def add(first, second):\n    return first + second\n\nWe've 1234 reasons, it's said; źdźbło trawy,\n"
    "漢字 and 🎉 naïve café. The 25 other otters swam in the 2nd river in 2024!\n\n\n\t\tindented    text\r\n"
) * 8
SPECIAL, ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>", "<tool>"]


def split(pattern):
    return hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated")


def byte_level(**kwargs):
    return hf.pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False} | kwargs)


CUTS = {
    "gpt2": [byte_level(use_regex=True)],
    "llama3": [split(LLAMA3_PATTERN), byte_level()],
    "qwen2": [split(QWEN2_PATTERN), byte_level()],
    "o200k": [split(O200K_PATTERN), byte_level()],
    "digits": [hf.pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)],
    "prefix space": [byte_level(add_prefix_space=True, use_regex=True)],
    "another": [split(r"\p{L}+|[^\p{L}]+"), byte_level()],
    "two cuts": [split(r"\p{N}{1,3}"), split(r"[\p{L}]+"), byte_level()],
}


def trained(steps, *, alphabet=True, normalizer=None):
    """A small byte-level BPE of the package, with special and added tokens."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.normalizer = normalizer
    trainer = hf.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([hf.AddedToken(token, normalized=False) for token in ADDED])
    return tokenizer


def save(tokenizer, directory, **config):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
