# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""
A Hub on localhost: the endpoints that `huggingface_hub` calls to create a repository, to push a folder over LFS, to
validate a card and to download a snapshot. What arrives is kept in memory. Clients need `HF_ENDPOINT` and, as there is
no Xet storage, `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


USER = "someone"
TEXT = (".json", ".md", ".jinja", ".txt", ".gitattributes")  # the rest goes over LFS, as binary files do on the Hub


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.message, sorted(self.files.items()))).encode()).hexdigest()


@dataclass
class Hub:
    """What the server knows. `fails(method, path)` is asked at each request whether to answer 500."""

    url: str = ""
    repos: dict[str, list[Commit]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    fails: Callable[[str, str], bool] = lambda method, path: False

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][-1].files if self.repos[repo] else {}


def find_faults(content: str) -> list[str]:
    """What the Hub's documented rules for the metadata of a model card have against a card."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["no metadata"]
    data = yaml.safe_load(match[1])
    faults = []
    for name, kinds in {"library_name": str, "pipeline_tag": str, "tags": list, "model-index": list}.items():
        if not isinstance(data.get(name, kinds()), kinds):
            faults.append(f'"{name}" must be a {kinds.__name__}')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        faults.append('"tags" must hold strings')
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        for value in [values] if isinstance(values, str) else values:
            try:
                validate_repo_id(value)
            except HFValidationError:
                faults.append(f'"{name}" has "{value}", which is no repository')
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= result.keys() or not result["task"].get("type"):
                faults.append('"model-index" has an incomplete result')
            elif not all(result["dataset"].get(key) for key in ("name", "type")):
                faults.append('"model-index" has a dataset without a name or a type')
            elif not all(metric.get("type") and "value" in metric for metric in result["metrics"]):
                faults.append('"model-index" has a metric without a type or a value')
    ModelCardData(**data)  # raises if the library cannot read it
    return faults


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def _answer(self, status: int, body: bytes | dict | list = b"", headers: dict[str, str] | None = None):
        self.hub.requests.append((self.command, self.path, status))
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _dispatch(self):
        body = self._read()
        path = unquote(urlsplit(self.path).path)
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.fails(self.command, path):
            return self._answer(500, {"error": "out of order"})
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, body, *match.groups())
        self._answer(404, {"error": f"{self.command} {path} is not spoken here"})

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _create(self, body):
        payload = json.loads(body)
        repo = f"{payload.get('organization') or USER}/{payload['name']}"
        exists = repo in self.hub.repos
        self.hub.repos.setdefault(repo, [])
        self._answer(409 if exists else 200, {"url": f"{self.hub.url}/{repo}"})

    def _validate(self, body):
        faults = [{"message": fault} for fault in find_faults(json.loads(body)["content"])]
        self._answer(400 if faults else 200, {"errors": faults, "warnings": []})

    def _preupload(self, body, repo):
        if repo not in self.hub.repos:
            return self._answer(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
        files = [
            {
                "path": file["path"],
                "uploadMode": "regular" if file["path"].endswith(TEXT) else "lfs",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, body, repo):
        objects = []
        for item in json.loads(body)["objects"]:
            item = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                actions = {name: {"href": f"{self.hub.url}/lfs/{name}/{item['oid']}"} for name in ("upload", "verify")}
                item["actions"] = actions
            objects.append(item)
        self._answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "not what was announced"})
        self.hub.blobs[oid] = body
        self._answer(200)

    def _verify(self, body, oid):
        self._answer(200 if len(self.hub.blobs.get(oid, b"")) == json.loads(body)["size"] else 404)

    def _commit(self, body, repo):
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = dict(self.hub.files(repo))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.hub.blobs:
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                return self._answer(400, {"error": f"{value['path']} points to nothing"})
        commit = Commit(header["value"]["summary"], files)
        self.hub.repos[repo].append(commit)
        url = f"{self.hub.url}/{repo}/commit/{commit.sha}"
        self._answer(200, {"commitUrl": url, "commitOid": commit.sha, "success": True})

    def _info(self, body, repo):
        self._answer(200, {"id": repo, "sha": self.hub.repos[repo][-1].sha, "siblings": []})

    def _tree(self, body, repo):
        tree = []
        for path, content in self.hub.files(repo).items():
            sha = hashlib.sha1(content).hexdigest()
            tree.append({"type": "file", "path": path, "size": len(content), "oid": sha})
        self._answer(200, tree)

    def _resolve(self, body, repo, path):
        content = self.hub.files(repo)[path]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._answer(200, content, {"ETag": etag, "X-Repo-Commit": self.hub.repos[repo][-1].sha})


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("POST", f"/api/models/{_REPO}/preupload/main", _Handler._preupload),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", "/lfs/upload/([0-9a-f]{64})", _Handler._upload),
    ("POST", "/lfs/verify/([0-9a-f]{64})", _Handler._verify),
    ("POST", f"/api/models/{_REPO}/commit/main", _Handler._commit),
    ("GET", f"/api/models/{_REPO}(?:/revision/main)?", _Handler._info),
    ("GET", f"/api/models/{_REPO}/tree/[0-9a-f]+", _Handler._tree),
    ("GET HEAD", f"/{_REPO}/resolve/[0-9a-f]+/(.+)", _Handler._resolve),
]


@contextmanager
def serve():
    """Starts a server on a free port of localhost, and stops it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
