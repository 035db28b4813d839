"""What wandb 0.31 keeps of a run on disk, and a server of just the calls that its client makes for a run."""

from __future__ import annotations

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK = 2**15  # a .wandb file is a LevelDB log: blocks of chunks, each with checksum, length and kind before it
WHOLE, LAST = 1, 4


def records(file: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(file: Path) -> list[dict[str, Any]]:
    """The rows of a run, without wandb's own keys."""
    rows = [record.history.item for record in records(file) if record.WhichOneof("record_type") == "history"]
    return [_own({item.key or item.nested_key[0]: json.loads(item.value_json) for item in row}) for row in rows]


def _own(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("_")}


class Server(ThreadingHTTPServer):
    """Knows the runs that were started by their ids, and the rows of each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.resumed: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            call = json.loads(body)
            variables = call.get("variables") or {}
            self._answer({"data": getattr(self, call.get("operationName") or "", lambda _: {})(variables)})
            return
        if self.path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            lines = files.get("wandb-history.jsonl", {}).get("content", [])
            self.server.rows[self.path.split("/")[-2]] += [json.loads(line) for line in lines]
        self._answer({})

    def Viewer(self, _: Any) -> Any:
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def RunResumeStatus(self, variables: dict[str, Any]) -> Any:
        bucket = None
        if (name := variables["name"]) in self.server.rows:
            self.server.resumed.append(name)
            rows = self.server.rows[name]
            bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "tags": [], "eventsTail": "[]"}
            bucket |= {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(rows)}
            bucket |= {"historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]), "wandbConfig": '{"t": 1}'}
            bucket |= {"summaryMetrics": json.dumps(rows[-1] if rows else {})}
        return {"model": {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def UpsertBucket(self, variables: dict[str, Any]) -> Any:
        name = variables["name"]
        inserted = name not in self.server.rows
        self.server.rows.setdefault(name, [])
        project = {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def CreateRunFiles(self, variables: dict[str, Any]) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.server.url}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
