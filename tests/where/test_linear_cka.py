"""linear_cka and its streaming form against hand-worked values and a plain dense reference."""

import numpy as np
import pytest
import torch

from trimtab.errors import SelectionError
from trimtab.where.cka import linear_cka
from trimtab.where.moments import SIGNATURES, StreamingCKA

X3 = [[1, 2], [3, 4], [5, 0]]
Y3 = [[1, 0, 1], [2, 1, 0], [0, 3, 1]]
X4 = [[1, 0], [0, 1], [-1, 0], [0, -1]]
Y4 = [[2, 0], [0, 1], [-2, 0], [0, -1]]


def reference(x, y, estimator):
    """Straight from the definitions, with every n×n matrix written out."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    n = len(x)
    if estimator == "biased":
        h = np.eye(n) - 1 / n

        def hsic(a, b):
            return np.trace(a @ a.T @ h @ b @ b.T @ h)
    else:
        one = np.ones(n)

        def hsic(a, b):  # Song et al. 2012, eq. 5
            k, l = a @ a.T, b @ b.T
            np.fill_diagonal(k, 0)
            np.fill_diagonal(l, 0)
            middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
            return np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def features(n, d_x, d_y, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d_x)) * np.geomspace(1, 0.1, d_x) + offset
    return x, x @ rng.normal(size=(d_x, d_y)) + 0.5 * rng.normal(size=(n, d_y))


def test_the_two_hand_worked_cases():
    assert linear_cka(X3, Y3) == pytest.approx(0.9952631715, abs=1e-10)
    assert linear_cka(X4, Y4) == pytest.approx(0.8574929257, abs=1e-10)


def test_gram_and_covariance_forms_agree():
    padded = np.hstack([np.asarray(X4, float), np.zeros((4, 6))])  # zero columns push n below d
    assert linear_cka(padded, Y4) == pytest.approx(linear_cka(X4, Y4), abs=1e-14)
    padded = np.hstack([np.asarray(X3, float), np.zeros((3, 6))])
    assert linear_cka(padded, Y3) == pytest.approx(0.9952631715, abs=1e-10)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_rotation_shift_and_scale_change_nothing(estimator):
    rotation = np.array([[0.0, -1.0], [1.0, 0.0]])
    x = np.random.default_rng(0).normal(size=(20, 2))
    assert linear_cka(x, 7 * x @ rotation + 3, estimator) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-150, 1e-4, 1e4, 1e150])
def test_scale_of_the_features_does_not_matter(scale):
    x, y = features(30, 4, 5)
    assert linear_cka(scale * x, scale * x) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(scale * x, y) == pytest.approx(linear_cka(x, y), abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-5, 3e7])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_a_constant_side_gives_zero(value, estimator):
    x = np.full((7, 3), value)
    assert linear_cka(x, np.random.default_rng(0).normal(size=(7, 3)), estimator) == 0.0
    assert linear_cka(x, x, estimator) == 0.0


def test_a_constant_side_with_float32_noise_gives_zero():
    noise = 1e-7 * torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert linear_cka(3 * (1 + noise), torch.arange(36.0).view(9, 4).sin()) == 0.0


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize(("n", "d_x", "d_y"), [(5, 3, 2), (12, 12, 12), (10, 40, 30), (60, 7, 9), (200, 16, 4)])
def test_it_equals_the_dense_definition(n, d_x, d_y, estimator):
    x, y = features(n, d_x, d_y, offset=2.0)
    assert linear_cka(x, y, estimator) == pytest.approx(reference(x, y, estimator), abs=1e-11)


def test_the_biased_estimator_is_inflated_and_the_unbiased_is_not():
    """Independent Gaussians, d=64: methods.md gives 0.802 for n=16 and 0.334 for n=128."""
    rng = np.random.default_rng(0)

    def mean(n, estimator):
        draws = [linear_cka(rng.normal(size=(n, 64)), rng.normal(size=(n, 64)), estimator) for _ in range(40)]
        return np.mean(draws)

    assert mean(16, "biased") == pytest.approx(0.802, abs=0.01)
    assert mean(128, "biased") == pytest.approx(0.334, abs=0.01)
    assert mean(16, "unbiased") == pytest.approx(0.0, abs=0.05)
    assert mean(128, "unbiased") == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize(
    ("x", "y", "estimator", "says"),
    [
        ([[1.0]], [[1.0]], "biased", "at least 2 samples"),
        ([[1.0], [2.0], [4.0]], [[1.0], [2.0], [5.0]], "unbiased", "at least 4 samples"),
        ([[1.0], [2.0]], [[1.0], [2.0], [3.0]], "biased", "x has 2 samples, y has 3"),
        ([[1.0], [float("nan")]], [[1.0], [2.0]], "biased", "NaN or infinite"),
        ([1.0, 2.0], [[1.0], [2.0]], "biased", "shape (2,)"),
    ],
)
def test_what_cannot_be_compared_is_refused(x, y, estimator, says):
    with pytest.raises(SelectionError) as error:
        linear_cka(x, y, estimator)
    assert says in str(error.value)


# Streaming


def streamed(matrices, pairs, splits, estimator, block=512):
    stream = StreamingCKA(pairs, estimator, block)
    for chunk in zip(*(torch.as_tensor(m).split(splits) for m in matrices)):
        stream.add(list(chunk))
    return stream


SPLITS = {"one by one": 1, "fives": 5, "all at once": 10_000}


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize(("n", "d"), [(6, 10), (10, 10), (11, 10), (37, 10), (300, 10)])
def test_streaming_equals_the_dense_definition_however_the_rows_come(n, d, estimator):
    x, y = features(n, d, d, offset=3.0)
    z = features(n, d, d, seed=1)[0] + y
    want = [reference(x, y, estimator), reference(y, z, estimator)]
    found = []
    for split in SPLITS.values():
        got = streamed([x, y, z], [(0, 1), (1, 2)], split, estimator, block=16).finish()
        np.testing.assert_allclose(got, want, atol=1e-11)
        found.append(got)
    np.testing.assert_allclose(found, np.broadcast_to(found[0], np.shape(found)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_streaming_survives_features_far_from_zero(estimator):
    """A huge mean (the outlier features of real transformers) costs no digits that matter."""
    x, y = features(400, 12, 12)
    far = streamed([x + 1e4, y - 3e3], [(0, 1)], 7, estimator).finish()[0]
    assert far == pytest.approx(reference(x, y, estimator), abs=1e-9)


def test_streaming_takes_matrices_of_different_widths():
    x, y = features(50, 6, 9)
    assert streamed([x, y], [(0, 1)], 4, "unbiased").finish()[0] == pytest.approx(reference(x, y, "unbiased"))


@pytest.mark.parametrize("split", SPLITS.values())
def test_streaming_reports_a_constant_matrix_as_zero(split):
    x, y = features(100, 8, 8)
    assert streamed([np.full_like(x, 0.1), y], [(0, 1)], split, "unbiased").finish() == [0.0]


@pytest.mark.parametrize("n", [200, 2000, 4000])
def test_memory_stops_growing_once_there_are_more_samples_than_features(n):
    d, block = 16, 32
    stream = StreamingCKA([(0, 1), (1, 2)], "unbiased", block)
    peak = 0
    for _ in range(n // 8):
        stream.add([torch.randn(8, d, dtype=torch.float64) for _ in range(3)])
        peak = max(peak, stream.stored_values)
    five_products, one_block_and_a_batch = 5 * d * d, 3 * d * (block + 8)
    assert peak <= five_products + one_block_and_a_batch


# A row that is the same for most samples


def repeated(rows, split=3):
    stream = streamed([rows, rows], [(0, 1)], split, "biased")
    return stream.repeated()[0]


def with_copies(n, copies, noise=0.0, d=24, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    x[rng.permutation(n)[:copies]] = x[0]
    return x * (1 + noise * rng.uniform(-1, 1, size=x.shape))


@pytest.mark.parametrize("n", [10, 11, 500])
def test_a_row_counts_as_repeated_above_one_half_only(n):
    x = np.random.default_rng(0).normal(size=(n, 24))
    x[: n // 2] = x[0]
    assert not repeated(x)
    x[: n // 2 + 1] = x[0]
    assert repeated(x)


def test_rows_within_a_millionth_count_as_the_same_and_farther_ones_do_not():
    assert repeated(with_copies(400, 300, noise=2e-7))
    assert not repeated(with_copies(400, 300, noise=1e-4))


def test_a_row_that_comes_late_is_still_found():
    x = np.random.default_rng(0).normal(size=(400, 8))
    x[190:] = x[399]
    assert repeated(x)


def test_two_different_rows_with_half_each_are_not_one_repeated_row():
    x = np.random.default_rng(0).normal(size=(2, 8))
    assert not repeated(np.repeat(x, 50, axis=0))


def test_zero_rows_count_as_repeated():
    assert repeated(np.zeros((5, 4)))


def test_signatures_are_bounded_and_still_find_the_row():
    x = np.random.default_rng(0).normal(size=(3 * SIGNATURES, 4))
    x[: 2 * SIGNATURES] = x[0]  # two thirds, all of them first
    stream = streamed([x, x], [(0, 1)], 5_000, "biased")
    assert stream.repeated() == [True, True]
    assert sum(len(c) for c in stream._signatures[0].kept) <= SIGNATURES
