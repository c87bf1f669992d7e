"""Write a checkpoint as a Transformers model folder (bfloat16 safetensors)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from models.tiny.network import Decoder, Shape

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Sharp attention magnifies the rounding of rotary angles; a wrong weight moves logits by more.
ALLOWED_DIFFERENCE = 2e-2


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one special token."""
    (found,) = tokenizer.encode(token, add_special_tokens=False)
    return int(found)


def configuration(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The Qwen3 configuration of a decoder shape."""
    return Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.rms_norm_eps,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        attention_bias=False,
        use_sliding_window=False,
        bos_token_id=token_id(tokenizer, "<|bos|>"),
        eos_token_id=token_id(tokenizer, "<|im_end|>"),
        pad_token_id=token_id(tokenizer, "<|pad|>"),
    )


def convert(state: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The same weights in the stock class, checked against ours on random tokens."""
    shape = Shape(**state["shape"])
    ours = Decoder(shape)
    ours.load_state_dict(state["model"])
    stock = Qwen3ForCausalLM(configuration(shape, tokenizer))
    stock.eval()
    missing = stock.load_state_dict(state["model"], strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise click.ClickException(f"parameters not set: {missing}")
    stock.tie_weights()
    tokens = torch.randint(0, shape.vocab_size, (2, 300))
    with torch.no_grad():
        gap = (ours(tokens) - stock(tokens).logits).abs().max().item()
    if gap > ALLOWED_DIFFERENCE:
        raise click.ClickException(f"the stock class differs by {gap}")
    return stock


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("tokenizer", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Export CHECKPOINT with the TOKENIZER folder's files to FOLDER."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=False)
    words = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    model = convert(state, words)
    model.bfloat16()
    ends = [token_id(words, token) for token in ("<|im_end|>", "<|eos|>")]
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=model.config.bos_token_id,
        pad_token_id=model.config.pad_token_id,
        eos_token_id=ends,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, folder / name)
    click.echo(f"wrote {folder}")


if __name__ == "__main__":
    main()
