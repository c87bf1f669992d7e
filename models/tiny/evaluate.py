"""Measure recall and code prediction of the bundled weights on held-out text.

python models/tiny/evaluate.py --lengths 2048 4096 --samples 200 --json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import click
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # lets the file run as a plain script

from models.tiny.batches import Library  # noqa: E402
from models.tiny.corpus import read_modules  # noqa: E402
from models.tiny.probes import PROBES, Probe  # noqa: E402

BUNDLED = ROOT / "src" / "kvkeep" / "bundled" / "tiny"
SEED = 20_000
# Half the width of a 95 % interval, in standard errors.
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Score:
    """Exact matches of one probe kind at one prompt length."""

    task: str
    length: int
    samples: int
    exact: int
    mean_prompt_tokens: float

    @property
    def share(self) -> float:
        """Part of the samples answered exactly."""
        return self.exact / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        z2 = NORMAL_95**2
        centre = (self.exact + z2 / 2) / (self.samples + z2)
        variance = self.share * (1 - self.share) / self.samples + z2 / (4 * self.samples**2)
        spread = NORMAL_95 * math.sqrt(variance) / (1 + z2 / self.samples)
        return max(0.0, centre - spread), min(1.0, centre + spread)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def answered(model: PreTrainedModel, tokenizer: Tokenizer, probe: Probe) -> tuple[bool, int]:
    """Whether greedy decoding gives the answer exactly, and the prompt's length.

    One pass over prompt and answer decides it: greedy decoding writes the
    answer if and only if every answer token is the best guess after the ones before.
    """
    prompt = tokenizer.encode(probe.prompt, add_special_tokens=False).ids
    answer = tokenizer.encode(probe.answer, add_special_tokens=False).ids
    tokens = torch.tensor([prompt + answer[:-1]])
    with torch.inference_mode():
        logits = model(tokens, logits_to_keep=len(answer), use_cache=False).logits[0]
    return bool(logits.argmax(-1).tolist() == answer), len(prompt)


def recall(
    model: PreTrainedModel, tokenizer: Tokenizer, library: Library, settings: tuple[str, int, int]
) -> Score:
    """Ask ``samples`` fresh questions of one kind at one length."""
    task, length, samples = settings
    rng = Random(f"{SEED}/{task}/{length}")

    def measure(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    results = [
        answered(model, tokenizer, PROBES[task](rng, length, measure, library))
        for _ in range(samples)
    ]
    exact = sum(right for right, _ in results)
    return Score(task, length, samples, exact, sum(size for _, size in results) / samples)


def code_prediction(
    model: PreTrainedModel, tokenizer: Tokenizer, library: Library, rows: int
) -> dict[str, float]:
    """Loss per token, bits per byte and accuracy on held-out library text."""
    rng = Random(SEED)
    loss, right, size, count = 0.0, 0, 0, 0
    for _ in range(rows):
        tokens = torch.tensor([library.code(rng, 1025)[:1025]])
        with torch.inference_mode():
            logits = model(tokens[:, :-1], use_cache=False).logits[0].float()
        wanted = tokens[0, 1:]
        loss += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        right += int((logits.argmax(-1) == wanted).sum().item())
        size += len(tokenizer.decode(wanted.tolist(), skip_special_tokens=False).encode())
        count += len(wanted)
    return {
        "tokens": count,
        "loss_per_token": loss / count,
        "bits_per_byte": loss / math.log(2) / size,
        "top_1_accuracy": right / count,
    }


def arguments() -> argparse.Namespace:
    """Options of the command line; argparse, since click has no ``--lengths 2048 4096``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="Model folder.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--samples", type=int, default=200, help="Questions per kind and length.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="Threads; 0 keeps the default.")
    parser.add_argument("--json", action="store_true", help="Also print the numbers as JSON.")
    return parser.parse_args()


def main() -> None:
    """Print a table of exact-match recall and of code prediction."""
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    tokenizer = load_tokenizer(options.model)
    library = Library(read_modules(held_out=True), tokenizer)
    scores = []
    for length in options.lengths:
        for task in PROBES:
            score = recall(model, tokenizer, library, (task, length, options.samples))
            scores.append(score)
            low, high = score.interval
            click.echo(
                f"{task:10} {length:6} tokens  {score.exact:4}/{score.samples:<4}"
                f" {score.share:7.1%}  (95 % interval {low:.1%} to {high:.1%})"
            )
    code = code_prediction(model, tokenizer, library, rows=max(4, options.samples // 4))
    click.echo("  ".join(f"{name} {value:.3f}" for name, value in code.items()))
    if options.json:
        rows = [{**asdict(score), "share": score.share} for score in scores]
        click.echo(json.dumps({"dtype": options.dtype, "recall": rows, "code": code}, indent=2))


if __name__ == "__main__":
    main()
