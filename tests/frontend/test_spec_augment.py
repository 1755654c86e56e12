"""SpecAugment draws its own spans for every example, within their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.frontend import SpecAugment


def test_spans_are_contiguous_bounded_and_differ_between_examples():
    augment = SpecAugment(probability=1.0, max_time_frames=10, max_mels=8)
    masked = np.asarray(augment(jax.random.key(0), jnp.ones((200, 50, 20)))) == 0
    frames_hidden = masked.all(axis=2).sum(axis=1)
    mels_hidden = masked.all(axis=1).sum(axis=1)
    assert frames_hidden.max() == 10 and mels_hidden.max() == 8
    assert len({row.tobytes() for row in masked}) > 150
    for row in masked.all(axis=2):
        assert np.abs(np.diff(row.astype(int))).sum() <= 2


def test_every_place_can_be_masked():
    augment = SpecAugment(probability=1.0, num_mel_masks=0)
    masked = np.asarray(augment(jax.random.key(1), jnp.ones((2000, 30, 2)))) == 0
    assert masked.any(axis=0).all()


def test_probability_and_zero_masks():
    ones = jnp.ones((1000, 40, 20))
    share = float(np.mean([(row == 0).any() for row in np.asarray(SpecAugment()(jax.random.key(2), ones))]))
    assert 0.5 < share < 0.65
    np.testing.assert_array_equal(SpecAugment(probability=0.0)(jax.random.key(2), ones), ones)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="probability"):
        SpecAugment(probability=1.5)
    with pytest.raises(ValueError, match="negative"):
        SpecAugment(max_mels=-1)


def test_masks_do_not_depend_on_how_the_batch_is_split():
    features, augment, key = jnp.ones((8, 50, 20)), SpecAugment(probability=1.0), jax.random.key(3)
    whole = augment(key, features)
    parts = [augment(key, features[start : start + 2], first_example=start) for start in range(0, 8, 2)]
    np.testing.assert_array_equal(jnp.concatenate(parts), whole)
