"""Loading a model: by path, as an object, with a tokenizer, and what is refused."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kvkeep.errors import ConfigError
from kvkeep.hf.fingerprint import model_fingerprint
from kvkeep.hf.load import load_model
from kvkeep.testing.tiny_models import build_tiny


def tokenizer(eos: str | None = None) -> PreTrainedTokenizerFast:
    """Two words."""
    words = {"a": 0, "b": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")),  # noqa: S106  a word
        eos_token=eos,
    )


def test_a_saved_model_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    """Weights, number type and tokenizer come from the folder."""
    saved = build_tiny("llama", dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path)
    tokenizer("b").save_pretrained(tmp_path)

    loaded = load_model(tmp_path, device="cpu")

    assert model_fingerprint(loaded.model) == model_fingerprint(load_model(saved).model)
    assert loaded.model.dtype is torch.bfloat16
    assert not loaded.model.training
    assert loaded.tokenizer is not None
    assert loaded.eos_ids == {1}
    assert loaded.name == str(tmp_path)


def test_a_folder_without_tokenizer_serves_token_ids(tmp_path: Path) -> None:
    """A missing tokenizer is no error; a given one is used."""
    build_tiny("llama").save_pretrained(tmp_path)

    assert load_model(str(tmp_path), device="cpu").tokenizer is None
    own = tokenizer()
    assert load_model(str(tmp_path), own, device="cpu").tokenizer is own


def test_a_loaded_model_is_taken_as_it_is() -> None:
    """The object itself, alone or in a pair with its tokenizer, moved only where that is asked for."""
    model, own = build_tiny("llama"), tokenizer("b")

    loaded = load_model((model, own))

    assert loaded.model is model
    assert loaded.tokenizer is own
    assert loaded.eos_ids == {1}
    assert load_model(model).name == "LlamaForCausalLM"
    assert load_model(model, dtype="bfloat16").model.dtype is torch.bfloat16


def test_the_generation_config_says_what_ends_an_output() -> None:
    """It may name several tokens, and goes before the tokenizer."""
    model = build_tiny("llama")
    assert load_model(model).eos_ids == frozenset()
    model.generation_config.eos_token_id = [5, 6]

    assert load_model(model, tokenizer("b")).eos_ids == {5, 6}


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x", torch.device("cuda:99")])
def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(
    device: str | torch.device,
) -> None:
    """A model that does not exist is not even looked for, and one that is there stays where it is."""
    for model in ("nobody/has-this", build_tiny("llama")):
        with pytest.raises(ConfigError, match=rf"device='?{device}'?.*give \"cpu\""):
            load_model(model, device=device)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (17, "model=17 is neither a name nor a model"),
        ((1, 2, 3), "model is a tuple of 3; give"),
        ("nobody/has-this", "model='nobody/has-this' cannot be loaded"),
    ],
    ids=["number", "triple", "unknown"],
)
def test_what_is_no_model_is_refused(model: object, message: str) -> None:
    """The error says what may be given."""
    with pytest.raises(ConfigError, match=message):
        load_model(model)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    """Neither another object nor an empty folder."""
    with pytest.raises(ConfigError, match="tokenizer=17 is no tokenizer"):
        load_model(build_tiny("llama"), 17)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(build_tiny("llama"), tmp_path)


def test_an_unknown_number_type_is_refused() -> None:
    """Names of types and of functions that are none."""
    for dtype in ("int8", "zeros", "fp13"):
        with pytest.raises(ConfigError, match=f"dtype='{dtype}' is unknown"):
            load_model(build_tiny("llama"), dtype=dtype)
