"""Stored number formats: bits ↔ float32, and weighted sums of tensors as they are stored.

Everything is computed in float32 (float64 if a float64 tensor takes part), in the order written, and rounded once,
to nearest even, to the stored format. bfloat16 has a path of its own on the bit patterns, because that is what
checkpoints are made of, compiled where the extra `fast` is installed; it gives the same bits as the general one.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache

import ml_dtypes
import numpy as np

ITEM_SIZE = {  # bytes per element of every safetensors dtype read here
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 1),
}
# Formats that can be averaged; anything else is only ever copied.
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_NATIVE = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_NARROW = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
_NAMES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "fp32": "F32", "fp16": "F16"},
    **{"bf16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
}
CHUNK_BYTES = 1 << 20  # of the largest operand handled at once, so that a chunk and its temporaries stay in cache


def stored_dtype(name: str) -> str:
    """The safetensors name of a floating dtype: `bfloat16`, `bf16` and `BF16` are the same."""
    found = _NAMES.get(name.lower(), name.upper())
    if found not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join([*FLOATS, *_NAMES])}, got {name!r}")
    return found


def decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bytes (uint8, contiguous) as float32, exactly; float64 for F64."""
    if dtype == "BF16":
        wide = raw.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    values = raw.view(_NATIVE.get(dtype) or _NARROW[dtype])
    return values if dtype in ("F32", "F64") else values.astype(np.float32)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 or float64 values rounded once, to nearest even, to stored bytes (uint8); ValueError beyond the range."""
    values = np.ascontiguousarray(values).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype in _NATIVE:
            stored = values.astype(_NATIVE[dtype], copy=False)
        else:
            single = _round_to_odd(values) if values.dtype == np.float64 else values
            stored = _encode_bfloat16(single) if dtype == "BF16" else single.astype(_NARROW[dtype])
        if dtype != "F64" and not (dtype == "F32" and values.dtype == np.float32):
            back = decode(stored.view(np.uint8), dtype)
            lost = np.isfinite(values) & ~np.isfinite(back)
            if lost.any():
                some = f"{int(lost.sum())} values, such as {values[lost][0]:g}"
                raise ValueError(f"{some}, are beyond the range of {dtype}")
    return stored.view(np.uint8)


def _round_to_odd(values: np.ndarray) -> np.ndarray:
    """Float64 as float32 rounded to odd, so that rounding it again to a narrower format acts as one rounding.

    Float32 has at least two bits more than any format narrower than itself: its last bit, set where the value is not
    exact, keeps ties of the narrower format apart from their neighbours.
    """
    narrow = values.astype(np.float32)
    bits = narrow.view(np.uint32)
    inexact = (narrow != values) & np.isfinite(narrow)
    away = np.abs(narrow.astype(np.float64)) > np.abs(values)
    return np.where(inexact, np.where(away, bits - 1, bits) | 1, bits).astype(np.uint32).view(np.float32)


def _encode_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)  # a quiet NaN


def weighted_sum(weights: Sequence[float], raws: Sequence[np.ndarray], dtypes: Sequence[str], out: str) -> np.ndarray:
    """Σ w_k x_k of stored tensors, in float32, left to right, rounded once to `out`; all in stored bytes (uint8).

    Terms of weight zero are left out, and a single term of weight one keeps its bits where formats agree.
    The result may be a scratch buffer of this thread: use it before the next call.

    >>> one, two = encode(np.float32([1.0]), "F16"), encode(np.float32([2.0]), "F32")
    >>> decode(weighted_sum([0.5, 0.25], [one, two], ["F16", "F32"], "BF16"), "BF16")
    array([1.], dtype=float32)
    """
    terms = [(w, raw, dtype) for w, raw, dtype in zip(weights, raws, dtypes, strict=True) if w != 0]
    if not terms:
        return encode(np.zeros(raws[0].size // ITEM_SIZE[dtypes[0]], np.float32), out)
    if len(terms) == 1 and terms[0][0] == 1 and terms[0][2] == out:
        return terms[0][1]
    if out == "BF16" and all(dtype == "BF16" for _, _, dtype in terms) and terms[0][1].size % 4 == 0:
        large = terms[0][1].size >= CHUNK_BYTES  # small models do not repay compilation
        compiled = _compiled_bfloat16_sum() if large else None
        return (compiled or _bfloat16_sum)([(w, raw) for w, raw, _ in terms])
    precision = np.float64 if any(dtype == "F64" for _, _, dtype in terms) else np.float32
    with np.errstate(all="ignore"):
        total = precision(terms[0][0]) * decode(terms[0][1], terms[0][2])
        for weight, raw, dtype in terms[1:]:
            total += precision(weight) * decode(raw, dtype)
    return encode(total, out)


_scratch = threading.local()


def _bfloat16_sum(terms: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Two bfloat16 at a time in the halves of a 32-bit word.

    A bfloat16 is the upper half of a float32: masking a word gives its odd element as a float32, shifting it left the
    even one, both exactly and without a widening copy. Adding 0x7fff plus the last kept bit rounds to nearest even. A
    NaN stays one, since sums of bfloat16 NaNs keep a payload whose low half is empty, which no carry can overflow.
    """
    count = terms[0][1].size // 4
    if getattr(_scratch, "size", -1) < count:
        _scratch.size, _scratch.buffers = count, np.empty((2, 2, count), np.uint32)
    total, term = _scratch.buffers[..., :count]  # each holds the odd elements, then the even ones
    upper, shift, one, half = np.uint32(0xFFFF0000), np.uint32(16), np.uint32(1), np.uint32(0x7FFF)
    with np.errstate(all="ignore"):
        for position, (weight, raw) in enumerate(terms):
            words, target = raw.view(np.uint32), term if position else total
            np.bitwise_and(words, upper, out=target[0])
            np.left_shift(words, shift, out=target[1])
            values = target.view(np.float32)
            np.multiply(values, np.float32(weight), out=values)
            if position:
                np.add(total.view(np.float32), values, out=total.view(np.float32))
    np.right_shift(total, shift, out=term)
    np.bitwise_and(term, one, out=term)
    np.add(term, half, out=term)
    np.add(total, term, out=total)
    odd, even = total
    np.bitwise_and(odd, upper, out=odd)
    np.right_shift(even, shift, out=even)
    np.bitwise_or(odd, even, out=odd)
    return odd.view(np.uint8)


@cache
def _compiled_bfloat16_sum() -> Callable[[list[tuple[float, np.ndarray]]], np.ndarray] | None:
    """The same in one pass over memory; None without numba, or without a folder where it can keep what it compiled."""
    try:
        from linfit.bridge.compiled import bfloat16_sum
    except (ImportError, RuntimeError):
        return None

    def total(terms: list[tuple[float, np.ndarray]]) -> np.ndarray:
        weights, raws = zip(*terms)
        out = np.empty(raws[0].size // 2, np.uint16)
        bfloat16_sum(np.array(weights, np.float32), tuple(raw.view(np.uint16) for raw in raws), out)
        return out.view(np.uint8)

    return total
