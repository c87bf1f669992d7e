"""PromptEncoder: the tokens of LLM, and where in them messages begin."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep import LLM, RequestError
from kvkeep.server.errors import ApiError
from kvkeep.server.message_places import MessagePlaces
from kvkeep.server.prompts import PromptEncoder

_CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# A beginning of its own, a preamble of tools, trimmed contents.
_WITH_TOOLS = (
    "{{- '<|bos|>' -}}{%- if tools -%}"
    "{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' -}}"
    "{%- endif -%}{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') | trim -}}"
    "{%- if m.tool_calls -%}{{- '<tool>' + (m.tool_calls | tojson) + '</tool>' -}}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}"
)
# Of earlier answers only what follows the thinking is shown.
_WITHOUT_THINKING = (
    "{%- for m in messages -%}{%- set c = m.content -%}"
    "{%- if not loop.last and m.role == 'assistant' -%}{%- set c = c.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' -}}{%- endfor -%}"
)
_WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40)
_CONVERSATIONS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": _TEXT}
    ),
    min_size=1,
    max_size=8,
)

Message = Mapping[str, Any]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The bundled model, for its tokenizer."""
    with LLM("tiny", capacity="16MB") as found:
        yield found


@pytest.fixture(scope="module")
def encoder(llm: LLM) -> PromptEncoder:
    """An encoder over the bundled tokenizer."""
    return PromptEncoder(llm.tokenizer, max_tokens=8192)


def chat(*contents: str) -> list[dict[str, str]]:
    """A conversation of a system prompt and turns."""
    roles = ["system"] + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def prefix_lengths(
    llm: LLM, messages: Sequence[Message], template: str, **options: Any
) -> list[int]:
    """The tokens of the first n messages, for every n: where message n begins."""
    assert llm.tokenizer is not None
    return [
        len(
            llm.tokenizer.apply_chat_template(
                [dict(message) for message in messages[:at]],
                chat_template=template,
                return_dict=False,
                **options,
            )
        )
        for at in range(1, len(messages))
    ]


def with_template(llm: LLM, template: str, monkeypatch: pytest.MonkeyPatch) -> PromptEncoder:
    """An encoder over the same tokenizer with another template, for the time of a test."""
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    return PromptEncoder(llm.tokenizer, max_tokens=8192)


@given(text=_TEXT)
def test_text_has_the_tokens_that_the_library_gives(
    llm: LLM, encoder: PromptEncoder, text: str
) -> None:
    """What is served is what LLM would compute, so that both share blocks."""
    assert list(encoder.encode_text(text).ids) == llm.encode(text)


@given(messages=_CONVERSATIONS)
def test_conversations_have_the_tokens_that_the_library_gives(
    llm: LLM, encoder: PromptEncoder, messages: list[dict[str, str]]
) -> None:
    """The same for conversations, up to where the answer begins."""
    assert list(encoder.encode_chat(messages).ids) == llm.encode_chat(messages)


@given(
    messages=st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["system", "user", "assistant"]),
                "content": st.text("abcdefgh .,é✓", min_size=8, max_size=40).map(
                    lambda t: f"Say {t}!"
                ),
            }
        ),
        min_size=1,
        max_size=6,
    )
)
def test_messages_begin_where_those_before_them_end(
    llm: LLM, encoder: PromptEncoder, messages: list[dict[str, str]]
) -> None:
    """The first token of message n is the number of tokens that the first n messages have."""
    found = encoder.encode_chat(messages)

    assert found.message_starts == (0, *prefix_lengths(llm, messages, _CHATML))


@given(messages=_CONVERSATIONS)
def test_no_message_is_said_to_begin_too_late(
    llm: LLM, encoder: PromptEncoder, messages: list[dict[str, str]]
) -> None:
    """For whatever text: a tag on a message must cover all of its content, and starts are in order."""
    found = encoder.encode_chat(messages)

    true_starts = [0, *prefix_lengths(llm, messages, _CHATML)]
    header = 3  # the marker, the role, the newline
    for message, start, true_start in zip(messages, found.message_starts, true_starts, strict=True):
        assert start <= true_start + header or not message["content"].strip()
    assert list(found.message_starts) == sorted(found.message_starts)


def test_tools_and_trimmed_contents_are_found(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preamble counts to the first message; a call without content has its place all the same."""
    encoder = with_template(llm, _WITH_TOOLS, monkeypatch)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "  What is the weather?  \n"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]},
        {"role": "tool", "content": "Rain."},
        {"role": "assistant", "content": "It rains."},
    ]

    found = encoder.encode_chat(messages, [_WEATHER], add_generation_prompt=False)

    assert encoder.takes_tools
    assert found.message_starts == (
        0,
        *prefix_lengths(llm, messages, _WITH_TOOLS, tools=[_WEATHER]),
    )


def test_what_a_template_leaves_out_does_not_move_the_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer without its thinking is no longer in the text as it was sent."""
    encoder = with_template(llm, _WITHOUT_THINKING, monkeypatch)
    messages = chat("Be brief.", "One and one?", "<think>easy</think>Two.", "And one more?")

    found = encoder.encode_chat(messages, add_generation_prompt=False)

    starts = prefix_lengths(llm, messages, _WITHOUT_THINKING)
    assert found.message_starts[:3] == (0, *starts[:2])
    # Alone, the answer is shown with its thinking; so the next message begins at its content at the latest.
    text_before = "Two.<|im_end|>\n<|im_start|>user\n"
    decoded = encoder.decode(found.ids[found.message_starts[3] :])
    assert (text_before + "And one more?").endswith(decoded.removesuffix("<|im_end|>\n"))


def test_parts_are_joined_and_each_has_its_place(llm: LLM, encoder: PromptEncoder) -> None:
    """Parts of text are what one text with newlines between them is."""
    parts = [{"type": "text", "text": "A document."}, {"type": "text", "text": "A question?"}]
    messages: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
    ]

    found = encoder.encode_chat(messages)

    plain = chat("Be brief.", "A document.\nA question?")
    assert list(found.ids) == llm.encode_chat(plain)
    assert len(found.part_starts) == 2
    first, second = found.part_starts[1]
    assert encoder.decode(found.ids[first:]).startswith("A document.")
    assert encoder.decode(found.ids[second:]).startswith("A question?")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content is neither"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], "takes text only"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content is null; give text"),
        ([*chat("x"), {"role": "tool"}], r"messages\[1\]\.content is missing; give text"),
        ([*chat("x"), {"role": "assistant", "content": None}], r"messages\[1\]\.content is null"),
    ],
)
def test_what_cannot_be_written_is_refused(
    encoder: PromptEncoder, messages: list[Message], message: str
) -> None:
    """A RequestError that names the message, never an error of the template's own."""
    with pytest.raises(RequestError, match=message):
        encoder.encode_chat(messages)


def test_deep_tools_are_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON too deep for the template is a fault of the request."""
    encoder = with_template(llm, _WITH_TOOLS, monkeypatch)
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}

    with pytest.raises(RequestError, match="chat template"):
        encoder.encode_chat(chat("Hello"), [deep])


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_dict"])
def test_clients_do_not_choose_the_template(encoder: PromptEncoder, name: str) -> None:
    """A template is a program, and the rest is how we call it."""
    with pytest.raises(RequestError, match=name):
        encoder.encode_chat(chat("Hello"), None, {name: True})


def test_text_that_is_too_long_is_refused_before_it_is_encoded(llm: LLM) -> None:
    """By its characters, or by the tokens of its beginning; what fits is not refused."""
    encoder = PromptEncoder(llm.tokenizer, max_tokens=100)
    words = "the cat sat on the mat " * 30

    with pytest.raises(ApiError, match="characters") as by_characters:
        encoder.encode_text("x" * 1_000_000)
    with pytest.raises(ApiError, match="more than 100 tokens"):
        encoder.encode_text(words * 2)
    with pytest.raises(ApiError) as in_chat:
        encoder.encode_chat(chat("y" * 1_000_000))

    assert by_characters.value.code == in_chat.value.code == "context_length_exceeded"
    assert by_characters.value.status == 400
    assert encoder.encode_text(words[:300]).ids


def test_tokens_decode_to_the_text_they_came_from(encoder: PromptEncoder) -> None:
    """Ids that are not in the vocabulary are refused."""
    text = "Grüße, 世界!\n"

    assert encoder.decode(encoder.encode_text(text).ids) == text
    for wrong in (-1, 3072, 10**30):
        with pytest.raises(RequestError, match="tokens has"):
            encoder.decode([wrong])


def test_a_model_without_tokenizer_takes_token_ids_only() -> None:
    """Every use says so."""
    encoder = PromptEncoder(None, max_tokens=10)

    assert not encoder.has_chat_template
    assert not encoder.takes_tools
    with pytest.raises(RequestError, match="no tokenizer"):
        encoder.encode_text("x")
    with pytest.raises(RequestError, match="no tokenizer"):
        encoder.decode([1])
    with pytest.raises(RequestError, match="no chat template"):
        encoder.encode_chat(chat("x"))


def test_threads_may_encode_and_decode_at_once(llm: LLM, encoder: PromptEncoder) -> None:
    """Two threads of the server's pool, and the engine's, which decodes."""
    texts = [f"Sentence number {at} of the story. " * 20 for at in range(64)]
    expected = [llm.encode(text) for text in texts]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: list(encoder.encode_text(text).ids), texts))
        back = list(threads.map(encoder.decode, found))

    assert found == expected
    assert back == texts


def test_a_learnt_separator_is_not_taken_for_another_place() -> None:
    """Without any rendering of a beginning, the content itself is where a message begins."""
    places = MessagePlaces().find("[u]Hello[a]World", [["Hello"], ["World"]], lambda _: None)

    assert [place.start for place in places] == [0, 11]
