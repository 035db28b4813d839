"""Whose texts an evaluation was on: only those of the checkpoint's own recipe count as unseen and go on its card."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from swiftkv_models import rewrite
from swiftkv_train.evaluate import evaluate
from swiftkv_train.export.card import figures_block

UNSEEN = "tokens that no training saw"


@pytest.fixture
def checkpoint(make_recipe, tmp_path):
    recipe = make_recipe()
    directory = tmp_path / "checkpoint"
    rewrite(AutoModelForCausalLM.from_pretrained("models/debug"), num_key_value_layers=2).save_pretrained(directory)
    AutoTokenizer.from_pretrained("models/debug").save_pretrained(directory)
    (directory / "swiftkv.json").write_text(json.dumps({"recipe": recipe.model_dump(mode="json")}))
    (directory / "README.md").write_text(f"# card\n\n{figures_block([])}\n")
    return directory


@pytest.mark.parametrize("own", [False, True], ids=["the recipe's", "--data"])
def test_whose_texts(checkpoint, tmp_path, capsys, own):
    source = json.loads((checkpoint / "swiftkv.json").read_text())["recipe"]["data"]["held_out"][0]
    before = (checkpoint / "README.md").read_text()
    result = evaluate(
        str(checkpoint),
        base="models/debug",
        report_dir=tmp_path / "report",
        data=[f"mine={source['path']}"] if own else None,
        tokens=64,
        prompt_lengths=(16,),
        new_tokens=2,
    )
    card, report = (checkpoint / "README.md").read_text(), (tmp_path / "report/report.md").read_text()
    assert result["own_data"] == own
    assert (card == before) == own
    assert (f"| {source['name']} | {result['sources'].get(source['name'], {}).get('kl', 0):.3f} |" in card) != own
    assert (f"card        {checkpoint / 'README.md'} has these figures" in capsys.readouterr().err) != own
    assert (UNSEEN in report) != own
    assert ("of texts given by --data" in report) == own


def test_a_template_that_refuses_a_lone_question_and_a_short_context(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = "{{ raise_exception('a system message is needed') }}"
    tokenizer.save_pretrained(checkpoint)
    prose = ["mine=data/debug/prose.held_out.jsonl"]
    options = {"base": "models/debug", "data": prose, "tokens": 64, "prompt_lengths": (16, 10**9), "new_tokens": 2}
    result = evaluate(str(checkpoint), report_dir=tmp_path / "report", **options)
    assert len(result["generations"]) == 3
    assert [row["prompt_tokens"] for row in result["time_to_first_token"]] == [16]
