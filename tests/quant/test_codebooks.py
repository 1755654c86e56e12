"""Fixed codebooks against their definitions, level by level."""

import numpy as np
import pytest

import qsv


def distinct(codebook):
    codebook = np.asarray(codebook)
    assert codebook.dtype == np.float32 and np.all(np.diff(codebook) >= 0)
    return np.unique(codebook)


def test_uniform_levels():
    np.testing.assert_array_equal(distinct(qsv.uniform_codebook(bits=2)), [-1, 0, 1])
    thirds = np.array([-3, -2, -1, 0, 1, 2, 3]) / 3
    np.testing.assert_allclose(distinct(qsv.uniform_codebook(bits=3)), thirds, rtol=1e-7)
    assert len(distinct(qsv.uniform_codebook(bits=8))) == 255


def test_power_of_two_levels():
    np.testing.assert_array_equal(distinct(qsv.power_of_two_codebook(bits=2)), [-1, 0, 1])
    np.testing.assert_array_equal(distinct(qsv.power_of_two_codebook(bits=3)), [-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    assert len(distinct(qsv.power_of_two_codebook(bits=8))) == 255


# Terms as listed for 3 and 5 magnitude bits in the authors' code, and by eq. 3 for the even counts.
ADDITIVE_TERMS = {
    2: [[1]],
    3: [[1, 2, 3]],
    4: [[1, 2, 4], [3]],
    5: [[1, 3, 5], [2, 4, 6]],
    6: [[1, 3, 6], [2, 4, 7], [5]],
    7: [[1, 4, 7], [2, 5, 8], [3, 6, 9]],
}


@pytest.mark.parametrize(("bits", "terms"), ADDITIVE_TERMS.items())
def test_additive_power_of_two_levels(bits, terms):
    sums = {0.0}
    for term in terms:
        sums = {total + power for total in sums for power in [0.0, *(2.0**-i for i in term)]}
    magnitudes = np.array(sorted(sums)) / max(sums)
    expected = np.concatenate([-magnitudes[:0:-1], magnitudes])
    np.testing.assert_allclose(distinct(qsv.additive_power_of_two_codebook(bits=bits)), expected, rtol=1e-6)
    assert len(expected) == 2**bits - 1


@pytest.mark.parametrize("make", [qsv.uniform_codebook, qsv.power_of_two_codebook, qsv.additive_power_of_two_codebook])
@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(make, bits):
    with pytest.raises(ValueError, match=f"2 to 8, got {bits}"):
        make(bits=bits)
