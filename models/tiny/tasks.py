"""Synthetic recall tasks: keyed lines, needles, copies, variables and chats.

A task returns pieces of text with a weight each.  Weight 1 marks text that the
context determines and that the model must recall; smaller weights mark text that
is only context.  Pieces begin and end where the tokenizer always splits, so that
encoding them one by one equals encoding the joined text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

RECALL = 1.0
FORMAT = 0.05
SILENT = 0.0

WORDS = """
amber anchor apple arrow badge bamboo basket beacon berry bishop blanket bottle branch
breeze brick bridge bronze brush bucket butter button cabin cactus camel candle canyon
carbon carpet castle cedar cello chalk cherry circle cliff clover cobalt coffee comet copper
coral cotton crane crater crown crystal dagger daisy desert diamond dolphin dragon drum
eagle echo ember engine falcon feather fern fiddle flame flint flute forest fossil fountain
fox galaxy garden garnet ginger glacier goblet granite grape gravel hammer harbor hawk hazel
helmet heron hollow honey horizon hunter indigo iron island ivory jacket jaguar jasmine
jewel jungle kernel kettle kite ladder lagoon lantern lemon lily linen lion lizard lobster
lotus magnet mango maple marble meadow mirror mitten monsoon mountain nectar needle nickel
oasis ocean olive onyx orange orbit orchid otter owl oyster paddle palace panther pearl
pebble pepper piano pigeon pillow pine planet plum pocket pollen pony poplar prairie prism
pumpkin quartz rabbit raven ribbon river robin rocket rose ruby saddle saffron salmon
sapphire scarlet shadow shell silver sparrow spider spruce squid statue stone storm summit
sunset swan temple thistle thunder tiger timber topaz torch tulip tunnel turtle valley
velvet violet violin walnut walrus whale willow window winter wizard wolf yarrow zebra
zephyr zinc
"""
NAMES = WORDS.split()


@dataclass(frozen=True)
class Piece:
    """Some text and how much its tokens count in the loss."""

    text: str
    weight: float


Pieces = list[Piece]
Measure = Callable[[str], int]
Haystack = Callable[[Random, int], list[str]]


def number(rng: Random) -> str:
    """A four-digit code."""
    return f"{rng.randrange(10_000):04d}"


def two_names(rng: Random) -> str:
    """Two words with a blank between."""
    return f"{rng.choice(NAMES)} {rng.choice(NAMES)}"


def name_number(rng: Random) -> str:
    """A word and a two-digit number."""
    return f"{rng.choice(NAMES)} {rng.randrange(100):02d}"


def underscored(rng: Random) -> str:
    """Two words joined as a Python name."""
    return f"{rng.choice(NAMES)}_{rng.choice(NAMES)}"


def one_name(rng: Random) -> str:
    """One word."""
    return rng.choice(NAMES)


def odd_word(rng: Random) -> str:
    """Letters, perhaps with digits, that form no word."""
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7)))
    return letters + rng.choice(("", "", f"-{rng.randrange(100)}"))


KEYS = (two_names, two_names, two_names, name_number, underscored, number, odd_word)
VALUES = (number, number, number, one_name, two_names, odd_word)
SEPARATORS = (":", ":", ":", " =", " ->", " is")


def distinct(rng: Random, draw: Callable[[Random], str], count: int) -> list[str]:
    """``count`` different draws."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None
    return list(found)


def keyed_lines(rng: Random, length: int, measure: Measure) -> Pieces:
    """Lines ``key: value``; known keys come back and their value must be recalled."""
    draw_key, draw_value = rng.choice(KEYS), rng.choice(VALUES)
    separator = rng.choice(SEPARATORS)
    probe = f"{draw_key(rng)}{separator} {draw_value(rng)}\n"
    lines = length // measure(probe)
    streaming = rng.random() < 0.4
    asked_share = 0.5 if streaming else rng.choice((0.1, 0.25, 0.5))
    facts = max(2, int(lines * (1 - asked_share)))
    keys = distinct(rng, draw_key, facts)
    values = [draw_value(rng) for _ in keys]
    order = [(index, False) for index in range(facts)]
    for _ in range(lines + 8 - facts):
        asked = rng.randrange(facts)
        place = rng.randrange(asked + 1, len(order) + 1) if streaming else len(order)
        order.insert(place, (asked, True))
    pieces, seen = [], set()
    for index, _ in order:
        known = index in seen
        seen.add(index)
        pieces.append(Piece(keys[index] + separator, FORMAT))
        pieces.append(Piece(f" {values[index]}\n", RECALL if known else FORMAT))
    return pieces


SENTENCES = (
    ("The magic number for {key} is", number),
    ("The secret code for {key} is", number),
    ("The magic number for {key} is", number),
    ("Remember that the password of {key} is", two_names),
    ("# NOTE: the port of {key} is", number),
    ("The best friend of {key} is", two_names),
)


def needles(rng: Random, length: int, measure: Measure, haystack: Haystack) -> Pieces:
    """Sentences hidden in library text, each asked for at the end."""
    sentence, draw_value = rng.choice(SENTENCES)
    draw_key = rng.choice((two_names, two_names, one_name, odd_word))
    limit = max(1, min(length // 45, 80))
    keys = distinct(rng, draw_key, rng.choice((1, rng.randint(1, limit), limit)))
    facts = [(sentence.format(key=key), f" {draw_value(rng)}.\n") for key in keys]
    cost = sum(measure(stem + end) for stem, end in facts)
    asked = rng.sample(facts, len(facts))
    while measure("x\n") and cost * 2 > length - 16:
        cost -= measure("".join(facts.pop()))
        asked = rng.sample(facts, len(facts))
    lines = haystack(rng, length - 2 * cost - 8)
    places = sorted(rng.randrange(len(lines) + 1) for _ in facts)
    pieces = [Piece(line, 0.5) for line in lines]
    for place, (stem, end) in zip(reversed(places), facts, strict=True):
        pieces[place:place] = [Piece(stem + end, FORMAT)]
    for stem, end in asked:
        pieces += [Piece(stem, FORMAT), Piece(end, RECALL)]
    return pieces


def copying(rng: Random, length: int, measure: Measure, haystack: Haystack) -> Pieces:
    """A text and its exact copy."""
    lines = haystack(rng, rng.randint(length // 4, length // 2 - 8))
    if rng.random() < 0.3:
        room = sum(map(measure, lines)) // 2
        lines = [" ".join(rng.choice(NAMES) for _ in range(6)) + "\n" for _ in range(room // 4)]
    repeats = 1 + length // max(1, sum(map(measure, lines)))
    pieces = [Piece(line, 0.2) for line in lines]
    for _ in range(min(repeats, 4)):
        pieces.append(Piece("# copy\n", SILENT))
        pieces += [Piece(line, RECALL) for line in lines]
    return pieces


def variables(rng: Random, length: int, measure: Measure) -> Pieces:
    """Assignments, some through another variable, and assertions about them."""
    probe = "amber_river = stone_lion\nassert amber_river == 4821\n"
    count = max(2, length // measure(probe))
    names = distinct(rng, underscored, count)
    known: dict[str, str] = {}
    pieces: Pieces = []
    for name in names:
        if known and rng.random() < 0.4:
            source = rng.choice(list(known))
            pieces.append(Piece(f"{name} = {source}\n", FORMAT))
            known[name] = known[source]
        else:
            known[name] = number(rng)
            pieces.append(Piece(f"{name} = {known[name]}\n", FORMAT))
    for name in rng.choices(names, k=count + 4):
        pieces.append(Piece(f"assert {name} ==", FORMAT))
        pieces.append(Piece(f" {known[name]}\n", RECALL))
    return pieces


TOPICS = ("magic number", "secret code", "phone extension", "locker number", "port")
QUESTIONS = (
    "What is the {topic} of {key}?",
    "What is the {topic} of {key}?",
    "Tell me the {topic} of {key}.",
    "And the {topic} of {key}?",
)
OPENINGS = (
    "Answer from these notes.\n",
    "Answer from these notes.\n",
    "You are a helpful assistant. Answer from the notes below.\n",
    "",
)


def chat(rng: Random, length: int, measure: Measure, haystack: Haystack) -> Pieces:
    """A ChatML talk about facts from the system prompt, in several turns."""
    topic = rng.choice(TOPICS)
    draw_key = rng.choice((two_names, two_names, one_name, odd_word))
    draw_value = rng.choice((number, number, number, one_name, odd_word))
    turns = rng.randint(1, max(1, min(24, length // 100)))
    fact = f"The {topic} of amber river is 4821.\n"
    turn_cost = 30 + 2 * measure(fact)
    room = max(measure(fact) * 2, length - turn_cost * turns - 24)
    padded = rng.random() < 0.5 and room > 120
    limit = max(turns + 1, room // measure(fact))
    count = rng.randint(turns, max(turns, limit // 8)) if padded else max(turns, limit)
    keys = distinct(rng, draw_key, min(count, 120 if draw_key is one_name else 2000))
    values = {key: draw_value(rng) for key in keys}
    lines = [f"The {topic} of {key} is {values[key]}.\n" for key in keys]
    if padded:
        for line in haystack(rng, room - len(lines) * measure(fact)):
            lines.insert(rng.randrange(len(lines) + 1), line)
    opening = f"<|im_start|>system\n{rng.choice(OPENINGS)}"
    pieces = [Piece(opening, FORMAT), *(Piece(line, FORMAT) for line in lines)]
    pieces.append(Piece("<|im_end|>\n", FORMAT))
    for key in rng.sample(keys, turns):
        question = rng.choice(QUESTIONS).format(topic=topic, key=key)
        question = f"<|im_start|>user\n{question}<|im_end|>\n"
        pieces.append(Piece(question + "<|im_start|>assistant\n", FORMAT))
        pieces.append(Piece(f"The {topic} of {key} is {values[key]}.<|im_end|>", RECALL))
        pieces.append(Piece("\n", FORMAT))
    return pieces
