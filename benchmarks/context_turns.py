"""Turns of sessions to another context, as context="auto" sees them: false alarms, and turns missed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random
from time import perf_counter

from transformers import PreTrainedTokenizerBase

from benchmarks.conversations import KINDS, Author, Sent
from benchmarks.harness import Run, Script
from kvkeep.blocks import Namespace, TokenChain
from kvkeep.cache.lifetimes import Lifetimes, LifetimeSettings
from kvkeep.config import CacheOptions
from kvkeep.hf.load import load_model
from kvkeep.replay import TraceRequest, read_trace
from kvkeep.replay.trace import BLOCK_TOKENS
from kvkeep.spec import BlockKey

_BLOCK = 32
_ALARMS, _IN_VAIN, _MISSED = "false alarms", "demoted in vain", "turns missed"
# What the usual share has to hold. Where only the end of a chat changes an alarm would be an error.
_AT_MOST = {
    ("chat that grows", _ALARMS): 0.0,
    ("public trace", _IN_VAIN): 1.0,
    ("public trace", _MISSED): 25.0,
    ("other subjects", _MISSED): 25.0,
    ("two code bases", _MISSED): 10.0,
}
_USUAL = LifetimeSettings().context_share


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`shares` are thresholds; each kind has `conversations` sessions in each of `applications`.

    `trace` is a file in the format of the public traces, left out where it is absent (docs/traces.md).
    """

    trace: str
    shares: tuple[float, ...]
    applications: int
    conversations: int


@dataclass(frozen=True, slots=True)
class _Step:
    """One request of a session: its prompt, and the same with the answer."""

    prompt: TokenChain
    whole: TokenChain
    is_turn: bool


_Session = Sequence[_Step]


@dataclass(slots=True)
class _Verdicts:
    """Whether a turn was seen, of requests that are about something else, and of those that go on.

    `num_missed` are blocks that were demoted because the session turned away from them, and that it asked for
    again, of `num_asked`.
    """

    of_turns: list[bool] = field(default_factory=list)
    of_others: list[bool] = field(default_factory=list)
    num_asked: int = 0
    num_missed: int = 0

    def join(self, other: "_Verdicts") -> None:
        """Add what was seen elsewhere."""
        self.of_turns += other.of_turns
        self.of_others += other.of_others
        self.num_asked += other.num_asked
        self.num_missed += other.num_missed


def measure(run: Run, settings: Settings) -> None:
    """The public trace, then all kinds of scripted conversations, each with all thresholds."""
    _measure_trace(run, settings)
    tokenizer = load_model("tiny").tokenizer
    assert tokenizer is not None
    start = perf_counter()
    for kind, write in KINDS.items():
        if perf_counter() - start > run.budget_s:
            run.notes.append(f"left out, since the budget was spent: {kind}")
            continue
        authors = [Author((run.seed, kind, at)) for at in range(settings.applications)]
        applications = [
            [list(_steps(write(author), tokenizer)) for _ in range(settings.conversations)]
            for author in authors
        ]
        _measure(run, kind, applications, settings.shares)
    _check_never(run, tokenizer)
    run.notes += [
        "false alarms: of 1,000 requests that go on with what their session was about",
        "demoted in vain: of 1,000 blocks asked for, those that the session had turned away from before",
        "one value for each application; its sessions share a system prompt",
        "share 0: turns are not looked for, and only branches of a conversation that it leaves are demoted",
        "alone: nobody else uses the system prompt, so that it counts as the session's own",
    ]


def _check_never(run: Run, tokenizer: PreTrainedTokenizerBase) -> None:
    author = Author((run.seed, "check"))
    talks = [list(_steps(KINDS["other subjects"](author), tokenizer)) for _ in range(2)]
    never, always = (_watch(talks, share) for share in (0.0, 1.1))
    run.check(
        "a share of 0 sees no turn, one above 1 sees turns",
        holds=not any(never.of_turns) and any(always.of_turns),
        found=f"({always.of_turns.count(True)} of {len(always.of_turns)})",
    )


def _measure(
    run: Run, what: str, applications: Sequence[Sequence[_Session]], shares: Sequence[float]
) -> None:
    for share in shares:
        _add(run, what, share, [_watch(one, share) for one in applications])
    if any(step.is_turn for one in applications for steps in one for step in steps):
        for share in shares:
            alone = [_watch_alone(one, share) for one in applications]
            _add(run, f"{what}, alone", share, alone)


def _add(run: Run, what: str, share: float, found: Sequence[_Verdicts]) -> None:
    others = [one.of_others for one in found if one.of_others]
    turns = [one.of_turns for one in found if one.of_turns]
    measures = {
        _ALARMS: ([1000 * one.count(True) / len(one) for one in others], "of 1,000"),
        _IN_VAIN: ([1000 * one.num_missed / one.num_asked for one in found], "of 1,000"),
        _MISSED: ([100 * one.count(False) / len(one) for one in turns], "%"),
    }
    for measure_name, (values, unit) in measures.items():
        if values:
            at_most = _AT_MOST.get((what, measure_name)) if share == _USUAL else None
            run.add(f"{what}, share {share:g}: {measure_name}", values, unit, at_most=at_most)


def _watch(sessions: Iterable[_Session], share: float) -> _Verdicts:
    """What the books of a cache say of these sessions, one behind the other."""
    lifetimes, found = Lifetimes(LifetimeSettings(context_share=share)), _Verdicts()
    for number, steps in enumerate(sessions):
        options, context = CacheOptions(session=f"s{number}", context="auto"), None
        demoted: set[BlockKey] = set()
        for step in steps:
            claim = lifetimes.open(options, step.prompt)
            found.num_asked += len(step.prompt.keys)
            found.num_missed += len(demoted.intersection(step.prompt.keys))
            demoted.difference_update(step.prompt.keys)
            demoted.update(lifetimes.begin(claim, step.prompt))
            lifetimes.use(claim, step.whole, range(len(step.whole.keys)), is_new=True)
            lifetimes.close(claim, step.whole)
            if context is not None:
                verdicts = found.of_turns if step.is_turn else found.of_others
                verdicts.append(claim.context != context)
            context = claim.context
    return found


def _watch_alone(sessions: Iterable[_Session], share: float) -> _Verdicts:
    """The same where every session has a cache of its own."""
    found = _Verdicts()
    for steps in sessions:
        found.join(_watch([steps], share))
    return found


# --- scripted conversations --------------------------------------------------------------------------


def _steps(sent: Iterable[Sent], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Step]:
    root = _root(_BLOCK)
    for one in sent:
        text = tokenizer.apply_chat_template(
            list(one.messages), add_generation_prompt=True, tokenize=False
        )
        prompt = TokenChain(root, _BLOCK, _ids(str(text), tokenizer))
        whole = prompt.fork()
        whole.append(_ids(one.answer, tokenizer))
        yield _Step(prompt, whole, one.is_turn)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _root(block_size: int) -> BlockKey:
    return Namespace(model="", positions="", kv_format="", block_size=block_size).root_key()


# --- the public trace --------------------------------------------------------------------------------


def _measure_trace(run: Run, settings: Settings) -> None:
    path = Path(settings.trace)
    if not path.is_file():
        run.notes.append(f"public trace: left out, trace={settings.trace!r} is no file")
        return
    digest = sha256(path.read_bytes()).hexdigest()
    conversations = _conversations(read_trace(path))
    num_requests = sum(map(len, conversations))
    run.notes.append(
        f"public trace: {path.name}, sha256 {digest}; {num_requests} requests in {len(conversations)} "
        "conversations; two of them, drawn at random, are a session that turns once"
    )
    Random(run.seed).shuffle(conversations)
    sessions = list(_joined(conversations))
    _measure(run, "public trace", [sessions], settings.shares)


def _conversations(requests: Sequence[TraceRequest]) -> list[list[TraceRequest]]:
    """Which requests go on with each other: those that share more than what all begin with.

    A request belongs to the conversation that it shares most blocks with.
    """
    chains = [one.hash_ids[: one.input_length // BLOCK_TOKENS] for one in requests]
    everywhere = set(chains[0]).intersection(*chains)
    id_to_number: dict[int, int] = {}
    conversations: list[list[TraceRequest]] = []
    for request, ids in zip(requests, chains, strict=True):
        own = [one for one in ids if one not in everywhere]
        known = [id_to_number[one] for one in own if one in id_to_number]
        number = known[-1] if known else len(conversations)
        if not known:
            conversations.append([])
        conversations[number].append(request)
        for one in own:
            id_to_number.setdefault(one, number)
    return conversations


def _joined(conversations: Sequence[Sequence[TraceRequest]]) -> Iterator[_Session]:
    """Sessions of two conversations each. What was answered is not in a trace: it is never sent back."""
    unknown = count(1 + max(max(one.hash_ids) for talk in conversations for one in talk))
    root = _root(1)
    for pair in zip(conversations[::2], conversations[1::2], strict=False):
        steps = []
        for at, talk in enumerate(pair):
            for number, request in enumerate(talk):
                num_tokens = request.input_length
                prompt = TokenChain(root, 1, request.hash_ids[: num_tokens // BLOCK_TOKENS])
                whole = prompt.fork()
                num_blocks = (num_tokens + request.output_length) // BLOCK_TOKENS
                whole.append([next(unknown) for _ in range(num_blocks - len(prompt))])
                steps.append(_Step(prompt, whole, at > 0 and number == 0))
        yield steps


main = Script(
    name="context_turns",
    claim='context="auto" raises no alarm where a conversation goes on, and sees when another one begins.',
    full=Settings(
        trace="conversation_trace.jsonl",
        shares=(0.0, 0.1, 0.25, 0.5, 0.75),
        applications=10,
        conversations=8,
    ),
    quick=Settings(trace="", shares=(0.0, 0.5), applications=2, conversations=3),
    measure=measure,
)

if __name__ == "__main__":
    main()
