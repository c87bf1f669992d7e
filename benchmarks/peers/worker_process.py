"""A worker as the comparison sees it: a process that is asked, answers, and may die."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Self

from benchmarks.peers.engines import ROOT, EngineSpec
from benchmarks.peers.prepare import Prepared
from benchmarks.peers.protocol import RefusalError

__all__ = ["Worker", "WorkerError"]

_START_S = 600.0
_END_S = 20.0


class WorkerError(Exception):
    """The worker died, failed or did not answer; the text says how."""


class Worker:
    """One engine in a process of its own. Closes once; a dead one is closed too."""

    def __init__(
        self,
        engine: EngineSpec,
        prepared: Prepared,
        *,
        threads: int,
        capacity_tokens: int,
        log: Path,
    ) -> None:
        self.engine = engine
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [
            str(prepared.python), "-m", engine.module, "--model", str(prepared.model),
            "--threads", str(threads), "--capacity-tokens", str(capacity_tokens),
            "--kv", engine.kv,
        ]  # fmt: skip
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(engine, threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # so that what it starts ends with it
            )
        self._answers: Queue[str | None] = Queue()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()
        self.is_alive = True
        try:
            self.hello = self._answer(_START_S)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, op: str, *, timeout_s: float = 300.0, **fields: object) -> dict[str, Any]:
        """Raises RefusalError for what the engine says it cannot do, WorkerError for all else."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the missing answer tells more
            self._process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
            self._process.stdin.flush()
        return self._answer(timeout_s)

    def close(self) -> None:
        """End the process and what it started."""
        if not self.is_alive:
            return
        self.is_alive = False
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(None)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except Empty:
            self._kill()
            raise WorkerError(f"no answer for {timeout_s:.0f} s") from None
        if line is None:
            self._kill()
            raise WorkerError(f"its process ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise RefusalError(answer["refused"])
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next(
            (line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing"
        )


def _environment(engine: EngineSpec, threads: int) -> dict[str, str]:
    quiet = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **quiet, **dict(engine.environ)}
