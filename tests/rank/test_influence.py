"""The tiled solver against a dense one that keeps every n × n matrix, and against the released code."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trimtab.errors import ConfigError, SelectionError
from trimtab.rank import influence as module
from trimtab.rank.influence import log_influence
from trimtab.rank.salientlora import influence

PARITY = Path(os.environ.get("TRIMTAB_DATA", Path(__file__).parents[3] / "shared/data")) / "parity/salientlora"


def dense_log_domain(series: np.ndarray, beta: float, gamma: float) -> np.ndarray:
    """log D by the paper's definition: correlation and slope matrices, then the recursion."""
    n = len(series)
    centred = series - series.mean(1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(1))
    alive = sigma > 1e-12 * np.abs(series).max()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rho = centred @ centred.T / series.shape[1] / sigma[:, None] / sigma[None, :]
        slope = rho * (sigma[None, :] / sigma[:, None])
    edge = (rho >= beta) & (slope >= gamma) & alive[:, None] & alive[None, :]
    log_domain = np.zeros(n)
    for i in np.argsort(-sigma, kind="stable"):
        if edge[i].any():
            log_domain[i] = np.logaddexp.reduce(np.log(slope[i, edge[i]]) + log_domain[edge[i]])
    return log_domain


def check(series, beta=0.9, gamma=2.0, rtol=1e-9):
    series = np.asarray(series, dtype=np.float64)
    found, has_edge = log_influence(torch.from_numpy(series), beta, gamma)
    expected = dense_log_domain(series, beta, gamma)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=rtol)  # absolute in logs is relative in D
    assert has_edge.any() == (expected != 0).any()
    share = influence(torch.from_numpy(series), beta, gamma)
    np.testing.assert_allclose(share, np.exp(expected - np.logaddexp.reduce(expected)), rtol=10 * rtol)
    return has_edge


def walks(n, window, decades, seed=0):
    rng = np.random.default_rng(seed)
    trend = np.linspace(0, 1, window)
    return (trend + 0.05 * rng.standard_normal((n, window)).cumsum(1)) * 10 ** rng.uniform(0, decades, (n, 1))


def test_oracle_a_five_rows():
    t = torch.arange(5.0)
    series = torch.stack([t, 3 * t + 1, 7 * t - 2, -9 * t, torch.tensor([0.0, 1, 0, 1, 0])])
    share = influence(series, 0.9, 2.0)
    assert share.tolist() == pytest.approx([0.724138, 0.120690, 0.051724, 0.051724, 0.051724], abs=1e-6)
    log_domain, has_edge = log_influence(series, 0.9, 2.0)
    assert log_domain.exp().tolist() == pytest.approx([14, 7 / 3, 1, 1, 1])
    assert has_edge.tolist() == [True, True, False, False, False]


def test_oracle_b_a_chain_of_rising_slopes():
    series = torch.stack([2.5**k * torch.arange(4.0) for k in range(6)])
    log_domain, _ = log_influence(series, 0.9, 2.0)
    assert log_domain.exp().tolist() == pytest.approx([1562.5, 312.5, 62.5, 12.5, 2.5, 1])


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_the_released_code_gives_the_same_influence_apart_from_leaves(case):
    if not PARITY.exists():
        pytest.skip("parity data is not beside this checkout")
    data = load_file(PARITY / f"{case}.safetensors")
    log_domain, has_edge = log_influence(data["series"], 0.9, 2.0)
    released = data["released_influence"]
    assert torch.equal(has_edge, released > 0)
    torch.testing.assert_close(log_domain.exp()[has_edge], released[has_edge], rtol=1e-9, atol=0)
    assert (log_domain[~has_edge] == 0).all()


@pytest.mark.parametrize("seed", range(20))
def test_random_series_equal_the_dense_reference(seed):
    rng = np.random.default_rng(seed)
    n, window = int(rng.integers(1, 90)), int(rng.integers(2, 40))
    check(rng.standard_normal((n, window)) * 10 ** rng.uniform(-5, 5, (n, 1)), rng.uniform(0.3, 0.95), 1.7)
    check(walks(n, window, 4, seed))


@pytest.mark.parametrize("gamma", [1.0001, 1.01, 1.5, 2.0, 50.0])
def test_several_tiles_equal_the_dense_reference(gamma, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 64)
    monkeypatch.setattr(module, "COLUMNS", 96)
    assert check(walks(500, 20, 3), gamma=gamma, rtol=1e-8).double().mean() > 0.3
    check(walks(500, 20, 0.1), gamma=gamma, rtol=1e-8)  # everything inside the diagonal blocks


def test_tiles_of_real_size_equal_the_dense_reference():
    check(walks(1300, 30, 2.5), rtol=1e-8)


def test_duplicates_do_not_depend_on_each_other():
    series = np.repeat(walks(40, 12, 2), 3, axis=0)
    check(series)
    check(series, gamma=1.0001)
    check(np.repeat(np.arange(5.0)[None], 30, axis=0))


@pytest.mark.parametrize("constant", [0.0, 3.0, 0.1, 1e8])
def test_constant_rows_have_no_edges(constant):
    series = walks(30, 12, 2)
    series[[0, 7, 29]] = constant
    has_edge = check(series)
    assert not has_edge[[0, 7, 29]].any()
    assert not check(np.full((5, 8), constant)).any()


@pytest.mark.parametrize("scale", [1e-150, 1e-10, 1e-8, 1e10, 1e150])
def test_the_scale_of_all_rows_does_not_matter(scale):
    series = torch.from_numpy(walks(60, 15, 3))
    torch.testing.assert_close(influence(series * scale, 0.9, 2.0), influence(series, 0.9, 2.0), rtol=1e-9, atol=0)


def test_rows_of_very_different_scale_equal_the_dense_reference():
    series = walks(60, 15, 0)
    check(series * 10 ** np.random.default_rng(0).uniform(-10, 1, (60, 1)))


@pytest.mark.parametrize(
    "decades, gamma, log10",
    [(6, 2.0, 30.5), (6, 1.5, 42.9), (6, 1.1, 103), (6, 1.01, 330), (2, 2.0, 12.1), (2, 1.1, 49.1), (2, 1.01, 180.7)],
)
def test_influence_beyond_float64_is_solved_in_logs(decades, gamma, log10):
    # 1080 proportional rows: log10 of the largest D, in part beyond the 308 that float64 holds
    series = 10 ** torch.linspace(0, decades, 1080, dtype=torch.float64)[:, None] * torch.linspace(0, 1, 10)
    log_domain, _ = log_influence(series, 0.9, gamma)
    assert log_domain.max().item() / np.log(10) == pytest.approx(
        log10, abs=0.06 if log10 < 100 or decades == 2 else 0.6
    )
    share = influence(series, 0.9, gamma)
    assert torch.isfinite(share).all() and share.sum().item() == pytest.approx(1)


def test_sums_over_more_than_the_range_of_float64_equal_the_dense_reference():
    rng = np.random.default_rng(0)
    check(10 ** rng.uniform(0, 9, (1080, 1)) * np.linspace(0, 1, 10) ** 1.5, gamma=1.005, rtol=1e-7)


def test_a_short_window_or_a_single_value_has_equal_shares():
    assert influence(torch.randn(4, 1), 0.9, 2.0).tolist() == [0.25] * 4
    assert influence(torch.randn(1, 9), 0.9, 2.0).tolist() == [1.0]
    assert influence(torch.zeros(0, 9), 0.9, 2.0).tolist() == []


def test_float32_and_strided_input_are_computed_in_float64_and_left_alone():
    series = torch.from_numpy(walks(50, 12, 2)).float()
    before = series.clone()
    strided = series.T.contiguous().T
    assert torch.equal(influence(series, 0.9, 2.0), influence(strided, 0.9, 2.0))
    assert torch.equal(influence(series, 0.9, 2.0), influence(series.double(), 0.9, 2.0))
    assert torch.equal(series, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(bad):
    series = torch.randn(5, 4)
    series[3, 2] = bad
    with pytest.raises(SelectionError, match="NaN or infinity"):
        influence(series, 0.9, 2.0)


def test_oracle_f_thresholds_that_could_make_a_cycle_are_refused():
    series = torch.arange(4.0).repeat(2, 1)
    for gamma in (1.0, 0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"rank\.gamma"):
            influence(series, 0.9, gamma)
    for beta in (0.0, -0.5, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"rank\.beta"):
            influence(series, beta, 2.0)
    with pytest.raises(SelectionError, match="shape"):
        influence(torch.zeros(3), 0.9, 2.0)


def test_no_n_by_n_matrix_is_made(monkeypatch):
    n = 3000
    largest = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: largest.append((r := real(*a, **k)).numel()) or r)
    influence(torch.from_numpy(walks(n, 10, 3)), 0.9, 2.0)
    assert max(largest) <= module.ROWS * module.COLUMNS < n * n / 10


def test_the_number_of_threads_changes_no_bit_and_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(module, "COLUMNS", 128)
    series, threads, found = torch.from_numpy(walks(1100, 10, 3)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(influence(series, 0.9, 2.0))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
