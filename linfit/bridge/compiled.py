"""The compiled twin of the numpy sum of bfloat16 tensors, for those who install the extra `fast` (numba).

XLA would fuse these loops too, but it flushes subnormal numbers to zero and contracts products and sums into fused
multiply-adds: other bits than those promised. Numba's defaults keep IEEE arithmetic as written.
"""

import numpy as np
from numba import njit

BLOCK = 2048  # elements handled at once: two blocks of float32 stay in the first-level cache


@njit(nogil=True, cache=True, error_model="numpy")
def bfloat16_sum(weights: np.ndarray, terms: tuple[np.ndarray, ...], out: np.ndarray) -> None:
    """out = Σ w_k x_k in float32, left to right, rounded to nearest even; terms and out are uint16 bit patterns (n,).

    >>> one, out = np.array([0x3F80], np.uint16), np.empty(1, np.uint16)
    >>> bfloat16_sum(np.float32([0.25, 0.25]), (one, one), out)
    >>> hex(out[0])  # one half
    '0x3f00'
    """
    wide, bits = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    value, total = wide.view(np.float32), bits.view(np.float32)
    for start in range(0, out.size, BLOCK):
        count = min(BLOCK, out.size - start)
        for k in range(len(terms)):
            stored, weight = terms[k][start : start + count], weights[k]
            for i in range(count):
                wide[i] = np.uint32(stored[i]) << np.uint32(16)
            if k == 0:
                for i in range(count):
                    total[i] = weight * value[i]
            else:
                for i in range(count):
                    total[i] += weight * value[i]
        rounded = out[start : start + count]
        for i in range(count):
            last_kept = (bits[i] >> np.uint32(16)) & np.uint32(1)
            rounded[i] = (bits[i] + np.uint32(0x7FFF) + last_kept) >> np.uint32(16)
