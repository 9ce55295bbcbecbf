"""Small integers in as few bits as tell them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tying.errors import FileError


@dataclass(frozen=True)
class Packed:
    """Integers from `low` to `low + 2^bits − 1`, `bits` bits each, the first in the lowest bits of the first byte."""

    low: int
    bits: int
    count: int
    content: bytes


def bits_for(values: int) -> int:
    """Return ⌈log2 K⌉, the bits that tell K values apart: 0 for one value, or none.

    Example:
        >>> [bits_for(values) for values in (0, 1, 2, 3, 4, 5, 88, 256, 257)]
        [0, 0, 1, 2, 2, 3, 7, 8, 9]
    """
    return max(values - 1, 0).bit_length()


def pack(values: NDArray[Any]) -> Packed:
    r"""Pack integers into ⌈log2 K⌉ bits each, K = highest − lowest + 1; the last byte is filled up with zeros.

    For labels 0 … K−1 of which all occur, that is one value per label, and one for −1 only if −1 occurs.

    Args:
        values: Integers of any type that fits int64, any shape; read in C order.

    Example:
        >>> pack(np.array([0, 1, -1, 1, 0]))
        Packed(low=-1, bits=2, count=5, content=b'\x89\x01')
    """
    flat = values.astype(np.int64).reshape(-1)
    if not flat.size:
        return Packed(0, 0, 0, b"")
    low, high = int(flat.min()), int(flat.max())
    bits = bits_for(high - low + 1)
    offsets = flat.astype(np.uint64) - np.uint64(low % 2**64)  # modulo 2^64: any two int64 are comparable this way
    one_bit_each = np.empty((flat.size, bits), dtype=np.uint8)
    for bit in range(bits):
        one_bit_each[:, bit] = (offsets >> np.uint64(bit)) & np.uint64(1)
    return Packed(low, bits, flat.size, np.packbits(one_bit_each, bitorder="little").tobytes())


def unpack(packed: Packed) -> NDArray[np.int64]:
    r"""Return the integers, `(count,)`: the inverse of `pack`.

    Raises:
        FileError: If there are more or fewer bytes than count × bits need, or the bits that fill up the last byte
            are not zero.

    Example:
        >>> unpack(Packed(low=-1, bits=2, count=5, content=b"\x89\x01"))
        array([ 0,  1, -1,  1,  0])
    """
    used = packed.count * packed.bits
    expected = -(-used // 8)
    if len(packed.content) != expected:
        raise FileError(
            f"packed labels: expected {expected} bytes for {packed.count} labels of {packed.bits} bits, "
            f"got {len(packed.content)}; save the model again"
        )
    stream = np.unpackbits(np.frombuffer(packed.content, dtype=np.uint8), bitorder="little")
    if stream[used:].any():
        raise FileError("packed labels: expected zeros after the last label, got other bits; save the model again")
    one_bit_each = stream[:used].reshape(packed.count, packed.bits)
    offsets = np.zeros(packed.count, dtype=np.uint64)
    for bit in range(packed.bits):
        offsets |= one_bit_each[:, bit].astype(np.uint64) << np.uint64(bit)
    return (offsets + np.uint64(packed.low % 2**64)).view(np.int64)
