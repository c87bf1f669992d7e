"""Support bot: all customers share one handbook, and each has a session of their own.

Closing a session forgets what only that customer has said, and leaves the handbook to the others.
"""

from itertools import product

from kvkeep import LLM, CacheOptions, SamplingParams

COLOURS = ("amber", "cobalt", "coral", "ivory", "scarlet", "silver")
ANIMALS = ("falcon", "heron", "lizard", "otter", "salmon", "tiger")
# Which locker a parcel lies in; parcels have names here.
LOCKERS = {
    f"{one} {two}": 1000 + 211 * at for at, (one, two) in enumerate(product(COLOURS, ANIMALS))
}
HANDBOOK = "Answer from these notes.\n" + "".join(
    f"The locker number of {parcel} is {locker}.\n" for parcel, locker in LOCKERS.items()
)
PARAMS = SamplingParams(max_tokens=24, temperature=0)


class Conversation:
    """What one customer and the bot have said."""

    def __init__(self, llm: LLM, customer: str) -> None:
        self._llm = llm
        self._options = CacheOptions(session=customer)
        self._messages = [{"role": "system", "content": HANDBOOK}]

    def ask(self, parcel: str) -> None:
        """Ask where a parcel is, and print the answer and its cost."""
        question = f"What is the locker number of {parcel}?"
        self._messages.append({"role": "user", "content": question})
        output = self._llm.chat(self._messages, PARAMS, cache=self._options)
        self._messages.append({"role": "assistant", "content": output.text})
        cost = output.receipt
        print(
            f"{self._options.session:>6}: {output.text.strip():<45} "
            f"{cost.reused_tokens:5} tokens reused, {cost.computed_tokens:4} computed, "
            f"first token after {1000 * (cost.first_token_s or 0):.0f} ms"
        )


def main() -> None:
    """Two customers come, one goes, a third one comes."""
    with LLM("tiny", capacity="64MB", block_size=16) as llm:
        ada, ben = Conversation(llm, "ada"), Conversation(llm, "ben")
        ada.ask("silver otter")
        ben.ask("coral tiger")
        ada.ask("amber falcon")
        ada.ask("ivory heron")
        ben.ask("cobalt lizard")
        for session in llm.cache.sessions():
            print(
                f"session {session.name}: {session.num_blocks} blocks, {session.num_own_blocks} its own"
            )

        receipt = llm.cache.close_session("ada")
        print(f"closed ada: {receipt.deleted} blocks forgotten, {receipt.freed_bytes:,} bytes")

        Conversation(llm, "cleo").ask("scarlet salmon")
        ben.ask("amber tiger")


if __name__ == "__main__":
    main()
