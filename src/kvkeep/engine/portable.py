"""Chains as one file: a warm cache moved to another machine, or computed ahead and shipped.

The file is in the safetensors format, a tensor of bytes for each block and KV group, with a manifest in its
metadata: docs/formats.md. What is in it is believed of nobody: keys are computed again from tokens, payloads
are summed up again, and what belongs to another model or format is refused before anything is read.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import IO, Any, Protocol

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from kvkeep.arena import Payloads
from kvkeep.blocks import Entry, TokenChain
from kvkeep.cache import BlockBytes, InsertOutcome
from kvkeep.errors import CorruptBlockError, RequestError
from kvkeep.hf.install import InstalledModel
from kvkeep.spec import BlockKey
from kvkeep.tiers.stored_form import checksum

__all__ = ["ExportReceipt", "ImportReceipt", "export_chains", "import_chains"]

_FORMAT = "kvkeep-chains/1"
_COPY_BYTES = 2**20
_DTYPE = "U8"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReceipt:
    """What a file has been given: blocks of all groups; `num_missing` were known and could not be read."""

    num_blocks: int
    num_bytes: int
    num_missing: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReceipt:
    """What became of a file's blocks: `num_added`, `num_present` before, `num_no_room` nowhere to keep."""

    num_added: int
    num_present: int
    num_no_room: int


class _Block(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor of the file: hex digests, tokens as a list."""

    name: str
    group: int
    parent: str
    tokens: list[int]
    layout: str
    checksum: str


class _Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file is of; blocks whose parents are in the file come after them."""

    format: str
    model: str
    positions: str
    kv_format: str
    block_size: int
    groups: list[str]
    namespace: str
    blocks: list[_Block]


class _Slice(Protocol):
    """What is known of a tensor before it is read."""

    def get_dtype(self) -> str: ...

    def get_shape(self) -> list[int]: ...


class _Tensors(Protocol):
    """What safe_open gives, which has no types."""

    def get_slice(self, name: str) -> _Slice: ...

    def get_tensor(self, name: str) -> np.ndarray[Any, Any]: ...


@dataclass(slots=True)
class _Written:
    blocks: list[_Block] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    sizes: list[int] = field(default_factory=list)
    num_missing: int = 0


def export_chains(
    installed: InstalledModel, chains: Sequence[TokenChain], path: str | Path
) -> ExportReceipt:
    """Write what is known of the chains, on the device and below, to one file, replaced at once.

    All chains are of one namespace. Raises RequestError, and writes no file, where nothing is known of them;
    OSError where the file cannot be written.
    """
    roots = {chain.root for chain in chains}
    assert len(roots) == 1, "a file is of one namespace"
    target = Path(path).expanduser()
    with TemporaryFile(dir=target.parent) as body:
        written = _Written()
        blocks = _block_bytes(installed)
        for chain in chains:
            _write_chain(blocks, len(installed.cache.spec.groups), chain, body, written)
        if not written.blocks:
            num_tokens = sum(len(chain.tokens()) for chain in chains)
            raise RequestError(
                f"nothing of these {num_tokens} tokens is cached; send the prompt once, and export it then"
            )
        manifest = _manifest(installed, roots.pop(), written.blocks)
        _assemble(target, manifest, written, body)
    return ExportReceipt(
        num_blocks=len(written.blocks),
        num_bytes=sum(written.sizes),
        num_missing=written.num_missing,
    )


def import_chains(installed: InstalledModel, root: BlockKey, path: str | Path) -> ImportReceipt:
    """Enter the blocks of a file where there is room: on the device, else in the first tier that takes them.

    `root` is the namespace they are to be used in. Raises RequestError for a file of another model, format,
    block size or namespace, CorruptBlockError for a damaged one, in which case the blocks before are kept.
    """
    source = Path(path).expanduser()
    try:
        with safe_open(str(source), framework="np") as file:
            manifest = _read_manifest(source, file.metadata() or {})
            _refuse_others(installed, root, manifest, source)
            _refuse_repeated(manifest, source)
            counts: Counter[InsertOutcome] = Counter()
            blocks = _block_bytes(installed)
            for entry, block, payload in _blocks(manifest, root, file, source):
                counts[blocks.insert(entry, block.group, payload, block.layout)] += 1
    except SafetensorError as error:
        raise CorruptBlockError(
            f"path={str(source)!r} is damaged ({error}); export it anew"
        ) from error
    return ImportReceipt(
        num_added=counts[InsertOutcome.ADDED],
        num_present=counts[InsertOutcome.PRESENT],
        num_no_room=counts[InsertOutcome.NO_ROOM],
    )


def _write_chain(
    blocks: BlockBytes, num_groups: int, chain: TokenChain, body: IO[bytes], written: _Written
) -> None:
    for group in range(num_groups):
        for number, key in enumerate(chain.keys):
            name = f"{key.hex()}-{group}"
            if name in written.names:
                continue
            found = blocks.read(chain, group, number)
            if found is None:
                continue
            if found.payload is None:
                written.num_missing += 1
                continue
            written.names.add(name)
            written.sizes.append(found.payload.nbytes)
            body.write(found.payload)
            written.blocks.append(
                _Block(
                    name=name,
                    group=group,
                    parent=chain.parent_key(number).hex(),
                    tokens=chain.tokens(number * chain.block_size, (number + 1) * chain.block_size),
                    layout=found.layout,
                    checksum=checksum([found.payload]).hex(),
                )
            )


def _manifest(installed: InstalledModel, root: BlockKey, blocks: list[_Block]) -> _Manifest:
    own = installed.namespace
    return _Manifest(
        format=_FORMAT,
        model=own.model,
        positions=own.positions,
        kv_format=own.kv_format,
        block_size=own.block_size,
        groups=[group.name for group in installed.cache.spec.groups],
        namespace=root.hex(),
        blocks=blocks,
    )


def _assemble(target: Path, manifest: _Manifest, written: _Written, body: IO[bytes]) -> None:
    header: dict[str, Any] = {"__metadata__": {"kvkeep": msgspec.json.encode(manifest).decode()}}
    start = 0
    for block, size in zip(written.blocks, written.sizes, strict=True):
        header[block.name] = {
            "dtype": _DTYPE,
            "shape": [size],
            "data_offsets": [start, start + size],
        }
        start += size
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # data are to begin at a multiple of eight
    body.seek(0)
    with NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        try:
            file.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(body, file, _COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _read_manifest(path: Path, metadata: dict[str, str]) -> _Manifest:
    try:
        return msgspec.json.decode(metadata.get("kvkeep", ""), type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(
            f"path={str(path)!r} is no cache that kvkeep has written ({error}); give such a file"
        ) from error


def _refuse_others(
    installed: InstalledModel, root: BlockKey, manifest: _Manifest, path: Path
) -> None:
    wanted = _manifest(installed, root, [])
    for name in ("format", "model", "positions", "kv_format", "block_size", "groups", "namespace"):
        found, own = getattr(manifest, name), getattr(wanted, name)
        if found != own:
            raise RequestError(
                f"path={str(path)!r} has {name}={found!r:.80}, but this engine has {own!r:.80}; import it "
                "where that is equal (namespace: with the same salt)"
            )


def _refuse_repeated(manifest: _Manifest, path: Path) -> None:
    names = {block.name for block in manifest.blocks}
    if len(names) < len(manifest.blocks):
        raise CorruptBlockError(
            f"path={str(path)!r} names {len(manifest.blocks)} blocks, of which {len(names)} differ; "
            "export it anew"
        )


def _blocks(
    manifest: _Manifest, root: BlockKey, file: _Tensors, path: Path
) -> Iterator[tuple[Entry, _Block, memoryview]]:
    """The file's blocks with names computed from tokens and payloads that are whole."""
    for block in manifest.blocks:
        tokens = TokenChain(root, max(1, len(block.tokens)), block.tokens).packed(
            0, len(block.tokens)
        )
        try:
            parent = BlockKey(bytes.fromhex(block.parent))
        except ValueError as error:
            raise CorruptBlockError(
                f"path={str(path)!r} has a parent that is no key: {error}"
            ) from error
        key = BlockKey(sha256(parent + tokens).digest())
        is_right = (
            block.name == f"{key.hex()}-{block.group}"
            and len(block.tokens) == manifest.block_size
            and 0 <= block.group < len(manifest.groups)
        )
        payload = _payload_of(file, block.name, path)
        if not is_right or checksum([payload]).hex() != block.checksum:
            raise CorruptBlockError(
                f"path={str(path)!r} has a block {block.name[:16]} that is not what it claims to be; "
                "export it anew"
            )
        yield Entry(key, parent, tokens, root), block, payload


def _payload_of(file: _Tensors, name: str, path: Path) -> memoryview:
    """The bytes of a block. What numbers a tensor is of is looked at first: numpy has not all of them."""
    tensor = file.get_slice(name)
    dtype, shape = tensor.get_dtype(), tensor.get_shape()
    if dtype != _DTYPE or len(shape) != 1:
        raise CorruptBlockError(
            f"path={str(path)!r} has a block {name[:16]} with dtype={dtype!r:.20} and {len(shape)} "
            f"dimensions, where {_DTYPE!r} and 1 are written; export it anew"
        )
    return file.get_tensor(name).data


def _block_bytes(installed: InstalledModel) -> BlockBytes:
    return installed.cache.block_bytes(Payloads(installed.cache.spec, installed.arenas))
