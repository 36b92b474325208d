"""Random bits: the published vectors, and the product that turns them into a draw."""

import torch

from fuserl.kernels.philox import high_product, random_bits


def test_philox_equals_its_published_vectors():
    """The known answers that Random123 ships (kat_vectors, philox4x32 10), of which these are the first two words."""

    def signed(word):
        return (word + 2**63) % 2**64 - 2**63

    ones = 2**64 - 1
    for counter, key, first, second in (
        ((0, 0), 0, 0x6627E8D5, 0xE169C58D),
        ((ones, ones), ones, 0x408F276D, 0x41C83B0E),
        ((0x85A308D3243F6A88, 0x0370734413198A2E), 0x299F31D0A4093822, 0xD16CFE09, 0x94FDCCEB),
    ):
        rollout, position = (torch.tensor([signed(word)]) for word in counter)
        bits = random_bits(signed(key), rollout, position).item()
        assert bits == signed(second << 32 | first)


def test_the_high_half_of_a_product():
    a = torch.tensor([0, 1, -1, -(2**63), 2**62 + 12345, -987654321987])
    b = torch.tensor([2**53 - 1, 2**53 - 1, 2**53 - 1, 3, 2**52 + 7, 12345678901234])
    expected = [(x % 2**64) * y >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert high_product(a, b).tolist() == expected
