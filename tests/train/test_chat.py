"""A conversation in the terminal that goes past the model's context."""

import io
import json
import shutil

import pytest
from transformers import AutoTokenizer

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


@pytest.fixture
def model(debug_files, tmp_path):
    return shutil.copytree(debug_files / "models/debug", tmp_path / "model")


def answer(model, **options):
    chat(str(model), **{"prompt": "What does the fox do?", "max_new_tokens": 4, **options})


@pytest.mark.parametrize("option", ["prompt", "system"])
@pytest.mark.parametrize("text", ["caf\udce9", "\ud800"], ids=["latin-1", "half a pair"])
def test_text_that_is_not_utf8_is_refused(model, option, text):
    with pytest.raises(UserError, match=f"--{option} is not UTF-8"):
        answer(model, **{option: text})


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_messages_that_are_not_utf8_are_refused(model, monkeypatch, errors):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    with pytest.raises(UserError, match="the message is not UTF-8"):
        answer(model, prompt=None)


def test_a_temperature_next_to_nothing_is_greedy(model, capsys):
    answer(model, temperature=0.0)
    greedy = capsys.readouterr().out
    answer(model, temperature=1e-40)
    assert capsys.readouterr().out == greedy
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"--temperature is {wrong}"):
            answer(model, temperature=wrong)


@pytest.mark.parametrize("window", [129, 10**12, 10**25])
def test_a_window_longer_than_the_context_is_refused(model, window):
    with pytest.raises(UserError, match=f"--window {window} is longer than the context of .*model, 128"):
        answer(model, window=window)


@pytest.mark.parametrize("window", [None, 64], ids=["plain", "window"])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for x in %}", "Expected an expression"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% if false %}x{% endif %}", "makes nothing of the conversation"),
    ],
)
def test_a_template_that_fails_is_named_in_one_line(model, template, reason, window):
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=f"model: its chat template .*{reason}") as caught:
        answer(model, window=window, system="Say little.")
    assert "\n" not in str(caught.value)


def test_a_template_without_a_prefix_cannot_have_a_window(model):
    (model / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(UserError, match=r"model: --system cannot go with --window: .* no prefix"):
        answer(model, window=64, system="Say little.")


@pytest.mark.parametrize("templates", [5, [{"name": "rag", "template": "x"}]])
def test_templates_that_are_none(model, templates):
    (model / "chat_template.jinja").unlink()
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": templates}))
    with pytest.raises(UserError, match="model: its chat template refuses"):
        answer(model)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<{number}>" for number in range(513 - len(tokenizer))])
    tokenizer.save_pretrained(model)
    with pytest.raises(
        UserError, match=r"vocabulary mismatch in .*model: the tokenizer has 513 tokens, the model only"
    ):
        answer(model)


def test_beams_time_limits_and_stop_strings_of_the_model_are_left_out(model, capsys):
    answer(model)
    plain = capsys.readouterr().out
    settings = {"eos_token_id": 2, "num_beams": 4, "stop_strings": ["e"], "max_time": 1e-6, "use_cache": False}
    (model / "generation_config.json").write_text(json.dumps(settings))
    answer(model)
    assert capsys.readouterr().out == plain
