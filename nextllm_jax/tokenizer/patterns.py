"""The published regular expressions that split text before bytes are merged."""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{_WORD_END}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_WORD_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# As in tokenizer.json files: without possessive quantifiers, which Oniguruma interprets differently.
PLAIN_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit is a piece of its own. Digits are split off first, so whitespace before a digit is at the end of a text.
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_PATTERN = rf"{_WORDS}|\p{{N}}|{_REST}"
PLAIN_GPT4_PATTERN = LLAMA3_PATTERN.replace(r"|\s*[\r\n]+", r"|\s+\z|\s*[\r\n]+")
TEKKEN_PATTERN = O200K_PATTERN.replace(_WORD_END, "").replace(r"\p{N}{1,3}", r"\p{N}")

PLAIN = {GPT2_PATTERN: PLAIN_GPT2_PATTERN, GPT4_PATTERN: PLAIN_GPT4_PATTERN}
"""tiktoken's patterns -> the equivalent patterns of tokenizer.json files."""

IN_BOTH_ENGINES = (
    *(PLAIN_GPT2_PATTERN, DIGITS_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN),
    *(PLAIN_GPT4_PATTERN, TEKKEN_PATTERN, O200K_PATTERN),
)
"""Patterns of tokenizer.json files that split text equally in tiktoken and in `tokenizers`, as tests verify."""
