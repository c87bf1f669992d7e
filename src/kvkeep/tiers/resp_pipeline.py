"""Many small commands in one round trip: to each server its own, all sent before the first reply is read."""

import select
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvkeep.tiers.deadlines import CallError, Deadline
from kvkeep.tiers.resp_connection import unavailable
from kvkeep.tiers.resp_node import NodeLease, RespNode
from kvkeep.tiers.resp_protocol import Reply, ServerError, encode
from kvkeep.tiers.resp_router import Router

__all__ = ["Answer", "KeyCommand", "Pipeline"]

# A thousand commands are about 100 kB.
_MAX_COMMANDS = 1000
_MAX_HOPS = 4
# Replies that came while another server was waited for are read although the time is over.
_GRACE_S = 0.01

# A server's reply, or why there is none.
Answer: TypeAlias = "Reply | CallError"


@dataclass(frozen=True, slots=True)
class KeyCommand:
    """An encoded command about one key."""

    key: bytes
    command: bytes


@dataclass(slots=True)
class _Batch:
    """The commands, by place, that one server answers."""

    node: RespNode
    is_asking: bool
    places: list[int]
    lease: NodeLease | None = None


class Pipeline:
    """Runs commands and follows redirects; a server that does not answer concerns its own keys only."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def run(self, commands: Sequence[KeyCommand], deadline: Deadline) -> list[Answer]:
        """The answer to each command; a round trip for each thousand."""
        answers: list[Answer] = []
        for first in range(0, len(commands), _MAX_COMMANDS):
            answers += self._run_some(commands[first : first + _MAX_COMMANDS], deadline)
        return answers

    def _run_some(self, commands: Sequence[KeyCommand], deadline: Deadline) -> list[Answer]:
        answers: list[Answer] = [None] * len(commands)
        batches = self._by_owner(commands, answers, deadline)
        for _ in range(_MAX_HOPS):
            self._exchange(batches, commands, answers, deadline)
            batches = self._redirected(batches, answers)
            if not batches:
                break
        return answers

    def _by_owner(
        self, commands: Sequence[KeyCommand], answers: list[Answer], deadline: Deadline
    ) -> list[_Batch]:
        node_to_batch: dict[int, _Batch] = {}
        for place, command in enumerate(commands):
            try:
                node = self._router.node_of(command.key, deadline)
            except CallError as error:
                answers[place] = error
                continue
            batch = node_to_batch.get(id(node))
            if batch is None:
                batch = node_to_batch[id(node)] = _Batch(node, is_asking=False, places=[])
            batch.places.append(place)
        return list(node_to_batch.values())

    def _redirected(self, batches: list[_Batch], answers: list[Answer]) -> list[_Batch]:
        """Commands that were answered by a redirect, by where it leads."""
        target_to_batch: dict[tuple[int, bool], _Batch] = {}
        for batch in batches:
            for place in batch.places:
                answer = answers[place]
                if not isinstance(answer, ServerError) or not self._router.is_redirect(answer):
                    continue
                try:
                    target = self._router.follow(answer, batch.node)
                except CallError as error:
                    answers[place] = error
                    continue
                following = target_to_batch.setdefault(
                    (id(target.node), target.is_asking), _Batch(target.node, target.is_asking, [])
                )
                following.places.append(place)
        return list(target_to_batch.values())

    def _exchange(
        self,
        batches: list[_Batch],
        commands: Sequence[KeyCommand],
        answers: list[Answer],
        deadline: Deadline,
    ) -> None:
        try:
            # In one order for all threads: two that hold a connection each, and want the other's, would
            # wait until both are late.
            for batch in sorted(batches, key=lambda batch: str(batch.node.address)):
                self._send(batch, commands, answers, deadline, is_alone=len(batches) == 1)
            for batch in _as_they_answer(batches, deadline):
                self._read(batch, answers, deadline)
        except BaseException as error:
            for batch in batches:
                if batch.lease is not None:
                    batch.lease.end(error)
            raise

    def _send(
        self,
        batch: _Batch,
        commands: Sequence[KeyCommand],
        answers: list[Answer],
        deadline: Deadline,
        *,
        is_alone: bool,
    ) -> None:
        prefix = encode(b"ASKING") if batch.is_asking else b""
        try:
            # A server that hangs while one connects to it must leave some time to the others.
            own = deadline if is_alone else deadline.at_most(deadline.left_s() / 2)
            batch.lease = batch.node.lease(own)
            batch.lease.connection.send(
                b"".join(prefix + commands[place].command for place in batch.places), own
            )
        except CallError as error:
            self._give_up(batch, error, answers)

    def _read(self, batch: _Batch, answers: list[Answer], deadline: Deadline) -> None:
        assert batch.lease is not None
        connection = batch.lease.connection
        own = deadline if deadline.remaining_s() > _GRACE_S else Deadline(_GRACE_S)
        try:
            for place in batch.places:
                if batch.is_asking:
                    connection.reply(own)
                reply = answers[place] = connection.reply(own)
            self._check(reply)
        except CallError as error:
            self._give_up(batch, error, answers)
        else:
            batch.lease.end(None)

    def _check(self, reply: Reply) -> None:
        """Raise CallError where a server says that it cannot serve."""
        if isinstance(reply, ServerError) and not self._router.is_redirect(reply):
            fault = unavailable(reply)
            if fault is not None:
                raise fault

    def _give_up(self, batch: _Batch, error: CallError, answers: list[Answer]) -> None:
        if batch.lease is not None:
            batch.lease.end(error)
            batch.lease = None
        self._router.note_fault()
        for place in batch.places:
            answers[place] = error


def _as_they_answer(batches: list[_Batch], deadline: Deadline) -> Iterator[_Batch]:
    """Those that were sent, in the order in which replies arrive; at last those that are late."""
    fileno_to_batch = {
        batch.lease.connection.fileno(): batch for batch in batches if batch.lease is not None
    }
    if len(fileno_to_batch) > 1:
        arriving = select.poll()
        for fileno in fileno_to_batch:
            arriving.register(fileno, select.POLLIN)
        while ready := arriving.poll(deadline.remaining_s() * 1000):
            for fileno, _ in ready:
                arriving.unregister(fileno)
                yield fileno_to_batch.pop(fileno)
            if not fileno_to_batch:
                return
    yield from fileno_to_batch.values()
