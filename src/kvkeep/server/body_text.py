"""Is the text of JSON text? It can write half a character, which nothing can tokenize or send back."""

import json
import re

from kvkeep.server.errors import ApiError

__all__ = ["text_of"]

# As much of JSON as has no half of a pair alone: plain text, escapes, pairs, other escapes with "u".
_WHOLE_CHARACTERS = re.compile(
    r"(?:[^\\]++|(?:\\[^u])++|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u(?![dD][89a-fA-F]))*+",
    re.DOTALL,
)


def text_of(body: bytes) -> str:
    """The text of JSON. Raises ApiError 400 where no encoding of Unicode can hold it."""
    try:
        text = body.decode(json.detect_encoding(body))
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is no valid {error.encoding} at byte {error.start}; send UTF-8"
        ) from error
    if "\\ud" not in text and "\\uD" not in text:
        return text
    place = _WHOLE_CHARACTERS.match(text).end()  # type: ignore[union-attr]  # it matches nothing, too
    if text.startswith("\\u", place):
        raise ApiError(
            400,
            f"the body has half a character (U+{text[place + 2 : place + 6].upper():.4}) at character "
            f"{place}; send valid Unicode",
        )
    return text
