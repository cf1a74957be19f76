"""Encoded samples: what a codec promises about the values, and that no payload of others can do harm."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bus.codecs.coding import decode, encode
from bus.errors import ProtocolError
from bus.tensors import DTYPES, NUMPY_TYPES, Array, TensorHead
from bus.values import Codec, TensorSpec

FLOATS = ("float16", "float32", "float64")
LOSSY = {Codec.Q8: 255, Codec.Q4: 15}  # steps between the lowest level and the highest


def heads_of(tensors: Sequence[Array]) -> list[TensorHead]:
    return [TensorHead(tensor.dtype.name, tensor.shape) for tensor in tensors]


def back(codec: Codec, tensors: Sequence[Array], specs: Sequence[TensorSpec] | None = None) -> list[Array]:
    payload = encode(codec, tensors, specs)
    return decode(codec, heads_of(tensors), payload, sum(tensor.nbytes for tensor in tensors))


def same_bits(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


any_tensor = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: st.binary(max_size=400).map(lambda text: of_bits(text, dtype))
)


def of_bits(text: bytes, dtype: str) -> Array:
    """A tensor of any bits, also NaNs with payloads."""
    if dtype == "bool":
        return np.frombuffer(text, np.uint8) > 127
    items = len(text) // NUMPY_TYPES[dtype].itemsize
    return np.frombuffer(text, dtype, items) if items else np.zeros((0, 3), dtype)


@pytest.mark.parametrize("codec", [Codec.RAW, Codec.ZSTD])
@given(tensors=st.lists(any_tensor, max_size=4))
def test_lossless_codecs_give_the_same_bits(codec: Codec, tensors: list[Array]) -> None:
    for tensor, again in zip(tensors, back(codec, tensors), strict=True):
        assert same_bits(tensor, again)


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 5), (1 << 15) + 1])
def test_shapes_and_types_survive(codec: Codec, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = np.asarray(np.random.default_rng(1).integers(0, 2, shape)).astype(dtype)
    (again,) = back(codec, [tensor])
    assert same_bits(tensor, again)  # 0 and 1 are levels
    assert not again.flags.writeable


def test_strides_and_byte_order_are_of_no_matter() -> None:
    tensor = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for form in (tensor.T, tensor[:, ::2], tensor.astype(">f4")):
        (again,) = back(Codec.ZSTD, [form])
        assert again.tolist() == form.tolist()


finite = st.sampled_from(FLOATS).flatmap(
    lambda dtype: arrays.arrays(
        dtype,
        st.integers(1, 60),
        elements={"allow_nan": False, "allow_infinity": False},
    )
)


@pytest.mark.parametrize("codec", sorted(LOSSY))
@settings(max_examples=300)
@given(tensor=finite)
def test_a_lossy_value_is_off_by_half_a_step_at_most(codec: Codec, tensor: Array) -> None:
    (again,) = back(codec, [tensor])
    wide, low, high = tensor.astype(np.float64), float(tensor.min()), float(tensor.max())
    step = high / LOSSY[codec] - low / LOSSY[codec]
    if low < 0 < high:
        step *= 1 + 1 / (LOSSY[codec] - 1)  # since zero is a level
    resolution = max(abs(low), abs(high)) * max(2.0**-22, float(np.finfo(tensor.dtype).eps))
    off = np.abs(again.astype(np.float64) / 2 - wide / 2).max() * 2
    assert off <= 0.57 * step + resolution


@pytest.mark.parametrize("codec", sorted(LOSSY))
@pytest.mark.parametrize("offset", [0.0, 3.0, -5e2, 1e6, 1e9, -1e12])
def test_values_far_from_zero_keep_their_differences(codec: Codec, offset: float) -> None:
    tensor = offset + np.linspace(0, 1, 100)
    (again,) = back(codec, [tensor])
    assert np.abs(again - tensor).max() <= 0.57 / LOSSY[codec]


@pytest.mark.parametrize("codec", sorted(LOSSY))
@given(tensor=finite)
def test_zero_stays_zero(codec: Codec, tensor: Array) -> None:
    both = np.concatenate((tensor, np.zeros(3, tensor.dtype)))
    for form in (both, np.maximum(both, 0), np.minimum(both, 0)):
        (again,) = back(codec, [form])
        assert not again[form == 0].any()


@pytest.mark.parametrize("codec", sorted(LOSSY))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_tensor_that_cannot_be_quantised_is_stored_without_loss_and_the_others_are_not(
    codec: Codec, value: float
) -> None:
    plain = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    odd = plain.copy()
    odd[500] = value
    first, second, third = back(codec, [plain, odd, plain])
    assert same_bits(odd, second)
    assert same_bits(first, third)
    assert not same_bits(first, plain)


@pytest.mark.parametrize("values", [(65504, -53280, 0), (65504, -2684, 0), (-65504, 2000)])
def test_levels_beyond_the_largest_number_of_a_type_are_not_used(values: tuple[int, ...]) -> None:
    tensor = np.array(values, np.float16)
    for codec in LOSSY:
        assert np.isfinite(*back(codec, [tensor])).all()


@pytest.mark.parametrize("codec", sorted(LOSSY))
@pytest.mark.parametrize("dtype", sorted(DTYPES - set(FLOATS) - {"int8", "uint8"}))
def test_integers_and_truth_values_are_stored_without_loss(codec: Codec, dtype: str) -> None:
    tensor = of_bits(random.Random(3).randbytes(800), dtype)
    assert same_bits(tensor, *back(codec, [tensor]))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_8_bit_integers_pass_q8_as_they_are_and_q4_in_steps_of_their_scale(dtype: str) -> None:
    limits = np.iinfo(dtype)
    tensor = np.random.default_rng(4).integers(limits.min, limits.max, 5000, dtype, endpoint=True)
    zero_point = int(limits.min) + 100
    tensor[:50] = zero_point
    spec = TensorSpec(name="x", dtype=dtype, shape=tensor.shape, scales=(0.1,), zero_points=(zero_point,))
    assert same_bits(tensor, *back(Codec.Q8, [tensor], [spec]))
    (again,) = back(Codec.Q4, [tensor], [spec])
    assert again.dtype == tensor.dtype
    assert (again[tensor == zero_point] == zero_point).all()  # what means zero stays zero
    assert len(np.unique(again)) <= 16
    assert np.abs(again.astype(int) - tensor.astype(int)).max() <= 10  # half of 256 / 15, and one for rounding
    assert len(encode(Codec.Q4, [tensor], [spec])) < 0.51 * tensor.nbytes


def test_activations_behind_a_relu_shrink() -> None:
    rng = np.random.default_rng(5)
    tensor = np.maximum(rng.standard_normal((1, 64, 64, 32)).astype(np.float32) - 0.5, 0)
    ratios = [tensor.nbytes / len(encode(codec, [tensor])) for codec in (Codec.ZSTD, Codec.Q8, Codec.Q4)]
    assert ratios[0] > 1.5
    assert ratios[1] > 7
    assert ratios[2] > 12


@pytest.mark.parametrize("codec", list(Codec))
def test_the_same_tensor_gives_the_same_bytes_whatever_was_encoded_before(codec: Codec) -> None:
    tensor = np.linspace(-1, 1, 99, dtype=np.float32)
    payloads = set()
    for other in (np.zeros(1000, np.float32), np.ones(1000, np.float32), np.linspace(0, 1, 1000, dtype=np.float32)):
        encode(codec, [other])
        payloads.add(encode(codec, [tensor]))
    assert len(payloads) == 1


def test_threads_do_not_share_buffers() -> None:
    tensors = [np.random.default_rng(n).standard_normal(200_000).astype(np.float32) for n in range(4)]
    expected = [encode(Codec.Q4, [tensor]) for tensor in tensors]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            payload = encode(Codec.Q4, [tensors[number]])
            if payload != expected[number] or not decode(Codec.Q4, heads_of(tensors[:1]), payload, 800_000):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- payloads of others ----------------------------------------------------------------------------------------------

HEAD = TensorHead("float32", (100,))


def cause(codec: Codec, heads: Sequence[TensorHead], payload: bytes, limit_bytes: int = 1 << 20) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(codec, heads, payload, limit_bytes)
    return caught.value.cause


def test_more_than_the_limit_is_rejected_before_anything_is_decompressed() -> None:
    assert cause(Codec.ZSTD, [HEAD, HEAD], b"", 799) == "oversized"
    assert cause(Codec.RAW, [TensorHead("float32", (1 << 38,))], b"") == "oversized"


def zstd(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x00" * 50,
        zstd(bytes(399)),
        zstd(bytes(401)),
        zstd(bytes(400), write_content_size=False),
        zstd(bytes(400)) + b"\x00",
        zstd(bytes(400)) * 2,
        zstd(bytes(400))[:-1],
        b"\x50\x2a\x4d\x18" + (400).to_bytes(4, "little") + bytes(400),  # a frame that zstandard skips
        # Headers that claim 400 bytes before blocks of other sizes: a run of 100,000, and nothing.
        b"\x28\xb5\x2f\xfd\x60" + (400 - 256).to_bytes(2, "little") + (100_000 << 3 | 3).to_bytes(3, "little") + b"a",
        b"\x28\xb5\x2f\xfd\x60" + (400 - 256).to_bytes(2, "little") + b"\x01\x00\x00",
    ],
)
def test_a_frame_with_other_content_than_the_tensors_need_is_rejected(frame: bytes) -> None:
    assert cause(Codec.ZSTD, [HEAD], b"\x00" + frame) == "undecodable"


def test_bytes_behind_tensors_without_content_are_rejected() -> None:
    empty = TensorHead("float32", (0, 5))
    assert [array.shape for array in decode(Codec.ZSTD, [empty], b"\x00", 0)] == [(0, 5)]
    assert cause(Codec.ZSTD, [empty], b"\x00" + zstd(b"")) == "undecodable"
    assert cause(Codec.ZSTD, [], zstd(b"x")) == "undecodable"


@pytest.mark.parametrize(
    ("codec", "head", "bits"),
    [
        (Codec.ZSTD, HEAD, 8),
        (Codec.Q8, HEAD, 4),
        (Codec.Q4, HEAD, 8),
        (Codec.Q8, HEAD, 7),
        (Codec.Q8, TensorHead("int8", (100,)), 8),
        (Codec.Q8, TensorHead("int32", (100,)), 8),
        (Codec.Q4, TensorHead("bool", (100,)), 4),
    ],
)
def test_a_tensor_that_is_stored_as_its_codec_never_does_is_rejected(codec: Codec, head: TensorHead, bits: int) -> None:
    size = (head.items * bits + 7) // 8
    assert cause(codec, [head], bytes((bits,)) + struct.pack("<ff", 0, 1) + zstd(bytes(size))) == "undecodable"


@pytest.mark.parametrize(
    ("base", "step"),
    [(np.nan, 1), (np.inf, 1), (0, np.nan), (0, np.inf), (0, 0), (0, -1), (-3e38, 1), (0, 3e38), (3e38, 3e38)],
)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8"])
def test_levels_that_the_type_does_not_hold_are_rejected(base: float, step: float, dtype: str) -> None:
    payload = bytes((4,)) + struct.pack("<ff", base, step) + zstd(bytes(50))
    assert cause(Codec.Q4, [TensorHead(dtype, (100,))], payload) == "undecodable"


@pytest.mark.parametrize("codec", [Codec.ZSTD, Codec.Q8, Codec.Q4])
def test_damaged_payloads_are_decoded_or_rejected(codec: Codec) -> None:
    rng = random.Random(6)
    tensors: list[Array] = [
        np.random.default_rng(7).standard_normal((3, 50)).astype(np.float32),
        np.arange(40, dtype=np.int8),
        np.linspace(-2, 9, 33).astype(np.float16),
    ]
    heads, good = heads_of(tensors), encode(codec, tensors)
    outcomes = {"decoded": 0, "rejected": 0}
    for _ in range(3000):
        payload = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            match rng.randrange(4):
                case 0 if payload:
                    payload[rng.randrange(len(payload))] = rng.randrange(256)
                case 1:
                    del payload[rng.randrange(len(payload) + 1) :]
                case 2:
                    payload[rng.randrange(len(payload) + 1) :] = rng.randbytes(rng.randrange(30))
                case _:
                    at = rng.randrange(len(payload) + 1)
                    payload[at:at] = rng.randbytes(rng.randrange(1, 5))
        try:
            found = decode(codec, heads, bytes(payload), 1 << 20)
        except ProtocolError:
            outcomes["rejected"] += 1
        else:
            assert heads_of(found) == heads
            outcomes["decoded"] += 1
    assert min(outcomes.values()) > 0


BOMB = """
import re, zstandard
from bus.codecs.coding import decode
from bus.errors import ProtocolError
from bus.tensors import TensorHead
from bus.values import Codec

MAGIC, SIZE = b"\\x28\\xb5\\x2f\\xfd", 200 << 20
honest = zstandard.ZstdCompressor(level=1).compress(bytes(4096))
def run(last):  # one byte, 131,072 times
    return (128 * 1024 << 3 | 2 | last).to_bytes(3, "little") + b"a"
blocks = run(0) * 1599 + run(1)
CLAIM = (4096).to_bytes(4, "little")
bombs = {
    "a true size": MAGIC + b"\\xa0" + SIZE.to_bytes(4, "little") + blocks,
    "no size": MAGIC + b"\\x00" + b"\\x38" + blocks,
    "the expected size": MAGIC + b"\\xa0" + CLAIM + blocks,
    "the expected size, and a window of a gigabyte": MAGIC + b"\\x80" + b"\\xa0" + CLAIM + blocks,
    "a size of 2 ** 62": MAGIC + b"\\xe0" + (1 << 62).to_bytes(8, "little") + blocks,
    "skipped": b"\\x50\\x2a\\x4d\\x18" + CLAIM + bytes(4096),
}
heads = [TensorHead("float32", (1024,))]
decode(Codec.ZSTD, heads, bytes(1) + honest, 4096)
def peak():  # in KiB, of this process since it began
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
for name, bomb in bombs.items():
    try:
        decode(Codec.ZSTD, heads, bytes(1) + bomb, 4096)
    except ProtocolError as error:
        print(error.cause)
    else:
        print("decoded", name)
print(peak() - before)
zstandard.ZstdDecompressor().decompress(bombs["a true size"])  # what believing the bomb costs
print(peak() - before)
"""


def test_a_bomb_costs_no_more_memory_than_the_tensors_need() -> None:
    done = subprocess.run([sys.executable, "-c", BOMB], capture_output=True, text=True, check=True, timeout=60)
    *causes, peak_kib, believed_kib = done.stdout.split("\n")[:-1]
    assert causes == ["undecodable"] * 6
    assert int(peak_kib) < 2048
    assert int(believed_kib) > 150_000  # so the measurement would have shown it
