"""Stored formats: bits against ml_dtypes, torch and exact integer arithmetic."""

import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from linfit.bridge import numbers as stored_numbers
from linfit.bridge.numbers import CHUNK_BYTES, FLOATS, ITEM_SIZE, decode, encode, stored_dtype, weighted_sum

NARROW = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
ORACLE = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, **NARROW}


def every_pattern(dtype: str) -> np.ndarray:
    kind = np.uint8 if ITEM_SIZE[dtype] == 1 else np.uint16
    return np.arange(1 << (8 * ITEM_SIZE[dtype]), dtype=np.uint32).astype(kind).view(np.uint8)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_bit_pattern_decodes_exactly_and_comes_back(dtype):
    raw = every_pattern(dtype)
    values = decode(raw, dtype)
    np.testing.assert_array_equal(values, raw.view(ORACLE[dtype]).astype(np.float32))
    again, numbers, width = encode(values, dtype), ~np.isnan(values), ITEM_SIZE[dtype]
    np.testing.assert_array_equal(again.reshape(-1, width)[numbers], raw.reshape(-1, width)[numbers])
    assert np.isnan(decode(again, dtype)[~numbers]).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_rounding_agrees_with_ml_dtypes(dtype, generator):
    values = (generator.standard_normal(100_000) * 10.0 ** generator.uniform(-6, 2, 100_000)).astype(np.float32)
    np.testing.assert_array_equal(encode(values, dtype), values.astype(ORACLE[dtype]).view(np.uint8))


def test_bfloat16_rounds_ties_to_even_and_keeps_what_is_not_finite():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0xFF800000, 0x7F800001, 0x80000000], np.uint32)
    stored = encode(bits.view(np.float32), "BF16").view(np.uint16)
    assert [hex(value) for value in stored[:5]] == ["0x3f80", "0x3f82", "0x3f81", "0x7f80", "0xff80"]
    assert np.isnan(decode(stored[5:6].view(np.uint8), "BF16")).all()
    assert stored[6] == 0x8000


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_float64_is_rounded_once_to_every_format(dtype):
    """Beside every tie of the format, by less than float32 can see, against exact rational distances."""
    values = decode(every_pattern(dtype), dtype)
    numbers = np.unique(values[np.isfinite(values)]).astype(np.float64)
    step = 1 if ITEM_SIZE[dtype] == 1 else 97
    for lower, upper in zip(numbers[:-1:step], numbers[1::step]):
        middle = (lower + upper) / 2
        for value in (np.nextafter(middle, lower), middle, np.nextafter(middle, upper)):
            got = Fraction(float(decode(encode(np.array([value]), dtype), dtype)[0]))
            exact = Fraction(float(value))
            assert abs(got - exact) == min(abs(Fraction(float(each)) - exact) for each in (lower, upper))
            if value == middle:  # a tie goes to the even pattern
                assert encode(np.array([float(got)]), dtype)[0] % 2 == 0


def test_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"1 values, such as 70000, are beyond the range of F16"):
        encode(np.array([1.0, 70000.0], np.float32), "F16")


def random_raw(generator, dtype: str, size: int) -> np.ndarray:
    return encode((generator.standard_normal(size) * 0.1).astype(np.float32), dtype)


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [4, 2052, 65_536, CHUNK_BYTES // 2])
def test_sums_of_bfloat16_equal_those_of_ml_dtypes(size, compiled, terms, generator):
    """Bit for bit on any patterns, subnormals, infinity and the edges of blocks included; NaN apart, whose payload
    depends on which operand a processor takes it from."""
    if compiled:
        pytest.importorskip("numba")
        stored_numbers._compiled_bfloat16_sum.cache_clear()  # another test may have found it absent
    total = stored_numbers._compiled_bfloat16_sum() if compiled else stored_numbers._bfloat16_sum
    raws = [generator.integers(0, 1 << 16, size).astype(np.uint16).view(np.uint8) for _ in range(terms)]
    weights = generator.standard_normal(terms).tolist()
    with np.errstate(all="ignore"):
        products = [np.float32(weight) * decode(raw, "BF16") for weight, raw in zip(weights, raws)]
        expected = sum(products[1:], start=products[0]).astype(ml_dtypes.bfloat16)
    got = total(list(zip(weights, raws))).view(ml_dtypes.bfloat16)
    numbers = ~np.isnan(expected.astype(np.float32))
    assert numbers.mean() > 0.5
    np.testing.assert_array_equal(got.view(np.uint16)[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(got.astype(np.float32)[~numbers]).all()


def test_without_numba_large_sums_still_work(monkeypatch, generator):
    raws = [random_raw(generator, "BF16", CHUNK_BYTES // 2) for _ in range(2)]
    with_numba = weighted_sum([0.3, 0.7], raws, ["BF16"] * 2, "BF16").copy()
    monkeypatch.setitem(sys.modules, "linfit.bridge.compiled", None)  # importing it fails
    stored_numbers._compiled_bfloat16_sum.cache_clear()
    without = weighted_sum([0.3, 0.7], raws, ["BF16"] * 2, "BF16").copy()
    stored_numbers._compiled_bfloat16_sum.cache_clear()
    np.testing.assert_array_equal(with_numba, without)


@pytest.mark.parametrize("dtype", [name for name in FLOATS if name in ORACLE])
@pytest.mark.parametrize("tau", [0.2, 0.5, 0.9, 1.3])
def test_weighted_sum_equals_torch(dtype, tau, generator):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, np.dtype(ORACLE[dtype]).name)
    raws = [random_raw(generator, dtype, 4000) for _ in range(2)]
    base, tuned = (torch.from_numpy(raw.copy()).view(kind) for raw in raws)
    expected = ((1 - tau) * base.float() + tau * tuned.float()).to(kind)
    got = weighted_sum([1 - tau, tau], raws, [dtype, dtype], dtype)
    np.testing.assert_array_equal(got, expected.view(torch.uint8).numpy())


def test_zero_weights_do_not_spread_infinities():
    one, infinite = encode(np.float32([1, 2, 3, 4]), "BF16"), encode(np.float32([np.inf] * 4), "BF16")
    np.testing.assert_array_equal(weighted_sum([1.0, 0.0], [one, infinite], ["BF16", "BF16"], "BF16"), one)


def test_dtype_names():
    names = {"bfloat16": "BF16", "bf16": "BF16", "fp16": "F16", "F32": "F32", "f8_e4m3": "F8_E4M3"}
    assert {name: stored_dtype(name) for name in names} == names
    for name in ("int8", "I32", "BOOL", "", "float128"):
        with pytest.raises(ValueError, match="dtype must be one of"):
            stored_dtype(name)
