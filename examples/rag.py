"""RAG: retrieved documents are tagged, so that replacing one forgets exactly what was computed from it.

Documents go into the prompt in the order of their numbers: questions that need the same ones share them.
"""

from dataclasses import dataclass, replace
from random import Random

from kvkeep import LLM, CacheOptions, SamplingParams
from kvkeep.cache import Selector
from kvkeep.config import TagSpan

PLACES = (
    *("anchor", "beacon", "canyon", "desert", "forest", "glacier"),
    *("harbor", "island", "jungle", "lagoon", "meadow", "oasis"),
)
OPENING = "<|im_start|>system\nAnswer from these notes.\n"


@dataclass(frozen=True)
class Document:
    """The notes of one region: door codes of its huts."""

    number: int
    region: str
    edition: int = 1

    @property
    def codes(self) -> dict[str, str]:
        """What the document says."""
        rng = Random(f"{self.region} {self.edition}")
        return {f"{self.region} {place}": f"{rng.randrange(10_000):04d}" for place in PLACES}

    @property
    def text(self) -> str:
        """The document as it goes into a prompt."""
        codes = self.codes.items()
        return "".join(f"The secret code of {hut} is {code}.\n" for hut, code in codes)


class Library:
    """Documents by number."""

    def __init__(self, regions: list[str]) -> None:
        self.documents = {n: Document(n, region) for n, region in enumerate(regions, 70)}

    def retrieve(self, question: str) -> list[Document]:
        """The documents that a question mentions, in the order of their numbers."""
        return [one for _, one in sorted(self.documents.items()) if one.region in question]

    def replace(self, number: int) -> None:
        """Put a new edition in."""
        old = self.documents[number]
        self.documents[number] = replace(old, edition=old.edition + 1)


def ask(llm: LLM, library: Library, hut: str, *, beside: str = "") -> None:
    """Answer from what is retrieved for a hut, and for one more region, and print what that cost."""
    found = library.retrieve(f"{hut} {beside}")
    ids, tags = llm.encode(OPENING), []
    for document in found:
        tags.append(TagSpan(tag=f"doc:{document.number}", start=len(ids)))
        ids += llm.encode(document.text)
    question = f"What is the secret code of {hut}?"
    ids += llm.encode(
        f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    params = SamplingParams(max_tokens=24, temperature=0)
    (output,) = llm.generate([ids], params, cache=CacheOptions(tags=tags))
    cost, right = output.receipt, next(one.codes[hut] for one in found if hut in one.codes)
    verdict = "right" if right in output.text else f"wrong, {right}"
    numbers = ", ".join(str(one.number) for one in found)
    print(
        f"documents {numbers}: {output.text.strip()} ({verdict}); {cost.reused_tokens} tokens reused, "
        f"{cost.computed_tokens} computed"
    )


def main() -> None:
    """Questions that share documents; then one document changes."""
    library = Library(["amber", "cobalt", "scarlet"])
    with LLM("tiny", capacity="64MB", block_size=16) as llm:
        ask(llm, library, "cobalt harbor", beside="amber")
        ask(llm, library, "amber oasis", beside="cobalt")
        ask(llm, library, "scarlet lagoon", beside="amber")

        changed = Selector(tags=("doc:71",))
        preview = llm.cache.purge(changed, dry_run=True)
        print(f"document 71 changes: {preview.matched} blocks depend on it")
        library.replace(71)
        receipt = llm.cache.purge(changed)
        print(f"purged: {receipt.deleted} blocks, {receipt.freed_bytes:,} bytes")

        ask(llm, library, "scarlet desert", beside="amber")  # never saw it
        ask(llm, library, "cobalt harbor", beside="amber")  # what stands before it is still there


if __name__ == "__main__":
    main()
