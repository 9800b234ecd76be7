import pytest

from trimtab.errors import ConfigError
from trimtab.schedule import check_length, resolve_steps


@pytest.mark.parametrize(
    "value, steps",
    [(0, 0), (1, 1), (800, 800), (0.0, 0), (0.1, 100), (0.29, 290), ("10%", 100), ("100%", 1000), ("0%", 0),
     ("1ep", 40), ("2.5ep", 100), (".5 ep", 20), (" 3ep ", 120)],
)  # fmt: skip
def test_a_length_is_steps_or_a_share_of_the_run_or_epochs(value, steps):
    assert resolve_steps(value, 1000, 40, "rank.warmup") == steps


def test_shares_that_fill_the_run_fit_into_it():
    for total in range(1, 400):
        assert resolve_steps(0.3, total, None, "k") + resolve_steps(0.7, total, None, "k") <= total


def test_a_share_is_not_cut_short_by_binary_fractions():
    assert resolve_steps(0.29, 100, None, "k") == 29
    assert resolve_steps("29%", 100, None, "k") == 29
    assert resolve_steps("0.07ep", 100, 100, "k") == 7


@pytest.mark.parametrize("value", [1.0, 1.5, -0.1, -3, True, None, "ten", "10", "-1ep", "101%", float("nan"), [1]])
def test_what_is_no_length_is_refused_with_the_key(value):
    with pytest.raises(ConfigError, match=r"rank\.warmup"):
        check_length(value, "rank.warmup")


def test_the_float_one_is_called_ambiguous():
    with pytest.raises(ConfigError, match='ambiguous: write 1 for one step or "100%"'):
        resolve_steps(1.0, 1000, 40, "rank.warmup")


def test_epochs_of_unknown_length_are_refused():
    with pytest.raises(ConfigError, match="the length of an epoch is unknown"):
        resolve_steps("1ep", 1000, None, "rank.warmup")
