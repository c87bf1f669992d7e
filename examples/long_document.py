"""Long document: read once, asked many times, and still there after a restart.

The document is a module of the standard library with notes hidden in it. Its keys and values go to a disk
tier as well, from where another process takes them up instead of computing them.
"""

import inspect
import json.decoder
import textwrap
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from kvkeep import LLM, SamplingParams

NOTES = {
    "amber river": "4821",
    "cobalt harbor": "1730",
    "scarlet lantern": "9064",
    "silver falcon": "2258",
}
PARAMS = SamplingParams(max_tokens=8, temperature=0, stop=".")


def document() -> str:
    """Two modules, with the notes at places of their own."""
    source = inspect.getsource(json.decoder) + inspect.getsource(textwrap)
    lines = source.splitlines(keepends=True)[:350]
    rng = Random(3)
    for name, number in NOTES.items():
        place = rng.randrange(len(lines))
        lines.insert(place, f"The magic number for {name} is {number}.\n")
    return "".join(lines)


def ask(llm: LLM, text: str, name: str) -> None:
    """Ask for one of the notes, and print what the answer cost."""
    (output,) = llm.generate(f"{text}The magic number for {name} is", PARAMS)
    cost, number = output.receipt, output.text.strip()
    verdict = "right" if number == NOTES[name] else f"wrong, {NOTES[name]}"
    sources = {place: n for place, n in cost.tokens_by_source.items() if n}
    print(
        f"  {name}: {number} ({verdict}), first token after {1000 * (cost.first_token_s or 0):.0f} ms; "
        f"prompt tokens {sources}"
    )


def serve(folder: Path, text: str, names: list[str]) -> None:
    """Load the model, answer, and close it, as a process would that is started and stopped."""
    # Loads from disk even where this small model would compute faster.
    with LLM("tiny", capacity="64MB", tiers=[f"disk:{folder}:256MB"], loading="always") as llm:
        llm.generate(
            "hello", SamplingParams(max_tokens=1)
        )  # what is slow once, whatever comes first
        for name in names:
            ask(llm, text, name)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"  closed; the disk tier has {num_bytes:,} bytes")


def main() -> None:
    """Ask, stop, start again, ask."""
    text = document()
    with TemporaryDirectory() as folder:
        print("the first process reads the document")
        serve(Path(folder), text, ["amber river", "cobalt harbor", "scarlet lantern"])
        print("the second one does not have to")
        serve(Path(folder), text, ["silver falcon", "amber river"])


if __name__ == "__main__":
    main()
