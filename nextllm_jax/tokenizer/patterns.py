"""The regular expressions that cut text before bytes are merged, as their models publish them."""

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

# As tokenizer.json files spell them, without possessive quantifiers, which Oniguruma reads in another way.
PLAIN_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits stand alone, and are cut out before the rest is: blanks before a digit are blanks at an end.
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_PATTERN = rf"{_WORDS}|\p{{N}}|{_REST}"
PLAIN_GPT4_PATTERN = LLAMA3_PATTERN.replace(r"|\s*[\r\n]+", r"|\s+\z|\s*[\r\n]+")
TEKKEN_PATTERN = O200K_PATTERN.replace(_WORD_END, "").replace(r"\p{N}{1,3}", r"\p{N}")

PLAIN = {GPT2_PATTERN: PLAIN_GPT2_PATTERN, GPT4_PATTERN: PLAIN_GPT4_PATTERN}
"""The same cuts in the spelling of tokenizer.json."""

IN_BOTH_ENGINES = (
    *(PLAIN_GPT2_PATTERN, DIGITS_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN),
    *(PLAIN_GPT4_PATTERN, TEKKEN_PATTERN, O200K_PATTERN),
)
"""Patterns of tokenizer.json files that cut text alike in tiktoken and in the `tokenizers` package, as tests show."""
