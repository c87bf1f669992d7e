"""Train the bundled demonstration model; stops and resumes at any time.

python -m models.tiny.train --tokenizer FOLDER --run RUN_FOLDER --tokens 20_000_000
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from models.tiny.batches import Batch, Library, Sampler
from models.tiny.circuit import plant
from models.tiny.control import Control
from models.tiny.corpus import read_modules
from models.tiny.muon import Muon
from models.tiny.network import Decoder, Shape
from models.tiny.tasks import RECALL

LENGTHS = (512, 2048, 4608)
BATCH_TOKENS = 2048
RECALL_BOOST = 10.0
MATRIX_RATE, OTHER_RATE = 0.012, 0.004
WARMUP_STEPS = 40
DECAY_SHARE = 0.4
STAGE_ACCURACY, STAGE_MIN_STEPS, STAGE_MAX_STEPS = 0.93, 60, 250
ROW_SHARES = (0.74, 0.14, 0.12)  # of the batches, by row length, once all are unlocked
STAGE_TASKS = ("keyed", "needle", "chat")
SAVE_SECONDS = 120
MOSTLY_RECALL: dict[str, float] = {
    "keyed": 22, "needle": 14, "copy": 8, "variables": 10, "chat": 26, "raw": 8, "code": 12
}  # fmt: skip
# Once all lengths are unlocked, the shortest rows are for code: long ones cost several times more.
MOSTLY_CODE: dict[str, float] = {
    "keyed": 6, "needle": 4, "copy": 2, "variables": 4, "chat": 7, "raw": 4, "code": 73
}  # fmt: skip

log = logging.getLogger("tiny")


@dataclass
class Progress:
    """What besides weights and optimizers must survive a restart."""

    step: int = 0
    tokens: int = 0
    stage: int = 0
    stage_step: int = 0
    seconds: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)

    def note(self, key: str, value: float) -> None:
        """Fold one measurement into its moving average."""
        self.accuracy[key] = 0.95 * self.accuracy.get(key, value) + 0.05 * value

    def advance(self) -> None:
        """Unlock the next length once recall at the present one is good."""
        self.stage_step += 1
        reached = [self.accuracy.get(f"{task}@{LENGTHS[self.stage]}", 0.0) for task in STAGE_TASKS]
        good = min(reached) > STAGE_ACCURACY and self.stage_step >= STAGE_MIN_STEPS
        if self.stage + 1 < len(LENGTHS) and (good or self.stage_step >= STAGE_MAX_STEPS):
            self.stage, self.stage_step = self.stage + 1, 0


class Trainer:
    """Owns the model, both optimizers and the random streams."""

    def __init__(self, tokenizer: Tokenizer, run: Path, budget: int) -> None:
        self.run, self.budget = run, budget
        self.progress = Progress()
        torch.manual_seed(1)
        self.decoder = Decoder(Shape(vocab_size=tokenizer.get_vocab_size()))
        plant(self.decoder)
        self.rng = Random(1)
        self.sampler = Sampler(Library(read_modules(held_out=False), tokenizer), self.rng)
        named = dict(self.decoder.named_parameters())
        matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in named.items() if p.ndim == 1 or "embed" in n]
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, lr=MATRIX_RATE), MATRIX_RATE),
            (torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0), OTHER_RATE),
        ]
        self.losses: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = torch.compile(
            self._losses, dynamic=False
        )

    def _losses(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted loss, and where the best guess is right."""
        logits = self.decoder(tokens[:, :-1])
        wanted = tokens[:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        loss = (each * weights.flatten()).sum() / weights.sum()
        return loss, logits.argmax(-1) == wanted

    @property
    def checkpoint(self) -> Path:
        """Where the resumable state lives."""
        return self.run / "checkpoint.pt"

    def save(self) -> None:
        """Write the whole state, then rename it into place."""
        state = {
            "model": self.decoder.state_dict(),
            "shape": asdict(self.decoder.shape),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "progress": asdict(self.progress),
            "rng": self.rng.getstate(),
        }
        unfinished = self.checkpoint.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)

    def load(self) -> None:
        """Continue from the saved state."""
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=False)
        self.decoder.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        self.rng.setstate(state["rng"])

    def draw(self) -> Batch:
        """A batch at one of the unlocked lengths."""
        unlocked = LENGTHS[: self.progress.stage + 1]
        complete = unlocked == LENGTHS
        shares = ROW_SHARES if complete else [1.0] * len(unlocked)
        (length,) = self.rng.choices(unlocked, weights=shares)
        mixture = MOSTLY_CODE if complete and length == LENGTHS[0] else MOSTLY_RECALL
        return self.sampler.batch(max(1, BATCH_TOKENS // length), length, mixture)

    def set_rates(self) -> None:
        """Warm up, hold, then fall to zero over the last part of the budget."""
        left = 1 - self.progress.tokens / self.budget
        scale = min(1.0, (self.progress.step + 1) / WARMUP_STEPS, max(0.01, left / DECAY_SHARE))
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale

    def step(self) -> float:
        """Draw, learn, measure; returns the loss."""
        batch = self.draw()
        code_rows = torch.tensor([kind == "code" for kind in batch.kinds])[:, None]
        recalled = (batch.weights == RECALL) & ~code_rows
        weights = torch.where(recalled, RECALL_BOOST, batch.weights)
        loss, right = self.losses(batch.tokens, weights)
        loss.backward()
        self.set_rates()
        for optimizer, _ in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        length = batch.weights.shape[1]
        for row, kind in enumerate(batch.kinds):
            counted = recalled[row] if kind != "code" else torch.ones_like(recalled[row])
            if counted.any():
                self.progress.note(f"{kind}@{length}", right[row][counted].float().mean().item())
        self.progress.step += 1
        self.progress.tokens += batch.weights.numel()
        self.progress.advance()
        return float(loss.item())

    def report(self, loss: float) -> None:
        """Log the moving accuracies of all unlocked lengths."""
        progress = self.progress
        log.info(
            "step %d tokens %d stage %d seconds %.0f loss %.3f",
            progress.step, progress.tokens, progress.stage, progress.seconds, loss,
        )  # fmt: skip
        for length in LENGTHS[: progress.stage + 1]:
            found = {
                k.split("@")[0]: v for k, v in progress.accuracy.items() if k.endswith(f"@{length}")
            }
            log.info("  %5d %s", length, " ".join(f"{k} {v:.3f}" for k, v in sorted(found.items())))

    def learn(self, control: Control) -> None:
        """Run until the token budget is spent."""
        saved, smooth = time.monotonic(), 0.0
        while self.progress.tokens < self.budget:
            self.budget = control.apply(self.budget)
            started = time.monotonic()
            loss = self.step()
            self.progress.seconds += time.monotonic() - started
            smooth = loss if not smooth else 0.95 * smooth + 0.05 * loss
            if self.progress.step % 20 == 0:
                self.report(smooth)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--run", type=click.Path(path_type=Path), required=True)
@click.option("--tokens", default=20_000_000, show_default=True, help="Token budget.")
@click.option("--control", type=click.Path(path_type=Path), help="File with orders, re-read.")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in the run folder.")
def main(tokenizer: Path, run: Path, tokens: int, control: Path | None, *, resume: bool) -> None:
    """Train, logging to standard error."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(Tokenizer.from_file(str(tokenizer / "tokenizer.json")), run, tokens)
    if resume:
        trainer.load()
    trainer.learn(Control(control))


if __name__ == "__main__":
    main()
