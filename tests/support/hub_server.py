"""A stand-in for the Hugging Face Hub on this machine, for the real client.

Repositories are kept in memory. It answers what `huggingface_hub` asks when a file is
fetched, by the way of LFS for weights as the Hub does, and when a commit is sent.
"""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")  # what goes by LFS
READ, WRITE = "hf_read", "hf_write"  # the tokens that it knows


@dataclasses.dataclass
class Repository:
    """Commits, the newest last, and the names of some."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], message: str, ref: str) -> str:
        """Adds files to what a branch has, and returns the new commit."""
        before = self.commits.get(self.refs.get(ref, ""), {})
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = {**before, **files}, sha
        self.messages.append(message)
        return sha

    def resolved(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit."""
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


@dataclasses.dataclass
class Request:
    """What was asked for."""

    method: str
    path: str
    token: str | None


class Hub:
    """The repositories, the requests, and what is done before each."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.blobs: dict[str, bytes] = {}
        self.before: Callable[[Request], None] = lambda request: None
        self.fails = 0  # the status of all answers, if any

    def add(
        self, name: str, files: Mapping[str, bytes], ref: str = "main", **fields: Any
    ) -> str:
        """Commits files to a repository, which is made if there is none."""
        own = self.repositories.setdefault(name, Repository(**fields))
        return own.commit(files, "by hand", ref)

    def fetched(self) -> set[str]:
        """The files whose contents were asked for."""
        names = {_digest(f): n for r in self.repositories.values()
                 for files in r.commits.values() for n, f in files.items()}  # fmt: skip
        found = set()
        for request in self.requests:
            last = request.path.rpartition("/")[2]
            if request.method == "GET" and "/cdn/" in request.path:
                found.add(names[last])
            elif request.method == "GET" and "/resolve/" in request.path:
                found.add(last)
        return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _etag(name: str, data: bytes) -> str:
    if name.endswith(LARGE):
        return _digest(data)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """Runs a Hub on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refusal(Exception):
    def __init__(
        self, status: int, code: str | None, message: str, **more: Any
    ) -> None:
        self.status, self.code, self.message, self.more = status, code, message, more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def _handle(self) -> None:
        path = urlsplit(self.path).path  # in which a branch may have `%2F`
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        request = Request(self.command, unquote(path), token)
        self.hub.requests.append(request)
        self.hub.before(request)
        try:
            if self.hub.fails:
                raise _Refusal(self.hub.fails, None, "out of order")
            if token not in (None, READ, WRITE):
                message = "Invalid credentials in Authorization header"
                raise _Refusal(401, None, message)
            for pattern, answer in _ROUTES:
                if match := re.fullmatch(pattern, path):
                    given = (part and unquote(part) for part in match.groups())
                    answer(self, request, *given)
                    return
            raise _Refusal(404, None, f"no route {path}")
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            said = {"error": refusal.message, **refusal.more}
            self._answer(said, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(
        self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _found(self, name: str, request: Request, writing: bool = False) -> Repository:
        own = self.hub.repositories.get(name)
        if own is None or (own.private and request.token is None):
            # As the Hub: without a token a private one and none are alike.
            status = 404 if request.token else 401
            raise _Refusal(status, "RepoNotFound", "Repository not found")
        if writing and request.token != WRITE:
            raise _Refusal(403, None, "Forbidden: you must have write access")
        return own

    def _commit_of(self, own: Repository, revision: str) -> str:
        sha = own.resolved(revision)
        if sha is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # --- what is asked when files are fetched ---

    def info(self, request: Request, name: str, revision: str | None) -> None:
        own = self._found(name, request)
        sizes = "blobs=" in self.path
        sha = self._commit_of(own, revision or "main") if own.commits else None
        files = own.commits[sha] if sha else {}
        siblings = [
            {"rfilename": n, **({"size": len(d)} if sizes else {})}
            for n, d in files.items()
        ]
        self._answer({"id": name, "sha": sha, "siblings": siblings})

    def resolve(self, request: Request, name: str, revision: str, file: str) -> None:
        own = self._found(name, request)
        if own.gated:
            raise _Refusal(403, "GatedRepo", "Access to this model is restricted")
        sha = self._commit_of(own, revision)
        headers = {"X-Repo-Commit": sha}
        if file not in own.commits[sha]:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        data = own.commits[sha][file]
        if not file.endswith(LARGE):
            self._answer(data, 200, {**headers, "ETag": f'"{_etag(file, data)}"'})
            return
        digest = _digest(data)
        self.hub.blobs[digest] = data
        # Another host than the Hub's, which must not see the token.
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
        headers |= {
            "Location": f"{elsewhere}/cdn/{digest}",
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(data)),
        }
        self._answer(b"", 302, headers)

    def cdn(self, request: Request, digest: str) -> None:
        self._answer(self.hub.blobs[digest])

    # --- what is asked when a commit is sent ---

    def create(self, request: Request) -> None:
        said = json.loads(self.body)
        name = f"{said['organization']}/{said['name']}"
        if request.token != WRITE:
            status = 403 if request.token else 401
            raise _Refusal(status, None, "You have no right to create a model there")
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repositories:
            raise _Refusal(409, None, "You already created this model repo", url=url)
        private = said.get("private") or said.get("visibility") == "private"
        own = self.hub.repositories[name] = Repository(private=private)
        own.commit({".gitattributes": b"lfs\n"}, "initial commit", "main")
        self._answer({"url": url})

    def preupload(self, request: Request, name: str, revision: str) -> None:
        self._found(name, request, writing=True)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._answer({"files": files})

    def batch(self, request: Request, name: str) -> None:
        self._found(name, request, writing=True)
        objects = [
            {
                **wanted,
                "actions": {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}
                },
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def upload(self, request: Request, digest: str) -> None:
        if _digest(self.body) != digest:
            raise _Refusal(400, None, "the bytes are not those of the digest")
        self.hub.blobs[digest] = self.body
        self._answer({})

    def commit(self, request: Request, name: str, revision: str) -> None:
        own = self._found(name, request, writing=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(one["value"] for one in lines if one["key"] == "header")
        if header.get("parentCommit") not in (None, own.refs[revision]):
            raise _Refusal(412, None, "A commit has happened since")
        files = {}
        for one in lines:
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = own.commit(files, header["summary"], revision)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self._answer({"success": True, "commitOid": sha, "commitUrl": url})


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    (r"/api/repos/create", _Handler.create),
    (rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    (rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler.info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (r"/cdn/(\w+)", _Handler.cdn),
    (r"/lfs/(\w+)", _Handler.upload),
)
