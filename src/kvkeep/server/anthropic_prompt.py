"""Messages of the Anthropic protocol become the chat messages that templates know."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvkeep.errors import RequestError
from kvkeep.server.anthropic_schemas import Block, CountTokensRequest, InputMessage, Tool
from kvkeep.server.block_fields import content_of, shown, text_field

__all__ = ["ChatMessage", "chat_messages", "chat_tools", "marked_blocks", "template_options"]

# any: a chat template decides what a message may hold
ChatMessage = dict[str, Any]

# Thoughts of earlier turns are not read again: the protocol lets a server leave them out.
_NOT_READ = frozenset({"thinking", "redacted_thinking"})


def chat_messages(request: CountTokensRequest) -> list[ChatMessage]:
    """The system prompt and the turns; neighbours of one role are one message, as the protocol says.

    The result of a tool is a message of its own. Tags stay on the part they were given for; those of
    a message are on its first part. Raises RequestError for a block that is not text.
    """
    turns = _Turns()
    if request.system:
        turns.add("system", _text_parts(_blocks(request.system), "system"))
    for number, message in enumerate(request.messages):
        _add_message(turns, message, f"messages.{number}.content")
    return turns.messages()


def chat_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """The tools as templates know them. Raises RequestError for one that a server would have to run."""
    if not tools:
        return None
    for number, tool in enumerate(tools):
        if tool.type not in {None, "custom"}:
            raise RequestError(
                f"tools.{number}.type={tool.type!r} is a tool of another server; give one with "
                "a name and an input_schema, which the client runs"
            )
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.input_schema or {"type": "object", "properties": {}},
            },
        }
        for tool in tools
    ]


def marked_blocks(request: CountTokensRequest) -> list[Block]:
    """Everything that may bear `cache_control`."""
    contents = [request.system, *(message.content for message in request.messages)]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return [*(tool.model_dump() for tool in request.tools or ()), *blocks]


def template_options(request: CountTokensRequest) -> dict[str, Any]:
    """What the template is to know of `thinking`; templates without such a switch ignore it."""
    kind = (request.thinking or {}).get("type")
    return {} if kind is None else {"enable_thinking": kind != "disabled"}


class _Turns:
    """Chat messages in the making."""

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self.tool_names: dict[str, str] = {}  # by the id of a call

    def add(self, role: str, parts: list[Block], calls: Sequence[Block] = ()) -> None:
        """Say `parts`, in the last message if that is of the same role and nothing lies between."""
        if not parts and not calls:
            return
        last = self._messages[-1] if self._messages else None
        if last is None or last["role"] != role or role == "tool":
            last = {"role": role, "content": []}
            self._messages.append(last)
        last["content"].extend(parts)
        if calls:
            last.setdefault("tool_calls", []).extend(calls)

    def add_result(self, call_id: str, parts: list[Block], where: str) -> None:
        """Say what a tool has given. Raises RequestError where nobody has called it."""
        if call_id not in self.tool_names:
            raise RequestError(
                f"{where}.tool_use_id={shown(call_id)} is the result of no call of this conversation; send "
                "its tool_use block before it"
            )
        self._messages.append(
            {
                "role": "tool",
                "tool_call_id": call_id,
                "name": self.tool_names[call_id],
                "content": parts,
            }
        )

    def messages(self) -> list[ChatMessage]:
        """All messages; one plain part is text, which every template takes."""
        return [message | {"content": content_of(message["content"])} for message in self._messages]


def _add_message(turns: _Turns, message: InputMessage, where: str) -> None:
    blocks = _with_tags(_blocks(message.content), message.kv_cache)
    if message.role == "assistant":
        _add_answer(turns, blocks, where)
    elif message.role == "user":
        _add_question(turns, blocks, where)
    else:
        turns.add(message.role, _text_parts(blocks, where))


def _add_answer(turns: _Turns, blocks: Iterable[Block], where: str) -> None:
    parts, calls = [], []
    for number, block in enumerate(blocks):
        place = f"{where}.{number}"
        if block.get("type") == "tool_use":
            calls.append(_call(turns, block, place))
        elif block.get("type") not in _NOT_READ:
            parts.append(_text_part(block, place))
    turns.add("assistant", parts, calls)


def _add_question(turns: _Turns, blocks: Iterable[Block], where: str) -> None:
    parts: list[Block] = []
    for number, block in enumerate(blocks):
        place = f"{where}.{number}"
        if block.get("type") != "tool_result":
            parts.append(_text_part(block, place))
            continue
        turns.add("user", parts)
        parts = []
        turns.add_result(
            text_field(block, "tool_use_id", place), _result_parts(block, place), place
        )
    turns.add("user", parts)


def _call(turns: _Turns, block: Block, where: str) -> Block:
    call_id, name = text_field(block, "id", where), text_field(block, "name", where)
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.input={shown(arguments)} is not an object; give the arguments")
    turns.tool_names[call_id] = name
    # Templates write arguments as JSON themselves, so they get them as an object.
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _result_parts(block: Block, where: str) -> list[Block]:
    content = block.get("content")
    parts = _text_parts(_blocks(content or ""), f"{where}.content")
    if block.get("is_error") is True:
        first, *rest = parts or [{"type": "text", "text": ""}]
        parts = [first | {"text": f"Error: {first['text']}"}, *rest]
    return _with_tags(parts, block.get("kv_cache"))


def _blocks(content: object) -> list[Block]:
    """Blocks of a content; plain text is one block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if isinstance(content, list) and all(isinstance(block, dict) for block in content):
        return content
    raise RequestError(f"content={shown(content)} is neither text nor a list of blocks")


def _with_tags(blocks: list[Block], kv_cache: object) -> list[Block]:
    """The blocks, with what was said of all of them on the first."""
    if kv_cache is None or not blocks:
        return blocks
    first = blocks[0]
    both = [first["kv_cache"]] if isinstance(first.get("kv_cache"), dict) else []
    if isinstance(kv_cache, dict):
        both.insert(0, kv_cache)
    tags = [tag for one in both for tag in _as_list(one.get("tags"))]
    return [first | {"kv_cache": {"tags": tags}}, *blocks[1:]]


def _as_list(value: object) -> list[Any]:
    """A list as it is, one value as a list of it, None as none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _text_parts(blocks: Iterable[Block], where: str) -> list[Block]:
    return [_text_part(block, f"{where}.{number}") for number, block in enumerate(blocks)]


def _text_part(block: Block, where: str) -> Block:
    """A part that a template can show, with the tags of the block."""
    part: Block = {"type": "text", "text": "".join(_texts(block, where))}
    if "kv_cache" in block:
        part["kv_cache"] = block["kv_cache"]
    return part


def _texts(block: Block, where: str) -> Iterator[str]:
    kind = block.get("type", "text")
    if kind == "text":
        yield text_field(block, "text", where)
        return
    source = block.get("source")
    if kind == "document" and isinstance(source, dict) and source.get("type") == "text":
        title = block.get("title")
        yield f"{title}\n\n" if isinstance(title, str) and title else ""
        yield text_field(source, "data", f"{where}.source")
        return
    raise RequestError(
        f"{where}.type={kind!r} cannot be read by this model; give text, documents of plain text, "
        "calls of tools and their results"
    )
