"""Turn library text and recall tasks into weighted token batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.tiny import tasks
from models.tiny.tasks import RECALL, SILENT, Pieces

TASK_NAMES = ("keyed", "needle", "copy", "variables", "chat", "raw", "code")
END_OF_TEXT = "<|eos|>"
SHORT_SHARE = 0.3  # of the examples end before the row does


@dataclass(frozen=True)
class Batch:
    """Token rows with one extra column, weights of the predicted tokens, task of each row."""

    tokens: Tensor
    weights: Tensor
    kinds: list[str]


class Library:
    """Modules cut into lines, with token counts, for haystacks and code rows."""

    def __init__(self, texts: list[str], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.modules: list[list[tuple[str, list[int]]]] = []
        for text in texts:
            # A blank line would merge with the line break before it: keep them together.
            lines = _joined_lines(text)
            encoded = tokenizer.encode_batch(lines, add_special_tokens=False)
            self.modules.append(
                [(line, code.ids) for line, code in zip(lines, encoded, strict=True)]
            )
        self.sizes = [sum(len(ids) for _, ids in lines) for lines in self.modules]

    def _start(self, rng: Random) -> tuple[list[tuple[str, list[int]]], int]:
        (lines,) = rng.choices(self.modules, weights=self.sizes)
        return lines, rng.randrange(len(lines)) if rng.random() < 0.9 else 0

    def excerpt(self, rng: Random, length: int) -> list[str]:
        """Consecutive lines of about ``length`` tokens, never more."""
        chosen: list[str] = []
        room = length
        while room > 0:
            lines, start = self._start(rng)
            for line, ids in lines[start:]:
                room -= len(ids)
                if room < 0:
                    break
                chosen.append(line)
            if lines[start:] and room <= len(lines[start][1]):
                break
        return chosen

    def code(self, rng: Random, length: int) -> list[int]:
        """At least ``length`` tokens of library text, modules ended by an end token."""
        chosen: list[int] = []
        end = self.tokenizer.encode(END_OF_TEXT, add_special_tokens=False).ids
        while len(chosen) < length:
            lines, start = self._start(rng)
            for _, ids in lines[start:]:
                chosen += ids
                if len(chosen) >= length:
                    break
            else:
                chosen += end
        return chosen


def _joined_lines(text: str) -> list[str]:
    """Lines with their breaks, blank ones joined to the line before."""
    joined: list[str] = []
    for line in text.splitlines(keepends=True):
        if joined and not line.strip():
            joined[-1] += line
        elif line.strip():
            joined.append(line)
    return joined


class Sampler:
    """Draws task rows and batches from one random stream."""

    def __init__(self, library: Library, rng: Random) -> None:
        self.library, self.rng = library, rng
        self.tokenizer = library.tokenizer
        self.end = self.tokenizer.encode(END_OF_TEXT, add_special_tokens=False).ids
        self._encode = lru_cache(maxsize=100_000)(self._encode_piece)

    def _encode_piece(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def measure(self, text: str) -> int:
        """Number of tokens of a piece."""
        return len(self._encode(text))

    def pieces(self, kind: str, length: int) -> Pieces:
        """One example of a textual task that fills about ``length`` tokens."""
        excerpt = self.library.excerpt
        match kind:
            case "keyed":
                return tasks.keyed_lines(self.rng, length, self.measure)
            case "needle":
                return tasks.needles(self.rng, length, self.measure, excerpt)
            case "copy":
                return tasks.copying(self.rng, length, self.measure, excerpt)
            case "variables":
                return tasks.variables(self.rng, length, self.measure)
            case "chat":
                return tasks.chat(self.rng, length, self.measure, excerpt)
        raise ValueError(kind)

    def _raw(self, length: int) -> tuple[list[int], list[float]]:
        """Random tokens: repeated segments, or pairs asked again and again."""
        rng = self.rng
        size = self.tokenizer.get_vocab_size()
        alphabet = rng.sample(range(size), rng.choice((size, size, 256)))
        if rng.random() < 0.5:
            segment = rng.choices(alphabet, k=rng.randint(6, max(8, length // 3)))
            tokens = segment * (2 + length // len(segment))
            weights = [0.0] * len(segment) + ([0.0] + [RECALL] * (len(segment) - 1)) * (
                1 + length // len(segment)
            )
            return tokens, weights
        count = min(rng.randint(4, max(6, length // 4)), len(alphabet))
        values = {key: rng.choice(alphabet) for key in rng.sample(alphabet, count)}
        unseen = list(values)
        tokens, weights = [], []
        asked: list[int] = []
        while len(tokens) < length:
            known = bool(asked) and (not unseen or rng.random() < 0.5)
            key = rng.choice(asked) if known else unseen.pop()
            tokens += [key, values[key]]
            weights += [0.0, RECALL if known else 0.0]
            if not known:
                asked.append(key)
        return tokens, weights

    def row(self, kind: str, length: int) -> tuple[list[int], list[float]]:
        """Exactly ``length`` tokens and weights of one task, padded with code."""
        if kind == "code":
            tokens = self.library.code(self.rng, length)
            return tokens[:length], [1.0] * length
        if kind == "raw":
            tokens, weights = self._raw(length)
            return tokens[:length], weights[:length]
        tokens, weights = [], []
        while len(tokens) < length - 32:
            room = length - len(tokens)
            if self.rng.random() < SHORT_SHARE:
                room = self.rng.randint(min(room, 64), room)
            for piece in self.pieces(kind, room):
                ids = self._encode(piece.text)
                tokens += ids
                weights += [piece.weight] * len(ids)
            tokens += self.end
            weights += [SILENT]
        filler = self.library.code(self.rng, max(0, length - len(tokens)))
        return (tokens + filler)[:length], (weights + [0.3] * len(filler))[:length]

    def batch(self, rows: int, length: int, mixture: dict[str, float]) -> Batch:
        """Rows of ``length`` + 1 tokens, each of a task drawn from the mixture."""
        kinds = self.rng.choices(list(mixture), weights=list(mixture.values()), k=rows)
        drawn = [self.row(kind, length + 1) for kind in kinds]
        tokens = torch.tensor([tokens for tokens, _ in drawn])
        weights = torch.tensor([weights for _, weights in drawn])
        return Batch(tokens, weights[:, 1:].contiguous(), kinds)
