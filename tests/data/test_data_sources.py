"""Reading: every format and row shape, and what is said about each kind of bad input."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from swiftkv_train.data import ChatDocument, TextDocument, TokenDocument, read_documents
from swiftkv_train.data.sources import SkippedRows
from swiftkv_train.errors import UserError
from swiftkv_train.recipe import Source

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def read(path: object, **options: object) -> list:
    return list(read_documents(Source(name="s", path=str(path), **options)))


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\ntwo".encode())
    assert read(path) == [TextDocument(str(path), "one\r\n\ntwo")]


def test_a_directory_is_read_in_sorted_order_whatever_the_depth(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.txt.gz", ".hidden/x.txt", "c.bin"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = name.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert [document.text for document in read(tmp_path)] == ["a/y.txt.gz", "a/z.md", "b.txt"]


def test_a_glob_is_sorted_and_max_documents_counts_documents_not_rows(tmp_path, write_jsonl):
    write_jsonl("2.jsonl", [{"text": "c"}, {"text": "d"}])
    write_jsonl("1.jsonl", [{"text": "a"}, b"{", {"text": "b"}])
    assert [document.text for document in read(tmp_path / "*.jsonl")] == ["a", "b", "c", "d"]
    assert [document.text for document in read(tmp_path / "*.jsonl", max_documents=2)] == ["a", "b"]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "prompt": "ignored", "text": "ignored"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"instruction": "Hi", "output": "Hello", "input": ""},
    ],
)
def test_every_shape_of_chat_gives_the_same_messages(row, write_jsonl):
    path = write_jsonl("a.jsonl", [row])
    assert read(path) == [ChatDocument(f"{path}:1", CHAT)]


def test_the_input_of_an_instruction_is_part_of_the_question(write_jsonl):
    path = write_jsonl("a.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert read(path)[0].messages[0]["content"] == "Add.\n\n1 2"


def test_field_and_kind_choose_the_column(write_jsonl):
    path = write_jsonl(
        "a.jsonl", [{"messages": CHAT, "text": "words", "body": "other", "talk": CHAT, "input_ids": [4, 5]}]
    )
    assert read(path, kind="text") == [TextDocument(f"{path}:1", "words")]
    assert read(path, field="body") == [TextDocument(f"{path}:1", "other")]
    assert read(path, field="talk") == [ChatDocument(f"{path}:1", CHAT)]
    assert read(path, field="input_ids") == [TokenDocument(f"{path}:1", [4, 5], [True, True])]


def test_token_rows_with_and_without_a_mask(write_jsonl):
    path = write_jsonl("a.jsonl", [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, True]}, {"input_ids": [7]}])
    assert read(path) == [
        TokenDocument(f"{path}:1", [1, 2, 3], [False, True, True]),
        TokenDocument(f"{path}:2", [7], [True]),
    ]


def test_parquet_json_and_gzipped_jsonl_hold_the_same_rows(tmp_path):
    rows = [{"messages": CHAT}, {"messages": [*CHAT[:1], {"role": "assistant", "content": "ü"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    for name in ("a.parquet", "a.json", "a.jsonl.gz"):
        assert [document.messages for document in read(tmp_path / name)] == [row["messages"] for row in rows]


def test_a_row_of_parquet_that_is_not_utf8_is_skipped(tmp_path):
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, *(pyarrow.array([b"good", b"caf\xe9", b"better"]).buffers()[1:])]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    skipped = SkippedRows("s")
    found = list(read_documents(Source(name="s", path=str(tmp_path / "a.parquet")), skipped))
    assert [(document.location, document.text) for document in found] == [
        (f"{tmp_path}/a.parquet:row 0", "good"),
        (f"{tmp_path}/a.parquet:row 2", "better"),
    ]
    assert skipped.count == 1
    assert skipped.first.startswith(f"{tmp_path}/a.parquet:row 1: 'utf-8' codec can't decode byte 0xe9")


def turn(role: object, content: object) -> dict:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": role, "content": content}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"text": "cut of', "not JSON"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 13 of the line)"),
        (b"[" * 200_000, "not JSON"),
        (["a"], "a row must be an object with named columns, not a list"),
        ({"title": "x"}, "among the columns title"),
        ({"text": 3}, "text must be text, not a number"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "\ud83d"}, "text holds half a surrogate pair at character 0"),
        (turn("robot", "Hello"), "messages[1] has the unknown role 'robot'"),
        (turn("assistant", ""), "messages[1].content is empty"),
        (turn("assistant", None), "messages[1].content must be text, not null"),
        (turn("user", "Again"), "'messages' has no assistant message"),
        ({"messages": CHAT[1:]}, "'messages' begins with an assistant message"),
        ({"messages": []}, "'messages' must be a list of messages, not an empty list"),
        ({"messages": ["Hi"]}, "messages[0] must be an object with a role and a content, not text"),
        ({"prompt": "Hi", "response": ["x"]}, "response must be text, not a list"),
        ({"input_ids": [1, "2"]}, "'input_ids' must be a list of whole numbers"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "`loss_mask` has 1 entries for 2 tokens"),
        ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "`loss_mask` must be a list of 0 and 1"),
        ({"input_ids": [1, 2], "loss_mask": [0, 0]}, "`loss_mask` marks no token"),
    ],
)
def test_a_bad_row_is_skipped_with_its_place_and_reason(row, reason, write_jsonl, caplog):
    path = write_jsonl("a.jsonl", [{"text": "good"}, row, {"text": "better"}])
    skipped = SkippedRows("s")
    found = list(read_documents(Source(name="s", path=str(path)), skipped))
    assert [document.text for document in found] == ["good", "better"]
    assert skipped.count == 1
    assert skipped.first.startswith(f"{path}:2: ")
    assert reason in skipped.first
    assert skipped.first in caplog.text


@pytest.mark.parametrize(
    ("options", "row", "reason"),
    [
        ({"kind": "chat"}, {"text": "x"}, "none of `messages`"),
        ({"kind": "chat"}, {"input_ids": [1]}, "needs a `loss_mask`"),
        ({"kind": "text"}, {"messages": CHAT}, "none of `text`"),
        ({"field": "body"}, {"text": "x"}, "column 'body' is missing"),
        ({"field": "body", "kind": "text"}, {"body": CHAT}, "column 'body' must be text, not a list"),
        ({"field": "body", "kind": "chat"}, {"body": "x"}, "column 'body' holds text, not a chat"),
    ],
)
def test_rows_that_do_not_fit_what_the_source_asks_for(options, row, reason, write_jsonl):
    skipped = SkippedRows("s")
    path = write_jsonl("a.jsonl", [row])
    assert not list(read_documents(Source(name="s", path=str(path), **options), skipped))
    assert reason in skipped.first


def test_five_bad_rows_are_shown_and_all_are_counted(write_jsonl, caplog):
    path = write_jsonl("a.jsonl", [b"{"] * 9 + [{"text": "good"}])
    skipped = SkippedRows("s")
    with caplog.at_level(logging.WARNING):
        skipped.summarise(len(list(read_documents(Source(name="s", path=str(path)), skipped))))
    assert [record.getMessage().split(": ")[0] for record in caplog.records[:5]] == [f"{path}:{n}" for n in range(1, 6)]
    assert [record.getMessage() for record in caplog.records[5:]] == ["source 's': 9 rows skipped, 1 documents kept"]


def test_a_source_of_bad_rows_only_is_the_users_error(write_jsonl):
    skipped = SkippedRows("s")
    path = write_jsonl("a.jsonl", [b"{", b"{"])
    documents = list(read_documents(Source(name="s", path=str(path)), skipped))
    with pytest.raises(
        UserError, match=f"source 's' holds no usable document: all 2 rows .* {re.escape(str(path))}:1: "
    ):
        skipped.summarise(len(documents))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"na\xefve", "a.txt is not UTF-8 (byte 2); convert it"),
        ("a.json", b"{", "a.json is not JSON"),
        ("a.json", b"{}", "a.json must hold a list of rows"),
        ("a.parquet", b"PAR1 not really", "a.parquet is not a readable parquet file"),
        ("a.txt.gz", b"not gzip", "a.txt.gz is damaged (Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], "a.jsonl.gz is damaged"),
        ("a.docx", b"x", "a.docx has an unknown format; known are .txt"),
    ],
)
def test_a_file_that_cannot_be_read_stops_the_run_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_paths_and_empty_folders_and_chats_in_plain_text(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.txt does not exist or matches no file"):
        read(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match=r"\*\.jsonl does not exist or matches no file"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(UserError, match="holds no file of a known format"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match="is plain text, but `kind: chat` needs"):
        read(tmp_path / "a.txt", kind="chat")


def test_a_folder_that_may_not_be_seen_is_not_left_out(tmp_path, monkeypatch):
    for name in ("seen/a.txt", "unseen/b.txt", ".hidden/c.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("words")
    assert len(read(tmp_path)) == 2
    scandir = os.scandir

    def refuse(path):
        if Path(path).name in ("unseen", ".hidden"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"source 's': .*/unseen cannot be read: Permission denied"):
        read(tmp_path)
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        read(tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_an_empty_file_is_named(name, tmp_path):
    (tmp_path / name).touch()
    skipped = SkippedRows("s")
    assert not list(read_documents(Source(name="s", path=str(tmp_path / name)), skipped))
    with pytest.raises(UserError, match=rf"{name}: the file is empty"):
        skipped.summarise(0)


def test_a_local_dataset_directory_goes_through_datasets(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl("set/train.jsonl", [{"messages": CHAT, "id": 1}, {"messages": CHAT[:1], "id": 2}])
    skipped = SkippedRows("s")
    found = list(read_documents(Source(name="s", dataset=str(folder)), skipped))
    assert found == [ChatDocument(f"{folder}[train]:0", CHAT)]
    assert skipped.first == f"{folder}[train]:1: 'messages' has no assistant message"


def test_a_hub_dataset_is_asked_for_as_the_source_says_and_failure_is_one_line(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if arguments[0] == "org/gone":
            raise ConnectionError("no route\nto host")
        return datasets.Dataset.from_list([{"text": "a", "x": 1}, {"text": "b", "x": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(name="s", dataset="org/set", subset="en", split="test", max_documents=1)
    assert list(read_documents(source)) == [TextDocument("org/set[test]:0", "a")]
    assert calls == [(("org/set", "en"), {"split": "test", "revision": None, "streaming": False})]
    with pytest.raises(UserError) as error:
        list(read_documents(Source(name="s", dataset="org/gone")))
    assert str(error.value).startswith(
        "source 's': dataset 'org/gone', split 'train', cannot be loaded (no route to host)"
    )


def test_paths_sort_by_parts_not_by_string(tmp_path):
    for name in ("a/1.txt", "a-b/1.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    assert [Path(document.location).parent.name for document in read(tmp_path)] == ["a", "a-b"]
