"""Product catalogue: every page is computed once, ahead of time, and shared by all who ask about it."""

from itertools import product
from random import Random
from time import perf_counter

from kvkeep import LLM, CacheOptions, SamplingParams

MATERIALS = ("bamboo", "copper", "cotton", "granite", "ivory", "linen", "marble", "velvet")
THINGS = {
    "kitchen": ("bottle", "goblet", "kettle"),
    "bedroom": ("blanket", "candle", "pillow"),
    "hall": ("carpet", "lantern", "mirror"),
    "garden": ("basket", "bucket", "ladder"),
}
NUM_QUESTIONS = 24


class Page:
    """A page of the catalogue: products and their article numbers."""

    def __init__(self, name: str) -> None:
        self.name = name
        rng = Random(name)
        pairs = product(MATERIALS, THINGS[name])
        self.numbers = {f"{one} {two}": f"{rng.randrange(10_000):04d}" for one, two in pairs}

    def prompt(self, article: str = "") -> str:
        """The page, and an article that is asked for."""
        lines = "".join(f"{name}: {number}\n" for name, number in self.numbers.items())
        return lines + (f"{article}:" if article else "")


def main() -> None:
    """Warm all pages, then answer many questions at once."""
    pages = [Page(name) for name in THINGS]
    with LLM("tiny", capacity="64MB", block_size=16) as llm:
        for at, page in enumerate(pages, 1):
            ids = llm.encode(page.prompt())
            started_s = perf_counter()
            llm.cache.warm(ids, CacheOptions(tags=[f"page:{page.name}"]))
            print(
                f"warmed {at} of {len(pages)}: {page.name}, {len(ids)} tokens "
                f"in {1000 * (perf_counter() - started_s):.0f} ms"
            )

        rng = Random(1)
        asked = [rng.choice(pages) for _ in range(NUM_QUESTIONS)]
        articles = [rng.choice(list(page.numbers)) for page in asked]
        prompts = [page.prompt(one) for page, one in zip(asked, articles, strict=True)]
        started_s = perf_counter()
        outputs = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0, stop="\n"))
        total_s = perf_counter() - started_s

        right = sum(
            output.text.strip() == page.numbers[article]
            for output, page, article in zip(outputs, asked, articles, strict=True)
        )
        num_tokens = sum(output.receipt.prompt_tokens for output in outputs)
        computed = sum(output.receipt.computed_tokens for output in outputs)
        print(
            f"{NUM_QUESTIONS} questions at once, {right} answered right, in {1000 * total_s:.0f} ms"
        )
        print(
            f"their prompts have {num_tokens} tokens: {computed} were computed, "
            f"{num_tokens - computed} shared ({(num_tokens - computed) / num_tokens:.0%})"
        )
        stats = llm.cache.stats()
        print(f"all pages together take {stats.reusable_bytes:,} of {stats.capacity_bytes:,} bytes")


if __name__ == "__main__":
    main()
