"""TCEC's factor on errors of known make."""

from __future__ import annotations

import numpy as np
import pytest
from fit_study import by_channel, rough, study_of

from qncd_deploy.correct import tac, tcec


def test_a_proportional_error_is_taken_out(tmp_path):
    """q = (1 + k) e exactly: D = k / (1 + k) q."""
    k = np.array([0.1, -0.2, 0.0])
    study = study_of(tmp_path, rough(k=k))
    for row, ridged in zip(tcec.fit(study, lambda1=0), tcec.fit(study, lambda1=0.25), strict=True):
        np.testing.assert_allclose(row.a, 1 / (1 + k), rtol=1e-6)
        np.testing.assert_allclose(1 - ridged.a, (1 - row.a) / 1.25, atol=1e-7)
        assert row.b == 0


def test_it_is_the_least_squares_factor(tmp_path):
    study = study_of(tmp_path, rough(k=0.1, mu=0.1, noise=0.3))
    ner = tac.fit_ner(study, lambda1=0, lambda2=0, thr=0)
    for row, other, pairs in zip(tcec.fit(study, lambda1=0), ner, study.pairs(), strict=True):
        q, e = by_channel(pairs.q), by_channel(pairs.e)
        expected = [np.linalg.lstsq(a[:, None], b, rcond=None)[0].item() for a, b in zip(q, e, strict=True)]
        np.testing.assert_allclose(row.a, expected, rtol=1e-6)
        np.testing.assert_allclose(other.a, expected, rtol=1e-6)


def test_silent_channels_are_left_alone(tmp_path):
    for row in tcec.fit(study_of(tmp_path, lambda x, t: np.zeros_like(x))):
        np.testing.assert_array_equal(row.a, 1)


def test_the_default_shrinks_a_little(tmp_path):
    for row in tcec.fit(study_of(tmp_path, rough(k=0.1))):
        assert 1 - row.a == pytest.approx(np.full(3, 0.1 / 1.1 / 1.01), rel=1e-5)
