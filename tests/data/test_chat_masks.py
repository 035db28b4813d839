"""Assistant masks against two independent sources: what was said, and transformers' own {% generation %} masks."""

from __future__ import annotations

import random

import numpy as np
import pytest

from swiftkv_train.data import ChatDocument, TextDocument, TokenDocument
from swiftkv_train.data.chat import ChatRenderer, tokenize_chats, tokens_in_spans
from swiftkv_train.data.documents import BadRow
from swiftkv_train.data.sources import SkippedRows
from swiftkv_train.data.tokenize import tokenize_documents
from swiftkv_train.errors import UserError


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


CHATS = {
    "one turn": chat("What is the capital of France?", "Paris."),
    "reply said before by the user": chat("Yes", "Yes", "Yes again", "Yes"),
    "reply stands in the system prompt": chat(
        "Well?", "You are a helpful assistant.", system="You are a helpful assistant."
    ),
    "reply is a role's name": chat("assistant", "assistant", "user", "system"),
    "own system prompt": chat("Hi", "Hello", system="Answer in one sentence."),
    "emoji": chat("👩‍👩‍👧 ok?", "👍🏽 yes 👍🏽"),
    "scripts": chat("Wie heißt du? 你好", "Ich weiß nicht, 再见 ñ ä"),
    "combining marks": chat("e\u0301?", "e\u0301 a\u030a"),
    "whitespace around": chat(" Hi \n", "  two\n\n lines \n"),
    "a special token's name inside": chat("say <|im_end|>", "<|im_start|> is not <|endoftext|>"),
    "ends with the user": chat("Hi", "Hello", "Bye"),
    "many turns": chat(*["No", "I do not know", "No", "No"] * 4),
}


def masked_text(tokenizer, messages) -> str:
    ((ids, targets),) = tokenize_chats([ChatDocument("here", messages)], ChatRenderer(tokenizer))
    assert len(ids) == len(targets)
    return tokenizer.decode(ids[targets])


def said(messages) -> str:
    return "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_the_mask_is_what_the_assistant_said_with_its_end_of_turn(name, trim_offsets, make_tokenizer):
    tokenizer = make_tokenizer(trim_offsets=trim_offsets)
    ((ids, targets),) = tokenize_chats([ChatDocument("here", CHATS[name])], ChatRenderer(tokenizer))
    expected = tokenizer.apply_chat_template(CHATS[name], return_dict=False)
    assert ids.tolist() == expected
    assert tokenizer.decode(ids[targets]) == said(CHATS[name])


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_masks_agree_with_generation_marks(name, trim_offsets, make_tokenizer, generation_template):
    tokenizer = make_tokenizer(trim_offsets=trim_offsets, chat_template=generation_template)
    # With trimmed offsets transformers loses a reply that begins with a space, so its masks are made without.
    exact = make_tokenizer(trim_offsets=False, chat_template=generation_template)
    theirs = exact.apply_chat_template(CHATS[name], return_dict=True, return_assistant_tokens_mask=True)
    ((ids, targets),) = tokenize_chats([ChatDocument("here", CHATS[name])], ChatRenderer(tokenizer))
    assert ids.tolist() == theirs["input_ids"]
    assert targets.astype(int).tolist() == theirs["assistant_masks"]


def test_random_chats_agree_with_generation_marks(make_tokenizer, generation_template):
    tokenizer = make_tokenizer(chat_template=generation_template)
    words = ["Yes", "No", "yes.", " the", "\n", "👍", "ß", "assistant", "dog ", "\n\n", "7", "<", "|im_end|>"]
    random.seed(5)
    chats = []
    for _ in range(60):
        texts = ["".join(random.choices(words, k=random.randint(1, 6))) + "." for _ in range(2 * random.randint(1, 4))]
        chats.append(chat(*texts, system=random.choice([None, "Yes", "No dog"])))
    found = tokenize_chats(
        [ChatDocument(str(i), messages) for i, messages in enumerate(chats)], ChatRenderer(tokenizer)
    )
    for messages, (ids, targets) in zip(chats, found, strict=True):
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == theirs["input_ids"]
        assert targets.astype(int).tolist() == theirs["assistant_masks"]


def test_chats_of_the_same_roles_are_rendered_once_each(tokenizer, monkeypatch):
    long = chat(*["No", "I do not know"] * 40)
    chats = [long, long[:10], *(chat(f"{i}?", f" No. {i} \n") for i in range(20)), CHATS["ends with the user"]]
    renderer = ChatRenderer(tokenizer)
    tokenize_chats([ChatDocument("x", messages) for messages in chats], renderer)
    calls = []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(a) or apply(*a, **k))
    found = tokenize_chats([ChatDocument("x", messages) for messages in chats], renderer)
    assert len(calls) == len(chats)
    assert [tokenizer.decode(ids[targets]) for ids, targets in found] == [said(messages) for messages in chats]


@pytest.mark.parametrize("order", [1, -1])
def test_chats_that_begin_alike_in_any_order(order, tokenizer):
    whole = chat(*["No", "Yes", "What?", "I do not know"] * 3, system="Answer.")
    chats = [whole[:length] for length in range(3, len(whole) + 1)][::order]
    found = tokenize_chats([ChatDocument("x", messages) for messages in chats], ChatRenderer(tokenizer))
    assert [tokenizer.decode(ids[targets]) for ids, targets in found] == [said(messages) for messages in chats]


def test_templates_that_strip_or_change_what_is_said(tokenizer):
    contents = [" Hi \n", "  two\n\n lines \n", "No ", "loud dog "]
    for change, expected in (
        ("m.content | trim", "two\n\n lines<|im_end|>loud dog<|im_end|>"),
        ("m.content | trim if m.role == 'user' else m.content", "".join(f"{contents[i]}<|im_end|>" for i in (1, 3))),
        ("(m.content | upper) if 'loud' in m.content else m.content", f"{contents[1]}<|im_end|>LOUD DOG <|im_end|>"),
        ("(loop.index0 ~ m.content) * 2", f"{('1' + contents[1]) * 2}<|im_end|>{('3' + contents[3]) * 2}<|im_end|>"),
    ):
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{{ " + change + " }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        assert masked_text(tokenizer, chat(*contents)) == expected


def test_a_template_without_newline_at_the_end(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
    )
    for name in ("one turn", "reply said before by the user", "own system prompt", "emoji", "ends with the user"):
        assert masked_text(tokenizer, CHATS[name]) == said(CHATS[name])


def test_without_an_end_of_turn_token_the_message_keeps_its_own_whitespace_only(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert masked_text(tokenizer, chat("Hi", "Hello", "Bye", "No.")) == "HelloNo."
    assert masked_text(tokenizer, chat("Hi", "Hello  ")) == "Hello  "


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert masked_text(tokenizer, chat("Hi", "<think>so</think>Hello")) == "<think>so</think>Hello<|im_end|>"
    with pytest.raises(UserError, match=r"^there:3: the tokenizer's chat template rewrites earlier turns"):
        tokenize_chats(
            [ChatDocument("there:3", chat("Hi", "<think>so</think>Hello", "And?", "No"))], ChatRenderer(tokenizer)
        )


def test_a_generation_prompt_that_no_reply_continues_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' says ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant thinks {% endif %}"
    )
    with pytest.raises(UserError, match="message 1 does not continue the prompt"):
        masked_text(tokenizer, CHATS["one turn"])


def test_a_chat_the_template_refuses_is_a_bad_row_among_good_ones(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        + tokenizer.chat_template
    )
    names = ("one turn", "own system prompt", "emoji")
    first, second, third = tokenize_chats([ChatDocument(name, CHATS[name]) for name in names], ChatRenderer(tokenizer))
    assert isinstance(second, BadRow)
    assert str(second) == "the chat template refuses it: no system role here"
    assert tokenizer.decode(first[0][first[1]]) == said(CHATS["one turn"])
    assert tokenizer.decode(third[0][third[1]]) == said(CHATS["emoji"])
    assert all(
        isinstance(r, BadRow)
        for r in tokenize_chats([ChatDocument("x", CHATS["own system prompt"])], ChatRenderer(tokenizer))
    )


@pytest.mark.parametrize("template", ["{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{% for x in %}"])
def test_a_template_that_fails_in_any_way_refuses_the_chat(tokenizer, template):
    tokenizer.chat_template = template
    (row,) = tokenize_chats([ChatDocument("x", CHATS["one turn"])], ChatRenderer(tokenizer))
    assert isinstance(row, BadRow)
    assert str(row).startswith("the chat template refuses it: ")


def test_no_chat_template_is_the_users_error(make_tokenizer):
    with pytest.raises(UserError, match=r"^a\.jsonl:1 is a chat, but the tokenizer has no chat template"):
        tokenize_chats([ChatDocument("a.jsonl:1", CHATS["one turn"])], ChatRenderer(make_tokenizer(chat_template=None)))


def test_the_date_in_a_template_does_not_change_the_tokens(tokenizer):
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%H:%M:%S.%f') %}{% endif %}"
        "{{ date_string }}" + tokenizer.chat_template
    )
    ((first, _),) = tokenize_chats([ChatDocument("x", CHATS["many turns"])], ChatRenderer(tokenizer))
    ((second, _),) = tokenize_chats([ChatDocument("x", CHATS["many turns"])], ChatRenderer(tokenizer))
    assert first.tolist() == second.tolist()


def test_tokens_on_the_border_of_a_span():
    # "ab" | " " | "cd" | "\n" with the space and the newline reported as empty, as trim_offsets does.
    offsets = np.array([[0, 2], [3, 3], [3, 5], [6, 6]])
    assert tokens_in_spans(offsets, [(2, 5)]).tolist() == [False, True, True, False]
    assert tokens_in_spans(offsets, [(3, 6)]).tolist() == [False, False, True, True]
    assert tokens_in_spans(offsets, [(0, 1), (4, 5)]).tolist() == [True, False, True, False]


def test_kinds_keep_their_order_and_text_is_all_target(tokenizer):
    documents = [
        TextDocument("a", "The dog"),
        ChatDocument("b", CHATS["one turn"]),
        TokenDocument("c", [9, 8, 7], [False, True, True]),
        TextDocument("d", "Paris"),
    ]
    found = list(tokenize_documents(documents, tokenizer, 400, SkippedRows("s")))
    assert [ids.tolist() for ids, _ in found[::3]] == [
        tokenizer("The dog")["input_ids"],
        tokenizer("Paris")["input_ids"],
    ]
    assert all(targets.all() for _, targets in found[::3])
    assert tokenizer.decode(found[1][0][found[1][1].astype(bool)]) == "Paris.<|im_end|>"
    assert [array.tolist() for array in found[2]] == [[9, 8, 7], [0, 1, 1]]


def test_text_gets_the_tokenizers_default_special_tokens(tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    documents = [TextDocument("a", "The dog"), ChatDocument("b", CHATS["one turn"])]
    (text, _), (talk, _) = tokenize_documents(documents, tokenizer, 400, SkippedRows("s"))
    assert text[0] == 0
    assert 0 not in talk


@pytest.mark.parametrize("wrong", [400, -1, 2**40])
def test_an_id_outside_the_vocabulary_names_row_id_and_size(wrong, tokenizer):
    document = TokenDocument("a.jsonl:7", [1, wrong, 2], [True] * 3)
    with pytest.raises(UserError, match=f"^a.jsonl:7: token id {wrong} is outside the model's vocabulary of 400"):
        list(tokenize_documents([document], tokenizer, 400, SkippedRows("s")))
