"""A Hub on 127.0.0.1, in memory: enough of its protocol for pushes and downloads by the real client."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Branches point to commits; a commit holds all its files."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Make `files` the new state of a branch and return the commit's id."""
        content = repr((self.refs.get(branch), sorted((name, _sha256(data)) for name, data in files.items())))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Return the files of a branch or commit, None if it does not exist."""
        return self.commits.get(self.refs.get(revision, revision))


class HubServer:
    """Serves from `start` to `stop`, always at the same address. Safetensors and Parquet files are stored by LFS."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}  # "models/user/name"
        self.objects: dict[str, bytes] = {}  # LFS content by SHA-256
        self.requests: list[str] = []  # "METHOD path"
        self.forbidden: set[str] = set()  # names of repositories and owners that no token may write to
        self.puts_left: int | None = None  # LFS files that are accepted before uploads fail
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.url = "http://{}:{}".format(*self._server.server_address)

    def environment(self, home) -> dict[str, str]:
        """Return the environment that a client needs before it imports `huggingface_hub`; its cache is in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "anything", "HF_HUB_DISABLE_XET": "1"}

    def files(self, repo_id: str, kind: str = "models") -> dict[str, bytes]:
        """Return the files of a repository's branch main."""
        return self.repositories[f"{kind}/{repo_id}"].files("main")

    def put(self, repo_id: str, files: dict[str, bytes], branch="main", private=False, kind="models") -> str:
        """Commit files without a client; return the commit's id."""
        return self.repositories.setdefault(f"{kind}/{repo_id}", Repository(private)).commit(branch, dict(files))

    def downloads(self, repo_id: str) -> list[str]:
        """Return the names of the files that were downloaded from a repository."""
        gets = (re.fullmatch(rf"GET /(?:datasets/)?{repo_id}/resolve/[^/]+/(.+)", line) for line in self.requests)
        return list(dict.fromkeys(match[1] for match in gets if match))

    def start(self) -> None:
        """Serve in a thread."""
        if self._server.fileno() < 0:  # stopped before
            self._server = ThreadingHTTPServer(self._server.server_address, _Handler)
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, as without network."""
        self._server.shutdown()
        self._server.server_close()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _upload_mode(name: str) -> str:
    return "lfs" if name.endswith((".safetensors", ".parquet")) else "regular"


class _Handler(BaseHTTPRequestHandler):  # HTTP/1.0: no connection outlives `stop`
    def log_message(self, *arguments):
        """Print nothing."""

    def do_GET(self):
        self.hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        routes = (
            (r"/api/whoami-v2", lambda: self.json({"type": "user", "name": "user"})),
            (r"/api/validate-yaml", lambda: self.json({"errors": [], "warnings": []})),
            (r"/api/repos/create", self.create),
            (r"/lfs/(.+)", self.put_object),
            (r"/.+\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+))?(?:/(.+))?", self.api),
            (r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        )
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, path):
                return answer(*match.groups())
        return self.send(404)

    do_HEAD = do_POST = do_PUT = do_GET

    def create(self):
        request = json.loads(self.body)
        owner, name = request.get("organization") or "user", request["name"]
        key = f"{request.get('type') or 'model'}s/{owner}/{name}"
        answer = {"url": f"{self.hub.url}/{key.removeprefix('models/')}", "name": f"{owner}/{name}"}
        if "Authorization" not in self.headers:
            return self.send(401)
        if key in self.hub.repositories:
            return self.json({**answer, "error": "You already created this repository"}, 409)
        if owner in self.hub.forbidden:
            return self.send(403, b"", {"X-Error-Message": f"You don't have the rights to create under {owner}"})
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.put(f"{owner}/{name}", {".gitattributes": b""}, private=private, kind=key.split("/")[0])
        return self.json(answer)

    def put_object(self, oid):
        if self.hub.puts_left == 0:
            return self.send(403)
        if self.hub.puts_left:
            self.hub.puts_left -= 1
        self.hub.objects[oid] = self.body
        return self.send(200)

    def lfs_batch(self):
        answers = json.loads(self.body)["objects"]
        for entry in answers:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}
        return self.json({"transfer": "basic", "objects": answers})

    def api(self, kind, repo_id, action, revision, folder):
        repository, revision = self.repository(f"{kind}/{repo_id}"), revision or "main"
        if repository is None:
            return None
        files = repository.files(revision)
        if files is None:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if action == "preupload":
            names = [entry["path"] for entry in json.loads(self.body)["files"]]
            modes = [{"path": name, "uploadMode": _upload_mode(name), "shouldIgnore": False} for name in names]
            return self.json({"files": modes})
        if action == "commit":
            return self.commit(repository, repo_id, kind, revision)
        if action == "tree":
            return self.tree(files, folder)
        siblings = [{"rfilename": name, "size": len(files[name])} for name in sorted(files)]
        sha = repository.refs.get(revision, revision)
        return self.json({"id": repo_id, "sha": sha, "siblings": siblings, "private": repository.private})

    def commit(self, repository, repo_id, kind, branch):
        if "Authorization" not in self.headers:
            return self.send(401)
        if repo_id in self.hub.forbidden:
            return self.send(403, b"", {"X-Error-Message": "You may not write to this repository"})
        files = dict(repository.files(branch))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        sha, where = repository.commit(branch, files), f"{kind}/{repo_id}".removeprefix("models/")
        return self.json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{where}/commit/{sha}"})

    def tree(self, files, folder):
        root, names = PurePosixPath(folder or "."), [PurePosixPath(name) for name in files]
        paths = {*names, *(parent for name in names for parent in name.parents)}  # Git knows folders by their files
        below = sorted(path for path in paths if path != root and path.is_relative_to(root))
        if folder and not below:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        deep = "recursive=true" in self.path.lower()
        return self.json([self.entry(str(path), files) for path in below if deep or path.parent == root])

    def entry(self, name, files):
        oid = hashlib.sha1(files.get(name, name.encode())).hexdigest()
        if name not in files:
            return {"type": "directory", "path": name, "oid": oid, "size": 0}
        entry = {"type": "file", "path": name, "oid": oid, "size": len(files[name])}
        lfs = {"oid": _sha256(files[name]), "size": len(files[name]), "pointerSize": 130}
        return entry | ({"lfs": lfs} if _upload_mode(name) == "lfs" else {})

    def resolve(self, kind, repo_id, revision, name):
        repository = self.repository(f"{kind or 'models/'}{repo_id}")
        if repository is None:
            return None
        files, sha = repository.files(revision), repository.refs.get(revision, revision)
        if files is None or name not in files:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            return self.send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": sha})
        data, headers = files[name], {"ETag": f'"{_sha256(files[name])}"', "X-Repo-Commit": sha}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        return self.send(206 if wanted else 200, data, headers)

    def repository(self, key):
        """Return the repository, or None after the Hub's answer for a missing one or a private one without token."""
        repository = self.hub.repositories.get(key)
        if repository is None or (repository.private and "Authorization" not in self.headers):
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        return repository

    def json(self, value, status=200):
        return self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, data=b"", headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
