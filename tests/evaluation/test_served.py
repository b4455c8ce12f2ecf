"""docs/guides/served_models.md as it stands there: `laid serve` as a process, asked through a proxy that misbehaves on request.

(Time-outs: tests/data/test_http.py.)
"""

import http.client
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
import torch

from guides import ROOT, blocks, shell_commands
from laid.cli import main
from laid.data.http import Refused
from laid.data.questions import haystack_file, read_questions
from laid.errors import LaidError
from laid.evaluation import endpoint
from laid.evaluation.cells import read_cell
from laid.evaluation.scoring import spoken_answer
from laid.io import read_json

GUIDE = "docs/guides/served_models.md"
HERE, SECRET = "http://127.0.0.1:8000/v1", "sk-nobody-may-read-this"


def commands():
    return [shlex.split(command)[1:] for command in shell_commands(GUIDE)]


@pytest.fixture(scope="module")
def home(family, micro_file, coco_root, haystacks, tmp_path_factory):
    """What the guide takes for granted, with models that say yes or no, as trained ones do, and other words less likely."""
    from laid.evaluation.scoring import answer_tokens
    from laid.models.loading import load_model
    from laid.models.processing import Processor

    root = tmp_path_factory.mktemp("served")
    (overlay,) = (body for kind, body in blocks(GUIDE) if kind == "yaml")
    (root / "mine.yaml").write_text(overlay)
    shutil.copy(micro_file, root / "config.yaml")
    (root / "coco").symlink_to(coco_root)
    (root / "haystacks").symlink_to(haystacks)
    for name, folder in family.items():
        shutil.copytree(folder, root / "models" / name)
        model = load_model(folder)
        yes, no = answer_tokens(Processor.load(folder).tokenizer)
        with torch.no_grad():  # a number that all tokens share on to the last layer
            text = model.model.language_model
            text.embed_tokens.weight[:, 0] = 2.0
            for layer in text.layers:
                layer.self_attn.o_proj.weight[0] = 0.0
                layer.mlp.down_proj.weight[0] = 0.0
            model.lm_head.weight[yes + no, 0] += 40.0
        model.save_pretrained(root / "models" / name)
    return root


@pytest.fixture(scope="module")
def server(home):
    (words,) = (words for words in commands() if words[0] == "serve")
    process = subprocess.Popen(
        [sys.executable, "-m", "laid", *words, "--port", "0", "--device", "cpu"],
        cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = process.stdout.readline()
    assert said.startswith("teacher at http://127.0.0.1:")
    yield said.split()[2]
    process.terminate()
    process.wait()


class Proxy:
    """Between client and server. `plan`: what goes wrong, one a request; `most`: images it takes; `unknown`: words it refuses."""

    def __init__(self, behind):
        self.behind, self.plan, self.most, self.unknown, self.asked, self.keys = (
            behind,
            [],
            1000,
            [],
            [],
            set(),
        )
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                proxy.handle(self, body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def handle(self, request, body):
        self.keys.add(request.headers.get("Authorization"))
        asked, trick = json.loads(body), self.plan.pop(0) if self.plan else None
        images = sum(part["type"] == "image_url" for part in asked["messages"][0]["content"])
        bad = next((word for word in self.unknown if word in asked), None)
        if isinstance(trick, int):
            return self.send(
                request, trick, {"error": {"message": f"no, {request.headers['Authorization']}"}}
            )
        if bad:
            return self.send(request, 400, {"error": {"message": f"{bad}: try max_completion_tokens"}})
        if images > self.most:
            said = f"At most {self.most} image(s) may be provided in one prompt."
            return self.send(request, 400, {"object": "error", "message": said, "code": 400})
        if trick == "drop":
            return request.connection.close()
        self.asked.append((images, asked))
        answer = requests.post(f"{self.behind}/chat/completions", body, timeout=60)
        return self.send(request, answer.status_code, answer.json(), cut=trick == "half")

    def send(self, request, status, content, cut=False):
        body = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("Retry-After", "0")
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if cut else body)


@pytest.fixture
def proxy(server, home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv(endpoint.KEY, SECRET)
    monkeypatch.setattr(endpoint, "PATIENCE", {"retries": 6, "timeout": 300.0, "wait": 0.01})
    made = Proxy(server)
    yield made
    made.server.shutdown()
    made.server.server_close()


def laid(words, url=HERE, out=None, code=0):
    words = [url if word == HERE else word for word in words]
    if out:
        words[words.index("--out") + 1] = str(out)
    assert main([*words, "--device", "cpu"] if words[0] == "evaluate" else words) == code, words


ASK, EVALUATE, TABLES = commands()[1:]


def same(ours, theirs):
    for key in ("id", "answer", "label", "needles"):
        assert [a[key] for a in ours["answers"]] == [a[key] for a in theirs["answers"]]
    assert ours["tokens_mean"] == theirs["tokens_mean"] and ours["positions_mean"] is None


@pytest.fixture(scope="module")
def local(home, tmp_path_factory):
    """The teacher's cells, asked here: by size, and those whose answers are read by their words."""
    words = [word for word in ASK if word not in ("--endpoint", HERE)]
    words[words.index("--model") + 1] = "models/teacher"
    (home / "words.yaml").write_text("evaluation: {scoring: generate}\n")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name, more in (("logits", []), ("words", ["words.yaml"])):
            out, at = tmp_path_factory.mktemp("local"), words.index("mine.yaml") + 1
            laid([*words[:at], *more, *words[at:]], out=out)
            found[name] = {size: read_json(out / f"{size}.json") for size in (1, 2, 5)}
    return found


def test_the_guide_runs_as_it_stands(home, proxy, local, capsys):
    """Every fault on the way, and the answers and probabilities of the model asked here."""
    proxy.plan = [429, 500, "drop", None, "half", 503]
    laid(ASK, proxy.url)
    said = capsys.readouterr()
    assert "unknown positions" in said.out and not proxy.plan and proxy.keys == {f"Bearer {SECRET}"}
    for size, theirs in local["logits"].items():
        cell = read_cell(home / f"cells/test/teacher/base/{size}.json")
        same(cell, theirs)
        assert {a["answer"] for a in cell["answers"]} <= {"yes", "no"}
        assert [a["p_yes"] for a in cell["answers"]] == pytest.approx(
            [a["p_yes"] for a in theirs["answers"]], abs=1e-4
        )
        about = cell["provenance"]["endpoint"]
        assert (about["url"], about["model"]) == (proxy.url, "teacher") and "weights" in about["unknown"]
        (by,) = about["answered_by"]
        assert by["system_fingerprint"] == theirs["provenance"]["model"] and by["top_logprobs"] == 20
        assert cell["provenance"]["model"] is None and cell["provenance"]["data"].keys() == theirs[
            "provenance"
        ]["data"].keys() - {"model"}
    assert len({a["p_yes"] for cell in local["logits"].values() for a in cell["answers"]}) > 20
    laid(EVALUATE)
    laid(TABLES)
    shown = capsys.readouterr().out
    assert "teacher" in shown and "unknown" in shown
    everything = b"".join(file.read_bytes() for file in (home / "cells").rglob("*") if file.is_file())
    assert SECRET.encode() not in everything + said.out.encode() + said.err.encode()
    # Nothing claims to have checked what cannot be.
    Path("results").mkdir()
    Path("results/mine").symlink_to(home)
    cell = ["--config", "config.yaml", "mine.yaml"], "results/mine/cells/test/teacher/base/2.json"
    assert main(["explain", cell[1], *cell[0]]) == 0
    assert f"teacher at {proxy.url}; not known: weights" in capsys.readouterr().out
    assert main(["verify", cell[1], *cell[0]]) == 1
    assert "nobody can check" in (told := capsys.readouterr().out) and told.count("stale: ") == 1, told
    assert main(["verify", *cell[0], "--rebuild", cell[1]]) == 2
    assert "answered by a server" in capsys.readouterr().err


def test_a_server_that_takes_fewer_images(proxy, tmp_path, capsys):
    """One line, the sizes before it written; the next call asks what is left and ends with the same bytes."""
    laid(ASK, proxy.url, tmp_path / "whole")
    capsys.readouterr()
    proxy.most, proxy.asked = 2, []
    laid(ASK, proxy.url, tmp_path / "cut", code=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "400" in line and "At most 2 image(s)" in line and "ask smaller --sizes" in line
    assert {p.name for p in (tmp_path / "cut").iterdir() if p.name[0] != "."} == {"1.json", "2.json"}
    proxy.most, proxy.asked, proxy.plan = 5, [], [None, None, 400]
    laid(ASK, proxy.url, tmp_path / "cut", code=2)  # refused once, among what is asked at a time
    before = len(proxy.asked)
    laid(ASK, proxy.url, tmp_path / "cut")
    assert 2 <= before < 10 and [images for images, _ in proxy.asked] == [5] * 10
    for size in (1, 2, 5):
        assert (tmp_path / f"cut/{size}.json").read_bytes() == (tmp_path / f"whole/{size}.json").read_bytes()


def test_servers_that_want_to_be_asked_otherwise(proxy, local, tmp_path, capsys):
    """Without log-probabilities words tell; what a key is refused with shows no key."""
    proxy.unknown = ["logprobs", "max_tokens"]
    laid([*ASK[: ASK.index("--sizes")], "--sizes", "2", *ASK[-2:]], proxy.url, tmp_path / "words")
    cell = read_json(tmp_path / "words/2.json")
    same(cell, local["words"][2])
    assert {a["p_yes"] for a in cell["answers"]} == {None} and cell["provenance"]["endpoint"]["answered_by"][0].keys() == {
        "model", "system_fingerprint", "temperature", "max_completion_tokens",
    }  # fmt: skip
    proxy.plan = [401]
    laid(ASK, proxy.url, tmp_path / "refused", code=2)
    said = capsys.readouterr().err
    assert "Bearer ***" in said and "OPENAI_API_KEY" in said and SECRET not in said
    assert not (tmp_path / "refused").exists()
    proxy.plan = [500] * 7
    laid(ASK, proxy.url, tmp_path / "refused", code=2)
    assert "500" in (said := capsys.readouterr().err) and "gave up after 7 attempts" in said


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"stream": True}, 400, "stream is True"),
        ({"temperature": 1}, 400, "temperature is 1"),
        ({"model": "other"}, 404, "no model 'other' here; there is teacher"),
        ({"logprobs": True, "top_logprobs": 50}, 400, "at most 20"),
        ({"max_tokens": "many"}, 400, "max_tokens is 'many'"),
        ({"messages": "hello"}, 400, "a list of messages"),
        ({"messages": []}, 400, "messages is empty"),
        ({"max_tokens": 10**6}, 400, "max_tokens is 1000000: at most 8,192"),
        ({"stop": ["no"]}, 400, "stop is ['no']"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is {'type': 'json_object'}"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, 400, "half a character"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}, 400, "data: URL"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]}, 400, "data: URL"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]}]}, 400, "not a whole image"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, 400, "turn 0 is of 'robot'"),
    ],
)  # fmt: skip
def test_what_laid_serve_refuses(server, change, status, says):
    asked = {"model": "teacher", "messages": [{"role": "user", "content": "Is there a dog?"}], **change}
    answer = requests.post(f"{server}/chat/completions", json=asked, timeout=60)
    assert answer.status_code == status and says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("head", "body", "says"),
    [
        ({"Content-Length": "many"}, b"", "Content-Length is 'many'"),
        ({"Content-Length": "-1"}, b"", "Content-Length is '-1'"),
        ({"Content-Length": str(10**12)}, b"", "expected at most 1,073,741,824 bytes"),
        ({"Transfer-Encoding": "chunked"}, b"0\r\n\r\n", "Content-Length is ''"),
        ({"Content-Length": "5000"}, b"9" * 5000, "the request is not JSON"),
        ({"Content-Length": "5000"}, b"[" * 5000, "the request is not JSON"),
    ],
)
def test_what_is_no_request(server, head, body, says):
    address = urlsplit(server)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    connection.putrequest("POST", "/v1/chat/completions")
    for name, value in head.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    assert answer.status == 400 and says in json.loads(answer.read())["error"]["message"]
    connection.close()


GOOD = {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": -0.1}]}]}}]}  # fmt: skip


def listed(value):
    entry = {"token": "yes", "logprob": value}
    return GOOD | {"choices": [GOOD["choices"][0] | {"logprobs": {"content": [{"top_logprobs": [entry]}]}}]}


@pytest.mark.parametrize(
    "reply",
    [
        None, [], "yes", {}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": ["Yes"]}}]},
        listed("many"), listed(float("nan")), listed(float("inf")), listed(5.0), GOOD | {"model": ["x"]},
        GOOD | {"system_fingerprint": "a\ud800"}, GOOD | {"usage": "x"},
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_one_line(micro, coco_root, haystacks, monkeypatch, reply):
    question = read_questions(haystack_file(haystacks / "test", 1))[0]
    asker = endpoint.Endpoint("http://x/v1", "x", coco_root, micro.evaluation, 1)
    monkeypatch.setattr(asker.http, "post", lambda *_: reply)
    with pytest.raises(
        LaidError, match="x/v1/chat/completions: the answer is no chat completion: "
    ) as caught:
        asker._ask(question, spoken_answer)
    assert str(caught.value).isprintable()
    monkeypatch.setattr(asker.http, "post", lambda *_: GOOD | {"usage": {"prompt_tokens": -5}})
    found = asker._ask(question, spoken_answer)
    assert (found["answer"], found["p_yes"], found["tokens"]) == ("yes", 1.0, None)


def test_a_server_without_the_model_is_asked_for_its_name(micro, coco_root, haystacks, monkeypatch):
    """transformers serve says with 400 what others say with 404."""
    question = read_questions(haystack_file(haystacks / "test", 2))[0]
    asker = endpoint.Endpoint("http://x/v1", "small", coco_root, micro.evaluation, 1)
    said = "Server is pinned to '/models/small'; requested 'small'."
    monkeypatch.setattr(asker.http, "post", lambda url, _: (_ for _ in ()).throw(Refused(url, 400, said)))
    with pytest.raises(LaidError, match="requested 'small': is this .* --model a model there") as caught:
        asker._ask(question, spoken_answer)
    assert "--sizes" not in str(caught.value)


def test_what_laid_serve_answers(server):
    """Text alone; every token's probabilities; the models that there are."""
    asked = {
        "messages": [{"role": "user", "content": "Is there a dog?"}],
        "max_tokens": 2,
        "logprobs": True,
        "top_logprobs": 3,
    }
    reply = requests.post(f"{server}/chat/completions", json=asked, timeout=60).json()
    (choice,) = reply["choices"]
    listed = choice["logprobs"]["content"]
    assert len(listed) == reply["usage"]["completion_tokens"] == 2 and choice["finish_reason"] == "length"
    assert all(
        len(token["top_logprobs"]) == 3 and token["top_logprobs"][0]["token"] == token["token"]
        for token in listed
    )
    assert choice["message"]["content"].replace(" ", "") == "".join(
        token["token"].strip() for token in listed
    )
    assert requests.get(f"{server}/models", timeout=60).json()["data"][0]["id"] == "teacher"


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000", "ftp://x/v1", "http://u:p@x/v1", "https://x/v1?key=abc", "https:///v1", "http://[::1/v1",
        "http://u:p@x:port/v1", "http://x:99999/v1", "http://a b/v1",
    ],
)  # fmt: skip
def test_addresses_that_are_none(url):
    with pytest.raises(LaidError, match="--endpoint") as caught:
        endpoint.address(url)
    assert "u:p" not in str(caught.value) and "abc" not in str(caught.value)


def test_a_key_that_no_header_holds_is_not_shown(monkeypatch):
    monkeypatch.setenv(endpoint.KEY, "sk-a\nb")
    with pytest.raises(LaidError) as caught:
        endpoint.key()
    assert "sk-a" not in str(caught.value)
    assert endpoint.address("https://x.org/v1/chat/completions/") == "https://x.org/v1"
