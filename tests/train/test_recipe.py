"""Recipes: what is refused, and in which words."""

import pytest
import yaml

from debug_recipe import DEBUG_RECIPE
from swiftkv_train.errors import UserError
from swiftkv_train.recipe_file import load_recipe, parse_recipe

TEXT = DEBUG_RECIPE.read_text()


def parse(text=TEXT, *overrides):
    return parse_recipe(text, "r.yaml", list(overrides))


def refusal(text=TEXT, *overrides):
    with pytest.raises(UserError) as error:
        parse(text, *overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("modle", "model"),
        ("model.bsae", "base"),
        ("rewrite.num_key_value_layer", "num_key_value_layers"),
        ("calibration.token", "tokens"),
        ("data.sequence_lenght", "sequence_length"),
        ("data.train.0.wieght", "weight"),
        ("data.held_out.1.pth", "path"),
        ("loss.temprature", "temperature"),
        ("training.stpes", "steps"),
        ("logging.wandb.projct", "project"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(key, nearest):
    project = ["logging.wandb.project=p"] if "wandb" in key else []
    assert refusal(TEXT, *project, f"{key}=1") == f"recipe r.yaml: unknown key {key!r}; did you mean {nearest!r}?"


def test_an_unknown_key_unlike_any_lists_the_known_ones():
    assert refusal(TEXT, "loss.xyz=1").endswith("unknown key 'loss.xyz'; known keys here: temperature, hidden_mse")


def test_an_unknown_key_is_told_before_the_missing_one_that_it_explains():
    text = TEXT.replace("  base:", "  bass:")
    assert refusal(text) == "recipe r.yaml: unknown key 'model.bass'; did you mean 'base'?"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.steps=many", "training.steps: Input should be a valid integer (found 'many')"),
        ("training.steps=1.5", "training.steps: Input should be a valid integer"),
        ("training.steps=true", "training.steps: Input should be a valid integer (found True)"),
        ("training.steps=-3", "training.steps: Input should be greater than or equal to 1 (found -3)"),
        (
            "training.batch_size=9000000000000000000",
            "training.batch_size: Input should be less than or equal to 1048576",
        ),
        ("training.steps=", "training.steps: Input should be a valid integer (found None)"),
        ("training.learning_rate=.nan", "training.learning_rate: Input should be a finite number"),
        ("training.max_grad_norm=.inf", "training.max_grad_norm: Input should be a finite number"),
        ("training.learning_rate=1e300", "training.learning_rate: must be at most 1e+30 (found 1e+300)"),
        ("loss.hidden_mse=-1", "loss.hidden_mse: Input should be greater than or equal to 0 (found -1)"),
        ("data.train.0.max_documents=99999999999999999999", "data.train.0.max_documents: must be at most 9.22337e+18"),
        ("training.steps=1:30", "training.steps: Input should be a valid integer (found '1:30')"),
        ("training.warmup=0:0.5", "training.warmup: Input should be a valid number (found '0:0.5')"),
        ("training.steps=0x10", "training.steps: Input should be a valid integer (found '0x10')"),
        ('model.base="a\\0b"', "model.base: a path cannot hold the character NUL"),
        ("training.betas=[0.9, 1.0]", "training.betas.1: Input should be less than 1"),
        ("training.seed=-1", "training.seed: Input should be greater than or equal to 0"),
        ("training.output_dir=''", "training.output_dir: String should have at least 1 character"),
        ("model.dtype=int8", "model.dtype: Input should be 'auto', 'bfloat16', 'float16' or 'float32' (found 'int8')"),
        ("loss=3", "loss must be a section with keys of its own (temperature, hidden_mse), found 3"),
        ("data.train=[]", "data.train: List should have at least 1 item"),
        ("data.train.1.name=prose", "data.train: two sources are named 'prose'"),
        ("data.train.0.dataset=x/y", "data.train.0: a source needs exactly one of `path`, `dataset` and `generate`"),
        ("training.schedule=linear", "training.schedule: Input should be 'wsd' or 'cosine' (found 'linear')"),
        ("training.decay=0", "training.decay: Input should be greater than 0 (found 0)"),
        (
            "training={output_dir: x, steps: 1, batch_size: 1, schedule: cosine, decay: 0.1}",
            "training: `decay` goes with `schedule: wsd`",
        ),
        ("rewrite.init=checkpoint", "rewrite: `init: checkpoint` and `init_from: DIR` go together"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_key(override, says):
    assert refusal(TEXT, override).startswith(f"recipe r.yaml: {says}")


def test_an_override_may_go_into_a_section_that_is_left_out_or_null():
    for text in (TEXT, TEXT + "\nlogging: {wandb: null}\n"):
        assert parse(text, "logging.wandb.project=mine").logging.wandb.project == "mine"
    assert parse(parse(TEXT).to_yaml(), "logging.wandb.project=mine").logging.wandb.project == "mine"


@pytest.mark.parametrize("key", ["model.base", "training.steps", "data.train.0.name"])
def test_a_missing_key_is_named(key):
    content = yaml.safe_load(TEXT)
    node = content
    *parents, last = key.split(".")
    for name in parents:
        node = node[int(name)] if isinstance(node, list) else node[name]
    del node[last]
    assert refusal(yaml.safe_dump(content)) == f"recipe r.yaml: key {key!r} is missing"


@pytest.mark.parametrize(("text", "number"), [("0100", 100), ("08", 8), ("1_000", 1000), ("+7", 7)])
def test_whole_numbers_are_decimal(text, number):
    assert parse(TEXT, f"training.steps={text}").training.steps == number


@pytest.mark.parametrize("name", ["2024-01-01", "2024-13-45", "1:30", "08", "1e3", "+.5", "0100", "yes", "0x10"])
def test_text_that_looks_like_something_else_is_text_and_is_stored_as_text(name):
    quoted = parse(TEXT, f"data.train.0.name='{name}'")
    assert quoted.data.train[0].name == name
    assert parse(quoted.to_yaml()) == quoted
    if "-" in name or ":" in name:
        assert parse(TEXT, f"data.train.0.name={name}") == quoted


@pytest.mark.parametrize(("text", "number"), [("2e-4", 2e-4), ("1E3", 1e3), ("2.5e-4", 2.5e-4), ("-1e1", None)])
def test_a_number_with_an_exponent_and_no_point_is_a_number(text, number):
    if number is None:
        assert "greater than 0 (found -10.0)" in refusal(TEXT, f"training.learning_rate={text}")
    else:
        assert parse(TEXT, f"training.learning_rate={text}").training.learning_rate == number
        in_file = TEXT.replace("learning_rate: 3.0e-3", f"learning_rate: {text}")
        assert parse(in_file).training.learning_rate == number


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    places = ["model.base", "rewrite.init_from", "data.cache_dir", "data.train.0.path", "data.held_out.0.path"]
    places += ["training.output_dir", "distributed.deepspeed_config"]
    recipe = parse(TEXT, "rewrite.init=checkpoint", "distributed.strategy=zero1", *(f"{key}=~/x" for key in places))
    content = yaml.safe_load(recipe.to_yaml())
    for key in places:
        node = content
        for name in key.split("."):
            node = node[int(name)] if isinstance(node, list) else node[name]
        assert node == "/home/me/x", key
    assert parse(TEXT, "model.base=me/~x").model.base == "me/~x"


def test_overrides_reach_sections_list_positions_and_absent_sections():
    recipe = parse(
        TEXT,
        "training.steps=7",
        "data.train.1.path=other.jsonl",
        "logging.wandb.project=p",
        "training.betas=[0.5, 0.6]",
    )
    assert recipe.training.steps == 7
    assert [source.path for source in recipe.data.train] == ["data/debug/prose.train.jsonl", "other.jsonl"]
    assert recipe.logging.wandb is not None
    assert recipe.logging.wandb.project == "p"
    assert recipe.training.betas == (0.5, 0.6)


def test_an_override_reaches_the_item_it_names_and_no_equal_one():
    equal = "[[3], [3], [3]]"
    recipe = parse(TEXT, f"rewrite.key_value_groups={equal}", "rewrite.key_value_groups.1=[4]")
    assert recipe.rewrite.key_value_groups == [[3], [4], [3]]
    content = yaml.safe_load(TEXT)
    content["data"]["held_out"] = content["data"]["train"]  # dumped as an anchor, and read as one list
    twice = yaml.safe_dump(content)
    assert "*id" in twice
    data = parse(twice, "data.train.0.name=first").data
    assert (data.train[0].name, data.held_out[0].name) == ("first", "prose")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.steps", "override 'training.steps' must look like training.steps=200"),
        ("=3", "override '=3' must look like training.steps=200"),
        ("data.train.2.path=x", "override data.train.2.path: '2' must be a position from 0 to 1"),
        ("data.train.first.path=x", "override data.train.first.path: 'first' must be a position from 0 to 1"),
        ("training.steps.x=3", "override 'training.steps.x=3': training.steps is not a section"),
        ("data.train.².path=x", "override data.train.².path: '²' must be a position from 0 to 1"),
        ("training.steps=[1", "override 'training.steps=[1': the value is not YAML"),
        ("training.steps=!!int abc", "override 'training.steps=!!int abc': the value is not YAML"),
        ("training.steps=!!bool maybe", "override 'training.steps=!!bool maybe': the value is not YAML"),
        ("training.steps=!!timestamp x", "override 'training.steps=!!timestamp x': the value is not YAML"),
        ("training.steps=!!map x", "override 'training.steps=!!map x': the value is not YAML"),
    ],
)
def test_a_malformed_override_is_refused(override, says):
    assert refusal(TEXT, override) == says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1,\nb: {", "is not YAML: "),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
        (TEXT + "\ntraining: {}\n", "is not YAML: key 'training' is given twice"),
        (TEXT.replace("  steps:", "  seed: 1\n  seed: 2\n  steps:"), "is not YAML: key 'seed' is given twice"),
        ("a: !!int x", "is not YAML: invalid literal for int() with base 10: 'x'"),
        ("a: !!timestamp x", "is not YAML: "),
        ('extends: "a\\0b"', "extends must be the path of another recipe"),
        ("", "must hold a mapping with the keys model, rewrite"),
        ("- a\n- b\n", "must hold a mapping"),
    ],
)
def test_what_is_not_a_recipe_is_refused(text, says):
    assert refusal(text).startswith("recipe r.yaml")
    assert says in refusal(text)


def test_what_is_too_large_is_refused():
    assert refusal("[" * 5000) == "recipe r.yaml is not YAML: it is nested too deeply"
    for override in (f"training.steps={'9' * 5000}", f"training.steps={'[' * 3000}"):
        assert refusal(TEXT, override).endswith(": the value is not YAML")
    assert refusal(TEXT, f"data.train.{'1' * 5000}.name=x").endswith(" must be a position from 0 to 1")
    assert len(refusal(TEXT, f"training.steps={'9' * 4000}")) < 400


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for name, says in (("none.yaml", "does not exist"), ("binary.yaml", "cannot be read"), (".", "cannot be read")):
        with pytest.raises(UserError, match=says) as error:
            load_recipe(tmp_path / name)
        assert str(tmp_path) in str(error.value)


def test_the_stored_recipe_reads_back_as_the_same_recipe():
    recipe = parse(TEXT, "training.betas=[0.8, 0.9]", "logging.wandb.project=p")
    assert parse(recipe.to_yaml()) == recipe


def extending(tmp_path, **files):
    """Recipe files by name; returns the first one's path."""
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path / f"{next(iter(files))}.yaml"


def test_a_recipe_is_as_the_one_it_extends_but_for_what_it_says(tmp_path):
    (tmp_path / "below").mkdir()
    top = "extends: below/middle.yaml\ntraining: {steps: 7}\n"
    middle = (
        "extends: ../base.yaml\ntraining: {steps: 5, seed: 3}\nloss: {temperature: 1.5}\n"
        "data: {held_out: [{name: only, path: p.txt}]}\n"
    )
    path = extending(tmp_path, top=top, base=TEXT, **{"below/middle": middle})
    base, found = load_recipe(tmp_path / "base.yaml"), load_recipe(path, ["training.batch_size=2"])
    wanted = base.model_copy(deep=True)
    wanted.training.steps, wanted.training.seed, wanted.training.batch_size = 7, 3, 2
    wanted.loss.temperature = 1.5
    wanted.data.held_out = found.data.held_out
    assert found == wanted
    assert [source.name for source in found.data.held_out] == ["only"]  # a list is not added to
    assert load_recipe(extending(tmp_path, stored=found.to_yaml())) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: none.yaml\n", "top.yaml: extends none.yaml, but .*none.yaml is not a file"),
        ("extends: 3\n", "top.yaml: extends must be the path of another recipe .found 3."),
        ("extends: top.yaml\n", "top.yaml: extends leads back to .*top.yaml"),
        ("extends: round.yaml\n", "round.yaml: extends leads back to .*top.yaml"),
        ("extends: base.yaml\ntraining: {stpes: 3}\n", "top.yaml: unknown key 'training.stpes'; .*'?steps"),
        ("extends: broken.yaml\n", "broken.yaml is not YAML"),
    ],
)
def test_a_recipe_that_cannot_extend_says_why(tmp_path, text, says):
    path = extending(tmp_path, top=text, base=TEXT, round="extends: top.yaml\n", broken="a: [\n")
    with pytest.raises(UserError, match=says) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)
