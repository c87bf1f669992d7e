"""The command line says what is wrong in one line and ends with the documented code."""

import json
import os
import signal
import time
from collections.abc import Iterator
from threading import Event
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from kvkeep.cli import demo_scenes
from kvkeep.cli.chat import Conversation, stopped_by_interrupt
from kvkeep.cli.console import exit_code_of
from kvkeep.cli.demo_prompts import make_notes
from kvkeep.cli.demo_scenes import Scene
from kvkeep.cli.main import main
from kvkeep.cli.options import BUNDLED_MODEL, default_of
from kvkeep.config import EngineSettings, SamplingParams
from kvkeep.engine import Piece
from kvkeep.errors import (
    CapacityError,
    ConfigError,
    KVKeepError,
    RequestError,
    SamplingError,
    UnsupportedModelError,
)
from kvkeep.hf import format_probe, verdict
from kvkeep.hf.load import BUNDLED
from kvkeep.llm import LLM
from kvkeep.native import Kernels, load_kernels
from kvkeep.planning import Coverage
from kvkeep.planning.coverage import Run
from kvkeep.spec import LONG_FORMAT_NAMES, RequestId


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    """The program sets this in its environment, too late for a process that has transformers."""
    disable_progress_bar()
    yield
    enable_progress_bar()


def invoke(*args: str, stdin: str | None = None) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, list(args), input=stdin)


def error_line(result: Result) -> str:
    """What the one line on stderr says."""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def scene(**changes: Any) -> Scene:
    """A scene in which everything is right, but for `changes`."""
    values: dict[str, Any] = {
        "name": "cold", "story": "A story.", "num_requests": 1, "computed_tokens": 8,
        "reused_tokens": 0, "output_tokens": 2, "first_token_s": 0.5, "total_s": 1.0, "plain_s": 1.0,
        "asked": "a:", "answer": "b", "tokens_equal": True,
    }  # fmt: skip
    return Scene(**(values | changes))


class FakeLLM:
    """Answers "one two three", piece by piece, unless told to refuse."""

    def __init__(self) -> None:
        self.seen: list[list[dict[str, str]]] = []
        self.refuses = False

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Any ids."""
        return [len(messages)]

    def stream(self, messages: list[dict[str, str]], _: SamplingParams) -> Iterator[Piece]:
        """Three pieces."""
        if self.refuses:
            raise RequestError("prompt has too many tokens")
        self.seen.append(messages)
        for text in ("one", " two", " three"):
            yield Piece(request_id=RequestId(0), choice=0, token_ids=(1,), text=text)


def test_help_shows_every_command_and_the_defaults_of_the_settings() -> None:
    """Defaults in a help text are those of the settings classes."""
    assert {"chat", "demo", "doctor", "run"} <= set(invoke("--help").output.split())
    words = invoke("run", "--help").output.split()
    for settings, name in (
        (SamplingParams, "max_tokens"),
        (SamplingParams, "temperature"),
        (EngineSettings, "capacity"),
        (EngineSettings, "block_size"),
        (EngineSettings, "kv_format"),
        (EngineSettings, "kernels"),
    ):
        assert f"{default_of(settings, name)}]" in words
    assert BUNDLED_MODEL == BUNDLED


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--max-tokens", "-1"], "max_tokens=-1"),
        (["--temperature", "-0.5"], "temperature=-0.5"),
        (["--stop", ""], "stop="),
        (["--block-size", "0"], "block_size=0"),
        (["--dtype", "float7"], "dtype='float7'"),
        (["--device", "gpu"], "device='gpu' is no device; give \"cpu\""),
        (["--device", "cuda:99"], "device='cuda:99' cannot be used here"),
        (["--tier", "foo"], "(in tier foo) (from --tier)"),
        (["--tier", "disk:/nowhere/blocks:50"], "capacity=50 holds no file; give 4096"),
        (["--tier", "host:1MB?speed=3"], "speed is no option of the tier; choose"),
        (["--model", "no/such-model"], "model='no/such-model'"),
        (["--capacity", "much"], "capacity='much'"),
        (["--kv-format", "int5"], "kv_format='int5' is unknown; did you mean int"),
        (["--kernels", "fast"], "kernels='fast'"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(args: list[str], named: str) -> None:
    """A user's mistake ends with 2 and no traceback."""
    result = invoke("run", "hello", *args)

    assert result.exit_code == 2
    assert named in error_line(result)
    assert result.stdout == ""


@pytest.mark.parametrize("args", [["run"], ["run", "x", "--nonsense"], ["demo", "--tokens", "0"]])
def test_wrong_usage_ends_with_two(args: list[str]) -> None:
    """What the command line itself cannot read ends like a bad value."""
    assert invoke(*args).exit_code == 2


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (SamplingError("x"), 1),
        (KVKeepError("x"), 1),
        (ConfigError("x"), 2),
        (RequestError("x"), 2),
        (UnsupportedModelError("x"), 3),
        (CapacityError("x"), 4),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: KVKeepError, exit_code: int) -> None:
    """The codes of the documentation."""
    assert exit_code_of(error) == exit_code


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is no failure and leaves no traceback."""

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvkeep.cli.run.open_llm", interrupt)

    result = invoke("run", "hello")

    assert result.exit_code == 130
    assert error_line(result) == "error: interrupted"


def test_debug_lets_the_error_through() -> None:
    """With --debug the traceback is there."""
    result = invoke("run", "hello", "--max-tokens", "-1", "--debug")

    assert isinstance(result.exception, ConfigError)


def test_a_cache_without_room_ends_with_four() -> None:
    """Too little memory is told apart from a bad value."""
    result = invoke("run", "hello", "--capacity", "1KB")

    assert result.exit_code == 4
    assert "capacity=" in error_line(result)


def test_run_prints_json_and_nothing_else() -> None:
    """One object with text, tokens and the receipt, whose numbers add up."""
    result = invoke("run", "-", "--json", "--temperature", "0", "--max-tokens", "3", stdin="a b\n")

    assert result.exit_code == 0
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    assert set(answer) == {"model", "text", "token_ids", "finish_reason", "receipt"}
    assert answer["finish_reason"] in {"stop", "length"}
    receipt = answer["receipt"]
    assert receipt["computed_tokens"] + receipt["reused_tokens"] == receipt["prompt_tokens"] > 0
    assert receipt["output_tokens"] == len(answer["token_ids"]) <= 3


def test_the_same_seed_gives_the_same_text() -> None:
    """A seeded run can be repeated, and says on stderr what it cost."""
    first, second = (invoke("run", "hello", "--seed", "7", "--max-tokens", "8") for _ in range(2))

    assert first.exit_code == 0
    assert first.stdout == second.stdout
    assert "computed" in first.stderr


def test_a_broken_comparison_fails_the_demonstration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where plain transformers would say something else, the table says no and the code is 1."""
    monkeypatch.setattr(demo_scenes, "plain_tokens", lambda *_: [-1])
    monkeypatch.setattr(demo_scenes, "_LONG_PROMPT_TOKENS", 200)
    monkeypatch.setattr(demo_scenes, "_NUM_SHARING", 2)

    result = invoke("demo", "--tokens", "1")

    assert result.exit_code == 1
    assert result.stdout.split().count("no") == 5
    assert "Not every check holds" in result.stdout


def test_a_scene_passes_only_when_exactly_the_gaps_were_computed() -> None:
    """More or less computed than was missing is a failure, although the tokens are equal."""
    after = Coverage(12, (Run(0, 4, "device"), Run(4, 12, None)))

    assert scene(after=after).passed
    assert not scene(after=after, computed_tokens=9).passed
    assert not scene(tokens_equal=False).passed


def test_notes_are_repeatable_and_no_name_comes_twice() -> None:
    """The demonstration asks the same everywhere."""
    notes = make_notes(300, seed=1)

    assert notes == make_notes(300, seed=1)
    assert len(set(notes.names)) == 300


def test_doctor_reports_a_refused_model_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mode is right: code 3, the measured errors on stderr, and still one JSON object."""

    def refuse(*_: object) -> None:
        raise UnsupportedModelError("paged logits differ (native: error 0.5)")

    monkeypatch.setattr(verdict, "choose_mode", refuse)

    result = invoke("doctor", BUNDLED_MODEL, "--json")

    assert result.exit_code == 3
    assert "error 0.5" in error_line(result)
    report = json.loads(result.stdout)
    assert report["served"] is False
    assert report["self_test"] is None


def test_doctor_counts_what_fits() -> None:
    """Tokens, blocks and requests follow from the bytes that were measured."""
    report = json.loads(invoke("doctor", BUNDLED_MODEL, "--json", "--capacity", "64MB").stdout)

    assert report["served"] is True
    spec, (fit, _) = report["spec"], report["fits"]
    assert spec["block_bytes"] == spec["bytes_per_token"] * spec["block_size"]
    assert fit["num_tokens"] == 64_000_000 // spec["block_bytes"] * spec["block_size"]
    assert fit["requests_of"]["4096"] == fit["num_tokens"] // 4096
    (trial,) = (
        t for t in report["self_test"]["trials"] if t["mode"] == report["self_test"]["mode"]
    )
    assert trial["error"] <= report["self_test"]["tolerance"]


def test_doctor_counts_in_the_format_asked_for() -> None:
    """Sizes are those of the format with the layers that are kept exact; what it does is measured."""
    report = json.loads(invoke("doctor", BUNDLED_MODEL, "--json", "--kv-format", "int4").stdout)

    spec, probe = report["spec"], report["format_probe"]
    (group,) = spec["groups"]
    # K/V of 2 heads of 64: 2 bytes an element, or half a byte and a word for each head.
    in_format, exact = 2 * 2 * (64 // 2 + 4), 2 * 2 * 64 * 2
    num_exact = len(probe["exact_layers"])
    assert num_exact in {1, 2}
    assert spec["bytes_per_token"] == num_exact * exact + (4 - num_exact) * in_format
    assert [at for at, one in enumerate(group["formats"]) if one["k"] == "bfloat16"] == (
        probe["exact_layers"]
    )
    assert probe["kld"] <= probe["limit"] < probe["whole_kld"]


def test_doctor_compares_all_formats() -> None:
    """A row for each format: the model's own changes nothing, fewer bits hold more and change more."""
    result = invoke("doctor", BUNDLED_MODEL, "--json", "--formats", "--capacity", "64MB")

    rows = {row["format"]: row for row in json.loads(result.stdout)["formats"]}
    assert set(rows) == set(LONG_FORMAT_NAMES) - {"auto"}
    own, eight, four = rows["bfloat16"], rows["int8"], rows["k8v4"]
    assert own["probe"]["kld"] == 0
    assert own["ratio"] == 1
    assert 0 < eight["probe"]["kld"] < four["probe"]["kld"] < 0.05
    assert own["num_tokens"] < eight["num_tokens"] < four["num_tokens"]
    assert own["bytes_per_token"] == pytest.approx(eight["ratio"] * eight["bytes_per_token"])
    shown = invoke("doctor", BUNDLED_MODEL, "--formats", "--kernels", "torch").stdout
    assert f"{eight['ratio']:.2f} ×" in shown


def test_doctor_shows_a_line_for_each_shape_of_linear_layer() -> None:
    """Where kernels are in use the table has their verdicts, and else none."""
    if not isinstance(load_kernels(), Kernels):
        pytest.skip("the compiled kernels are not installed")
    with_kernels = invoke("doctor", BUNDLED_MODEL).stdout
    without = invoke("doctor", BUNDLED_MODEL, "--kernels", "torch").stdout

    assert "3072 × 256" in with_kernels
    assert "attention by kernels" in with_kernels
    assert "3072 × 256" not in without
    assert "attention by torch" in without


def test_doctor_refuses_a_format_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that changes too much: code 3, the numbers on stderr, and the report all the same."""
    monkeypatch.setattr(format_probe, "_LIMIT", 1e-9)

    result = invoke("doctor", BUNDLED_MODEL, "--json", "--kv-format", "k8v4")

    assert result.exit_code == 3
    assert "kv_format='k8v4' changes what this model (qwen3) says" in error_line(result)
    report = json.loads(result.stdout)
    assert report["served"] is False
    assert report["spec"]["bytes_per_token"] == 4 * 2 * (64 + 4 + 32 + 4)


def test_doctor_says_when_not_one_block_fits() -> None:
    """The model is fine and the memory is not: code 4, after the report."""
    result = invoke("doctor", BUNDLED_MODEL, "--capacity", "1KB")

    assert result.exit_code == 4
    assert "native" in result.stdout
    assert "capacity=" in error_line(result)


def test_an_answer_that_is_stopped_stays_said() -> None:
    """The next turn shows the model what the user has seen, and no more."""
    llm, stop = FakeLLM(), Event()
    conversation = Conversation(cast(LLM, llm), SamplingParams(), "Be brief.")

    pieces = conversation.answer("hi", stop)
    assert next(pieces) == "one"
    stop.set()
    assert list(pieces) == []
    list(conversation.answer("and", Event()))

    contents = [message["content"] for message in llm.seen[-1]]
    assert contents == ["Be brief.", "hi", "one", "and"]


def test_a_refused_message_leaves_the_conversation_as_it_was() -> None:
    """After an error one can go on."""
    llm = FakeLLM()
    conversation = Conversation(cast(LLM, llm), SamplingParams(), "")
    list(conversation.answer("hi", Event()))
    llm.refuses = True
    with pytest.raises(RequestError):
        list(conversation.answer("too long", Event()))
    llm.refuses = False
    list(conversation.answer("and", Event()))

    contents = [message["content"] for message in llm.seen[-1]]
    assert contents == ["hi", "one two three", "and"]


def interrupt_oneself() -> None:
    """Another thread may be the one to take the signal; this one sees it a moment later."""
    os.kill(os.getpid(), signal.SIGINT)
    # Another thread may get the signal: then no sleep of this one ends early, but the loop comes round.
    for _ in range(100):
        time.sleep(0.05)


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background, which ignores it."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("heard_interrupts")
def test_the_first_interrupt_stops_the_answer_and_the_second_interrupts() -> None:
    """Ctrl-C once is a wish, twice is an interrupt; afterwards all is as before."""
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_interrupt() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        with pytest.raises(KeyboardInterrupt):
            interrupt_oneself()

    assert signal.getsignal(signal.SIGINT) is before
