"""Coding assistant: open files are tagged with their versions, and a workspace is a context.

A new version of a file purges what depended on the old one, and only that. When the assistant turns to
another workspace, the first one leaves the device at once and comes back when it is wanted.
"""

from dataclasses import dataclass
from random import Random

from kvkeep import LLM, CacheOptions, SamplingParams
from kvkeep.cache import Selector
from kvkeep.config import TagSpan

WORDS = (
    *("anchor", "beacon", "cabin", "dagger", "engine", "flute"),
    *("garden", "harbor", "island", "jacket", "kettle", "ladder"),
)


@dataclass
class SourceFile:
    """A file of constants."""

    path: str
    version: int

    @property
    def tag(self) -> str:
        """Names this version of the file."""
        return f"file:{self.path}@v{self.version}"

    @property
    def constants(self) -> dict[str, str]:
        """What the file assigns; every version and file its own numbers."""
        rng = Random(f"{self.path} {self.version}")
        stem = self.path.removesuffix(".py")
        return {f"{stem}_{word}": f"{rng.randrange(10_000):04d}" for word in WORDS}

    @property
    def text(self) -> str:
        """The source."""
        return "".join(f"{name} = {value}\n" for name, value in self.constants.items())


class Assistant:
    """Completes assertions about the files of a workspace."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._params = SamplingParams(max_tokens=8, temperature=0, stop="\n")

    def ask(self, workspace: str, files: list[SourceFile], file: SourceFile, word: str) -> None:
        """Print the value of one constant, and what it cost to find."""
        ids, tags = list[int](), list[TagSpan]()
        for one in files:
            tags.append(TagSpan(tag=one.tag, start=len(ids)))
            ids += self._llm.encode(one.text)
        name = f"{file.path.removesuffix('.py')}_{word}"
        ids += self._llm.encode(f"{name} =")
        options = CacheOptions(session="editor", context=workspace, tags=tags)
        (output,) = self._llm.generate([ids], self._params, cache=options)
        cost, right = output.receipt, file.constants[name]
        sources = {place: n for place, n in cost.tokens_by_source.items() if n}
        verdict = "right" if output.text.strip() == right else f"wrong, {right}"
        print(
            f"{workspace:>8}: {name} = {output.text.strip()} ({verdict}); prompt tokens {sources}"
        )

    def print_places(self) -> None:
        """Print where blocks are."""
        stats = self._llm.cache.stats()
        kept = sum(group.reusable for group in stats.groups)
        below = ", ".join(f"{one.tier.num_objects} in {one.tier.name}" for one in stats.tiers)
        print(f"          blocks: {kept} on the device, {below}")


def main() -> None:
    """Work on one project, edit it, look at another one, and return."""
    # Loads from memory even where this small model would compute faster.
    with LLM("tiny", capacity="32MB", block_size=16, tiers=["host:64MB"], loading="always") as llm:
        assistant = Assistant(llm)
        billing = [SourceFile(f"{name}.py", 1) for name in ("invoice", "tariff", "ledger")]
        search = [SourceFile(f"{name}.py", 1) for name in ("index", "query")]
        assistant.ask("billing", billing, billing[0], "harbor")
        assistant.ask("billing", billing, billing[2], "kettle")

        print("edit ledger.py: what stands before it stays")
        billing[2].version = 2
        assistant.ask("billing", billing, billing[2], "kettle")
        stale = llm.cache.purge(Selector(tags=("file:ledger.py@v1",)), dry_run=True)
        print(f"          {stale.matched} blocks of ledger.py@v1 are left")

        print("turn to another workspace: the first one leaves the device")
        assistant.print_places()
        assistant.ask("search", search, search[1], "garden")
        assistant.print_places()
        print("and back")
        assistant.ask("billing", billing, billing[1], "island")


if __name__ == "__main__":
    main()
