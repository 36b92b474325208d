"""Random bits that are a function of their names: Philox4x32-10 (Salmon et al., 2011), in torch and in Triton.

    key      seed, low word first                      in words of 32 bits
    counter  rollout_id low, rollout_id high, position low, position high
    bits     the first two words that come out, low word first

csrc/cpu/sample.cpp has the same in C++.
"""

from __future__ import annotations

from torch import Tensor

from fuserl.kernels.jit import tl, triton

_WORD = 0xFFFFFFFF


def random_bits(seed: int, rollout_ids: Tensor, positions: Tensor) -> Tensor:
    """64 random bits for each rollout and position, as int64 of any sign: the definition, in plain torch."""
    c = [rollout_ids & _WORD, rollout_ids >> 32 & _WORD, positions & _WORD, positions >> 32 & _WORD]
    k = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        # A product may leave the range of int64: its bits are right all the same.
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32 & _WORD) ^ c[1] ^ k[0], b & _WORD, (a >> 32 & _WORD) ^ c[3] ^ k[1], a & _WORD]
        k = [k[0] + 0x9E3779B9 & _WORD, k[1] + 0xBB67AE85 & _WORD]
    return c[1] << 32 | c[0]


def high_product(a: Tensor, b: Tensor) -> Tensor:
    """floor(a b / 2^64) of a in [0, 2^64), whose bits an int64 holds, and of b in [0, 2^53)."""
    a0, a1, b0, b1 = a & _WORD, a >> 32 & _WORD, b & _WORD, b >> 32
    cross, other = a1 * b0, a0 * b1
    middle = (a0 * b0 >> 32 & _WORD) + (cross & _WORD) + (other & _WORD)
    return a1 * b1 + (cross >> 32 & _WORD) + (other >> 32) + (middle >> 32)


@triton.jit
def row_bits(seed, rollout, position):
    """The same in Triton, as uint64."""
    seed = seed.to(tl.uint64)
    rollout = rollout.to(tl.uint64)
    position = position.to(tl.uint64)
    low, high, _, _ = tl.philox_impl(
        rollout.to(tl.uint32), (rollout >> 32).to(tl.uint32), position.to(tl.uint32), (position >> 32).to(tl.uint32),
        seed.to(tl.uint32), (seed >> 32).to(tl.uint32), 10,
    )  # fmt: skip
    return high.to(tl.uint64) << 32 | low.to(tl.uint64)
