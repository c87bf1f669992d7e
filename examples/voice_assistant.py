"""Voice assistant: what callers may ask for is computed before they call, and pinned.

Who speaks cannot wait. The prompts of all skills are warmed at the start; a pin keeps them on the device
while other work comes and goes there.
"""

from random import Random

from kvkeep import LLM, CacheOptions, SamplingParams

SKILLS = ("doctors", "lawyers", "florists")
WORDS = (
    *("amber", "apple", "cedar", "cherry", "clover", "coral", "daisy"),
    *("hazel", "heron", "iris", "jasmine", "lilac", "maple", "olive"),
)
PARAMS = SamplingParams(max_tokens=24, temperature=0)


def phone_book(skill: str) -> dict[str, str]:
    """Names and extensions, others for every skill."""
    rng = Random(skill)
    names = [f"{first} {second}" for first in WORDS for second in ("bishop", "hunter")]
    return {name: f"{rng.randrange(10_000):04d}" for name in names}


class Assistant:
    """Answers callers."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def prompt(self, skill: str, question: str = "") -> list[int]:
        """The tokens of a call, or of what all calls of a skill begin with."""
        book = phone_book(skill).items()
        notes = "".join(f"The phone extension of {name} is {number}.\n" for name, number in book)
        head = f"<|im_start|>system\nAnswer from these notes.\n{notes}<|im_end|>\n"
        if question:
            head += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return self._llm.encode(head)

    def answer(self, skill: str, name: str, when: str) -> None:
        """Answer one call, and print how long the caller waited."""
        question = f"What is the phone extension of {name}?"
        (output,) = self._llm.generate([self.prompt(skill, question)], PARAMS)
        cost = output.receipt
        print(
            f"{when:<26} {output.text.strip():<46} first token after "
            f"{1000 * (cost.first_token_s or 0):4.0f} ms, {cost.computed_tokens:4} of "
            f"{cost.prompt_tokens} tokens computed"
        )


def other_work(llm: LLM, num_prompts: int) -> None:
    """Prompts of somebody else, more than the device has room for."""
    rng = Random(0)
    for _ in range(num_prompts):
        lines = "".join(f"{rng.choice(WORDS)} {rng.randrange(10_000)}\n" for _ in range(150))
        llm.generate(lines, SamplingParams(max_tokens=1))


def main() -> None:
    """A call to a cold assistant, one to a warm one, and one after a busy hour."""
    with LLM("tiny", capacity="24MB", block_size=16) as llm:
        assistant = Assistant(llm)
        llm.generate(
            "hello", SamplingParams(max_tokens=1)
        )  # what is slow once, whatever comes first
        assistant.answer("doctors", "cedar hunter", "cold:")
        llm.cache.clear()

        for skill in SKILLS:
            ids = assistant.prompt(skill)
            llm.cache.warm(ids, CacheOptions(priority=90))
            llm.cache.pin(ids, name=f"skill:{skill}")
        for pin in llm.cache.pins():
            print(f"pinned {pin.name}: {pin.num_blocks} blocks")
        assistant.answer("doctors", "olive bishop", "warm:")

        other_work(llm, num_prompts=20)
        evicted = sum(group.num_evictions for group in llm.cache.stats().groups)
        print(f"other work has evicted {evicted} blocks")
        for skill in SKILLS:
            assistant.answer(skill, "clover hunter", f"{skill}, after that:")


if __name__ == "__main__":
    main()
