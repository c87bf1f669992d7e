"""Held-out recall questions: fresh random facts, haystacks from modules kept out of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from models.tiny.batches import Library
from models.tiny.tasks import Measure, distinct, number, two_names


@dataclass(frozen=True)
class Probe:
    """A prompt and the only right continuation."""

    prompt: str
    answer: str
    depth: float  # where the asked fact stands, 0 is the start of the prompt


def keyed_probe(rng: Random, length: int, measure: Measure, _: Library) -> Probe:
    """As many ``key: value`` lines as fit; one of them is asked for."""
    count = (length - 8) // measure("amber river: 4821\n")
    keys = distinct(rng, two_names, count)
    values = [number(rng) for _ in keys]
    asked = rng.randrange(count)
    text = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
    return Probe(f"{text}{keys[asked]}:", f" {values[asked]}", asked / count)


def needle_probe(rng: Random, length: int, measure: Measure, library: Library) -> Probe:
    """One sentence anywhere in unseen library text, asked for at the end."""
    key, value = two_names(rng), number(rng)
    stem = f"The magic number for {key} is"
    needle = f"{stem} {value}.\n"
    lines = library.excerpt(rng, length - 2 * measure(needle))
    place = rng.randrange(len(lines) + 1)
    lines.insert(place, needle)
    return Probe("".join(lines) + stem, f" {value}.", place / len(lines))


def _chat_prompt(notes: list[str], question: str) -> str:
    """The text that the chat template makes of a system and a user message."""
    return (
        f"<|im_start|>system\nAnswer from these notes.\n{''.join(notes)}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def chat_probe(rng: Random, length: int, measure: Measure, library: Library) -> Probe:
    """A few facts among unseen library text in the system prompt, one asked by the user."""
    count = 8
    keys = distinct(rng, two_names, count)
    facts = [f"The secret code of {key} is {number(rng)}." for key in keys]
    room = length - 48 - count * measure(facts[0] + "\n")
    notes = library.excerpt(rng, room)
    for fact in facts:
        notes.insert(rng.randrange(len(notes) + 1), fact + "\n")
    asked = rng.randrange(count)
    depth = notes.index(facts[asked] + "\n") / len(notes)
    question = f"What is the secret code of {keys[asked]}?"
    return Probe(_chat_prompt(notes, question), facts[asked] + "<|im_end|>", depth)


PROBES: dict[str, Callable[[Random, int, Measure, Library], Probe]] = {
    "key-value": keyed_probe,
    "needle": needle_probe,
    "chat": chat_probe,
}
