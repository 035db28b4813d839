"""Answers and conversations in the terminal, also beyond the model's context."""

import io
import json
import shutil
import signal

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from swiftkv_train import chat as chat_module
from swiftkv_train import kept_caches, loading
from swiftkv_train.chat import chat
from swiftkv_train.errors import UserError
from swiftkv_train.generation_settings import decoding_config, kept_settings

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
def _ctrl_c_interrupts():
    """Of a process that a shell put into the background it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def layer_runs(monkeypatch):
    """Makes the model's context short; what is put into it is called before every run of layer 0, with its tokens."""
    load, watchers = chat_module.load_for_inference, []

    def load_short(path, **options):
        model = load(path, **options)
        model.config.max_position_embeddings = 128

        def watch(layer, arguments, named):
            for watcher in watchers:
                watcher((arguments[0] if arguments else named["hidden_states"]).shape[1])

        model.model.layers[0].register_forward_pre_hook(watch, with_kwargs=True)
        return model

    monkeypatch.setattr(chat_module, "load_for_inference", load_short)
    return watchers


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def type_in(model, monkeypatch):
    """A conversation in a terminal of the given lines; returns what stands on standard error."""

    def run(*messages, **options):
        monkeypatch.setattr("sys.stdin", Terminal("".join(f"{message}\n" for message in messages)))
        monkeypatch.setattr("sys.stderr", Terminal())
        chat(str(model), **{"max_new_tokens": 4, **options})
        return chat_module.sys.stderr.getvalue().splitlines()

    return run


def test_a_turn_runs_what_is_new_only(type_in, layer_runs):
    runs = []
    layer_runs.append(runs.append)
    type_in("What does the fox do?", "And the newt?")
    first, second = (count for count in runs if count > 1)
    assert second < first + 4  # the first turn's tokens stay, even where its answer is cut into other tokens


def test_a_conversation_that_is_full_stays_open(type_in, model, layer_runs):
    runs = []
    layer_runs.append(runs.append)
    long = "What does the fox do at noon? " * 20
    said = type_in(long, "What does the newt do?", long)
    assert len(said) == 3
    for refused in (said[0], said[2]):
        assert refused.startswith("error: ")
        assert refused.endswith("conversation and an answer exceed the context of 128; --window lets it go on")
    assert said[1].startswith("(cut after 4 tokens; --max-new-tokens")
    assert len([count for count in runs if count > 1]) == 1  # of three messages one fitted


def test_answers_become_shorter_where_the_context_ends(type_in, layer_runs, capsys):
    runs = []
    layer_runs.append(runs.append)
    said = type_in("What does the fox do?", max_new_tokens=500)
    assert sum(runs) == 127  # the last token does not run
    assert said == [f"(cut after {128 - runs[0]} tokens; --window lets it go on)"]


def test_ctrl_c_ends_the_answer_only(type_in, layer_runs, capsys):
    runs = []

    def interrupt(count):
        runs.append(count)
        if len(runs) == 3:
            signal.raise_signal(signal.SIGINT)

    layer_runs.append(interrupt)
    before = signal.getsignal(signal.SIGINT)
    said = type_in("What does the fox do?", "And the newt?", max_new_tokens=20)
    assert said[0] == "(interrupted)"
    assert runs[1:3] == [1, 1]
    assert runs[3] > 1  # the next message
    assert len(runs) == 3 + 20
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_or_one_without_a_conversation_ends_the_command(type_in, model, layer_runs):
    layer_runs.append(lambda count: signal.raise_signal(signal.SIGINT))
    layer_runs.append(lambda count: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        type_in("What does the fox do?")
    del layer_runs[1]
    with pytest.raises(KeyboardInterrupt):
        answer(model)


def test_one_answer_that_is_cut_says_so_in_a_terminal(model, monkeypatch, capsys):
    answer(model)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr", Terminal())
    answer(model)
    assert chat_module.sys.stderr.getvalue() == "(cut after 4 tokens; --max-new-tokens allows more)\n"


@pytest.mark.parametrize(
    ("settings", "asked", "wanted"),
    [
        ({}, {}, (True, 1.0, None, 0, None)),
        ({}, {"temperature": 0.7}, (True, 0.7, None, 0, None)),
        ({"do_sample": False, "temperature": 0.9}, {}, (False, 1.0, 1.0, 50, None)),
        ({"do_sample": False}, {"temperature": 0.5}, (True, 0.5, None, 0, None)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 7}, {}, (True, 0.6, None, 7, None)),
        ({"top_k": 7}, {"top_k": -1, "top_p": 0.5, "repetition_penalty": 1.1}, (True, 1.0, 0.5, 0, 1.1)),
        ({"top_k": 7}, {"temperature": 1e-9}, (False, 1.0, 1.0, 50, None)),
    ],
)
def test_how_answers_are_decoded(settings, asked, wanted, debug_files):
    """The same for the server and the chat."""
    tokenizer = AutoTokenizer.from_pretrained(debug_files / "models/debug")
    config = decoding_config(kept_settings(GenerationConfig(**settings)), tokenizer, max_new_tokens=5, **asked)
    found = (config.do_sample, config.temperature, config.top_p, config.top_k, config.repetition_penalty)
    assert found == wanted
    assert config.eos_token_id == [tokenizer.eos_token_id]
    assert config.max_new_tokens == 5


def test_without_a_window_it_ends_and_says_what_helps(talk):
    with pytest.raises(UserError, match=r"exceed the context of 128; --window lets it go on"):
        talk()


@pytest.mark.parametrize("system", [None, "You are a fox and you say little."], ids=["sinks", "system message"])
def test_with_a_window_it_goes_on_beyond_the_context(talk, capsys, monkeypatch, system):
    made = []

    class Watched(kept_caches.SinkWindowCache):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(kept_caches, "SinkWindowCache", Watched)
    talk(window=32, system=system)
    cache = made[-1]  # random tokens seldom come back from text as they were, so turns begin anew
    assert cache.columns > 128
    assert len(cache.prefixes) == (system is not None)
    assert not cache.shares
    assert cache.attention_sinks == (len(cache.prefixes[0]) if system else 4)
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


def test_a_system_message_that_leaves_no_room_for_the_window(model):
    with pytest.raises(UserError, match=r"--system has \d+ tokens, which with --window 128 is longer than the context"):
        answer(model, window=128, system="Say little.")


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


def test_a_dtype_of_ones_own(make_recipe, monkeypatch, capsys):
    make_recipe()
    loaded = []
    plain = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: loaded.append(plain(*a, **k)) or loaded[-1])
    chat("models/debug", prompt="What does the fox do?", max_new_tokens=2, dtype="bfloat16")
    assert loaded[-1].dtype == torch.bfloat16
    with pytest.raises(UserError, match="--dtype 'int8' is not one of auto, float32, bfloat16, float16"):
        chat("models/debug", prompt="What does the fox do?", dtype="int8")
