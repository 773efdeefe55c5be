"""A stand-in for the Hub on 127.0.0.1, in memory: enough of its protocol for pushes and downloads by the real client.

The client must see `HF_ENDPOINT`, `HF_HOME` (a fresh folder) and `HF_TOKEN` before `huggingface_hub` is imported, and
`HF_HUB_DISABLE_XET=1` where files travel by LFS: `HubServer.environment` says so once.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """Branches and tags point to commits, a commit is all its files."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Makes `files` the new state of a branch and returns the commit's id."""
        content = repr((self.refs.get(branch), sorted((name, _oid(data)) for name, data in files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        """Resolves a branch, tag or commit id, None where there is none."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    """Serves from `start` to `stop`, at one address. `requests` lists "METHOD path" of every call so far."""

    def __init__(self, lfs: bool = False):
        self.lfs = lfs  # weights and Parquet files travel by LFS, as on the real Hub
        self.repositories: dict[str, Repository] = {}  # "models/user/name"
        self.objects: dict[str, bytes] = {}  # LFS content by SHA-256
        self.requests: list[str] = []
        self.forbidden: set[str] = set()  # names of repositories and owners that no token may write to
        self.claimed_sizes: dict[str, int] = {}  # by file name, of files that are said to be larger than they are
        self.puts_left: int | None = None  # LFS files that are taken before the line is cut
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.url = "http://{}:{}".format(*self._server.server_address)

    def environment(self, home) -> dict[str, str]:
        """The environment of a client that is to talk to this server and keep its cache under `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "anything", "HF_HUB_DISABLE_XET": "1"}

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """The files of a repository, to look at or to damage."""
        repository = self.repositories[f"{kind}/{repo_id}"]
        return repository.commits[repository.sha(revision)]

    def put(
        self, repo_id: str, files: dict[str, bytes], branch: str = "main", private: bool = False, kind: str = "models"
    ) -> str:
        """Puts a repository there without a client; returns the commit's id."""
        return self.repositories.setdefault(f"{kind}/{repo_id}", Repository(private)).commit(branch, dict(files))

    def downloads(self, repo_id: str) -> list[str]:
        """Names of the files whose content was fetched from a repository, in order, without repetition."""
        gets = (re.fullmatch(rf"GET /(?:datasets/)?{repo_id}/resolve/[^/]+/(.+)", line) for line in self.requests)
        return list(dict.fromkeys(match[1] for match in gets if match))

    def start(self) -> None:
        """Serves in a thread; again at the same address after `stop`."""
        if self._server.fileno() < 0:  # stopped before
            self._server = ThreadingHTTPServer(self._server.server_address, _Handler)
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Leaves nobody listening, as without network."""
        self._server.shutdown()
        self._server.server_close()


def _paths(files) -> list[PurePosixPath]:
    """Files and the folders that they imply, which Git knows by their files only."""
    names = [PurePosixPath(name) for name in files]
    return sorted({*names, *(folder for name in names for folder in name.parents if folder.name)})


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):  # HTTP/1.0, a connection a request: none outlives `stop`
    def log_message(self, *arguments):
        """Keeps the test output clean."""

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self):
        self.hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.body()
        if path == "/api/whoami-v2":
            return self.json({"type": "user", "name": "user", "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.startswith("/lfs/") and self.hub.puts_left is not None:
            self.hub.puts_left -= 1
            if self.hub.puts_left < 0:
                return self.send(403)
        if path.startswith("/lfs/"):
            self.hub.objects[path.removeprefix("/lfs/")] = body
            return self.send(200)
        if match := re.fullmatch(r"/(datasets/)?(.+)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+))?(?:/([^/]+))?(?:/(.+))?", path):
            return self.api(*match.groups(), body)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        return self.send(404)

    def api(self, kind, repo_id, action, revision, rest, body):
        repository = self.repository(f"{kind}/{repo_id}")
        if repository is None:
            return None
        if action in ("branch", "tag"):
            repository.refs[rest if action == "tag" and rest else revision] = repository.refs["main"]
            return self.json({})
        if action == "refs":
            refs = [{"name": name, "ref": name, "targetCommit": sha} for name, sha in repository.refs.items()]
            return self.json({"branches": refs, "tags": [], "converts": []})
        sha = repository.sha(revision or "main")
        if sha is None:
            return self.error("RevisionNotFound")
        files = repository.commits[sha]
        if action == "preupload":
            return self.json({"files": [self.upload_mode(entry["path"]) for entry in json.loads(body)["files"]]})
        if action == "commit":
            return self.commit(repository, f"{kind}/{repo_id}", revision, files, body)
        if action == "tree":
            deep, folder = "recursive=true" in self.path.lower(), PurePosixPath(rest or ".")
            below = [path for path in _paths(files) if path.is_relative_to(folder) and path != folder]
            if rest and not below:
                return self.error("EntryNotFound")
            return self.json([self.entry(str(path), files) for path in below if deep or path.parent == folder])
        if action == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            return self.json([self.entry(str(path), files) for path in _paths(files) if str(path) in wanted])
        if action in (None, "revision"):
            siblings = [{"rfilename": name} for name in sorted(files)]
            if "blobs=true" in self.path.lower():
                sizes = {name: len(data) for name, data in files.items()} | self.hub.claimed_sizes
                siblings = [{"rfilename": name, "size": sizes[name]} for name in sorted(files)]
            return self.json({"id": repo_id, "sha": sha, "siblings": siblings, "private": repository.private})
        return self.send(404)

    def create(self, request):
        if "Authorization" not in self.headers:
            return self.send(401)
        owner = request.get("organization") or "user"
        key = f"{request.get('type') or 'model'}s/{owner}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{key.removeprefix('models/')}", "name": f"{owner}/{request['name']}"}
        if key in self.hub.repositories:
            return self.json({**answer, "error": "You already created this repository"}, 409)
        if owner in self.hub.forbidden:
            return self.send(403, b"", {"X-Error-Message": f"You don't have the rights to create under {owner}"})
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.repositories[key] = Repository(private)
        self.hub.repositories[key].commit("main", {".gitattributes": b""})
        return self.json(answer)

    def commit(self, repository, key, branch, files, body):
        if "Authorization" not in self.headers:
            return self.send(401)
        if key.partition("/")[2] in self.hub.forbidden:
            return self.send(403, b"", {"X-Error-Message": "You may not write to this repository"})
        files = dict(files)
        for line in body.splitlines():
            operation, value = json.loads(line)["key"], json.loads(line)["value"]
            if operation == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation == "deletedFile":
                files.pop(value["path"])
            elif operation == "deletedFolder":
                files = {name: data for name, data in files.items() if not name.startswith(value["path"])}
        sha = repository.commit(branch, files)
        url = f"{self.hub.url}/{key.removeprefix('models/')}/commit/{sha}"
        return self.json({"success": True, "commitOid": sha, "commitUrl": url})

    def lfs_batch(self, request):
        answers = []
        for entry in request["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}
            missing = entry["oid"] not in self.hub.objects
            answers.append({**entry, "authenticated": True, **({"actions": upload} if missing else {})})
        return self.json({"transfer": "basic", "objects": answers})

    def resolve(self, kind, repo_id, revision, name):
        repository = self.repository(f"{(kind or 'models/')}{repo_id}")
        if repository is None:
            return None
        sha = repository.sha(revision)
        if sha is None:
            return self.error("RevisionNotFound")
        if name not in repository.commits[sha]:
            return self.error("EntryNotFound", {"X-Repo-Commit": sha})
        data = repository.commits[sha][name]
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        return self.send(206 if wanted else 200, data, headers)

    def upload_mode(self, path):
        mode = "lfs" if self.hub.lfs and path.endswith((".safetensors", ".parquet")) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def entry(self, name, files):
        data = files.get(name)
        if data is None:
            return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
        lfs = {"lfs": {"oid": _oid(data), "size": len(data), "pointerSize": 130}}
        entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        return {**entry, **(lfs if self.upload_mode(name)["uploadMode"] == "lfs" else {})}

    def repository(self, key):
        """The repository, or None after answering as the Hub does for a missing one or a private one without token."""
        repository = self.hub.repositories.get(key)
        if repository is None or (repository.private and "Authorization" not in self.headers):
            return self.error("RepoNotFound")
        return repository

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def json(self, value, status=200):
        return self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, code, headers=None):
        return self.send(404, b"", {"X-Error-Code": code, **(headers or {})})

    def send(self, status, data=b"", headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
