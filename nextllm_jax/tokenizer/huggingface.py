"""Reads and writes Hugging Face tokenizers: tokenizer.json or a SentencePiece tokenizer.model, with their config files.

A byte-level BPE with a known pattern runs in tiktoken if tiktoken would make the same merges. All other tokenizers run
in the `tokenizers` package.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer import sentencepiece
from nextllm_jax.tokenizer.backends import (
    ByteBPE,
    HuggingFaceBPE,
    byte_letters,
    bytes_to_letters,
    from_json,
    import_tokenizers,
    letters_to_bytes,
    merge_pairs,
    missing_bytes,
)
from nextllm_jax.tokenizer.huggingface_files import added_token, read_declarations, read_json, write_json
from nextllm_jax.tokenizer.patterns import (
    DIGITS_PATTERN,
    IN_BOTH_ENGINES,
    PLAIN,
    PLAIN_GPT2_PATTERN,
    QWEN2_PATTERN,
)
from nextllm_jax.tokenizer.tokenizer import Roles, Tokenizer

_log = logging.getLogger(__name__)

_TEXT_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|return|>")


def load_huggingface(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or of a single tokenizer.json, with its roles and chat template.

    Other tokens, and the tokens that begin and end text, are read from the files that `read_declarations` names. Added
    tokens with ids beyond the vocab_size of config.json are left out, with a warning. Raises InputError, which names
    the file, for a missing tokenizer or a damaged file.
    """
    file = Path(path)
    folder = file.parent if file.name == "tokenizer.json" else file
    has_json = (folder / "tokenizer.json").is_file()
    if has_json:
        description = read_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        description = sentencepiece.read_model(folder / "tokenizer.model")
    else:
        raise InputError(f"{folder} holds neither tokenizer.json nor tokenizer.model; add one of them")
    declared = read_declarations(folder)
    try:
        tokenizer = from_description(
            _name_of(folder.resolve()),
            description,
            names=declared.names,
            tokens=declared.tokens,
            add_bos=None if has_json else declared.add_bos,
            stop_ids=declared.stop_ids,
            chat_template=declared.chat_template,
        )
        if declared.rows is not None:
            tokenizer = tokenizer.within(declared.rows)
    except (InputError, UnicodeEncodeError) as error:
        raise InputError(f"the tokenizer in {folder} cannot be used: {error}") from error
    if declared.add_bos not in (None, tokenizer.add_bos):
        _log.warning(
            f"{folder}: prompts {'begin' if tokenizer.add_bos else 'do not begin'} with a token, as the post-processor "
            f"of tokenizer.json says; add_bos_token {declared.add_bos} in tokenizer_config.json is ignored"
        )
    return tokenizer


def _name_of(folder: Path) -> str:
    """The name of a directory, or of the model if it is in the cache of huggingface_hub, where it is a hash."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def from_description(
    name: str,
    description: dict[str, Any],
    *,
    names: dict[str, str],
    tokens: Iterable[dict[str, Any]] = (),
    add_bos: bool | None = None,
    stop_ids: Iterable[int] = (),
    chat_template: str | None = None,
) -> Tokenizer:
    """The tokenizer of a parsed tokenizer.json; `names` are the spellings of bos_token, eos_token, ...

    `tokens` are added to those of the description. If `add_bos` is None, its post-processor decides. Raises InputError.
    """
    description = _with_tokens(description, tokens)
    description = _with_special(description, names.values())
    huggingface = HuggingFaceBPE(json.dumps(description, ensure_ascii=False))
    ids = huggingface.ids
    names = {key: token for key, token in names.items() if token in ids}
    if "eos_token" not in names:
        ends = [token for token in _TEXT_ENDS if token in huggingface.special_tokens]
        if not ends:
            raise InputError("the end-of-text token is unknown; set eos_token in tokenizer_config.json")
        names["eos_token"] = ends[0]
    eos_id = ids[_text_end(names["eos_token"], huggingface.special_tokens)]
    named = ids.get(names.get("bos_token", "")) if add_bos else None
    bos_id = _first_id(huggingface) if add_bos is None else named
    stops = {eos_id, ids[names["eos_token"]], *stop_ids} & huggingface.bytes_of.keys()
    stops |= {huggingface.tokens[token] for token in _TURN_ENDS if token in huggingface.tokens}
    roles = Roles(
        bos_id=eos_id if bos_id is None else bos_id,
        eos_id=eos_id,
        add_bos=bos_id is not None,
        stop_ids=tuple(sorted(stops)),
        pad_id=ids.get(names.get("pad_token", "")),
        names=names,
        chat_template=chat_template,
    )
    return Tokenizer(name, byte_bpe(description, huggingface) or huggingface, roles)


def byte_bpe(description: dict[str, Any], huggingface: HuggingFaceBPE) -> ByteBPE | None:
    """The tiktoken encoding that is equivalent to a parsed tokenizer.json; None if there is none."""
    model, added = description["model"], description["added_tokens"]
    nfc = description["normalizer"] is not None
    pattern = _pattern(description["pre_tokenizer"])
    plain = (
        model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and not model.get("byte_fallback")
        and description["normalizer"] in (None, {"type": "NFC"})
        and (description["decoder"] or {}).get("type") == "ByteLevel"
        and not any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
        and not any(token["normalized"] and nfc for token in added)
        and not any(token["content"] in byte_letters() for token in added)
    )
    if not plain or pattern not in IN_BOTH_ENGINES:
        return None
    pieces = {piece: id for piece, id in model["vocab"].items() if piece not in huggingface.tokens}
    if not all(letter in byte_letters() for piece in pieces for letter in piece):
        return None
    ranks = {letters_to_bytes(piece): id for piece, id in pieces.items()}
    if (model["unk_token"] is not None and missing_bytes(ranks)) or not _merges_as_tiktoken(description, ranks):
        return None
    try:
        return ByteBPE(ranks, pattern, huggingface.special_tokens, huggingface.added_tokens, nfc=nfc)
    except InputError:  # the ranks lack a byte that tiktoken needs
        return None


def save_huggingface(tokenizer: Tokenizer, directory: str | os.PathLike[str]) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template, for transformers' AutoTokenizer."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    roles = tokenizer.roles
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": roles.add_bos,
        **roles.names,
    }
    if roles.chat_template is not None:
        config["chat_template"] = roles.chat_template
    write_json(folder / "tokenizer.json", to_description(tokenizer))
    write_json(folder / "tokenizer_config.json", config)


def splits_as_qwen2(tokenizer: Tokenizer) -> bool:
    """Whether text is split by the pattern of Qwen2, which transformers 5 uses for all models of this type."""
    backend = tokenizer.backend
    if isinstance(backend, HuggingFaceBPE):
        return _pattern(json.loads(backend.description)["pre_tokenizer"]) == QWEN2_PATTERN
    return PLAIN.get(backend.pattern, backend.pattern) == QWEN2_PATTERN


def to_description(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer as the content of a tokenizer.json."""
    backend = tokenizer.backend
    description = json.loads(backend.description) if isinstance(backend, HuggingFaceBPE) else _describe(backend)
    return description | {"post_processor": _post_processor(tokenizer)}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that produce a byte-level vocabulary, in order: every split of each token into two other tokens."""
    cuts = []
    for token, rank in ranks.items():
        for middle in range(1, len(token)):
            left, right = ranks.get(token[:middle]), ranks.get(token[middle:])
            if left is not None and right is not None:
                cuts.append((rank, left, right, middle, token))
    return [(token[:middle], token[middle:]) for _, _, _, middle, token in sorted(cuts)]


def _describe(backend: ByteBPE) -> dict[str, Any]:
    """The tokenizer.json of a tiktoken encoding, without a post-processor."""
    spelling = {token: bytes_to_letters(token) for token in backend.ranks}
    return byte_level_description(
        PLAIN.get(backend.pattern, backend.pattern),
        added_tokens=[
            added_token(id, token, special=token in backend.special_tokens)
            for token, id in sorted(backend.tokens.items(), key=lambda item: item[1])
        ],
        vocab={spelling[token]: id for token, id in backend.ranks.items()} | backend.tokens,
        merges=[[spelling[left], spelling[right]] for left, right in merges(backend.ranks)],
        nfc=backend.nfc,
        ignore_merges=True,
    )


def byte_level_description(
    pattern: str,
    *,
    added_tokens: list[dict[str, Any]],
    vocab: dict[str, int],
    merges: list[list[str]],
    nfc: bool,
    ignore_merges: bool,
) -> dict[str, Any]:
    """The tokenizer.json, without a post-processor, of a byte-level BPE that splits text by `pattern`.

    `merges` are pairs of spellings. With `ignore_merges` a word that is in the vocabulary is not split further.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pattern == DIGITS_PATTERN:
        steps = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    else:
        regex = {"Regex": pattern}
        steps = [{"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}, byte_level]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any]:
    """The post-processor, which puts bos_id before a text if prompts begin with it."""
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    if not tokenizer.add_bos:
        return {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
    bos = next(token for token, id in tokenizer.backend.tokens.items() if id == tokenizer.bos_id)
    bos_first, bos_second = ({"SpecialToken": {"id": bos, "type_id": type_id}} for type_id in (0, 1))
    return {
        "type": "TemplateProcessing",
        "single": [bos_first, first],
        "pair": [bos_first, first, bos_second, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }


def _first_id(huggingface: HuggingFaceBPE) -> int | None:
    """The id that the post-processor of the tokenizer.json puts before a text; None if it puts none."""
    prefix = huggingface.prefix()
    if len(prefix) > 1 or not {*prefix} <= {*huggingface.tokens.values()}:
        spelled = [huggingface.bytes_of.get(id, b"?").decode("utf-8", "replace") for id in prefix]
        raise InputError(f"the post-processor puts {spelled} before a text; only one token is supported")
    return prefix[0] if prefix else None


def _with_tokens(description: dict[str, Any], tokens: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The description, validated and with every key present, with tokens that are declared in other files.

    The flags of a token with a declared id replace those in the description. Raises InputError if it has another id.
    """
    tokens = list(tokens)
    tokenizer = from_json(json.dumps(description))
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(
        [
            import_tokenizers().AddedToken(**{key: value for key, value in token.items() if key != "id"})
            for token in tokens
            if token["id"] is not None or token["content"] not in known
        ]
    )
    for token in tokens:
        found = tokenizer.token_to_id(token["content"])
        if token["id"] not in (None, found):
            raise InputError(
                f"{token['content']} has the id {token['id']} in tokenizer_config.json or added_tokens.json, but "
                f"{found} in tokenizer.json; use files of the same tokenizer"
            )
    special = [token["content"] for token in tokens if token["special"]]
    return _with_special(json.loads(tokenizer.to_str()), special)


def _with_special(description: dict[str, Any], tokens: Iterable[str]) -> dict[str, Any]:
    """The description in which these tokens are special, as transformers treats bos_token, eos_token, ..."""
    added = {token["content"]: token for token in description["added_tokens"]}
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, list):  # of Unigram
        vocabulary = {piece: id for id, (piece, _) in enumerate(vocabulary)}
    for token in tokens:
        if token in added:
            added[token] = added[token] | {"special": True}
        elif token in vocabulary:
            added[token] = added_token(vocabulary[token], token, special=True)
    return description | {"added_tokens": sorted(added.values(), key=lambda token: token["id"])}


def _text_end(eos: str, special_tokens: dict[str, int]) -> str:
    """The token that ends documents. The eos_token of a chat model may be the one that ends a turn instead."""
    ends = [eos, *_TEXT_ENDS] if eos in _TEXT_ENDS else [*_TEXT_ENDS, eos]
    return next(token for token in ends if token in special_tokens)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The single pattern that is equivalent to a pre-tokenizer; None if there is none."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    *before, last = steps
    if not last or last["type"] != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if not before:
        return PLAIN_GPT2_PATTERN if last["use_regex"] else None
    step = before[0]
    if step["type"] == "Digits":
        return DIGITS_PATTERN if step["individual_digits"] and last["use_regex"] else None
    if step["type"] != "Split" or last["use_regex"]:
        return None
    keeps = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
    return step["pattern"].get("Regex") if keeps else None


def _merges_as_tiktoken(description: dict[str, Any], ranks: dict[bytes, int]) -> bool:
    """Whether the listed merges give the same result as tiktoken, which merges any two pieces that form a token.

    tiktoken merges lower ids first, so the merges must be listed in the order of the ids that they produce. One of
    these must also hold:
    - The merges reduce each token's own bytes to that token. Then two pieces that form a token only ever occur next to
      each other in the way that the token's own merge lists.
    - The merges list every split of each token, and whole words are looked up first, as in tiktoken.
    """
    model = description["model"]
    pairs = merge_pairs(model)
    made = [ranks.get(letters_to_bytes("".join(pair)), -1) for pair in pairs]  # -1: an added token
    if made != sorted(made) or -1 in made:
        return False
    if merge_to_themselves(description, [bytes_to_letters(token) for token in ranks]):
        return True
    cuts = {(bytes_to_letters(left), bytes_to_letters(right)) for left, right in merges(ranks)}
    return model["ignore_merges"] and cuts == set(pairs)


def merge_to_themselves(description: dict[str, Any], pieces: list[str]) -> bool:
    """Whether the merges of a tokenizer.json reduce the letters of each piece to that piece."""
    nothing = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    model = description["model"] | {"ignore_merges": False}
    merger = from_json(json.dumps(description | nothing | {"model": model}))
    return all(len(found.ids) == 1 for found in merger.encode_batch(pieces))
