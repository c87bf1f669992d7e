"""Grammars are tried in a process of their own before the server compiles them: a bad one ends only that.

The library compiles in native code that nothing can stop, takes what memory it wants, and dies of references
that lie too deep.
"""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from kvkeep.errors import ConfigError

__all__ = ["GrammarTrial"]

_PROGRAM = Path(__file__).with_name("grammar_process.py")


class GrammarTrial:
    """Tries grammars, one after another; thread-safe.

    The process starts with the first one and ends with this object. `limits` are those of the library's
    parser.
    """

    def __init__(
        self, limits: Mapping[str, Any], *, max_work_s: float = 3.0, max_bytes: int = 2**30
    ) -> None:
        self._limits = limits
        self._max_work_s = max_work_s
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize[[subprocess.Popen[str]], GrammarTrial] | None = None

    def failure(self, source: str) -> str | None:
        """Why this grammar cannot be compiled, as the library says it; None where it can be."""
        with self._lock:
            # One that ended while it was not asked is no fault of this grammar.
            if self._process is None or self._process.poll() is not None:
                self._close()
                self._process = self._start()
            answer = _asked(self._process, json.dumps(source))
            if answer is not None:
                return answer or None
            self._close()
        return (
            f"making its grammar takes more than {self._max_work_s:g} s, {self._max_bytes >> 20} MiB or the "
            "stack; give smaller schemas, with fewer patterns, alternatives and references behind each other"
        )

    def _close(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _start(self) -> "subprocess.Popen[str]":
        """Raises ConfigError where no process can be started."""
        options = [str(self._max_work_s), str(self._max_bytes), json.dumps(dict(self._limits))]
        # Its own session: Ctrl-C on a terminal is for the server, whose end closes its input.
        process = subprocess.Popen(  # noqa: S603  a program of our own
            [sys.executable, "-P", str(_PROGRAM), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end_process, process)
        if _asked(process, "") is None:
            self._close()
            raise ConfigError(
                f"{sys.executable} cannot run {_PROGRAM.name} (status {process.returncode}), which tries "
                "grammars; leave out response_format and required tools, or repair the installation"
            )
        return process


def _asked(process: "subprocess.Popen[str]", line: str) -> str | None:
    """The answer to this line, or to the start of the process without one; None from a process that ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if line:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        return str(json.loads(answer)) if answer.endswith("\n") else None
    except OSError:
        return None


def _end_process(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            try:
                pipe.close()
            except OSError:  # what it was never told cannot be told now
                continue
