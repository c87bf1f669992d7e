"""Text from tokens, piece by piece, against decoding everything at once."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given
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


def token_sequences(tokenizer: CountingTokenizer) -> st.SearchStrategy[list[int]]:
    """Return runs of any tokens, of lone bytes and of text."""
    any_token = st.integers(0, tokenizer.size - 1).map(lambda token_id: [token_id])
    lone_bytes = st.lists(st.sampled_from(tokenizer.byte_ids), max_size=6)
    special = st.just([tokenizer.size - 1])
    chunks = st.one_of(any_token, lone_bytes, special, texts.map(tokenizer.encode))
    return st.lists(chunks, max_size=12).map(lambda runs: [token for run in runs for token in run])


def pieces_of(
    tokenizer: CountingTokenizer,
    token_ids: Sequence[int],
    *,
    prompt_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    include_stop: bool = False,
    cuts: random.Random | None = None,
) -> tuple[list[str], IncrementalDetokenizer]:
    """Feed tokens one by one, or in chunks cut by chance, and return all pieces."""
    detokenizer = IncrementalDetokenizer(
        tokenizer, prompt_ids, stop_strings=stop_strings, include_stop=include_stop
    )
    pieces, place = [], 0
    while place < len(token_ids):
        length = cuts.randint(1, 5) if cuts else 1
        pieces.append(detokenizer.append(token_ids[place : place + length]))
        place += length
    return [*pieces, detokenizer.finish()], detokenizer


def longest_byte_run(tokenizer: CountingTokenizer, token_ids: Sequence[int]) -> int:
    """Return the length of the longest run of byte tokens; special tokens do not end one."""
    longest = run = 0
    for token_id in token_ids:
        if token_id != tokenizer.size - 1:
            run = run + 1 if token_id in tokenizer.byte_ids else 0
            longest = max(longest, run)
    return longest


@both_tokenizers
@given(chance=st.data())
def test_pieces_add_up_to_the_text(name: str, chance: st.DataObject) -> None:
    """Any tokens, broken bytes included, give what decoding them at once gives."""
    tokenizer = TOKENIZERS[name]()
    token_ids = chance.draw(token_sequences(tokenizer))
    expected = tokenizer.decode(token_ids)
    # The documented exception: a long run of bytes is not undone by a later byte.
    undone = name == "byte_fallback" and longest_byte_run(tokenizer, token_ids) >= 16
    assume(not (undone and REPLACEMENT in expected))

    pieces, detokenizer = pieces_of(tokenizer, token_ids)

    assert "".join(pieces) == expected
    assert detokenizer.text == expected
    assert detokenizer.num_tokens == len(token_ids)


@both_tokenizers
@given(text=texts, prompt=texts, seed=st.integers(0, 99))
def test_no_piece_holds_part_of_a_character(name: str, text: str, prompt: str, seed: int) -> None:
    """Pieces of a real text hold no U+FFFD that is not in the text, whatever the chunks."""
    tokenizer = TOKENIZERS[name]()
    token_ids = tokenizer.encode(text)

    pieces, _ = pieces_of(
        tokenizer, token_ids, prompt_ids=tokenizer.encode(prompt), cuts=random.Random(seed)
    )

    assert "".join(pieces).count(REPLACEMENT) == text.count(REPLACEMENT)


@both_tokenizers
@given(chance=st.data())
def test_output_continues_the_text_of_the_prompt(name: str, chance: st.DataObject) -> None:
    """Prompt and output decode together to the prompt's text and then the output's."""
    tokenizer = TOKENIZERS[name]()
    token_ids = tokenizer.encode(chance.draw(texts) + chance.draw(texts))
    split = chance.draw(st.integers(0, len(token_ids)))
    prompt_ids, output_ids = token_ids[:split], token_ids[split:]
    whole_text = tokenizer.decode(token_ids)
    assume(REPLACEMENT not in whole_text)
    # Only the whole characters of the prompt are its text; the output completes the last one.
    beginnings = [
        tokenizer.decode(prompt_ids[: max(0, split - num_begun)]).rstrip(REPLACEMENT)
        for num_begun in range(4)
    ]
    prompt_text = max(filter(whole_text.startswith, beginnings), key=len)

    pieces, _ = pieces_of(tokenizer, output_ids, prompt_ids=prompt_ids)

    assert "".join(pieces) == whole_text[len(prompt_text) :]


def test_output_behind_a_special_token_is_a_text_of_its_own() -> None:
    """An answer behind the end of a turn begins without the space that a word carries."""
    tokenizer = byte_fallback()
    words = tokenizer.encode("the dog")
    eos = tokenizer.size - 1

    own, _ = pieces_of(tokenizer, words, prompt_ids=[*words, eos])
    continued, _ = pieces_of(tokenizer, words, prompt_ids=words)

    assert "".join(own) == "the dog"
    assert "".join(continued) == " the dog"


@both_tokenizers
@given(
    text=texts,
    stop_strings=st.lists(st.text(" abthe\n€😀", min_size=1, max_size=4), min_size=1, max_size=3),
    include_stop=st.booleans(),
    seed=st.integers(0, 99),
)
def test_text_ends_at_the_first_stop_string(
    name: str, text: str, stop_strings: list[str], include_stop: bool, seed: int
) -> None:
    """The cut is at the stop string that completes first, and no token behind it is taken."""
    tokenizer = TOKENIZERS[name]()
    token_ids = tokenizer.encode(text)
    whole = tokenizer.decode(token_ids)
    ends = [
        (whole.index(stop) + len(stop), -len(stop), stop) for stop in stop_strings if stop in whole
    ]
    end, _, stop = min(ends) if ends else (len(whole), 0, None)
    kept = whole[: end if include_stop or stop is None else end - len(stop)]

    for cuts in (None, random.Random(seed)):
        pieces, detokenizer = pieces_of(
            tokenizer, token_ids, stop_strings=stop_strings, include_stop=include_stop, cuts=cuts
        )

        assert "".join(pieces) == kept
        assert detokenizer.stopped_by == stop
        if stop is not None:
            taken = token_ids[: detokenizer.num_tokens]
            assert stop in tokenizer.decode(taken)
            assert stop not in tokenizer.decode(taken[:-1])


@both_tokenizers
def test_text_leaves_early(name: str) -> None:
    """Plain words leave with their token."""
    tokenizer = TOKENIZERS[name]()
    token_ids = tokenizer.encode("the dog the dog")

    pieces, _ = pieces_of(tokenizer, token_ids)

    assert pieces[-1] == ""
    assert all(pieces[:-1])


@both_tokenizers
def test_what_only_looks_like_a_stop_string_comes_out(name: str) -> None:
    """A beginning that is not completed leaves with the next text, or at the end."""
    tokenizer = TOKENIZERS[name]()
    detokenizer = IncrementalDetokenizer(tokenizer, stop_strings=["dog!"])

    first = detokenizer.append(tokenizer.encode("the dog"))
    second = detokenizer.append(tokenizer.encode("the dog")[1:])

    assert first == "the "
    assert second.startswith("dog")
    assert first + second + detokenizer.finish() == "the dog dog"
    assert detokenizer.finish() == ""
    assert detokenizer.stopped_by is None


def test_a_stop_string_of_byte_tokens_ends_the_text_at_once() -> None:
    """A line feed is a byte token in vocabularies with byte fallback; no token more is needed."""
    tokenizer = byte_fallback()
    token_ids = tokenizer.encode("dog\nthe")
    detokenizer = IncrementalDetokenizer(tokenizer, stop_strings=["\n"])

    text = detokenizer.append(token_ids[: token_ids.index(11) + 1])

    assert text == "dog"
    assert detokenizer.stopped_by == "\n"
    assert detokenizer.append(token_ids) == ""
    assert detokenizer.finish() == ""


def test_an_emoji_leaves_whole() -> None:
    """Four bytes in four tokens: nothing, nothing, nothing, the character."""
    tokenizer = byte_level()
    pieces, _ = pieces_of(tokenizer, [tokenizer.byte_ids[byte] for byte in "😂".encode()])

    assert pieces == ["", "", "", "😂", ""]


def test_a_broken_byte_does_not_hold_the_text_back() -> None:
    """A byte that can be no start of a character shows with the next token at the latest."""
    tokenizer = byte_level()
    broken = tokenizer.byte_ids[0xFF]
    pieces, _ = pieces_of(tokenizer, [broken, broken, broken, *tokenizer.encode("a")])

    assert pieces == ["", REPLACEMENT, REPLACEMENT, REPLACEMENT + "a", ""]


@pytest.mark.parametrize("text", ["नमस्ते" * 20, "😂" * 50])
def test_a_long_run_of_byte_tokens_leaves_in_parts(text: str) -> None:
    """A language without tokens of its own is streamed, in whole characters."""
    tokenizer = byte_fallback()
    token_ids = [tokenizer.byte_ids[byte] for byte in text.encode()]

    pieces, _ = pieces_of(tokenizer, token_ids)

    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 6


def test_the_context_may_begin_inside_a_run_of_byte_tokens() -> None:
    """A prompt that ends with many byte tokens does not spoil the output's."""
    tokenizer = byte_fallback()
    prompt_ids = tokenizer.encode("नमस्ते" * 3)
    output_ids = tokenizer.encode("नमdog")[1:]

    pieces, _ = pieces_of(tokenizer, output_ids, prompt_ids=prompt_ids)

    assert "".join(pieces) == "नमdog"


@both_tokenizers
@pytest.mark.parametrize("kind", ["text", "broken bytes", "special", "straddling"])
def test_work_per_token_is_bounded(name: str, kind: str) -> None:
    """Decoded tokens grow with the output, not with its square, whatever the tokens."""
    tokenizer = TOKENIZERS[name]()
    straddling = [byte for _ in range(400) for byte in "€".encode()][1:]
    token_ids = {
        "text": tokenizer.encode("the dog jumps " * 100),
        "broken bytes": [tokenizer.byte_ids[200]] * 1000,
        "special": [tokenizer.size - 1] * 1000,
        "straddling": [tokenizer.byte_ids[byte] for byte in straddling],
    }[kind]
    tokenizer.num_decoded = 0

    pieces_of(tokenizer, token_ids, stop_strings=["no such text"])

    assert tokenizer.num_decoded <= 80 * len(token_ids)
