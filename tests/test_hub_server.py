"""The Hub on loopback, driven through the real client: what other tests see there is what the Hub would do."""

import hashlib
import json
import random
import textwrap
import tracemalloc
import urllib.request
from pathlib import Path

import pytest
from helpers import run_python, tiny_config
from hub_server import Fault, HubServer

from deepseek_ocr_vision import DeepSeekOCRVisionImageProcessor, DeepSeekOCRVisionModel, DeepSeekOCRVisionProcessor


REPO = "org/encoder"
CONFIG = b'{"model_type": "test"}'
WEIGHTS = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS}

IMPORTS = """
    import hashlib
    import json
    from pathlib import Path

    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_download, hf_hub_url, snapshot_download
    from huggingface_hub.utils import build_hf_headers, http_backoff

    def outcome(function, *arguments, **options):
        try:
            function(*arguments, **options)
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            return [type(error).__name__, status]
        return "done"

    api = HfApi()
"""


def run_client(hub: HubServer, home: Path, code: str, *, token: str = "") -> dict:
    """Run code in a fresh interpreter whose client talks to `hub`, and return what it leaves in `result`."""
    program = textwrap.dedent(IMPORTS) + textwrap.dedent(code) + "\nprint(json.dumps(result))\n"
    return json.loads(run_python(program, **hub.environment(home, token=token)))


def requests_of(hub: HubServer, method: str, part: str = "") -> list:
    return [request for request in hub.requests if request.method == method and part in request.path]


def test_files_come_whole_and_by_range_with_the_headers_that_the_client_needs(tmp_path):
    """Pins the bytes, the etags that the cache is named by, and the edges of a range."""
    code = f"""
        url = hf_hub_url({REPO!r}, "model.safetensors")
        wanted = ["bytes=0-7", "bytes=1048570-2000000", "bytes=-3", "bytes=1048576-", "bytes=0-1,4-5"]
        answers = [get_session().get(url, headers={{"Range": part}}) for part in wanted]
        files = {{name: get_hf_file_metadata(hf_hub_url({REPO!r}, name)) for name in {list(FILES)}}}
        paths = [hf_hub_download({REPO!r}, name) for name in files]
        result = {{
            "sha256": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths],
            "metadata": [[data.size, data.etag, data.commit_hash] for data in files.values()],
            "ranges": [[a.status_code, len(a.content), a.headers.get("content-range")] for a in answers],
            "snapshot": sorted(path.name for path in Path(snapshot_download({REPO!r})).iterdir()),
        }}
    """
    (tmp_path / "weights").write_bytes(WEIGHTS)
    with HubServer() as hub:
        commit = hub.add_repository(REPO, {"config.json": CONFIG, "model.safetensors": tmp_path / "weights"})
        result = run_client(hub, tmp_path / "home", code)
    git_id = hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()
    assert result["sha256"] == [hashlib.sha256(CONFIG).hexdigest(), SHA256]
    assert result["metadata"] == [[len(CONFIG), git_id, commit], [len(WEIGHTS), SHA256, commit]]
    assert result["snapshot"] == sorted(FILES)
    size = len(WEIGHTS)
    assert result["ranges"][:3] == [
        [206, 8, f"bytes 0-7/{size}"],
        [206, 6, f"bytes {size - 6}-{size - 1}/{size}"],
        [206, 3, f"bytes {size - 3}-{size - 1}/{size}"],
    ]
    assert [answer[::2] for answer in result["ranges"][3:]] == [[416, f"bytes */{size}"], [200, None]]
    assert [request.range for request in requests_of(hub, "GET", "model.safetensors")][:2] == [
        "bytes=0-7",
        "bytes=1048570-2000000",
    ]


def test_a_redirect_to_the_storage_keeps_the_range_and_drops_the_token(tmp_path):
    """Pins a token that leaks to another origin, and etags taken from the storage, which has its own."""
    code = f"""
        url = hf_hub_url({REPO!r}, "model.safetensors")
        path = hf_hub_download({REPO!r}, "model.safetensors")
        part = get_session().get(url, headers=build_hf_headers() | {{"Range": "bytes=256-259"}})
        bare = get_session().get(str(part.url).split("?")[0])
        result = {{
            "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            "name": Path(path).resolve().name,
            "part": [part.status_code, list(part.content)],
            "etags": [get_hf_file_metadata(url).etag, part.headers["etag"].strip('"')],
            "unsigned": bare.status_code,
        }}
    """
    with HubServer(redirects=True) as hub:
        hub.add_repository(REPO, FILES, private=True)
        result = run_client(hub, tmp_path, code, token=hub.token)
    assert (result["sha256"], result["name"]) == (SHA256, SHA256)
    assert (result["part"], result["unsigned"]) == ([206, [0, 1, 2, 3]], 403)
    assert result["etags"][0] == SHA256 != result["etags"][1]
    tokens = {request.origin: set() for request in hub.requests}
    for request in hub.requests:
        tokens[request.origin].add(request.authorization)
    assert tokens == {"hub": {f"Bearer {hub.token}"}, "storage": {None}}


def test_a_download_that_is_cut_goes_on_where_it_was(tmp_path):
    """Pins what a cut leaves to the client: an answer that it sees to be short, and the rest at the next request."""
    code = f"""
        # The second call is for older clients, whose first one fails.
        outcome(hf_hub_download, {REPO!r}, "model.safetensors")
        path = hf_hub_download({REPO!r}, "model.safetensors")
        result = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    """
    # The client keeps what it has in steps of 10 MiB; of a smaller file that is cut it keeps nothing.
    weights, kept = random.Random(0).randbytes(12_000_000), 10 * 1024 * 1024
    with HubServer(redirects=True) as hub:
        hub.add_repository(REPO, {"model.safetensors": weights})
        hub.faults.append(Fault(path=r"^/lfs/.*model\.safetensors", cut_after=11_000_000))
        assert run_client(hub, tmp_path, code) == hashlib.sha256(weights).hexdigest()
    answers = [(get.range, get.status, get.bytes_sent) for get in requests_of(hub, "GET", "model.safetensors")]
    assert answers == [(None, 200, 11_000_000), (f"bytes={kept}-", 206, len(weights) - kept)]


@pytest.mark.parametrize("redirects", [False, True])
def test_a_server_without_ranges_sends_the_whole_file(tmp_path, redirects):
    """Pins a part that is taken for granted: status 200 where 206 was hoped for."""
    code = f"""
        url = hf_hub_url({REPO!r}, "model.safetensors")
        answer = get_session().get(url, headers={{"Range": "bytes=0-7"}})
        told = [name for name in ("accept-ranges", "content-range") if name in answer.headers]
        result = [answer.status_code, len(answer.content), told]
    """
    with HubServer(ranges=False, redirects=redirects) as hub:
        hub.add_repository(REPO, FILES)
        assert run_client(hub, tmp_path, code) == [200, len(WEIGHTS), []]


def test_what_is_missing_or_closed_raises_the_clients_own_exceptions(tmp_path):
    """Pins the status and the error code on which the client decides."""
    code = f"""
        names = ["org/missing", "org/private", "org/gated", "org/refused"]
        result = {{
            "anonymous": [outcome(hf_hub_download, name, "config.json", token=False) for name in names],
            "known": [outcome(hf_hub_download, name, "config.json") for name in names],
            "wrong token": outcome(hf_hub_download, {REPO!r}, "config.json", token="hf_wrong"),
            "no file": outcome(hf_hub_download, {REPO!r}, "nothing.json"),
            "no folder": outcome(lambda: list(api.list_repo_tree({REPO!r}, "nothing"))),
            "no revision": outcome(api.model_info, {REPO!r}, revision="nothing"),
            "no endpoint": outcome(lambda: list(api.list_spaces())),
            "writing": outcome(api.create_branch, {REPO!r}, branch="other", token=False),
        }}
    """
    with HubServer() as hub:
        hub.add_repository(REPO, FILES)
        hub.add_repository("org/private", FILES, private=True)
        hub.add_repository("org/gated", FILES, gated=True)
        hub.add_repository("org/refused", FILES, gated=True, granted=False)
        result = run_client(hub, tmp_path, code, token=hub.token)
    missing, gated = "RepositoryNotFoundError", "GatedRepoError"
    assert result["anonymous"] == [[missing, 401], [missing, 401], [gated, 401], [gated, 401]]
    assert result["known"] == [[missing, 404], "done", "done", [gated, 403]]
    assert result["wrong token"] == ["HfHubHTTPError", 401]
    assert result["no file"] == result["no folder"] == ["RemoteEntryNotFoundError", 404]
    assert result["no revision"] == ["RevisionNotFoundError", 404]
    assert result["no endpoint"] == ["HfHubHTTPError", 404]
    assert result["writing"] == [missing, 401]


def test_faults_come_in_order_as_often_as_asked_for_and_reach_the_client(tmp_path):
    """Pins a fault that hits the wrong request, or stays, or does not come."""
    code = f"""
        result = {{
            "info": [outcome(api.model_info, {REPO!r}) for _ in range(5)],
            "tree": len(http_backoff("GET", "{{}}/api/models/{REPO}/tree/main".format(api.endpoint)).json()),
            "coded": outcome(hf_hub_download, {REPO!r}, "config.json"),
            "etags": [get_hf_file_metadata(hf_hub_url({REPO!r}, name)).etag for name in {list(FILES) * 2}],
        }}
    """
    with HubServer() as hub:
        hub.add_repository(REPO, FILES)
        hub.faults += [Fault(path=f"^/api/models/{REPO}$", status=status) for status in (401, 403, 429, 500)]
        hub.faults.append(Fault(path="/tree/", status=429, headers={"Retry-After": "0"}))
        hub.faults.append(Fault(path="config", status=403, headers={"X-Error-Code": "GatedRepo"}))
        hub.faults.append(Fault(path=r"safetensors$", method="HEAD", etag="other", times=None))
        result = run_client(hub, tmp_path, code)
    assert result["info"] == [["HfHubHTTPError", status] for status in (401, 403, 429, 500)] + ["done"]
    assert (result["tree"], result["coded"]) == (2, ["GatedRepoError", 403])
    assert [request.status for request in requests_of(hub, "GET", "/tree/")] == [429, 200]
    assert result["etags"][1::2] == ["other", "other"]
    assert result["etags"][0] == result["etags"][2] != "other"


def test_what_is_uploaded_ends_in_the_repository_byte_for_byte(tmp_path):
    """Pins the way there: the new repository, small files in the commit, large ones through LFS, a pull request."""
    folder = tmp_path / "folder"
    (folder / "code").mkdir(parents=True)
    files = FILES | {"README.md": b"---\nlicense: mit\n---\n", "code/empty.py": b"", "page.png": b"\x89PNG\0\0"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    code = f"""
        result = {{"user": api.whoami()["name"], "new": api.create_repo({REPO!r}, private=True).repo_id}}
        result["again"] = [outcome(api.create_repo, {REPO!r}, exist_ok=ok) for ok in (False, True)]
        first = api.upload_folder(repo_id={REPO!r}, folder_path={str(folder)!r})
        operations = [CommitOperationAdd("config.json", b"{{}}"), CommitOperationDelete("code/")]
        request = api.create_commit({REPO!r}, operations, commit_message="Change", create_pr=True)
        info = api.model_info({REPO!r}, files_metadata=True)
        result["commits"] = [first.oid, info.sha, request.oid, request.pr_revision]
        result["private"] = info.private
        result["lfs"] = {{file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}}
        result["paths"] = [entry.path for entry in api.get_paths_info({REPO!r}, ["code", "config.json", "none"])]
        tree = api.list_repo_tree({REPO!r}, recursive=True, revision="refs/pr/1")
        result["tree"] = [entry.path for entry in tree]
    """
    with HubServer(redirects=True) as hub:
        result = run_client(hub, tmp_path / "home", code, token=hub.token)
        main, pull_request = hub.files(REPO), hub.files(REPO, "refs/pr/1")
        commits = [hub.commit_id(REPO), hub.commit_id(REPO), hub.commit_id(REPO, "refs/pr/1"), "refs/pr/1"]
        assert hub.is_private(REPO)
    attributes = main.pop(".gitattributes")
    assert main == files
    assert pull_request == {name: files[name] for name in ("README.md", "model.safetensors", "page.png")} | {
        "config.json": b"{}",
        ".gitattributes": attributes,
    }
    assert (result["new"], result["private"], result["commits"]) == (REPO, True, commits)
    assert result["again"] == [["HfHubHTTPError", 409], "done"]
    assert result["lfs"] == {
        name: hashlib.sha256(files[name]).hexdigest() for name in ("model.safetensors", "page.png")
    }
    assert (result["paths"], result["tree"]) == (["code", "config.json"], sorted(pull_request))


def test_an_interrupted_upload_sends_only_what_is_not_there_yet(tmp_path):
    """Pins the batch answer: what is stored gets no upload action; and a cut within a PUT, which is sent again."""
    files = {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS[1:]}
    first, second = (hashlib.sha256(content).hexdigest() for content in files.values())
    code = f"""
        weights = bytes(range(256)) * 4096
        def upload():
            files = {{"a.safetensors": weights, "b.safetensors": weights[1:]}}
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            api.create_commit({REPO!r}, operations, commit_message="Upload")
        result = [outcome(upload) for _ in range(3)]
    """
    with HubServer() as hub:
        hub.add_repository(REPO, {})
        hub.faults += [
            Fault(path=second, method="PUT", cut_after=100_000),
            Fault(path=second, method="PUT", status=403),
        ]
        outcomes = run_client(hub, tmp_path, code, token=hub.token)
        assert hub.files(REPO) == files
    assert (outcomes[0][0], outcomes[-1]) == ("RuntimeError", "done")
    sent = {oid: [(put.status, put.bytes_received) for put in requests_of(hub, "PUT", oid)] for oid in (first, second)}
    size = len(WEIGHTS)
    assert sent == {first: [(200, size)], second: [(None, 100_000), (403, size - 1), (200, size - 1)]}
    assert {put.authorization for put in requests_of(hub, "PUT")} == {None}


def test_a_commit_whose_answer_is_lost_has_happened_and_a_stale_one_has_not(tmp_path):
    """Pins the two ways in which a client and the Hub come to disagree about a branch."""
    code = f"""
        def commit(text, **options):
            operations = [CommitOperationAdd("config.json", text)]
            return api.create_commit({REPO!r}, operations, commit_message="Change", **options)
        start = api.model_info({REPO!r}).sha
        result = [outcome(commit, b"lost"), outcome(commit, b"stale", parent_commit=start)]
    """
    with HubServer() as hub:
        hub.add_repository(REPO, FILES)
        hub.faults.append(Fault(path="/commit/", cut_after=0))
        assert run_client(hub, tmp_path, code, token=hub.token) == [
            ["RemoteProtocolError", None],
            ["HfHubHTTPError", 412],
        ]
        assert hub.files(REPO)["config.json"] == b"lost"


def test_branches_are_made_listed_written_to_and_deleted(tmp_path):
    """Pins names with a slash, which come quoted, and that a branch leaves `main` alone."""
    code = f"""
        api.create_branch({REPO!r}, branch="feature/one")
        operations = [CommitOperationAdd("config.json", b"changed")]
        api.create_commit({REPO!r}, operations, commit_message="Change", revision="feature/one")
        result = {{"refs": {{ref.name: ref.target_commit for ref in api.list_repo_refs({REPO!r}).branches}}}}
        path = hf_hub_download({REPO!r}, "config.json", revision="feature/one")
        result["content"] = Path(path).read_text()
        result["again"] = [outcome(api.create_branch, {REPO!r}, branch="feature/one", exist_ok=ok) for ok in (0, 1)]
        result["delete"] = [outcome(api.delete_branch, {REPO!r}, branch="feature/one") for _ in range(2)]
    """
    with HubServer() as hub:
        commit = hub.add_repository(REPO, FILES)
        result = run_client(hub, tmp_path, code, token=hub.token)
        assert hub.files(REPO) == FILES
        assert hub.commit_id(REPO) == commit == result["refs"]["main"] != result["refs"]["feature/one"]
    assert result["content"] == "changed"
    assert result["again"] == [["HfHubHTTPError", 409], "done"]
    assert result["delete"] == ["done", ["BadRequestError", 400]]


def test_the_same_content_gets_the_same_commit_id():
    """Pins tests that name a commit, run after run."""
    with HubServer() as hub:
        commits = {hub.add_repository(f"org/{number}", FILES) for number in range(2)}
        changed = hub.add_repository("org/other", FILES | {"config.json": b"{}"})
    assert len(commits) == 1
    assert changed not in commits


def test_a_large_file_is_never_whole_in_memory(tmp_path):
    """Pins the memory of a test that serves some hundred megabytes."""
    size = 50_000_000
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        with HubServer(redirects=True) as hub:
            hub.add_repository(REPO, {"model.safetensors": tmp_path / "weights"})
            with urllib.request.urlopen(f"{hub.url}/{REPO}/resolve/main/model.safetensors") as answer:
                received = sum(len(piece) for piece in iter(lambda: answer.read(1 << 18), b""))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert received == size
    assert peak < 5_000_000


def test_a_model_and_its_processor_load_from_there_without_the_package(tmp_path):
    """Pins the files and folders that transformers asks for and that a repository need not have."""
    model = DeepSeekOCRVisionModel(tiny_config())
    DeepSeekOCRVisionProcessor(DeepSeekOCRVisionImageProcessor(size=128)).save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    code = f"""
        import json
        from transformers import AutoModel, AutoProcessor
        AutoProcessor.from_pretrained({REPO!r}, trust_remote_code=True)
        model = AutoModel.from_pretrained({REPO!r}, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
        print(json.dumps({{name: list(weight.shape) for name, weight in model.state_dict().items()}}))
    """
    with HubServer(redirects=True) as hub:
        hub.add_repository(REPO, {path.name: path for path in (tmp_path / "saved").iterdir()}, private=True)
        environment = hub.environment(tmp_path / "home", token=hub.token)
        output = run_python(code, package_installed=False, **environment)
    assert json.loads(output) == {name: list(weight.shape) for name, weight in model.state_dict().items()}
    assert {request.status for request in hub.requests} == {200, 302, 404}
    assert {request.authorization for request in hub.requests if request.origin == "storage"} == {None}
