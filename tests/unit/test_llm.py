"""The offline API: prompts of every form, streams that may be left, and errors that say what to do."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvkeep.config import CacheOptions, EngineSettings, SamplingParams
from kvkeep.engine import FinishReason
from kvkeep.errors import CapacityError, ConfigError, RequestError
from kvkeep.llm import LLM, Prompt
from kvkeep.testing.oracle import greedy
from kvkeep.testing.tiny_models import VOCAB_SIZE, build_tiny

MODEL = build_tiny("llama")
PROMPT = list(range(20, 60))
OTHER = list(range(90, 50, -1))
GREEDY = SamplingParams(max_tokens=6, temperature=0)


def word_tokenizer(*, chats: bool = True) -> PreTrainedTokenizerFast:
    """One token a word: w0 to w127."""
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106  a word, no password
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")  # noqa: S106  as above
    if chats:
        fast.chat_template = (
            "{% for message in messages %}w1 {{ message.content }} w2 {% endfor %}"
            "{% if add_generation_prompt %}w3{% endif %}"
        )
    return fast


def words(token_ids: list[int]) -> str:
    """Text of token ids."""
    return " ".join(f"w{token_id}" for token_id in token_ids)


def make_llm(tokenizer: object = None, **options: Any) -> LLM:
    """The tiny llama with small blocks and NaN in freed ones."""
    settings: dict[str, Any] = {
        "block_size": 8,
        "capacity": "2MB",
        "self_test": False,
        "poison": True,
    } | options
    return LLM(MODEL, tokenizer, **settings)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What the model says without a cache."""
    oracle = build_tiny("llama")
    return {
        "prompt": list(greedy(oracle, PROMPT, 6).token_ids),
        "other": list(greedy(oracle, OTHER, 6).token_ids),
    }


@pytest.fixture
def llm() -> Iterator[LLM]:
    """An LLM with a tokenizer that holds nothing when the test is over."""
    llm = make_llm(word_tokenizer())
    yield llm
    assert_idle(llm)


def assert_idle(llm: LLM) -> None:
    """No request is left, and no block is held."""
    assert not llm.engine.has_work
    assert llm._inboxes == {}
    assert llm.cache.stats().in_use_bytes == 0
    assert llm.cache.verify().ok


def test_one_prompt_or_many_of_text_or_ids(llm: LLM, expected: dict[str, list[int]]) -> None:
    """Every form of the same prompt gives the same tokens, in the order of the prompts."""
    one_of_ids = llm.generate(PROMPT, GREEDY)
    one_of_text = llm.generate(words(PROMPT), GREEDY)
    prompts: list[Prompt] = [OTHER, words(PROMPT), PROMPT]
    mixed = llm.generate(prompts, GREEDY)

    assert [list(out.token_ids) for out in one_of_ids + one_of_text] == [expected["prompt"]] * 2
    assert [list(out.token_ids) for out in mixed] == [
        expected["other"],
        expected["prompt"],
        expected["prompt"],
    ]
    assert mixed[1].prompt_ids == tuple(PROMPT)
    assert mixed[0].text.split() == llm.decode(expected["other"]).split()
    assert llm.generate([]) == []


def test_every_prompt_may_have_settings_of_its_own(llm: LLM) -> None:
    """A list of settings goes with the prompts, and must have one for each."""
    params = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=5, n=2)]

    outputs = llm.generate([PROMPT, OTHER], params)

    assert [[len(choice.token_ids) for choice in out.choices] for out in outputs] == [[2], [5, 5]]
    with pytest.raises(RequestError, match="params has 2 entries for 1 prompts"):
        llm.generate([PROMPT], params)


def test_the_second_time_is_read_from_the_cache(llm: LLM) -> None:
    """All but the last token is reused, and the receipt adds up."""
    llm.generate(PROMPT, GREEDY)
    receipt = llm.generate(PROMPT, GREEDY)[0].receipt

    assert (receipt.prompt_tokens, receipt.reused_tokens, receipt.computed_tokens) == (40, 39, 1)
    assert receipt.tokens_by_source == {"device": 39, "computed": 1}
    assert llm.generate(PROMPT, GREEDY, cache=CacheOptions(salt="x"))[0].receipt.reused_tokens == 0


def test_a_stream_gives_token_by_token_what_generate_gives_at_once(
    llm: LLM, expected: dict[str, list[int]]
) -> None:
    """The last piece alone has a reason and a receipt."""
    pieces = list(llm.stream(words(PROMPT), GREEDY))

    assert [token for piece in pieces for token in piece.token_ids] == expected["prompt"]
    assert "".join(piece.text for piece in pieces) == llm.generate(PROMPT, GREEDY)[0].text
    assert [piece.receipt is not None for piece in pieces] == [False] * 5 + [True]
    assert pieces[-1].finish_reason is FinishReason.LENGTH


def test_leaving_the_loop_aborts_the_request(llm: LLM) -> None:
    """Blocks are given back as soon as the stream is closed; what was computed stays known."""
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=100, temperature=0))
    for _ in stream:
        break
    assert llm.cache.stats().open_leases == 1

    stream.close()

    assert_idle(llm)
    assert llm.cache.coverage(PROMPT).known_tokens == 40


def test_a_stream_that_nobody_reads_leaves_nothing(llm: LLM) -> None:
    """Letting go of a stream before its first piece ends the request as well."""
    stream = llm.stream(PROMPT, GREEDY)
    del stream

    assert_idle(llm)


def test_a_stream_is_a_context(llm: LLM) -> None:
    """Leaving the block aborts the request, and what is left of the stream is empty."""
    with llm.stream(PROMPT, SamplingParams(max_tokens=100)) as stream:
        next(stream)

    assert_idle(llm)
    assert list(stream) == []


def test_two_interleaved_streams_do_not_mix(llm: LLM, expected: dict[str, list[int]]) -> None:
    """Each gets its own tokens, however they take turns, and a generate in between gets its own."""
    first, second = llm.stream(PROMPT, GREEDY), llm.stream(OTHER, GREEDY)
    got: dict[str, list[int]] = {"prompt": [], "other": []}
    got["prompt"] += [*next(first).token_ids, *next(first).token_ids]
    got["other"] += next(second).token_ids
    (between,) = llm.generate(OTHER[::-1], GREEDY)
    got["other"] += [token for piece in second for token in piece.token_ids]
    got["prompt"] += [token for piece in first for token in piece.token_ids]

    assert got == expected
    assert len(between.token_ids) == 6


def test_a_stream_beside_a_failing_step_ends_with_an_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one whose turn it was gets the exception, the other its last piece; neither waits for ever."""
    first, second = llm.stream(PROMPT, GREEDY), llm.stream(OTHER, GREEDY)
    next(first), next(second)

    def fail(*_args: object) -> Tensor:
        raise RuntimeError("the device is full")

    with monkeypatch.context() as broken:
        broken.setattr(llm.engine.installed.paged, "forward", fail)
        with pytest.raises(RuntimeError, match="the device is full"):
            list(first)
    rest = list(second)

    assert rest[-1].finish_reason is FinishReason.ERROR


def test_a_conversation_goes_through_the_chat_template(llm: LLM) -> None:
    """Messages are wrapped, the answer begins behind the generation prompt, and streams do the same."""
    messages = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]
    asked = [1, 10, 11, 2, 1, 12, 2, 3]

    output = llm.chat(messages, GREEDY)
    pieces = list(llm.stream(messages, GREEDY))

    assert output.prompt_ids == tuple(asked)
    assert output.token_ids == llm.generate(asked, GREEDY)[0].token_ids
    assert tuple(token for piece in pieces for token in piece.token_ids) == output.token_ids


def test_text_without_a_tokenizer_is_refused() -> None:
    """Each way in says what is missing; token ids are served all the same."""
    llm = make_llm()

    with pytest.raises(RequestError, match="no tokenizer; give token ids"):
        llm.generate("w1", GREEDY)
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat([{"role": "user", "content": "w1"}])
    with pytest.raises(RequestError, match=r"stop='w3' needs a tokenizer.*stop_token_ids"):
        llm.generate(PROMPT, SamplingParams(stop="w3"))
    assert llm.generate(PROMPT, GREEDY)[0].text == ""
    assert_idle(llm)


def test_if_one_prompt_is_refused_none_is_run(llm: LLM) -> None:
    """The others are taken back, and the next call is served."""
    with pytest.raises(RequestError, match="token id 500"):
        llm.generate([PROMPT, [500], OTHER], GREEDY)
    assert_idle(llm)
    with pytest.raises(RequestError, match="0 tokens"):
        llm.stream([], GREEDY)

    assert len(llm.generate(PROMPT, GREEDY)[0].token_ids) == 6


def test_stop_strings_end_text(llm: LLM, expected: dict[str, list[int]]) -> None:
    """The text ends before the string."""
    stop = f"w{expected['prompt'][2]}"
    (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=6, temperature=0, stop=stop))

    assert output.finish_reason is FinishReason.STOP
    assert output.text.split() == words(expected["prompt"][:2]).split()


def test_the_cache_can_be_asked_and_told(llm: LLM) -> None:
    """Coverage, drop and clear speak of token ids; a wrong block number is refused."""
    llm.generate(PROMPT, SamplingParams(max_tokens=0))
    assert llm.cache.coverage(PROMPT).gaps == ()

    assert llm.cache.drop(PROMPT, [1, 3]).num_blocks == 2
    assert [(gap.start, gap.stop) for gap in llm.cache.coverage(PROMPT).gaps] == [
        (8, 16),
        (24, 32),
        (39, 40),
    ]
    with pytest.raises(RequestError, match=r"blocks has 5, but 40 tokens have full blocks 0 to 4"):
        llm.cache.drop(PROMPT, [5])
    assert llm.cache.clear().num_blocks == 3
    assert llm.cache.coverage(PROMPT).known_tokens == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blok_size": 8}, "blok_size=8 is no setting; did you mean block_size?"),
        ({"zzz": 1}, "zzz=1 is no setting; choose from block_size, capacity"),
        ({"block_size": 0}, "block_size=0 is not a positive integer"),
        ({"capacity": "much"}, "capacity='much' is not a size"),
        ({"capacity": "1B"}, "capacity=1 B is less than one block"),
        ({"mode": "fast"}, "mode='fast' is unknown"),
        ({"policy": "mru"}, "policy='mru' is not known; did you mean lru?"),
        ({"max_context": 5000}, "max_context=5000 is more than 1024"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_refused_with_a_remedy(options: dict[str, Any], message: str) -> None:
    """The error names the setting and its value."""
    with pytest.raises((ConfigError, CapacityError)) as caught:
        make_llm(**options)

    assert message in str(caught.value)


def test_settings_and_options_do_not_mix() -> None:
    """It would not be clear which holds."""
    with pytest.raises(RequestError, match="settings and block_size were both given"):
        LLM(MODEL, settings=EngineSettings(), block_size=8)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A wrong path names the path and what to give instead; it is never replaced by another model."""
    missing = str(tmp_path / "nothing")

    with pytest.raises(ConfigError) as caught:
        LLM(missing)

    assert missing in str(caught.value)
    assert "'tiny' for the bundled one" in str(caught.value)


def test_options_in_a_dict_are_refused_with_how_they_are_written() -> None:
    """A dict is what servers take; here it is named, with the class that is meant."""
    with LLM("tiny", capacity="16MB") as llm:
        with pytest.raises(ConfigError, match=r"give CacheOptions\(session='a'\)"):
            llm.generate("Hello", cache={"session": "a"})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"give SamplingParams\(max_tokens=3\)"):
            llm.generate("Hello", {"max_tokens": 3})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"cache='a' is no CacheOptions"):
            llm.stream("Hello", cache="a")  # type: ignore[arg-type]
        assert len(llm.generate("Hello", SamplingParams(max_tokens=1))) == 1
