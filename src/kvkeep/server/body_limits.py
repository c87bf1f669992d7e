"""How much lists and objects of a body may hold: millions of entries would hold up everybody.

Of wrong entries the first is enough for an error.
"""

from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

__all__ = ["Entries", "FewEntries", "FewFields", "TokenIds", "check_num_fields"]

_T = TypeVar("_T")

# Messages, and parts of one: far more than any context can hold that is not empty words.
_MAX_ENTRIES = 16_384
# Of what every entry costs work for: tools, tags, calls.
_MAX_FEW = 4096
_MAX_TOKENS = 16_000_000


def check_num_fields(value: Any) -> Any:  # noqa: ANN401  whatever a client has sent
    """The value, if it is no object of too many fields. Raises ValueError."""
    if isinstance(value, dict) and len(value) > _MAX_FEW:
        raise ValueError(f"has {len(value)} fields; give at most {_MAX_FEW}")
    return value


Entries = Annotated[list[_T], Field(max_length=_MAX_ENTRIES, fail_fast=True)]
FewEntries = Annotated[list[_T], Field(max_length=_MAX_FEW, fail_fast=True)]
TokenIds = Annotated[list[_T], Field(max_length=_MAX_TOKENS, fail_fast=True)]
# Of an object all errors are collected, before its length is looked at.
FewFields = Annotated[dict[str, _T], BeforeValidator(check_num_fields)]
