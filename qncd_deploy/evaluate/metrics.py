"""Figures of merit of sampled pictures, in NumPy alone.

    PSNR   10 log10(255^2 / mean (x - y)^2), picture by picture
    SSIM   Wang et al., IEEE TIP 13(4), 2004: 11x11 Gaussian window of sigma 1.5
    shift  |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between features of paired pictures (Heusel et al.,
           arXiv:1706.08500, give this distance of two Gaussians; FID is the same against real data)
    feature RMS   (sum |f - g|^2 / sum |g - mean g|^2)^(1/2), g the features of the float twin's picture (ours)
    IS     exp E KL(p(y|x) | p(y)) (Salimans et al., arXiv:1606.03498)

tr (C1 C2)^(1/2) needs no square root of a product: with C = F^T F it is the sum of the singular values of F1 F2^T.
Identical sets then give 0 to rounding, also where there are fewer pictures than features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PSNR_CAP_DB = 100.0
"""PSNR of identical pictures, so that means stay finite. One level in one byte of a megapixel is 108 dB: capped too."""

_WINDOW, _SIGMA = 11, 1.5
_PATIENCE = 1e11  # multiplications


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """PSNR of each picture in dB with peak 255, at most PSNR_CAP_DB. images, reference (N, H, W, C) uint8 -> (N,)."""
    assert images.dtype == reference.dtype == np.uint8 and images.shape == reference.shape, "pictures do not pair up"
    error = np.square(images.astype(np.int32) - reference).mean(axis=(1, 2, 3), dtype=np.float64)
    with np.errstate(divide="ignore"):
        found: np.ndarray = np.minimum(10 * np.log10(255**2 / error), PSNR_CAP_DB)
    return found


def ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Structural similarity of each picture, 1 for identical ones, over the windows that lie inside the picture.

    images, reference (N, H, W, C) uint8 -> (N,); pictures smaller than the window take the largest odd one that fits.
    """
    assert images.dtype == reference.dtype == np.uint8 and images.shape == reference.shape, "pictures do not pair up"
    x, y = images.astype(np.float64), reference.astype(np.float64)
    mx, my = _blur(x), _blur(y)
    xx, yy, xy = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (xx + yy + c2))
    found: np.ndarray = index.mean(axis=(1, 2, 3))
    return found


def snr_db(exact: np.ndarray, found: np.ndarray) -> float:
    """10 log10(sum exact^2 / sum (found - exact)^2), infinite for equal arrays."""
    return decibels(power(exact), power(found - exact))


def power(x: np.ndarray) -> float:
    """Sum of squares in float64."""
    return float(np.square(x, dtype=np.float64).sum())


def row_power(x: np.ndarray) -> np.ndarray:
    """Sum of squares of each row, (rows,) float64."""
    found: np.ndarray = np.square(x, dtype=np.float64).reshape(len(x), -1).sum(axis=1)
    return found


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers, infinite without noise, minus infinity where it outgrows all numbers."""
    if not noise:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio else -math.inf


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (d,) and covariance F^T F of features, F (r, d), float64: all that a Frechet distance asks of them."""

    mean: np.ndarray
    root: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """features (N, d), N > 1; the covariance divides by N - 1, as np.cov and published FID code do."""
        features = np.asarray(features, np.float64)
        n, d = features.shape
        mean = features.mean(axis=0)
        root: np.ndarray = (features - mean) / math.sqrt(n - 1)
        return cls(mean, np.linalg.qr(root, mode="reduced").R if n > d else root)

    @classmethod
    def from_cov(cls, mean: np.ndarray, cov: np.ndarray) -> Moments:
        """cov (d, d), symmetric: taken apart by its eigen-decomposition."""
        values, vectors = np.linalg.eigh(cov.astype(np.float64))
        # what is left of zero eigenvalues after rounding would enter the distance as its square root
        floor = len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
        return cls(mean.astype(np.float64), np.sqrt(np.where(values > floor, values, 0))[:, None] * vectors.T)

    @property
    def cov(self) -> np.ndarray:
        return self.root.T @ self.root


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: what is published as FID. 0 for equal moments."""
    common = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    spread = power(a.root) + power(b.root) - 2 * float(common)
    return max(0.0, power(a.mean - b.mean) + spread)


def shift(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance between the features (N, d) of pictures and those of the float twin's, same seeds and labels.

    Paired sets share their sampling noise, so it is near 0 for near-identical pictures at any N, where FID is not.
    """
    assert features.shape == reference.shape and len(features) > 1, "features do not pair up"
    return frechet_distance(Moments.of(features), Moments.of(reference))


def feature_errors(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Squared distance of the features (N, d) of each picture to those of the float twin's, in units of the mean
    squared distance of the latter to their mean: (N,) float64, 0 for the same pictures, about 2 for unrelated ones.

    The feature RMS is the square root of its mean.
    """
    assert features.shape == reference.shape and len(features) > 1, "features do not pair up"
    exact = reference.astype(np.float64)
    spread = power(exact - exact.mean(axis=0)) / len(exact)
    found: np.ndarray = row_power(features - exact) / max(spread, np.finfo(np.float64).tiny)
    return found


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean divergence of a picture's class distribution from the average one, over all pictures at once.

    logits (N, K), float; between 1 and K.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    average = p.mean(axis=0)
    divergence = (p * (log_p - np.log(average, out=np.zeros_like(average), where=average > 0))).sum(axis=1)
    return float(np.exp(divergence.mean()))


def hits(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the classifier sees each picture as the class it was asked to be, (N,) bool; their share is the accuracy.

    logits (N, K), labels (N,).
    """
    found: np.ndarray = logits.argmax(axis=1) == labels
    return found


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap confidence interval and the number of pictures behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def frechet_work(n: int, width: int) -> float:
    """Multiplications that a Frechet distance of n features takes, about: two decompositions, of the features and of
    the product of two roots."""
    return 2 * n * width * min(n, width) + 10 * min(n, width) ** 2 * width


def resamples_for(work: float) -> int:
    """How often to resample a statistic that takes this many multiplications: as often as some ten seconds allow, but
    20 to 200 times. 20 show little more than their own extremes, so the interval is then rough.
    """
    return int(np.clip(_PATIENCE / work, 20, 200))


def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, *, seed: int, resamples: int = 200, level: float = 0.95
) -> Estimate:
    """statistic(rows) of all n pictures, with percentiles of its values on resamples of them, drawn with replacement.

    The percentiles are moved so that the resamples' mean is the value itself: a resampled distance between
    distributions is larger than the distance, by about as much as the distance is larger than that of infinitely many
    pictures, and the plain percentiles would leave the value outside. So the interval is one of spread; it does not
    take the small-sample bias out.
    """
    rng = np.random.default_rng(seed)
    value = statistic(np.arange(n))
    found = np.array([statistic(rng.integers(0, n, n)) for _ in range(resamples)])
    tail = 50 * (1 - level)
    low, high = np.percentile(found, [tail, 100 - tail]) - found.mean() + value
    return Estimate(value, float(low), float(high), n)


def _blur(x: np.ndarray) -> np.ndarray:
    """(N, H, W, C) averaged under the Gaussian window, along one axis and then the other; borders left out."""
    for axis in (1, 2):
        size = min(_WINDOW, (x.shape[axis] - 1) // 2 * 2 + 1)
        offsets = np.arange(size) - size // 2
        weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
        x = np.lib.stride_tricks.sliding_window_view(x, size, axis=axis) @ (weights / weights.sum())
    return x
