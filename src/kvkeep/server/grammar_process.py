"""The program of a process that compiles grammars to see whether they can be, within limits that end it.

It imports nothing of kvkeep. A line of input is a grammar as a JSON string, a line of output the error or "",
the first one for the start. Arguments: seconds of work, bytes of memory, limits of the parser.
"""

import json
import resource
import signal
import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# A small part of the stack that a thread of the server has: what fits here fits there.
_STACK_BYTES = 2**21
# By the clock, for a process that is given no time to work.
_WAIT_FACTOR = 4


def _serve(max_work_s: float, limits: LLParserLimits) -> None:
    # Without a vocabulary the library would leave out half of its work.
    vocabulary = LLTokenizer("byte")
    _say("")
    for line in sys.stdin:
        # Nothing handles these signals, so that they end native code too.
        signal.setitimer(signal.ITIMER_PROF, max_work_s)
        signal.setitimer(signal.ITIMER_REAL, _WAIT_FACTOR * max_work_s)
        error = LLMatcher(vocabulary, json.loads(line), log_level=0, limits=limits).get_error()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(error)


def _say(error: str) -> None:
    sys.stdout.write(json.dumps(error) + "\n")
    sys.stdout.flush()


def _main(max_work_s: str, max_bytes: str, limits: str) -> None:
    most = int(max_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    parsed = LLParserLimits(**json.loads(limits))
    worker = threading.Thread(target=_serve, args=(float(max_work_s), parsed))
    worker.start()
    worker.join()


if __name__ == "__main__":
    _main(*sys.argv[1:])
