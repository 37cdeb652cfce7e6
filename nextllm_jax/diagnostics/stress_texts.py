"""Texts on which two tokenizers show where they differ."""

import itertools
import sys
import unicodedata
from collections.abc import Iterable

_WORDS = [
    "a",
    "Word",
    "naïve",
    "Ünï",
    "日本語",
    "русский",
    "नमस्ते",
    "한국어",
    "עברית",
    "x\u00b2",
    "\u01c5",
    "\ufb01",
    "\u0130",
]
_BLANKS = [*" \t\n\v\x85\u00a0\u2003\u2028\u3000", "  ", "   ", "\r\n", "\n\n", " \n", "\n "]
_MARKS = [
    "!",
    "...",
    "'",
    "''",
    "—",
    "{}",
    "();",
    "#!/",
    "😀",
    "👩\u200d👧",
    "🇩🇪",
    "e\u0301",
    "\u0301",
    "\ufeff",
    "\x00",
]
_CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'\u017f", "\u2019s"]
_NUMBERS = ["1", "12", "123", "1234", "12345678", "3.14", "1,000", "\u0663\u0664", "\u216b", "\u00bd", "1\u0663\u00bd"]
_CODE = """def f(x, *args):
    \"\"\"Docs.\"\"\"
\tif x >= 10 and not args:\r\n        return {"a": [1, 22, 333], 'b': x ** 2}   # trailing   \n\n\n
"""


def stress_texts() -> list[str]:
    """Short texts of every assigned character, words, blanks, digits, contractions, marks, long runs and code."""
    categories = ((chr(code), unicodedata.category(chr(code))) for code in range(sys.maxunicode + 1))
    unassigned: list[str] = []
    assigned: list[str] = []
    for character, category in categories:
        if category != "Cs":
            (unassigned if category in ("Cn", "Co") else assigned).append(character)
    characters = assigned + unassigned[::1009]
    blocks = ["".join(characters[start : start + 128]) for start in range(0, len(characters), 128)]
    parts = [*_WORDS, *_MARKS, *_CONTRACTIONS, *_NUMBERS]
    texts = [*blocks, *(" ".join(block) for block in blocks[::3]), _CODE, _CODE.strip(), ""]
    texts += ["".join(pair) for pair in itertools.product(_BLANKS, _BLANKS)]
    texts += [left + middle + right for left, right in itertools.product(parts, parts) for middle in ("", " ")]
    texts += [word + blank + word for word in parts for blank in _BLANKS] + [" " * n + "x" for n in range(1, 90)]
    return texts + ["\n" * n for n in range(1, 40)] + ["=" * n + "-" * n for n in range(1, 70)]


def token_texts(tokens: Iterable[str]) -> list[str]:
    """Texts that spell out special and added tokens, alone, in company, and cut short; of the first 300."""
    texts = []
    for token in itertools.islice(tokens, 300):
        texts += [token, f" {token} ", f"a{token}b", f"{token}{token}", f"\n{token}\n", token[:-1], f"1{token}'s"]
    return texts
