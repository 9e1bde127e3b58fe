"""XXH64, by which Prometheus picks the series of limit_ratio. Pure; https://github.com/Cyan4973/xxHash."""

from __future__ import annotations

import struct

_P1, _P2, _P3, _P4, _P5 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_MASK = 2**64 - 1


def _rotated(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & _MASK


def _round(state: int, lane: int) -> int:
    return _rotated((state + lane * _P2) & _MASK, 31) * _P1 & _MASK


def xxh64(content: bytes) -> int:
    """The 64-bit hash with seed 0."""
    at, length = 0, len(content)
    if length >= 32:
        lanes = [(_P1 + _P2) & _MASK, _P2, 0, -_P1 & _MASK]
        while at <= length - 32:
            lanes = [
                _round(lane, word) for lane, word in zip(lanes, struct.unpack_from("<4Q", content, at), strict=True)
            ]
            at += 32
        made = sum(_rotated(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & _MASK
        for lane in lanes:
            made = ((made ^ _round(0, lane)) * _P1 + _P4) & _MASK
    else:
        made = _P5
    made = (made + length) & _MASK
    while at <= length - 8:
        made ^= _round(0, struct.unpack_from("<Q", content, at)[0])
        made = (_rotated(made, 27) * _P1 + _P4) & _MASK
        at += 8
    if at <= length - 4:
        made ^= struct.unpack_from("<I", content, at)[0] * _P1 & _MASK
        made = (_rotated(made, 23) * _P2 + _P3) & _MASK
        at += 4
    for byte in content[at:]:
        made = _rotated(made ^ (byte * _P5 & _MASK), 11) * _P1 & _MASK
    made = (made ^ (made >> 33)) * _P2 & _MASK
    made = (made ^ (made >> 29)) * _P3 & _MASK
    return made ^ (made >> 32)
