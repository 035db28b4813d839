"""What a recipe may say about a source, and in which words the rest is refused."""

from __future__ import annotations

import pytest

from debug_recipe import DEBUG_RECIPE
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import Recipe
from swiftkv_train.recipe_file import parse_recipe

TEXT = DEBUG_RECIPE.read_text()


def parse(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, "r.yaml", list(overrides))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{name: s}", "data.train.0: a source needs exactly one of `path`, `dataset` and `generate`"),
        ("{name: s, path: a, generate: {}}", "data.train.0: a source needs exactly one of `path`, `dataset` and"),
        ("{name: s, dataset: a, generate: {}}", "data.train.0: a source needs exactly one of"),
        ("{name: s, path: a, streaming: true}", "data.train.0: `subset`, `split`, `revision` and `streaming` go with"),
        (
            "{name: s, generate: {}, revision: main}",
            "data.train.0: `subset`, `split`, `revision` and `streaming` go with",
        ),
        ("{name: s, path: a, split: test}", "data.train.0: `subset`, `split`, `revision` and `streaming` go with"),
        ("{name: s, path: a, subset: b}", "data.train.0: `subset`, `split`, `revision` and `streaming` go with"),
        ("{name: s, generate: {}, field: text}", "data.train.0: `field` and `kind` do not go with `generate`"),
        ("{name: s, generate: {}, kind: chat}", "data.train.0: `field` and `kind` do not go with `generate`"),
        ("{name: s, generate: {temprature: 1}}", "unknown key 'data.train.0.generate.temprature'; did you mean 'temp"),
        ("{name: s, generate: {conversations: 0}}", "data.train.0.generate.conversations: Input should be greater"),
        ("{name: s, generate: {temperature: 0}}", "data.train.0.generate.temperature: Input should be greater than 0"),
        ("{name: s, generate: {top_p: 1.5}}", "data.train.0.generate.top_p: Input should be less than or equal to 1"),
        ("{name: s, generate: yes}", "data.train.0.generate must be a section with keys of its own (conversations, "),
        ("{name: s, dataset: a, streaming: 1}", "data.train.0.streaming: Input should be a valid boolean (found 1)"),
    ],
)
def test_sources_that_are_refused(source, says):
    with pytest.raises(UserError) as error:
        parse(f"data.train=[{source}]")
    assert str(error.value).startswith(f"recipe r.yaml: {says}")
    assert "\n" not in str(error.value)


def test_data_self_is_short_for_two_generated_sources():
    data = parse("data=self").data
    assert [(source.name, source.path) for source in [*data.train, *data.held_out]] == [("self", None)] * 2
    train, held_out = (sources[0].generate for sources in (data.train, data.held_out))
    assert train is not None
    assert held_out is not None
    assert train.seed != held_out.seed
    assert train.conversations > held_out.conversations
    again = parse_recipe(parse("data=self").to_yaml(), "stored.yaml")
    assert again.data == data


def test_what_data_self_is_short_for_can_be_changed():
    text = TEXT[: TEXT.index("\ndata:")] + "\ndata: self\n" + TEXT[TEXT.index("\nloss:") :]
    data = parse_recipe(text, "r.yaml", ["data.cache_dir=elsewhere", "data.train.0.generate.conversations=7"]).data
    assert data.cache_dir == "elsewhere"
    assert data.train[0].generate.conversations == 7
    assert parse_recipe(text, "r.yaml").data.held_out == data.held_out


@pytest.mark.parametrize("value", ["other", "3", "[self]"])
def test_data_is_a_section_or_self(value):
    with pytest.raises(
        UserError, match=r"^recipe r\.yaml: data must be a section with keys of its own \(sequence_length"
    ):
        parse(f"data={value}")
