"""Books of lifetimes without a cache, for tests of their rules; blocks of four tokens."""

from kvkeep.blocks import Namespace, TokenChain
from kvkeep.cache.lifetimes import Claim, Labels, Lifetimes, LifetimeSettings
from kvkeep.config import CacheOptions
from kvkeep.spec import BlockKey

__all__ = ["SIZE", "Clock", "chain", "labels_of", "made", "root", "serve"]

SIZE = 4


class Clock:
    """A wall clock that is set by hand."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def root(salt: str = "") -> BlockKey:
    """The namespace of a tenant."""
    namespace = Namespace(model="m", positions="p", kv_format="f", block_size=SIZE, salt=salt)
    return namespace.root_key()


def chain(num_blocks: int, first: int = 0, salt: str = "") -> TokenChain:
    """A chain of so many full blocks, all after `first`."""
    return TokenChain(root(salt), SIZE, [first] * (SIZE * num_blocks))


def made(clock: Clock, **settings: float) -> Lifetimes:
    """Books with these settings."""
    return Lifetimes(LifetimeSettings(**settings), clock=clock)


def serve(lifetimes: Lifetimes, tokens: TokenChain, **options: object) -> Claim:
    """A request that computes or reuses all full blocks."""
    claim = lifetimes.open(CacheOptions(**options), tokens)  # type: ignore[arg-type]
    lifetimes.use(claim, tokens, range(len(tokens.keys)), is_new=False)
    lifetimes.begin(claim, tokens)
    lifetimes.close(claim, tokens)
    return claim


def labels_of(lifetimes: Lifetimes, key: BlockKey) -> Labels:
    """The labels that a block must have."""
    labels = lifetimes.register.get(key)
    assert labels is not None
    return labels
