"""`swiftkv bench layers`: predictions and measurements of the forms that were asked for."""

import pytest

from swiftkv_train.bench.layers import _form, rank_correlation


def test_every_form_is_predicted_calibrated_and_measured(result_of):
    result = result_of("layers", "recipe.yaml", "--forms", "2,3x2,3:1+2")
    rows = {row["form"]: row for row in result["rows"]}
    assert rows.keys() == {"2", "3x2", "3:1+2"}
    assert rows["2"]["key_value_groups"] == [[2], [3], [4], [5]]
    assert rows["3x2"]["key_value_groups"] == [[3, 4], [5]]
    assert rows["3:1+2"]["key_value_groups"] == [[3], [4, 5]]
    assert all(row["kl"] > 0 and row["predicted"] > 0 for row in rows.values())
    order = [[row[key] for row in rows.values()] for key in ("predicted", "kl")]
    assert result["rank_correlation"] == rank_correlation(*order)


def test_left_out_forms_are_some_l_and_g_and_the_best_groupings(result_of):
    forms = [row["form"] for row in result_of("layers", "recipe.yaml", "calibration.tokens=512")["rows"]]
    assert forms[:-2] == ["2x1", "2x2", "2x4", "3x1", "3x2", "4x1", "4x2", "5x1"]
    assert all(form.startswith("3:") for form in forms[-2:])


def test_ranks():
    assert rank_correlation([0.1, 5.0, 0.3], [1.0, 3.0, 2.0]) == pytest.approx(1.0)
    assert rank_correlation([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]) == pytest.approx(0.8)
    assert rank_correlation([1.0], [2.0]) is None
    assert _form("4:2+3", 9) == (4, [[4, 5], [6, 7, 8]])


@pytest.mark.parametrize(
    ("forms", "says"),
    [
        ("3y2", "--forms: '3y2' is no form; they look like 15,15x2,22,15:1+2+3+9"),
        ("3,", "--forms: '' is no form"),
        ("3x0", "--forms: '3x0' is no form"),
        ("3x²", "--forms: '3x²' is no form"),
        ("3x1+2", "--forms: '3x1+2' is no form"),
        ("3+2", "--forms: '3+2' is no form"),
        ("3:1:2", "--forms: '3:1:2' is no form"),
        ("6", "--forms 6: l must be between 1 and 5"),
        ("3,3x1", "--forms: 3 and 3x1 are the same form; leave one out"),
        ("3:1+1", "--forms 3:1+1: the sizes must add up to the 3 layers from 3 on"),
    ],
)
def test_wrong_forms_are_refused(bench, forms, says):
    status, out, err = bench("layers", "recipe.yaml", "--forms", forms)
    assert (status, out) == (2, "")
    assert says in err.splitlines()[-1]


def test_too_few_tokens_without_ridge_are_refused_in_one_line(bench):
    few = ["data.sequence_length=32", "calibration.tokens=32", "calibration.ridge=0"]
    status, out, err = bench("layers", "recipe.yaml", *few, "--forms", "3")
    assert (status, out) == (2, "")
    assert "tokens do not determine the fit at ridge 0.0" in err.splitlines()[-1]
