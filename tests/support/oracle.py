"""The format of docs/design.md, section 3, once more, element by element in NumPy float32, to check the reference.

Written from the text and not from `nf4kernels.reference`; slow, for small weights. Scalars of np.float32 round every
operation to fp32 and are never fused.
"""

import bisect
import itertools
import math

import numpy as np

F32 = np.float32


def encode(flat: np.ndarray, code: np.ndarray, block_size: int) -> tuple[list[int], list[np.float32]]:
    """(nibble of each element, absmax of each block) of a flat fp32 weight. `code` need not be sorted."""
    ranked = sorted(range(16), key=lambda i: (code[i], i))
    levels = [code[i] for i in ranked]
    midpoints = [F32(F32(levels[i] + levels[i + 1]) / F32(2)) for i in range(15)]
    nibbles, scales = [], []
    for begin in range(0, len(flat), block_size):
        block = [F32(v) for v in flat[begin : begin + block_size]]
        if not all(map(math.isfinite, block)):
            scales.append(F32(math.nan))
            nibbles += [ranked[bisect.bisect_left(midpoints, F32(0))]] * len(block)
            continue
        absmax = max(abs(v) for v in block)
        scales.append(absmax)
        inverse = F32(F32(1) / max(absmax, F32(2.0**-126)))
        # bisect_left counts the midpoints strictly below.
        nibbles += [ranked[bisect.bisect_left(midpoints, F32(v * inverse))] for v in block]
    return nibbles, scales


def pack(nibbles: list[int], code_of_zero: int) -> np.ndarray:
    """The even element in the high nibble; an odd tail holds the code of 0."""
    padded = nibbles + [code_of_zero] * (len(nibbles) % 2)
    return np.array([padded[i] << 4 | padded[i + 1] for i in range(0, len(padded), 2)], dtype=np.uint8)


def e4m3_value(pattern: int) -> float:
    """The FP8 E4M3 number with this bit pattern: 1 sign, 4 exponent (bias 7), 3 fraction bits; S.1111.111 is NaN."""
    sign = -1.0 if pattern & 0x80 else 1.0
    exponent, fraction = pattern >> 3 & 15, pattern & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (8 + fraction) * 2.0 ** (exponent - 10)


def e4m3_nearest(value: np.float32) -> int:
    """The bit pattern nearest to value, ties to the even pattern, the sign kept for zero; beyond 448 not defined."""
    magnitude = abs(float(value))
    pattern = min(range(0x7F), key=lambda b: (abs(e4m3_value(b) - magnitude), b & 1))
    return pattern | (0x80 if math.copysign(1, value) < 0 else 0)


def encode_scales(absmax: list[np.float32], scale_code: np.ndarray, is_e4m3: bool):
    """(byte of each block, scale_absmax of each superblock, scale_offset)."""
    total = 0.0
    for begin in range(0, len(absmax), 256):
        partial = 0.0
        for value in absmax[begin : begin + 256]:
            partial += float(value)
        total += partial
    offset = F32(total / len(absmax)) if absmax else F32(0)
    indices, scale_absmax = [], []
    for begin in range(0, len(absmax), 256):
        centred = [F32(value - offset) for value in absmax[begin : begin + 256]]
        largest = max(abs(value) for value in centred)
        scale_absmax.append(largest)
        s = max(largest, F32(2.0**-100))
        if is_e4m3:
            factor = F32(F32(448) / s)
            indices += [e4m3_nearest(F32(value * factor)) for value in centred]
        else:
            inverse = F32(F32(1) / s)
            midpoints = [F32(F32(a + b) / F32(2)) for a, b in itertools.pairwise(scale_code)]
            indices += [bisect.bisect_left(midpoints, F32(value * inverse)) for value in centred]
    return np.array(indices, dtype=np.uint8), np.array(scale_absmax, dtype=F32), offset


def decode(packed, absmax, scale_absmax, scale_offset, code, scale_code, count: int, block_size: int) -> np.ndarray:
    """Ŵ, flat and fp32."""
    values = np.empty(count, dtype=F32)
    for i in range(count):
        byte = int(packed[i // 2])
        nibble = byte >> 4 if i % 2 == 0 else byte & 15
        block = i // block_size
        scale = absmax[block]
        if scale_code is not None:
            scale = F32(F32(scale_code[absmax[block]] * scale_absmax[block // 256]) + scale_offset)
        values[i] = F32(code[nibble] * scale)
    return values
