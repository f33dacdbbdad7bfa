"""What the loop is given: noise by picture, labels, and guidance as one call."""

from __future__ import annotations

import numpy as np
import pytest

from qncd_deploy.errors import LabelError, UsageError
from qncd_deploy.sample import PictureNoise, guided, labels_for

SHAPE = (3, 5, 4)


def test_noise_depends_on_seed_and_picture_alone():
    whole, part = PictureNoise(7, range(6), SHAPE), PictureNoise(7, [4, 1], SHAPE)
    for draw in ("initial", "step", "probe", "step"):
        np.testing.assert_array_equal(getattr(whole, draw)()[[4, 1]], getattr(part, draw)())
    draws = [PictureNoise(s, [i], SHAPE) for s, i in ((7, 0), (7, 1), (8, 0))]
    values = np.stack([f() for d in draws for f in (d.initial, d.step, d.probe)])
    assert np.unique(values).size == values.size  # every stream is its own
    # nor does any picture get the numbers that a generator with the bare seed gives to other code
    bare = np.random.default_rng(7).standard_normal(SHAPE, dtype=np.float32)
    assert not np.isin(values, bare).any()
    assert values.dtype == np.float32


def test_noise_is_the_same_on_every_numpy():
    """Pictures must not change with the library: the first numbers, as drawn by NumPy 1.26 and 2.4."""
    first = PictureNoise(0, [3], (4,))
    golden = [-0.20785532891750336, 0.2895148694515228, 1.2130179405212402, -0.23365116119384766]
    np.testing.assert_array_equal(first.initial()[0], np.array(golden, np.float32))


def test_labels():
    assert labels_for(range(12), classes=11, null_class=10).tolist() == [*range(10), 0, 1]
    assert labels_for([7, 2], classes=3).tolist() == [1, 2]
    assert labels_for([1, 2, 3], classes=4, null_class=0).tolist() == [2, 3, 1]
    assert labels_for(range(4), classes=11, null_class=10, chosen=[3, 5]).tolist() == [3, 5, 3, 5]
    assert labels_for([0], classes=2).dtype == np.int64
    with pytest.raises(LabelError, match=r"class label 11: the model knows 0 \.\. 10 \(10 is the null class\)"):
        labels_for([0], classes=11, null_class=10, chosen=[3, 11])
    with pytest.raises(LabelError, match="no class label"):
        labels_for([0], classes=11, chosen=[])
    with pytest.raises(UsageError, match="seed -1"):
        PictureNoise(-1, [0], SHAPE)


def test_guidance_is_one_batched_call():
    calls = []

    def model(x, t, cond):
        calls.append((x.shape[0], t))
        return (cond["c"] * cond["d"]).reshape(-1, 1, 1, 1) * x

    x = np.full((2, *SHAPE), 2.0, np.float32)
    cond = {"c": np.array([[3.0], [5.0]], np.float32), "d": np.array([[2.0], [2.0]], np.float32)}
    uncond = {"c": np.array([[1.0]], np.float32), "d": np.array([[1.0]], np.float32)}
    out = guided(model, cond, uncond, 1.5)(x, 7.0)
    assert calls == [(4, 7.0)]
    # u + s (c - u) with u = 2, c = 12 and 20: exact in float32
    np.testing.assert_array_equal(out[:, 0, 0, 0], [17.0, 29.0])
    assert out.dtype == np.float32
    for plain in (guided(model, cond, uncond, 1.0), guided(model, cond, None, 1.5)):
        calls.clear()
        np.testing.assert_array_equal(plain(x, 7.0)[:, 0, 0, 0], [12.0, 20.0])
        assert calls == [(2, 7.0)]
