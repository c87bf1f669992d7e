"""News desk: a bulletin is worth something until the next one; what has expired is never served.

River gauges are read again and again. Each bulletin is computed once for all readers, and its time to live
counts from then, so that being asked for often does not keep it.
"""

from random import Random
from time import sleep

from kvkeep import LLM, CacheOptions, SamplingParams

COLOURS = (
    "amber",
    "bronze",
    "cobalt",
    "coral",
    "garnet",
    "indigo",
    "ivory",
    "jasmine",
    "olive",
    "topaz",
)
PLACES = (
    "anchor",
    "bridge",
    "canyon",
    "castle",
    "harbor",
    "island",
    "lagoon",
    "meadow",
    "summit",
    "valley",
)
# Where a river's level is measured, in millimetres.
GAUGES = [f"{colour} {place}" for colour, place in zip(COLOURS, PLACES, strict=True)]
GAUGES += [f"{place} {colour}" for colour, place in zip(COLOURS[1:], PLACES, strict=False)]
TTL_S = 3.0


class NewsDesk:
    """Answers from the bulletin of the hour."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._options = CacheOptions(ttl=TTL_S, ttl_counts_from="first")
        # A line of the bulletin is a gauge and its level, so an answer ends with its line.
        self._params = SamplingParams(max_tokens=8, temperature=0, stop="\n")
        self._bulletin = ""
        self._levels: dict[str, str] = {}

    def publish(self, hour: int) -> None:
        """Replace the bulletin."""
        rng = Random(hour)
        self._levels = {gauge: f"{rng.randrange(10_000):04d}" for gauge in GAUGES}
        self._bulletin = "".join(f"{gauge}: {level}\n" for gauge, level in self._levels.items())
        print(f"{hour}:00 bulletin: {len(self._llm.encode(self._bulletin))} tokens")

    def ask(self, gauge: str) -> None:
        """Print the level at a gauge, and what the answer cost."""
        (output,) = self._llm.generate(
            f"{self._bulletin}{gauge}:", self._params, cache=self._options
        )
        cost, level = output.receipt, output.text.strip()
        verdict = "right" if level == self._levels[gauge] else f"wrong, {self._levels[gauge]}"
        print(
            f"  {gauge:<14} {level} ({verdict}): {cost.reused_tokens:4} tokens reused, "
            f"{cost.computed_tokens:4} computed"
        )

    def print_known(self, when: str) -> None:
        """Print how much of the bulletin the cache would serve now."""
        coverage = self._llm.cache.coverage(self._llm.encode(self._bulletin))
        print(f"  {when}: {coverage.known_tokens} tokens of the bulletin are known")


def main() -> None:
    """Two bulletins, and readers of both."""
    with LLM("tiny", capacity="64MB", block_size=16) as llm:
        desk = NewsDesk(llm)
        desk.publish(8)
        for gauge in ("ivory lagoon", "castle garnet", "cobalt canyon"):
            desk.ask(gauge)
        desk.print_known("while it is news")

        sleep(TTL_S)
        desk.print_known(f"{TTL_S:g} seconds later")
        receipt = llm.cache.expire()
        print(f"  swept away: {receipt.deleted} blocks, {receipt.freed_bytes:,} bytes")

        desk.publish(9)
        for gauge in ("ivory lagoon", "castle garnet"):
            desk.ask(gauge)


if __name__ == "__main__":
    main()
