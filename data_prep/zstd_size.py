"""How large a Zstandard frame becomes when it is unpacked, by its header alone (RFC 8878, section 3.1.1.1)."""

from __future__ import annotations

from brainlm.errors import DataError

MAGIC = b"\x28\xb5\x2f\xfd"
HEADER_BYTES = 18  # at most


def unpacked_size(head: bytes) -> int:
    """Return the number of bytes that a frame says it holds.

    Parameters
    ----------
    head : bytes
        The first `HEADER_BYTES` of the frame, or all of a shorter one.

    Raises
    ------
    DataError
        If it is no frame, or does not say its size: unpacking it could take any amount of memory.
    """
    if head[:4] != MAGIC or len(head) < 6:
        raise DataError(f"expected a Zstandard frame, found bytes {head[:4]!r}")
    descriptor = head[4]
    is_single = bool(descriptor & 0x20)
    start = 5 + (0 if is_single else 1) + (0, 1, 2, 4)[descriptor & 3]  # window size, id of a dictionary
    width = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    if width == 0 or len(head) < start + width:
        raise DataError("a Zstandard frame does not say how large it is")
    return int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0)
