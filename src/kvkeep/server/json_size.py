"""How many values a body of JSON may have: parsing and checking millions of them would hold up everybody."""

from kvkeep.server.errors import ApiError

__all__ = ["check_num_values"]

# Far more than all messages, tools and schemas that fit a context; each costs about a microsecond.
_MAX_PARTS = 250_000
# Token ids are what a body has most of, and cost least.
_MAX_VALUES = 2_000_000


def check_num_values(text: str) -> None:
    """Raise ApiError 413 for JSON of more texts, lists, objects or values in all than anybody needs.

    What is no JSON is not judged: it is counted as if it were.
    """
    if len(text) <= _MAX_PARTS:
        return
    signs = ['"', "[", "{", ","]
    if sum(map(text.count, signs)) <= _MAX_PARTS:
        return
    # Quotes that are a part of text are escaped.
    if "\\" in text:
        text = text.replace("\\\\", "").replace('\\"', "")
    num_texts = text.count('"') // 2
    if num_texts > _MAX_PARTS:
        raise _too_many("texts and names of fields", num_texts, _MAX_PARTS)
    beside_texts = "".join(text.split('"')[::2])
    num_parts = num_texts + beside_texts.count("[") + beside_texts.count("{")
    if num_parts > _MAX_PARTS:
        raise _too_many("texts, names of fields, lists and objects", num_parts, _MAX_PARTS)
    num_values = beside_texts.count(",") + 1
    if num_values > _MAX_VALUES:
        raise _too_many("values", num_values, _MAX_VALUES)


def _too_many(what: str, num_found: int, most: int) -> ApiError:
    return ApiError(
        413,
        f"the body has {num_found} {what}, but at most {most} are taken; send less",
        code="request_too_large",
    )
