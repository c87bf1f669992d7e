"""Libraries that speak the OpenAI protocol in their own way: LangChain's chat model, LiteLLM, and curl."""

import json
import shutil
import subprocess

import pytest

from tests.openai_calls import QUESTION
from tests.running_server import RunningServer

# They warn of their own dependencies, which is not ours to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_langchain_chats_streams_and_counts_what_was_cached(server: RunningServer) -> None:
    """Its chat model finds the cached tokens in both, and the same text."""
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        model="tiny",
        base_url=f"{server.url}/v1",
        api_key="unused",
        temperature=0,
        max_tokens=12,
        stream_usage=True,
        extra_body={"cache_salt": "langchain"},
    )
    messages = [(message["role"], message["content"]) for message in QUESTION]

    cold = model.invoke(messages)
    parts = list(model.stream(messages))
    whole = parts[0]
    for part in parts[1:]:
        whole += part

    assert cold.usage_metadata["input_token_details"]["cache_read"] == 0
    assert whole.usage_metadata["input_token_details"]["cache_read"] > 0
    assert whole.content == cold.content
    assert cold.response_metadata["finish_reason"] in {"stop", "length"}


def test_litellm_chats_streams_and_counts_what_was_cached(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told of our address, it finds text, counts, and cached tokens."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    options = {
        "model": "openai/tiny",
        "api_base": f"{server.url}/v1",
        "api_key": "unused",
        "messages": QUESTION,
        "max_tokens": 12,
        "temperature": 0,
        "extra_body": {"cache_salt": "litellm"},
    }

    cold = litellm.completion(**options)
    chunks = list(
        litellm.completion(**options, stream=True, stream_options={"include_usage": True})
    )

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == cold.choices[0].message.content
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    usage = next(chunk.usage for chunk in reversed(chunks) if getattr(chunk, "usage", None))
    assert usage.prompt_tokens_details.cached_tokens > 0


def test_curl_gets_a_stream(server: RunningServer) -> None:
    """A shell and nothing else: the stream ends with its mark."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    body = json.dumps({"messages": QUESTION, "max_tokens": 3, "stream": True})

    url, kind = f"{server.url}/v1/chat/completions", "content-type: application/json"
    done = subprocess.run(
        [curl, "-sN", url, "-H", kind, "-d", body],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout.startswith('data: {"id":"chatcmpl-')
    assert done.stdout.endswith("data: [DONE]\n\n")
