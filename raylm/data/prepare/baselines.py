"""What general compressors make of the validation text: the figures that a model's bits per byte stand beside."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable
from typing import Any

# xz takes about a second for two megabytes: of a larger set its beginning is measured.
MOST_BYTES = 4 << 20
# It takes eleven bytes of memory for each byte that it may look back at; -9 allows for 64 MB, which are never there.
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 2 * MOST_BYTES}]


def compressed_sizes(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Sizes under ``gzip -9`` and ``xz -9`` of ``texts`` joined by newlines; empty where there is no text.

    Bits per byte are 8 x compressed bytes / bytes of text, the joining newlines not counted, as a model's are: both
    have to say where a document ends.

    Returns:
        by compressor: text_bytes, compressed_bytes, bits_per_byte.
    """
    # 16 + 15: gzip's own header and checksum around the largest window.
    compressors = {"gzip -9": zlib.compressobj(9, zlib.DEFLATED, 31), "xz -9": lzma.LZMACompressor(filters=XZ)}
    sizes = dict.fromkeys(compressors, 0)
    text_bytes = 0
    for text in texts:
        content = text.encode()
        text_bytes += len(content)
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.compress(content + b"\n"))
        if text_bytes >= MOST_BYTES:
            break
    if not text_bytes:
        return {}
    for name, compressor in compressors.items():
        sizes[name] += len(compressor.flush())
    return {
        name: {
            "text_bytes": text_bytes,
            "compressed_bytes": size,
            "bits_per_byte": round(8 * size / text_bytes, 5),
        }
        for name, size in sizes.items()
    }
