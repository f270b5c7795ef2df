"""A stand-in for the Hugging Face Hub on the loopback interface: what pushing and loading need of it."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import yaml


TOKEN = "hf_secretsecretsecret"  # the token that may write


@dataclass
class Repository:
    """A repository; every commit is a whole tree, its files by path."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"lfs\n"}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def hashes(self) -> list[str]:
        return [hashlib.sha1(f"commit {index}".encode()).hexdigest() for index in range(len(self.commits))]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """The hash and the files of a commit, or of the branch `main`."""
        index = -1 if revision == "main" else self.hashes.index(revision)
        return self.hashes[index], self.commits[index]


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def object_id(path: str, content: bytes) -> str:
    """SHA-256 of what is in large file storage, git's own hash of what is not."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves until it is closed.

    Args:
        token (`str`): the one that may write; any other is refused.
        user (`str`): its owner.
    """

    daemon_threads = True

    def __init__(self, token: str, user: str = "user") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.user = token, user
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}  # Spaces as "spaces/USER/NAME"
        self.storage: dict[str, bytes] = {}
        self.requests: list[str] = []  # "METHOD /path"
        # Part of a path → status to answer with, or 0 to drop the connection.
        self.faults: dict[str, int] = {}
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def respond(self, content: object = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.respond({"error": message}, status, X_Error_Message=message, **headers)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {path}")
        for part, status in self.server.faults.items():
            if part in path:
                if status:
                    return self.refuse(status, f"made to fail for {self.headers['Authorization']}")
                self.close_connection = True
                return None
        if path.startswith("/storage/"):  # on the Hub another host, which sees no token
            self.server.storage[path.rpartition("/")[2]] = body
            return self.respond({})
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.server.token}"):
            return self.refuse(401, "Invalid credentials in Authorization header")
        words = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self.create(json.loads(body), authorization)
        if path == "/api/whoami-v2":
            return self.whoami(authorization)
        if path == "/api/validate-yaml":
            return self.check_card(json.loads(body))
        if words[0] == "api" and words[1] not in ("models", "spaces"):  # what is asked for by the way
            return self.refuse(404, "Not found")
        if words[0] == "api":
            repo_id, action, rest = "/".join(words[2:4]), words[4:5], words[5:]
            repo_id = f"spaces/{repo_id}" if words[1] == "spaces" else repo_id
        else:
            repo_id, action, rest = "/".join(words[:2]).removesuffix(".git"), words[2:3], words[3:]
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and authorization is None):
            status = 404 if authorization else 401
            return self.refuse(status, "Repository not found", X_Error_Code="RepoNotFound")
        if action == ["resolve"]:
            return self.resolve(*repository.at(rest[0]), "/".join(rest[1:]))
        if action == ["tree"]:
            return self.tree(repository.at(rest[0])[1])
        if action in ([], ["revision"]):
            sha, files = repository.at(rest[0] if rest else "main")
            siblings = [{"rfilename": name} for name in files]
            about = {
                "id": repo_id.removeprefix("spaces/"),
                "private": repository.private,
                "sha": sha,
                "siblings": siblings,
            }
            return self.respond(about)
        if authorization is None:
            return self.refuse(401, "Invalid username or password.")
        if action == ["auth-check"]:
            return self.respond({})
        if action == ["preupload"]:
            return self.preupload(repository, json.loads(body))
        if action == ["info"]:
            return self.offer_storage(json.loads(body))
        assert action == ["commit"], path
        return self.commit(repository, repo_id, [json.loads(line) for line in body.splitlines()])

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def whoami(self, authorization: str | None) -> None:
        if authorization is None:
            return self.refuse(401, "Invalid username or password.")
        self.respond({"type": "user", "name": self.server.user})

    def create(self, data: dict, authorization: str | None) -> None:
        if authorization is None:
            return self.refuse(401, "Invalid username or password.")
        owner = data["organization"] or self.server.user
        if owner != self.server.user:
            return self.refuse(403, f"You don't have the rights to create a model under {owner}")
        repo_id = f"{owner}/{data['name']}"
        if data.get("type") == "space":
            assert data["sdk"] == "gradio", data
            repo_id = f"spaces/{repo_id}"
        url = {"url": f"{self.server.url}/{repo_id}"}
        if repo_id in self.server.repositories:
            return self.respond({**url, "error": "You already created this model repo"}, 409)
        self.server.repositories[repo_id] = Repository(data.get("visibility") == "private")
        return self.respond(url)

    def check_card(self, data: dict) -> None:
        """Answers as the Hub does to metadata that is none."""
        try:
            metadata = yaml.safe_load(data["content"].split("---\n")[1])
            assert all(value not in (None, "", [], {}) for value in metadata.values())
        except Exception as error:
            errors = [{"message": f"not metadata: {error}"}]
            return self.respond({"errors": errors, "warnings": []}, 400)
        return self.respond({"errors": [], "warnings": []})

    def preupload(self, repository: Repository, data: dict) -> None:
        files = []
        for entry in data["files"]:
            name, known = entry["path"], repository.files.get(entry["path"])
            mode = "lfs" if is_lfs(name) else "regular"
            oid = None if known is None else object_id(name, known)
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.respond({"files": files})

    def offer_storage(self, data: dict) -> None:
        objects = []
        for entry in data["objects"]:
            upload = {"href": f"{self.server.url}/storage/{entry['oid']}"}
            actions = {} if entry["oid"] in self.server.storage else {"actions": {"upload": upload}}
            objects.append({**entry, **actions})
        self.respond({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, repo_id: str, lines: list[dict]) -> None:
        files = dict(repository.files)
        for line in lines[1:]:
            name = line["value"]["path"]
            if line["key"] == "file":
                files[name] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[name] = self.server.storage[line["value"]["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[name]
        repository.commits.append(files)
        repository.messages.append(lines[0]["value"]["summary"])
        sha = repository.hashes[-1]
        url = f"{self.server.url}/{repo_id}/commit/{sha}"
        self.respond({"commitUrl": url, "commitOid": sha, "success": True})

    def tree(self, files: dict[str, bytes]) -> None:
        entries = []
        for name, content in files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": object_id(name, content)}
            if is_lfs(name):
                entry["lfs"] = {"oid": object_id(name, content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.respond(entries)

    def resolve(self, sha: str, files: dict[str, bytes], name: str) -> None:
        content = files.get(name)
        if content is None:
            return self.refuse(404, "Entry not found", X_Error_Code="EntryNotFound")
        headers = {"ETag": f'"{object_id(name, content)}"', "X-Repo-Commit": sha}
        if is_lfs(name):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        return self.respond(content, **headers)


def use(server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None = TOKEN) -> HubServer:
    """Lets this process use the server, with the token in its environment."""
    # These are read from the environment once, when the library is imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    return server
