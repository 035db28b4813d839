import json
from itertools import chain

from swiftkv_train.fetch.demo import conversations, natural_texts, scenes, speeches, split_by_hash, split_by_year


def said(*messages):
    return {"messages": [[{"sender": sender, "text": text, "timestamp": ""}] for sender, text in messages]}


def test_only_the_text_in_its_natural_order_is_taken_and_once():
    rows = [
        {"0": " One. Two. ", "1": "Two. One."},
        {"0": "One. Two.", "1": "Two. One."},
        {"0": "Three.", "1": "Three."},
    ]
    assert list(natural_texts("\n".join(map(json.dumps, rows)))) == ["One. Two.", "Three."]


def test_overlong_texts_are_left_out():
    rows = [{"0": "x" * 2501}, {"0": "y" * 2500}]
    assert list(natural_texts("\n".join(map(json.dumps, rows)))) == ["y" * 2500]


def test_neighbouring_messages_of_one_author_become_one_turn():
    dialogue = said(("b", "Hello"), ("b", "You there?"), ("a", "Yes"), ("b", "Good"), ("a", "So"), ("a", " ?  "))
    assert list(conversations({"id": dialogue})) == [
        {
            "messages": [
                {"role": "user", "content": "Hello\nYou there?"},
                {"role": "assistant", "content": "Yes"},
                {"role": "user", "content": "Good"},
                {"role": "assistant", "content": "So\n?"},
            ]
        }
    ]


def test_chats_end_with_the_assistant_and_skip_empty_messages():
    dialogue = said(("a", " "), ("b", "Hi"), ("a", "Hello"), ("b", ""), ("a", "!"), ("b", "Bye"))
    (chat,) = conversations({"id": dialogue})
    assert [message["content"] for message in chat["messages"]] == ["Hi", "Hello\n!"]


def test_monologues_groups_repeats_and_endless_turns_are_left_out():
    dialogues = {
        "alone": said(("a", "Anyone?"), ("a", "No?")),
        "silent": said(("a", "Anyone?"), ("b", "  ")),
        "three": said(("a", "Hi"), ("b", "Hi"), ("c", "Hi")),
        "endless": said(("a", "Hi"), ("b", "x" * 2001)),
        "kept": said(("a", "Hi"), ("b", "Hello")),
        "repeated": said(("c", "Hi"), ("d", "Hello")),
        "nothing": {"messages": []},
    }
    assert [chat["messages"][1]["content"] for chat in conversations(dialogues)] == ["Hello"]


def test_split_parts_by_how_documents_begin():
    documents = [{"text": f"{number % 500}".rjust(80, "x") + f" {number}"} for number in range(1000)]
    parts = split_by_hash(documents, 0.1, 0.2)
    assert sum(map(len, parts.values())) == 1000
    assert 60 <= len(parts["held_out"]) <= 140  # 500 groups of two: 100 expected, standard deviation 13.4
    assert 147 <= len(parts["test"]) <= 253  # 200 expected, standard deviation 17.9
    starts = [{document["text"][:80] for document in part} for part in parts.values()]
    assert sum(map(len, starts)) == len(set.union(*starts)) == 500
    backwards = split_by_hash(reversed(documents), 0.1, 0.2)
    assert all(backwards[name] == part[::-1] for name, part in parts.items())
    more = split_by_hash([*documents, {"text": "another"}], 0.1, 0.2)
    assert all(more[name][: len(part)] == part for name, part in parts.items())


def test_chats_are_split_by_their_own_words():
    chats = [{"messages": [{"role": "user", "content": f"{number}"}]} for number in range(400)]
    parts = split_by_hash(chats, 0.25, 0.25)
    assert all(60 <= len(parts[name]) <= 140 for name in ("held_out", "test"))
    assert sum(map(len, parts.values())) == 400


PLAY = """# Title

## ACT I

### SCENE I. Rome. A street.

_Enter CAIUS and
others_

**CAIUS**<br>
Speak,<br>
I pray\\--do.

_\\[Aside]_

## ACT II

### SCENE I. Elsewhere.

""".replace("<br>", "  ")  # two spaces end a line in markdown


def test_a_play_becomes_plain_text():
    first, second = scenes(PLAY)
    assert first == "SCENE I. Rome. A street.\n\n[Enter CAIUS and\nothers]\n\nCAIUS\nSpeak,\nI pray--do.\n\n[Aside]"
    assert second == "SCENE I. Elsewhere."


def test_long_scenes_are_cut_between_speeches():
    speeches = [f"**A{number}**  \n" + "word " * 100 for number in range(12)]
    documents = list(scenes("### SCENE I.\n\n" + "\n\n".join(speeches)))
    assert len(documents) == 3
    assert all(len(document) <= 2502 for document in documents)
    assert [word for text in documents for word in text.split() if word.startswith("A")] == [f"A{n}" for n in range(12)]


def test_speeches_are_cleaned_and_in_order_of_time():
    files = {
        "package/LICENSE": "CC0",
        "package/data/1998_b_d.txt": "The President. Mr. Speaker: The President. Tonight",
        "package/data/1890_a_r.txt": " To the Senate: &quot;An act&quot;&mdash;better  so.\n",
    }
    first, second = [speech["text"] for speech in speeches(files)]
    assert first == 'To the Senate: "An act"\u2014better so.'
    assert second == "Mr. Speaker: The President. Tonight"


def test_speeches_are_parted_by_year():
    parts = split_by_year({"text": str(number)} for number in range(1, 234))
    numbers = {name: [int(document["text"]) for document in part] for name, part in parts.items()}
    assert numbers["held_out"] == list(range(12, 234, 12))
    assert numbers["test"] == list(range(6, 234, 12))
    assert sorted(chain(*numbers.values())) == list(range(1, 234))
