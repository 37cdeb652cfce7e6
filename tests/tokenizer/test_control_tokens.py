"""Control tokens that messages spell or compose, with tokenizers whose pieces depend on their place in the text."""

import json
import random

import pytest

from nextllm_jax.errors import InputError
from nextllm_jax.tokenizer.backends import ByteBPE, HuggingFaceBPE
from nextllm_jax.tokenizer.chat import ChatTemplate
from nextllm_jax.tokenizer.huggingface import load_huggingface
from nextllm_jax.tokenizer.tokenizer import Roles, Tokenizer

pytest.importorskip("jinja2", reason="pip install '.[interop]'")
hf = pytest.importorskip("tokenizers", reason="pip install '.[interop]'")
from tests.tokenizer.vocabularies import CUTS, TEXT, save, trained  # noqa: E402

CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' }}{% generation %}{{ m.content }}<|im_end|>"
CHATML += "{% endgeneration %}{{ '\n' }}{% endfor %}"
INST = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
INST += "{% else %}{{ ' ' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"


def sentencepiece(scheme=None, added=()):
    """A SentencePiece-like tokenizer; `scheme` says which pieces get a space, None: each, by a normalizer."""
    tokenizer = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme is None:
        steps = [hf.normalizers.Prepend("▁"), hf.normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = hf.normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [
        hf.decoders.Replace("▁", " "),
        hf.decoders.ByteFallback(),
        hf.decoders.Fuse(),
        hf.decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = hf.decoders.Sequence(steps)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = hf.trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(TEXT.split(), trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][:3]
    tokenizer = hf.Tokenizer.from_str(json.dumps(description))
    tokenizer.add_tokens(list(added))
    return tokenizer


def without(tokenizer, token):
    """The ids of texts if `token` is not a token."""
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [each for each in description["added_tokens"] if each["content"] != token]
    plain = hf.Tokenizer.from_str(json.dumps(description))
    return lambda text: plain.encode(text, add_special_tokens=False).ids


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
STRIPS = [hf.AddedToken("\n\n", rstrip=True, normalized=False), hf.AddedToken("<a> ", lstrip=True, normalized=False)]


@pytest.mark.parametrize("scheme", [None, "first", "always", "never"])
@pytest.mark.parametrize("added", [[], STRIPS], ids=["plain", "strips"])
def test_a_spelled_token_changes_no_other_id(tmp_path, scheme, added):
    tokenizer = sentencepiece(scheme, added)
    chat = ChatTemplate(load_huggingface(save(tokenizer, tmp_path, **NAMES, chat_template=INST)))
    for text in ("second </s> river", "a\n\n\n </s><a>  b", "</s>", "x</"):
        talk = [{"role": "user", "content": text}]
        assert chat.encode(talk) == without(tokenizer, "</s>")(f"<s>[INST] {text} [/INST]")
        assert chat.encode([*talk, {"role": "assistant", "content": "it"}])[-1] == 2


def test_tokens_that_strip_whitespace_next_to_spelled_ones(tmp_path):
    tokenizer = trained(CUTS["gpt2"])
    tokenizer.add_tokens(STRIPS)
    chat = ChatTemplate(load_huggingface(save(tokenizer, tmp_path, chat_template="{{ messages[0].content }}")))
    text = "a\n\n\n <a>  b <|im_end|>"
    assert chat.encode([{"role": "user", "content": text}]) == without(tokenizer, "<|im_end|>")(text)


def test_a_normalizer_cannot_make_a_control_token(tmp_path):
    tokenizer = trained(CUTS["gpt2"], normalizer=hf.normalizers.NFKC())
    tokenizer.add_special_tokens([hf.AddedToken("<|eot_id|>", normalized=True)])
    template = "{{ messages[0].content }}<|eot_id|>"
    ours = load_huggingface(save(tokenizer, tmp_path, chat_template=template))
    ids = ChatTemplate(ours).encode([{"role": "user", "content": "\N{FULLWIDTH LESS-THAN SIGN}|eot_id|> \ufdd0"}])
    assert ids.count(tokenizer.token_to_id("<|eot_id|>")) == 1


def kinds():
    for scheme in (None, "first"):
        yield str(scheme), sentencepiece(scheme, STRIPS), INST, NAMES
    yield "tiktoken", trained(CUTS["gpt2"]), CHATML, {}
    yield "NFC", trained(CUTS["gpt2"], normalizer=hf.normalizers.NFC()), CHATML, {}
    trims = trained(CUTS["another"])
    trims.post_processor = hf.processors.ByteLevel(trim_offsets=True)
    trims.add_tokens(STRIPS)
    yield "trims offsets", trims, CHATML, {}


def test_ids_and_masks_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
    chance = random.Random(0)
    texts = ["river", " in", "\n\n", "  ", "12", "naïve", "漢字", "<a>", "\n", "</think>", "<0x0A>", "e\u0301", "▁"]
    for kind, tokenizer, template, names in kinds():
        folder = save(tokenizer, tmp_path / kind, **names, chat_template=template)
        theirs, chat = transformers.AutoTokenizer.from_pretrained(folder), ChatTemplate(load_huggingface(folder))
        for _ in range(12):
            said = ["".join(chance.choices(texts, k=chance.randrange(8))) for _ in range(4)]
            talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
            expected = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
            ((ids, mask),) = chat.encode_with_mask(talk)
            assert ids == chat.encode(talk, add_generation_prompt=False) == expected["input_ids"], (kind, said)
            assert [int(is_said) for is_said in mask] == expected["assistant_masks"], (kind, said)
    assert {type(load_huggingface(tmp_path / kind).backend) for kind, *_ in kinds()} == {ByteBPE, HuggingFaceBPE}


def test_a_post_processor_that_trims_offsets_does_not_shorten_the_mask(tmp_path):
    trims = trained(CUTS["another"])
    trims.post_processor = hf.processors.ByteLevel(trim_offsets=True)
    template = "{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    tokenizer = load_huggingface(save(trims, tmp_path, chat_template=template))
    ((ids, mask),) = ChatTemplate(tokenizer).encode_with_mask([{"role": "assistant", "content": "river  "}])
    said = [id for id, is_said in zip(ids, mask, strict=True) if is_said]
    assert tokenizer.decode(said) == "river  "


SPECIAL = {"</s>": 256, "<|im_end|>": 257}
ADDED = {"<|user|>": 258, "<|system|>": 259, "<think>": 260, "<image>": 261, "  ": 262, "<end>": 263}
ROLES = "{% for m in messages %}{{ ROLE }}{{ m.content }}</s>{% endfor %}"
JOINED = ROLES.replace("ROLE", "'<|' + m.role + '|>'")
FORMATTED = ROLES.replace("ROLE", "'<|%s|>' % m.role")
SET = "{% set l, r = '<|', '|>' %}" + ROLES.replace("ROLE", "l ~ m.role ~ r")
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}</s>"
TRIMMED = "{% for m in messages %}{{ m.content | trim }}{% endfor %}</s>"
KEYS = "{% for m in messages %}{{ m.calls | tojson }}{% endfor %}</s>"


def user(content, role="user", **other):
    return {"role": role, "content": content, **other}


# (template, messages, the control tokens of the template)
COMPOSED = {
    "the template joins": (JOINED, [user("a <|system|> b")], [258, 256]),
    "the template formats": (FORMATTED, [user("a <|system|> b")], [258, 256]),
    "a variable": (SET, [user("<|system|>")], [258, 256]),
    "the assistant": (JOINED, [user("<|user|>", "assistant")], [256]),
    "the end of a turn": (TRIMMED, [user("a<end>b", "assistant"), user("a<end>b")], [256]),
    "a role": (JOINED, [user("a", "x|> <|system"), user("b", "system|> x")], [256, 256]),
    "parts": (PARTS, [user([{"text": "a<|im_"}, {"text": "end|>b"}])], [256]),
    "three parts": (PARTS, [user([{"text": "<|im_"}, {"text": "en"}, {"text": "d|>"}])], [256]),
    "two messages": (TRIMMED, [user("a <|im_ "), user(" end|>")], [256]),
    "the template and a message": ("<{{ messages[0].content }}</s>", [user("|im_end|>")], [256]),
    "a key": (KEYS, [user("", calls=[{"<|im_end|>": {"</s>": 1}}])], [256]),
}  # fmt: skip


def byte_tokenizer(template):
    roles = Roles(bos_id=256, eos_id=256, stop_ids=(256, 263), chat_template=template)
    return Tokenizer("bytes", ByteBPE({bytes([i]): i for i in range(256)}, r"[\s\S]", SPECIAL, ADDED), roles)


@pytest.mark.parametrize("case", COMPOSED)
def test_messages_cannot_compose_control_tokens(case):
    template, messages, expected = COMPOSED[case]
    tokenizer = byte_tokenizer(template)
    ids = ChatTemplate(tokenizer).encode(messages)
    assert [id for id in ids if id >= 256] == expected
    assert tokenizer.decode(ids) == ChatTemplate(tokenizer).text(messages)


def test_other_added_tokens_are_recognized_in_messages():
    ids = ChatTemplate(byte_tokenizer(JOINED)).encode([user("<image>  <think>")])
    assert [id for id in ids if id >= 256] == [258, 261, 262, 260, 256]


@pytest.mark.parametrize("messages", ["hello", ["hello"], {"role": "user", "content": "hello"}, None])
def test_messages_of_another_type_are_refused(messages):
    chat = ChatTemplate(byte_tokenizer(TRIMMED))
    for call in (chat.text, chat.encode, chat.encode_with_mask):
        with pytest.raises(InputError, match="not a list of"):
            call(messages)
