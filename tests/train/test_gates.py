"""`swiftkv evaluate --gate`: what is beyond a limit."""

import math

import pytest

from swiftkv_train.errors import RunError
from swiftkv_train.evaluate import _check_gate


def result(*figures):
    """One source for each of `figures`, which are its kl, agreement and time to the first token."""
    rows = [{"kl": figure, "agreement": figure, "ratio": figure} for figure in figures]
    return {"held_out": None, "own_data": True, "sources": dict(enumerate(rows)), "time_to_first_token": rows}


@pytest.mark.parametrize("figure", ["kl", "agreement", "time_to_first_token_ratio"])
@pytest.mark.parametrize("figures", [(math.nan,), (0.5, math.nan), (math.nan, 0.5)])
def test_nan_passes_no_gate(figure, figures):
    _check_gate(result(0.5), figure, 0.5)
    with pytest.raises(RunError, match=f"gate: {figure} is nan, not at (most|least) 0.5"):
        _check_gate(result(*figures), figure, 0.5)


@pytest.mark.parametrize(
    ("figure", "limit", "says"),
    [("kl", 0.6, "kl is 0.7000, not at most 0.6"), ("agreement", 0.4, "agreement is 0.3000, not at least 0.4")],
)
def test_the_worst_source_is_named(figure, limit, says):
    with pytest.raises(RunError, match=says):
        _check_gate(result(0.5, 0.7, 0.3, 0.65, 0.35), figure, limit)


@pytest.mark.parametrize("own_data", [True, False])
def test_every_source_of_ones_own_is_judged_and_of_a_recipe_what_was_trained_on(own_data):
    found = {**result(0.1, 0.9), "held_out": {"kl": 0.1}, "own_data": own_data}
    if own_data:
        with pytest.raises(RunError, match=r"kl is 0\.9000"):
            _check_gate(found, "kl", 0.5)
    else:
        _check_gate(found, "kl", 0.5)
