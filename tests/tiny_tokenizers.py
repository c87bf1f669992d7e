"""Tokenizers small enough to build in a test, and the pieces that a detokenizer makes of tokens."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from kvkeep.engine.detokenizer import IncrementalDetokenizer

# Latin, Cyrillic, CJK, Hangul, Devanagari with combining signs, a joined emoji, flags, tabs.
CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, the fox does not.",
    "Быстрая лиса и ленивая собака.\n\tNaïve café, e\u0301te\u0301, a\u0308.",
    "敏捷的棕色狐狸跳过懒狗。 여우가 개를 뛰어넘는다. हिन्दी में नमस्ते",
    "👩\u200d👩\u200d👧 🇩🇪🇫🇷 👍🏽 ☕️ 𝄞𝄢",
] * 3
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass
class CountingTokenizer:
    """A `tokenizers` tokenizer with the methods of transformers; it counts decoded tokens."""

    tokenizer: Tokenizer
    byte_ids: list[int] = field(default_factory=list)
    num_decoded: int = 0

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Return the text of tokens."""
        assert not clean_up_tokenization_spaces
        self.num_decoded += len(token_ids)
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Return a token's name."""
        name = self.tokenizer.id_to_token(ids)
        assert name is not None
        return name

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def size(self) -> int:
        """Tokens in the vocabulary."""
        size: int = self.tokenizer.get_vocab_size()
        return size


def byte_name(byte: int) -> str:
    """Return the byte-level name of a byte (GPT-2's table of printable characters)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [other for other in range(256) if other not in printable]
    return chr(byte if byte in printable else 256 + others.index(byte))


@functools.cache
def byte_level() -> CountingTokenizer:
    """Return a byte-level BPE tokenizer, as of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    name_to_id = tokenizer.get_vocab()
    return CountingTokenizer(tokenizer, [name_to_id[byte_name(byte)] for byte in range(256)])


@functools.cache
def byte_fallback() -> CountingTokenizer:
    """Return a SentencePiece-like tokenizer, as of Llama 2: Metaspace, unknown bytes as tokens."""
    vocabulary = {"<unk>": 0}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    letters = sorted(set("".join(CORPUS[:1]).replace(" ", "▁")) | {"▁", "é", "ä"})
    for name in [*letters, "▁▁", REPLACEMENT]:
        vocabulary[name] = len(vocabulary)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "d"), ("o", "g"), ("▁d", "og")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    merges.append(("▁", "▁"))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return CountingTokenizer(tokenizer, list(range(1, 257)))


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}
both_tokenizers = pytest.mark.parametrize("name", TOKENIZERS)
texts = st.text(
    st.one_of(st.sampled_from("".join(CORPUS)), st.sampled_from(" abthe\n€😀"), st.characters()),
    max_size=40,
).map(lambda text: text.encode("utf-8", "ignore").decode())


def pieces_of(
    tokenizer: CountingTokenizer,
    token_ids: Sequence[int],
    *,
    prompt_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    include_stop: bool = False,
    skip_special_tokens: bool = True,
    cuts: random.Random | None = None,
) -> tuple[list[str], IncrementalDetokenizer]:
    """Feed tokens one by one, or in chunks cut by chance, and return all pieces."""
    detokenizer = IncrementalDetokenizer(
        tokenizer,
        prompt_ids,
        stop_strings=stop_strings,
        include_stop=include_stop,
        skip_special_tokens=skip_special_tokens,
    )
    pieces, place = [], 0
    while place < len(token_ids):
        length = cuts.randint(1, 5) if cuts else 1
        pieces.append(detokenizer.append(token_ids[place : place + length]))
        place += length
    return [*pieces, detokenizer.finish()], detokenizer
