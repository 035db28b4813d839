"""What a base says itself: that it is the base that says it, through its template, the same at every start."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from swiftkv_train.data import ChatDocument, check_no_overlap, generate, load_training_data, read_documents
from swiftkv_train.data.generate import Speaker, ends_in_a_loop, generated_source
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import DataSection, GenerateSection, ModelSection, Source
from tiny import tiny_llama

SETTINGS = {"conversations": 5, "batch_size": 12, "max_prompt_tokens": 100, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_tokenizer) -> ModelSection:
    """A small random base that ends a turn after some twenty tokens; its own sampling settings are to be ignored."""
    directory = tmp_path_factory.mktemp("base")
    model = tiny_llama("bias", layers=2, vocab_size=400, dtype=torch.float32, max_position_embeddings=512)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 15.0  # much the same in every state, so that the head can count on it
        model.lm_head.weight[:2, 0] = -1.0  # other special tokens: hardly ever
        model.lm_head.weight[2, 0] = 0.75
    model.generation_config = GenerationConfig(eos_token_id=2, do_sample=True, top_k=1, repetition_penalty=3.0)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return ModelSection(base=str(directory), dtype="float32")


@pytest.fixture
def say(base, tokenizer, tmp_path):
    def generated(cache_dir: str = "cache", model: ModelSection = base, **settings) -> Path:
        source = Source(name="self", generate=GenerateSection(**(SETTINGS | settings)))
        found = generated_source(source, model, tokenizer, tmp_path / cache_dir)
        assert found.generate is None
        return Path(found.path)

    return generated


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_conversations_are_a_source_like_any_other(say):
    path = say()
    documents = list(read_documents(Source(name="self", path=str(path))))
    assert len(documents) == 5
    assert all(isinstance(document, ChatDocument) for document in documents)
    for document in documents:
        assert [message["role"] for message in document.messages] == ["user", "assistant"]
        assert not any("<|" in message["content"] for message in document.messages)
    # The base's own settings (top_k 1) would have made all prompts one.
    assert len({document.messages[0]["content"] for document in documents}) == 5


def test_the_same_everywhere_and_another_with_other_settings(say, base, tmp_path):
    before = torch.get_rng_state()
    first = say("one")
    assert torch.equal(torch.get_rng_state(), before)  # the run's own random numbers are left alone
    torch.rand(3)
    second = say("two")
    assert first.read_text() == second.read_text()
    assert first.name == second.name
    for other in ({"seed": 1}, {"temperature": 0.9}, {"top_p": 0.9}, {"max_new_tokens": 25}):
        assert rows(say("one", **other)) != rows(first)
    for model in (base.model_copy(update={"dtype": "bfloat16"}), other_base(base, tmp_path)):
        assert say("one", model).stem.split("-")[0] != first.stem.split("-")[0]


def other_base(base: ModelSection, tmp_path: Path) -> ModelSection:
    from safetensors.torch import load_file, save_file

    directory = tmp_path / "other"
    directory.mkdir()
    for file in Path(base.base).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return base.model_copy(update={"base": str(directory)})


def test_a_second_start_says_nothing(say, monkeypatch):
    path = say()
    before = path.stat()
    monkeypatch.setattr(generate, "load_for_inference", lambda *_, **__: pytest.fail("the base was loaded"))
    assert say() == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_cut_off_it_goes_on_and_more_conversations_add_to_what_is_there(say, monkeypatch):
    whole = say("whole", conversations=30)
    said: list[int] = []
    batch = Speaker.batch

    def cut_off(self, number):
        if len(said) == 1:
            raise KeyboardInterrupt
        said.append(number)
        return batch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Speaker, "batch", cut_off)
        with pytest.raises(KeyboardInterrupt):
            say(conversations=30)
    monkeypatch.setattr(Speaker, "batch", lambda self, number: said.append(number) or batch(self, number))
    again = say(conversations=30)
    assert again.read_text() == whole.read_text()
    assert said == list(range(len(said)))  # each batch once
    (batches,) = (path for path in again.parent.iterdir() if path.is_dir())
    damaged, number = batches / "000001.jsonl", len(said)
    damaged.write_text(damaged.read_text()[:-30])
    assert rows(say(conversations=31))[:30] == rows(whole)
    assert said[number:] in ([1], [1, number])  # the damaged one, and one more if the 31st was not there


def greedy(model, ids: list[int], tokens: int) -> list[int]:
    """The likeliest tokens one by one, by whole forward passes over a prompt without padding."""
    said: list[int] = []
    while len(said) < tokens and 2 not in said:
        said.append(int(model(torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax()))
    return said


def test_answers_are_the_bases_own_whatever_stands_beside_them(tokenizer, tmp_path):
    """At a temperature of nearly 0 sampling is greedy; prompts of unlike lengths are padded on the left."""
    model = tiny_llama("bias", vocab_size=400, dtype=torch.float32)  # says more than `base`, and ends less often
    model.save_pretrained(tmp_path)
    talker = ModelSection(base=str(tmp_path), dtype="float32")
    speaker = Speaker(talker, tokenizer, GenerateSection(**(SETTINGS | {"temperature": 1e-4})))
    prompts = ["Yes.", "The quick brown fox jumps over the lazy dog, and the dog does not mind.", "What? No."]
    said = speaker.answers(prompts)
    assert len({tuple(ids) for ids in said}) == len(prompts)
    with torch.no_grad():
        for prompt, ids in zip(prompts, said, strict=True):
            chat = [{"role": "user", "content": prompt}]
            question = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            expected = greedy(model, question, SETTINGS["max_new_tokens"])
            assert ids[: len(expected)] == expected
            assert set(ids[len(expected) :]) <= {2}  # the end token pads


def test_prompts_are_said_where_the_template_lets_the_user_speak(base, tokenizer, monkeypatch):
    seen = []

    def sample(self, prompts, max_new_tokens, **ending):
        seen.append(([tokenizer.decode(ids) for ids in prompts], max_new_tokens, ending))
        return [tokenizer.encode("Paris?<|im_end|><|im_end|>")] * len(prompts)

    monkeypatch.setattr(Speaker, "_sample", sample)
    speaker = Speaker(base, tokenizer, GenerateSection(**(SETTINGS | {"batch_size": 2})))
    assert (
        speaker.batch(0)
        == [{"messages": [{"role": "user", "content": "Paris?"}, {"role": "assistant", "content": "Paris?"}]}] * 2
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    opening = system + "<|im_start|>user\n"
    asked = system + "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n"
    assert seen == [
        ([opening] * 2, 100, {"eos_token_id": [2, 2]}),
        ([asked] * 2, 24, {}),
    ]


def test_a_template_that_ends_the_users_turn_by_plain_words(base, tokenizer, monkeypatch):
    tokenizer.chat_template = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' "
    tokenizer.chat_template += "else m.content + '<|im_end|>' }}{% endfor %}"
    said = iter(["The dog [/INST] No. [/INST]", "no end"])
    endings = []

    def sample(self, prompts, max_new_tokens, **ending):
        endings.append(ending)
        return [tokenizer.encode(next(said, "Yes.<|im_end|>")) for _ in prompts]

    monkeypatch.setattr(Speaker, "_sample", sample)
    speaker = Speaker(base, tokenizer, GenerateSection(**(SETTINGS | {"batch_size": 2})))
    assert speaker.batch(0) == [
        {"messages": [{"role": "user", "content": "The dog"}, {"role": "assistant", "content": "Yes."}]},
        {"dropped": "prompt without end"},
    ]
    assert endings[0]["stop_strings"] == ["[/INST]"]
    assert tokenizer.decode(speaker._user_turn[0]) == "[INST]"


def test_words_that_end_a_turn_stop_the_base(base, tokenizer):
    """Through `generate` itself: a likely single letter stands for the words."""
    speaker = Speaker(base, tokenizer, GenerateSection(**(SETTINGS | {"batch_size": 8})))
    torch.manual_seed(0)
    said = speaker._sample([[5, 6]] * 8, 60, stop_strings=["e"], tokenizer=tokenizer)
    for ids in said:
        text, found, rest = tokenizer.decode(ids).partition("e")
        assert not found or not rest.replace("<|im_end|>", "")[8:], (text, rest)  # no more than the token it stood in


def test_what_is_of_no_use_is_dropped_and_counted(base, tokenizer, monkeypatch, tmp_path, capsys):
    from swiftkv_train.progress import Reporter

    loop = " No." * 30
    turns = iter(
        [
            [
                "Paris?<|im_end|>",
                " \n<|im_end|>",
                "and so on",
                "a<|im_start|>b<|im_end|>",
                "Yes?<|im_end|>",
                "dog?<|im_end|>",
                "fox?<|im_end|>",
                "Why?<|im_end|>",
            ],
            ["cut in the mid", "<|im_end|>", loop, loop + "<|im_end|>", "<|im_start|>user<|im_end|>"],
        ]
    )

    def sample(self, prompts, max_new_tokens, **ending):
        texts = next(turns)
        assert len(texts) == len(prompts)
        return [tokenizer.encode(text) for text in texts]

    monkeypatch.setattr(Speaker, "_sample", sample)
    source = Source(name="self", generate=GenerateSection(**(SETTINGS | {"batch_size": 8, "conversations": 2})))
    found = generated_source(source, base, tokenizer, tmp_path / "cache", Reporter())
    assert [[m["content"] for m in row["messages"]] for row in rows(Path(found.path))] == [
        ["Paris?", "cut in the mid"],
        ["fox?", loop.strip()],
    ]
    told = capsys.readouterr().err
    assert "generated   self: 2 conversations; dropped: 1 empty prompt, 1 prompt without end, " in told
    assert "1 control token in the prompt, 1 empty answer, 1 answer without end, 1 control token in the answer" in told


@pytest.mark.parametrize(
    ("ids", "loop"),
    [
        ([*range(50), *[7] * 31], False),
        ([*range(50), *[7] * 32], True),
        ([*range(50), *[1, 2, 3] * 11], True),
        ([*range(50), *[1, 2, 3] * 11, 4], False),
        ([*range(40)] * 2, False),
        ([*range(40)] * 3, True),
        ([5, *range(40), *range(40), *range(39)], False),
        ([1] * 10, False),
        ([], False),
    ],
)
def test_a_loop_is_32_tokens_and_3_turns(ids, loop):
    assert ends_in_a_loop(ids) is loop


def test_a_base_that_says_nothing_of_use_is_given_up(base, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(
        Speaker, "_sample", lambda self, prompts, *_, **__: [tokenizer.encode("endless")] * len(prompts)
    )
    source = Source(name="mine", generate=GenerateSection(**SETTINGS))
    with pytest.raises(UserError) as error:
        generated_source(source, base, tokenizer, tmp_path / "cache")
    assert "source 'mine': " in str(error.value)
    assert "too little of use (0 of 48 conversations; dropped: 48 prompt without end); lower" in str(error.value)


def test_a_base_without_a_template_speaks_freely(base, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(chat_template=None)
    source = Source(name="self", generate=GenerateSection(**(SETTINGS | {"conversations": 4})))
    found = rows(Path(generated_source(source, base, tokenizer, tmp_path / "cache").path))
    assert [list(row) for row in found] == [["text"]] * 4
    assert len({row["text"] for row in found}) == 4


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('never') }}", "cannot generate conversations: the chat template refuses it: never"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "cannot generate .* does not say where a user's"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "cannot generate .* does not say where a user's"),
    ],
)
def test_templates_without_a_place_for_the_user_are_refused(template, says, base, tokenizer, tmp_path):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=says):
        generated_source(Source(name="self", generate=GenerateSection()), base, tokenizer, tmp_path / "cache")


def test_more_than_the_context_is_refused(say):
    with pytest.raises(UserError, match=r"tokens of prompt and 500 new ones exceed the context of .*, 512; lower"):
        say(max_new_tokens=500)


def test_a_cache_that_cannot_be_written_is_told_in_one_line(say, tmp_path):
    from swiftkv_train.errors import RunError

    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RunError, match=r"cache cannot be written: .*; free space or set data.cache_dir"):
        say()


def data(tmp_path, held_out: dict) -> DataSection:
    return DataSection(
        sequence_length=256,  # longer than any conversation
        train=[Source(name="self", generate=GenerateSection(**SETTINGS))],
        held_out=[Source(name="own", generate=GenerateSection(**(SETTINGS | held_out)))],
        cache_dir=str(tmp_path / "cache"),
    )


def test_held_out_takes_another_seed(tmp_path):
    for same in ({}, {"conversations": 3}):  # the first three of the training conversations
        with pytest.raises(
            UserError, match=r"'own' reads what the base says with seed 0, which .*'self' trains on; .* another seed$"
        ):
            check_no_overlap(data(tmp_path, same))
    check_no_overlap(data(tmp_path, {"seed": 1}))
    check_no_overlap(data(tmp_path, {"temperature": 0.9}))


def test_a_recipe_trains_on_replies(base, tokenizer, tmp_path):
    recipe_data = data(tmp_path, {"seed": 1})
    found = load_training_data(recipe_data, tokenizer, 400, 2, base=base)
    batch = found.batch(0, 2)
    replies = tokenizer.decode(batch.input_ids[:, 1:][batch.loss_mask[:, :-1]])
    said = {row["messages"][1]["content"] for path in (tmp_path / "cache/self").glob("*.jsonl") for row in rows(path)}
    assert {text for text in replies.split("<|im_end|>") if text} <= said
    with pytest.raises(UserError, match="'self' is said by a base, and none is known here"):
        load_training_data(recipe_data, tokenizer, 400, 2)


def test_a_hub_base_is_known_by_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "load_config", lambda *_, **__: SimpleNamespace(_commit_hash="c0ffee"))
    assert generate._base_identity(ModelSection(base="org/base"), tmp_path) == ["org/base", "c0ffee"]
