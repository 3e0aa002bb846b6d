"""Reading checkpoints: what is right is read exactly, what is wrong is refused before anything is written."""

import json
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from linfit.bridge import Checkpoint, merge
from linfit.bridge.checkpoint import read_shard
from tests.bridge_checkpoints import read_all, write_sharded, write_single


def raw_file(path, header, data=b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "empty file": (None, b"", "too few"),
    "length beyond the file": (None, struct.pack("<Q", 1 << 40) + b"{}", "truncated or foreign"),
    "not JSON": (b"{'a': 1}", b"", "not valid JSON"),
    "not an object": (b"[1, 2]", b"", "must start with"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "name twice": (b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": 1}', b"", "appears twice"),
    "unknown dtype": ({"a": {**ENTRY, "dtype": "F12"}}, b"0" * 8, "has dtype 'F12'"),
    "negative shape": ({"a": {**ENTRY, "shape": [-2]}}, b"0" * 8, "list of sizes"),
    "fractional shape": ({"a": {**ENTRY, "shape": [2.0]}}, b"0" * 8, "list of sizes"),
    "boolean shape": ({"a": {**ENTRY, "shape": [True, 2]}}, b"0" * 8, "list of sizes"),
    "wrong size": ({"a": {**ENTRY, "shape": [3]}}, b"0" * 8, "12 bytes, but spans 8"),
    "offsets backwards": ({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"0" * 8, "spans -8"),
    "overlap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"0" * 12, "overlaps"),
    "gap": ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"0" * 20, "gap"),
    "same bytes twice": ({"a": ENTRY, "b": ENTRY}, b"0" * 8, "overlaps"),
    "truncated data": ({"a": ENTRY}, b"0" * 7, "truncated"),
    "extra data": ({"a": ENTRY}, b"0" * 9, "unused bytes"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, b"0" * 8, "must have dtype"),
    "metadata not strings": ({"__metadata__": {"a": 1}, "a": ENTRY}, b"0" * 8, "__metadata__"),
    "huge sizes": ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, b"0" * 8, "spans 8"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_files_are_refused_by_name_and_nothing_is_written(tmp_path, case):
    header, data, message = BAD_HEADERS[case]
    good = write_single(tmp_path / "good", {"a": np.float32([1, 2])})
    (bad := tmp_path / "bad").mkdir()
    path = bad / "model.safetensors"
    path.write_bytes(data) if header is None else raw_file(path, header, data)
    with pytest.raises(ValueError, match=message) as caught:
        merge(good, bad, tmp_path / "out", tau=0.5)
    assert str(path) in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad", "good"]


INDEXES = {
    "parent": ({"a": "../good/model.safetensors"}, "outside its folder"),
    "absolute": ({"a": "/etc/passwd.safetensors"}, "outside its folder"),
    "subfolder": ({"a": "x/model.safetensors"}, "outside its folder"),
    "not safetensors": ({"a": "pytorch_model.bin"}, "outside its folder"),
    "number": ({"a": 3}, "outside its folder"),
    "missing shard": ({"a": "model-1.safetensors", "b": "model-2.safetensors"}, "missing 1 shard: model-2"),
    "unlisted tensor": ({"b": "model-1.safetensors"}, "disagrees with its shards"),
    "no map": ({}, "weight_map"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_bad_indexes_are_refused(tmp_path, case):
    weight_map, message = INDEXES[case]
    folder = write_single(tmp_path / "bad", {"a": np.float32([1, 2])})
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        Checkpoint(folder)


def test_other_folders_are_refused_and_pickles_never_opened(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        Checkpoint(tmp_path / "m")
    for names, message in (
        ((), "no safetensors file"),
        (("pytorch_model.bin",), r"only pickled weights .*save_pretrained"),
        (("a.safetensors", "b.safetensors"), r"no model.safetensors.index"),
    ):
        for name in names:
            (tmp_path / name).write_bytes(b"cposix\nsystem\n")
        with pytest.raises(ValueError, match=message):
            Checkpoint(tmp_path)


# Fuzzing: an error or the right tensors, never a wrong file.
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.integers(2**31, 2**65), st.floats(), st.text(max_size=4),
    st.lists(st.integers(-2, 40), max_size=3),
)  # fmt: skip
DTYPES = st.sampled_from(["F32", "F16", "BF16", "I8", "BOOL", "F64", "U16", "F8_E4M3", "F8_E5M2", "X", "f32"])
SHAPES = st.lists(st.integers(0, 4), max_size=3)
ENTRIES = st.one_of(
    st.fixed_dictionaries({"dtype": DTYPES, "shape": SHAPES, "data_offsets": st.just(None)}),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "more"]), VALUES, max_size=4),
    VALUES,
)
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "BOOL": 1, "F64": 8, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@st.composite
def files(draw):
    """Bytes of a file that is right, almost right, or not at all."""
    entries = draw(st.dictionaries(st.sampled_from("abcde"), ENTRIES, max_size=4))
    position, fields = 0, {"dtype", "shape", "data_offsets"}
    for entry in entries.values():
        if isinstance(entry, dict) and set(entry) == fields and entry["data_offsets"] is None:
            sizes = entry["shape"] if isinstance(entry["shape"], list) else []
            length = SIZES.get(str(entry["dtype"]), 1) * int(np.prod([size for size in sizes if isinstance(size, int)]))
            length = min(max(length, 0), 1000)
            begin = position + draw(st.sampled_from([0] * 12 + [1, -1]))
            entry["data_offsets"] = [begin, begin + length + draw(st.sampled_from([0] * 12 + [1, -1]))]
            position += length
    text = json.dumps(entries).encode() + b" " * draw(st.integers(0, 3))
    length = len(text) + draw(st.sampled_from([0] * 12 + [1, -1, 1 << 50]))
    data = draw(st.binary(min_size=position, max_size=position))
    content = struct.pack("<Q", max(length, 0)) + text + data + draw(st.sampled_from([b""] * 8 + [b"x"]))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    cut = draw(st.sampled_from([None, None, None, 7, 20, -1, -5]))
    return content[:cut]


def check_file(folder, content: bytes) -> bool:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    try:
        shard = read_shard(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise AssertionError(f"the error does not name the file: {error}") from error
        return False
    reference = dict(safetensors.deserialize(content))  # the library accepts whatever this reader accepts…
    shapes = {name: entry["shape"] for name, entry in reference.items()}
    assert {tensor.name: list(tensor.shape) for tensor in shard.tensors} == shapes
    for tensor in shard.tensors:  # …and sees the same bytes in it
        assert content[tensor.start : tensor.stop] == bytes(reference[tensor.name]["data"])
    return True


@pytest.mark.slow
@settings(max_examples=4500, deadline=None, database=None)
@given(files())
def test_fuzzed_files_are_refused_or_read_right(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    check_file(folder, content)


def test_fuzzer_reaches_both_sides(tmp_path):
    """The fuzzed files above are neither all right nor all wrong."""
    verdicts = []

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(files())
    def collect(content):
        verdicts.append(check_file(tmp_path, content))

    collect()
    assert 10 < sum(verdicts) < len(verdicts) - 10


ONE, TWO = "model-1.safetensors", "model-2.safetensors"
NAMES = st.sampled_from([ONE, TWO, "../a.safetensors", "/a.safetensors", "m.bin", ""])


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, database=None)
@given(
    weight_map=st.one_of(st.dictionaries(st.sampled_from("abcd"), NAMES, max_size=4), VALUES),
    extra=st.dictionaries(st.sampled_from(["metadata", "more"]), VALUES, max_size=2),
    broken=st.sampled_from([False, False, False, True]),
)
def test_fuzzed_indexes_are_refused_or_read_right(tmp_path_factory, weight_map, extra, broken):
    folder = tmp_path_factory.getbasetemp() / "fuzz_index"
    if not folder.exists():
        write_sharded(folder, [{"a": np.float32([1, 2])}, {"b": np.float32([3]), "c": np.float32([4])}])
        for number in (1, 2):
            (folder / f"model-{number:05d}-of-00002.safetensors").rename(folder / f"model-{number}.safetensors")
    text = json.dumps({**extra, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text[:-3] if broken else text)
    right = [{"a": ONE, "b": TWO, "c": TWO}, {"a": ONE}, {"b": TWO, "c": TWO}]
    try:
        checkpoint = Checkpoint(folder)
    except ValueError:
        assert broken or weight_map not in right
        return
    assert (broken, weight_map in right, set(checkpoint.tensors)) == (False, True, set(weight_map))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, database=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    kind=st.sampled_from([np.float32, np.float16, np.float64, np.int32]),
    tau=st.sampled_from([0.0, 0.3, 1.0, -0.5]),
    data=st.data(),
)
def test_fuzzed_merges_are_right(tmp_path_factory, shapes, kind, tau, data):
    root, generator = tmp_path_factory.mktemp("merge"), np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sides = [{f"t{i}": (generator.standard_normal(s) * 9).astype(kind) for i, s in enumerate(shapes)} for _ in range(2)]
    base, tuned = (write_single(root / name, side) for name, side in zip(("base", "tuned"), sides))
    out = merge(base, tuned, root / "out", tau=tau).folders[0]
    precision = np.float64 if kind == np.float64 else np.float32
    for name, merged in read_all(out).items():
        a, b = sides[0][name], sides[1][name]
        expected = (precision(1 - tau) * a.astype(precision) + precision(tau) * b.astype(precision)).astype(kind)
        if tau in (0, 1) or kind == np.int32:
            expected = a if tau == 0 and kind != np.int32 else b
        np.testing.assert_array_equal(merged, expected)
