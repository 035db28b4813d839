"""A conversation in the terminal that goes past the model's context."""

import io

import pytest

from swiftkv_train import chat as chat_module
from swiftkv_train.chat import chat
from swiftkv_train.errors import UserError

TURNS = 6


@pytest.fixture
def talk(make_recipe, monkeypatch):
    """Says the same thing a few times to the debug model, whose context is made short."""
    make_recipe()  # links it

    def run(**options):
        monkeypatch.setattr("sys.stdin", io.StringIO("What does the fox do at noon?\n" * TURNS))
        chat("models/debug", max_new_tokens=16, **options)

    return run


@pytest.fixture(autouse=True)
def short_context(monkeypatch):
    load = chat_module.load_for_inference

    def load_short(path):
        model = load(path)
        model.config.max_position_embeddings = 128
        return model

    monkeypatch.setattr(chat_module, "load_for_inference", load_short)


def test_without_a_window_it_ends_and_says_what_helps(talk):
    with pytest.raises(UserError, match=r"exceed the context of 128; --window lets it go on"):
        talk()


@pytest.mark.parametrize("system", [None, "You are a fox and you say little."], ids=["sinks", "system message"])
def test_with_a_window_it_goes_on_beyond_the_context(talk, capsys, monkeypatch, system):
    made = []

    class Watched(chat_module.SinkWindowCache):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(chat_module, "SinkWindowCache", Watched)
    talk(window=32, system=system)
    cache = made[-1]  # random tokens seldom come back from text as they were, so turns begin anew
    assert cache.columns > 128
    assert (cache.copied_prefix is not None) == (system is not None)
    assert cache.attention_sinks == (len(cache.copied_prefix) if system else 4)
    assert len(capsys.readouterr().out.splitlines()) >= TURNS
