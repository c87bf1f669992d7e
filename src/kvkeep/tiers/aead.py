"""The sealed form of objects and labels: AES-256-GCM, and what stands in front.

    0     8 bytes   magic "KVKEEPS1", the version in its last character
    8     8 bytes   length of the object, little-endian
    16    16 bytes  id of the key
    32    12 bytes  nonce, random for every put
    44    16 bytes  tag
    60    ...       zeros up to 4096, so that a payload aligned in the object stays aligned
    4096  ...       the object, encrypted

Authenticated with the object are the first 32 bytes and its StoredKey: neither another length, key or version
nor another object's place fits. The method is NIST SP 800-38D; random nonces allow 2**32 puts under one key.
The only importer of `cryptography`, which is optional.
"""

import os
from collections.abc import Iterable, Iterator, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Miss, MissCause
from kvkeep.tiers.keyring import TenantKey
from kvkeep.tiers.stored_form import HEADER_PAGE

__all__ = ["Aead"]

_MAGIC = b"KVKEEPS1"
_KEY_AT, _NONCE_AT, _TAG_AT, _END_AT = 16, 32, 44, 60
_KEY_BYTES, _NONCE_BYTES, _TAG_BYTES = 16, 12, 16
_ZEROS = bytes(HEADER_PAGE - _END_AT)
# So that labels and objects of one key are never taken for each other.
_LABELS = b"KVKEEPL1"


class Aead:
    """Seals and opens. Has no state; any thread may call any method."""

    def seal(
        self,
        tenant_key: TenantKey,
        key: StoredKey,
        parts: Iterable[memoryview],
        sealed: memoryview,
    ) -> Iterator[memoryview]:
        """Yield `sealed` once it holds the parts; nothing if they are not exactly as long.

        The parts are not asked for before the first byte is wanted.
        """
        num_bytes = sealed.nbytes - HEADER_PAGE
        nonce = os.urandom(_NONCE_BYTES)
        prefix = _MAGIC + num_bytes.to_bytes(8, "little") + tenant_key.key_id
        encryptor = Cipher(AES256(tenant_key.secret), GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(prefix + key)
        at = HEADER_PAGE
        for part in parts:
            if at + part.nbytes > sealed.nbytes:
                return
            if part.nbytes:
                encryptor.update_into(part.cast("B"), sealed[at : at + part.nbytes])
            at += part.nbytes
        if at != sealed.nbytes:
            return
        encryptor.finalize()
        sealed[:HEADER_PAGE] = (prefix + nonce + encryptor.tag).ljust(HEADER_PAGE, b"\0")
        yield sealed

    def open(
        self,
        tenant_key: TenantKey,
        key: StoredKey,
        sealed: memoryview,
        buffers: Sequence[memoryview],
    ) -> Miss | None:
        """Decrypt into `buffers`, together as long as the object; what is wrong with it, if anything.

        ABSENT is what was sealed with another key of this tenant.
        """
        page = bytes(sealed[:HEADER_PAGE])
        prefix, nonce, tag = page[:_NONCE_AT], page[_NONCE_AT:_TAG_AT], page[_TAG_AT:_END_AT]
        if prefix[:8] != _MAGIC:
            return Miss(MissCause.CORRUPT, f"magic of the seal is {prefix[:8]!r}")
        if page[_END_AT:] != _ZEROS:
            return Miss(MissCause.CORRUPT, "bytes behind the seal are not zero")
        if prefix[_KEY_AT:] != tenant_key.key_id:
            return Miss(MissCause.ABSENT, "erased")
        decryptor = Cipher(AES256(tenant_key.secret), GCM(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(prefix + key)
        at = HEADER_PAGE
        for buffer in buffers:
            if buffer.nbytes:
                decryptor.update_into(sealed[at : at + buffer.nbytes], buffer.cast("B"))
            at += buffer.nbytes
        try:
            decryptor.finalize()
        except InvalidTag:
            return Miss(MissCause.CORRUPT, "tag of the seal")
        return None

    def seal_labels(self, tenant_key: TenantKey, key: StoredKey, labels: bytes) -> bytes:
        """Key id, nonce and the encrypted labels with their tag."""
        nonce = os.urandom(_NONCE_BYTES)
        box = AESGCM(tenant_key.secret)
        sealed = box.encrypt(nonce, labels, _LABELS + tenant_key.key_id + key)
        return tenant_key.key_id + nonce + sealed

    def open_labels(self, tenant_key: TenantKey, key: StoredKey, sealed: bytes) -> bytes | None:
        """The labels, None where they cannot be read."""
        key_id, rest = sealed[:_KEY_BYTES], sealed[_KEY_BYTES:]
        nonce, rest = rest[:_NONCE_BYTES], rest[_NONCE_BYTES:]
        if key_id != tenant_key.key_id or len(rest) < _TAG_BYTES:
            return None
        box = AESGCM(tenant_key.secret)
        try:
            return box.decrypt(nonce, rest, _LABELS + key_id + key)
        except InvalidTag:
            return None
