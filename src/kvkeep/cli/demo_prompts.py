"""What the demonstration asks: notes with made-up facts, and questions about them."""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

__all__ = ["Notes", "make_notes", "question"]

_WORD_TEXT = """
amber anchor apple arrow badge bamboo beacon bishop bottle breeze bridge bronze bucket button
cabin cactus candle canyon carpet castle cedar cherry clover cobalt copper coral crane crystal
dagger desert dolphin dragon eagle ember falcon feather flint forest fossil galaxy garnet ginger
granite hammer harbor hazel heron honey indigo island ivory jacket jasmine jungle kettle ladder
lantern lemon lizard lotus magnet maple marble meadow mirror nectar needle ocean olive orbit
orchid otter oyster palace panther pearl pepper pillow planet poplar prairie quartz rabbit raven
ribbon river robin rocket saddle saffron salmon shadow silver sparrow spider spruce statue stone
summit temple thunder tiger timber topaz tulip tunnel valley velvet violet walnut whale willow
window winter wizard zephyr
"""
_WORDS = _WORD_TEXT.split()


@dataclass(frozen=True, slots=True)
class Notes:
    """Facts, each a name of two words and a code of four digits."""

    facts: tuple[tuple[str, str], ...]

    @property
    def names(self) -> list[str]:
        """What can be asked for."""
        return [name for name, _ in self.facts]

    def as_lines(self) -> str:
        """One `name: code` line for each fact; followed by `name:` the code is the likely next text."""
        return "".join(f"{name}: {code}\n" for name, code in self.facts)

    def as_system_prompt(self) -> str:
        """The facts as sentences for a system prompt."""
        lines = "".join(f"The secret code of {name} is {code}.\n" for name, code in self.facts)
        return f"Answer from these notes.\n{lines}"


def question(name: str) -> str:
    """What a user asks about one of the notes."""
    return f"What is the secret code of {name}?"


def make_notes(num_facts: int, seed: int) -> Notes:
    """`num_facts` facts, the same for the same seed, no name twice."""
    rng = Random(seed)  # noqa: S311  made-up facts protect nothing
    names: dict[str, None] = {}
    for name in _draw_names(rng):
        if len(names) == num_facts:
            break
        names[name] = None
    return Notes(tuple((name, f"{rng.randrange(10_000):04d}") for name in names))


def _draw_names(rng: Random) -> Iterator[str]:
    while True:
        yield " ".join(rng.sample(_WORDS, 2))
