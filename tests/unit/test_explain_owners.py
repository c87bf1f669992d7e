"""What is remembered of prompts is shared out between tenants."""

from dataclasses import replace

import pytest

from kvkeep.cache.explain import History
from tests.unit.test_explain import NAMESPACE, RULES, SYSTEM, everything, packed, sent, tokens


@pytest.mark.parametrize("bounds", [{"max_prompts": 4}, {"max_bytes": 4 * 4 * len(SYSTEM)}])
def test_prompts_of_one_owner_do_not_crowd_out_those_of_another(bounds: dict[str, int]) -> None:
    """Each keeps its own lately sent prompts, whatever the other sends."""
    theirs = replace(NAMESPACE, salt="theirs")
    history = History(**bounds)
    history.remember(sent(SYSTEM, owner="quiet"))

    for number in range(20):
        other = sent(f"{number:03}{SYSTEM[3:]}", namespace=theirs, owner="busy")
        history.remember(other)

    assert history.sent(NAMESPACE.root_key()) == [packed(tokens(SYSTEM))]
    assert 1 < len(history.sent(theirs.root_key())) <= 4


def test_sessions_of_one_owner_do_not_crowd_out_those_of_another() -> None:
    """The session's own last prompt is what the next one is compared with, still."""
    theirs = replace(NAMESPACE, salt="theirs")
    history = History()
    history.remember(sent("AAAA" + SYSTEM, session="mine", owner="quiet"))
    history.remember(sent("AABB" + SYSTEM + RULES, owner="quiet"))
    flood = sent(SYSTEM, namespace=theirs, owner="busy")

    for number in range(8192):
        history.remember(replace(flood, session=f"s{number}"))

    changed = sent("AABC" + SYSTEM + RULES, session="mine", owner="quiet")
    miss = history.explain(changed, everything(changed))
    assert miss is not None
    assert miss.first_divergent_token == 2
