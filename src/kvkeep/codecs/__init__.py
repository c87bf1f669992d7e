"""In what form K/V are stored: codes and metadata of vectors, by format."""

from kvkeep.codecs.base import Codec, Contract, Encoded
from kvkeep.codecs.fp8 import Fp8Codec
from kvkeep.codecs.identity import FloatCodec
from kvkeep.codecs.int4 import Int4Codec
from kvkeep.codecs.int8 import Int8Codec
from kvkeep.spec import KVFormat

__all__ = ["Codec", "Contract", "Encoded", "codec_of"]


def codec_of(kv_format: KVFormat) -> Codec:
    """The codec of a format."""
    match kv_format:
        case KVFormat.FP8:
            return Fp8Codec()
        case KVFormat.INT8:
            return Int8Codec()
        case KVFormat.INT4:
            return Int4Codec()
        case _:
            return FloatCodec(kv_format)
