"""Train the byte-level BPE tokenizer and save it in the Transformers layout."""

from __future__ import annotations

import json
from pathlib import Path

import click
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.tiny.corpus import read_modules
from models.tiny.tasks import NAMES

VOCABULARY_SIZE = 3072
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
# Digits come in pairs at most, so that codes split alike wherever they stand.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def train_tokenizer() -> Tokenizer:
    """Fit the merges to the library text, with the task words given extra weight."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Repeated often enough that names and digit pairs become single tokens.
    names = "".join(f" {name}\n{name}\n" for name in NAMES)
    numbers = "".join(f" {number:02d}-{number:02d}-" for number in range(100))
    extra = [names * 4000, numbers * 2000]
    tokenizer.train_from_iterator([*read_modules(held_out=False), *extra], trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<|eos|>", "<|im_start|>"],
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    target = folder / "tokenizer_config.json"
    target.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Train the tokenizer and save it in FOLDER."""
    save(train_tokenizer(), folder)
    click.echo(f"saved {folder}")


if __name__ == "__main__":
    main()
