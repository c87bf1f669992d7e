"""The bundled demonstration model loads, speaks ChatML and recalls from its context."""

import sys
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "src" / "kvkeep" / "bundled" / "tiny"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the task generators live beside the package, in models/tiny

MEGABYTE = 1_000_000
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
NASTY = st.one_of(
    st.text(),
    st.text(alphabet=st.characters(codec="utf-8", categories=["Mn", "So", "Zs", "Cf", "Cc", "Nd"])),
    st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "\r\n", "\t", "é", "a", "07"])).map(
        "".join
    ),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The bundled tokenizer."""
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(FOLDER)
    return loaded


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    """The bundled model, in the precision it ships in."""
    loaded = Qwen3ForCausalLM.from_pretrained(FOLDER)
    loaded.eval()
    return loaded


def _answers(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str
) -> bool:
    """Whether greedy decoding writes the answer: each of its tokens is the best guess."""
    asked, wanted = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
    tokens = torch.tensor([asked + wanted[:-1]])
    with torch.inference_mode():
        logits = model(tokens, logits_to_keep=len(wanted), use_cache=False).logits[0]
    return bool(logits.argmax(-1).tolist() == wanted)


@given(text=NASTY)
@example(text="e\u0301 \U0001f469\u200d\U0001f680 \u2028\x00\ufeff\t\r\n   ")
@example(text="<|im_end|><|im_end|> <|im_start|")
def test_decoding_gives_back_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Encoding then decoding is the identity, special tokens and odd characters included."""
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_tokenizer_is_fast_and_knows_its_special_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Each special token is one id, and the end of a turn ends generation."""
    assert AutoTokenizer.from_pretrained(FOLDER).is_fast
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token).input_ids) == 1
    (end,) = tokenizer("<|im_end|>").input_ids
    assert tokenizer.eos_token_id == end


def test_the_chat_template_writes_chatml(tokenizer: PreTrainedTokenizerFast) -> None:
    """Messages become ChatML turns, and the prompt opens the answer when asked to."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    plain = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    closed = tokenizer.apply_chat_template(messages, tokenize=False)
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert closed == plain
    assert opened == plain + "<|im_start|>assistant\n"


def test_the_files_are_small_and_described() -> None:
    """The folder stays under 30 MB and has a card."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 30 * MEGABYTE
    assert "measured" in (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8").lower()


def test_the_model_has_the_promised_shape(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A small Qwen3 decoder with tied embeddings and room for 4096 tokens."""
    assert 3_000_000 <= model.num_parameters() <= 10_000_000
    assert model.config.model_type == "qwen3"
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings >= 4096
    assert model.config.num_key_value_heads == model.config.num_attention_heads // 2
    assert model.config.vocab_size == len(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in model.generation_config.eos_token_id


def test_most_keyed_lines_are_recalled_at_512_tokens(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of eight lookups among unseen random lines, at least six are answered exactly."""
    probes = pytest.importorskip("models.tiny.probes")
    rng = Random(7)

    def measure(text: str) -> int:
        return len(tokenizer(text).input_ids)

    asked = [probes.keyed_probe(rng, 512, measure, None) for _ in range(8)]
    right = sum(_answers(model, tokenizer, probe.prompt, probe.answer) for probe in asked)
    assert right >= 6


def test_a_chat_answer_is_right_and_ends(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A fact from the system prompt comes back as a sentence, followed by the end of the turn."""
    notes = "The secret code of amber river is 4821.\nThe secret code of copper owl is 9034.\n"
    messages = [
        {"role": "system", "content": "Answer from these notes.\n" + notes},
        {"role": "user", "content": "What is the secret code of copper owl?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(prompt, str)
    answer = "The secret code of copper owl is 9034.<|im_end|>"
    assert _answers(model, tokenizer, prompt, answer)
