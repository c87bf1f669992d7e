"""A checkpoint with random weights that every engine can load, and a tokenizer that none of them needs."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.shapes import SHAPES, build_model

__all__ = ["save_checkpoint"]


def save_checkpoint(shape: str, folder: Path) -> Path:
    """Write a shape of SHAPES in bfloat16, in one file, unless it is there; returns the folder."""
    if (folder / "config.json").is_file():
        return folder
    partial = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = build_model(shape, torch.bfloat16)
    model.save_pretrained(partial, max_shard_size="100GB")
    _add_older_names(partial / "config.json")
    _save_tokenizer(SHAPES[shape].vocabulary, partial)
    partial.replace(folder)
    return folder


def _add_older_names(path: Path) -> None:
    """Peers pin older versions of transformers, whose names for two fields differ."""
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    config["rope_theta"] = rope.get("rope_theta", 10000.0)
    config["torch_dtype"] = "bfloat16"
    path.write_text(json.dumps(config, indent=2) + "\n")


def _save_tokenizer(vocabulary: int, folder: Path) -> None:
    """Bytes are tokens, and so are names that fill the vocabulary up."""
    names = pre_tokenizers.ByteLevel.alphabet()
    names = sorted(names) + [f"<{number}>" for number in range(vocabulary - len(names))]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131072}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
