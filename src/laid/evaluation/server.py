"""A checkpoint behind OpenAI's chat-completions protocol: what `laid evaluate --endpoint` asks, and any client of that protocol.

One question at a time, answered greedily, with log-probabilities. Images are `data:` URLs; neither files nor addresses are opened.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from laid.data.chat import waiting
from laid.errors import LaidError
from laid.methods.registry import Loaded
from laid.models.features import ImageFeatures
from laid.models.forward import collate, generate
from laid.models.prompts import TURN_END
from laid.settings.measuring import Evaluation

MOST_LISTED = 20
MOST_TOKENS = 8192  # of an answer, which holds up all others
MOST_BYTES = 2**30  # of a request: a thousand photographs
# What may be said of these, if anything.
ONLY: dict[str, Any] = {
    "stream": False, "n": 1, "temperature": 0, "stop": [], "tools": [], "response_format": {"type": "text"}, "logit_bias": {},
    "frequency_penalty": 0, "presence_penalty": 0,
}  # fmt: skip


class Completions:
    """Answers requests with one loaded model, whose features of images stay for later questions.

    name: of the model. version: of its weights, given with every answer as system_fingerprint. folder: for the images of the request
    that is answered, which the caller removes at the end.
    """

    def __init__(
        self, loaded: Loaded, name: str, settings: Evaluation, folder: str | Path, version: str
    ) -> None:
        self.model, self.processor, self.settings = loaded.model, loaded.processor, settings
        self.name, self.version, self.folder = name, version, Path(folder)
        limit = int(settings.feature_cache_gb * 2**30)
        self.features = ImageFeatures(
            self.model, self.processor, lambda name: self.folder / name, limit_bytes=limit
        )
        self.device = next(self.model.parameters()).device
        self.lock = threading.Lock()

    def answer(self, request: Any) -> dict[str, Any]:
        """The chat completion that a request asks for. Raises LaidError for one that asks for anything else."""
        if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
            raise LaidError("a request is an object with a list of messages")
        for key, value in ONLY.items():
            if request.get(key) not in (None, value):
                raise LaidError(
                    f"{key} is {request[key]!r:.40}: laid serve takes {value!r} alone, it answers once, greedily"
                )
        most = _count(request, "max_completion_tokens") or _count(request, "max_tokens")
        listed = (_count(request, "top_logprobs") or 0) if request.get("logprobs") else None
        if listed is not None and listed > MOST_LISTED:
            raise LaidError(f"top_logprobs is {listed}: at most {MOST_LISTED} are listed")
        if (most or 0) > MOST_TOKENS:
            raise LaidError(f"max_tokens is {most}: at most {MOST_TOKENS:,} are answered")
        if not request["messages"]:
            raise LaidError("messages is empty")
        with self.lock:
            try:
                return self._answered(request["messages"], most or self.settings.max_new_tokens, listed)
            finally:
                for file in self.folder.iterdir():
                    file.unlink()

    @torch.inference_mode()
    def _answered(self, messages: Sequence[Any], most: int, listed: int | None) -> dict[str, Any]:
        chat = waiting([self._with_files(message) for message in messages])
        prompt = self.processor.encoder.chat(chat, self.features.grids(chat.images)).asked
        inputs = collate([prompt], self.features.get(chat.images)).to(self.device)
        tokenizer = self.processor.tokenizer
        stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)} - {None}
        seen: list[torch.Tensor] = []
        (said,) = generate(
            self.model, inputs, most, sorted(stops), self.settings.chunk_tokens, lambda x: seen.append(x[0])
        )
        text = tokenizer.decode(said, skip_special_tokens=True)
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "system_fingerprint": self.version,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop" if len(said) < len(seen) else "length",
                    "logprobs": None
                    if listed is None
                    else {"content": [self._listed(logits, listed) for logits in seen]},
                }
            ],
            "usage": {
                "prompt_tokens": len(prompt.ids),
                "completion_tokens": len(seen),
                "total_tokens": len(prompt.ids) + len(seen),
            },
        }

    def _with_files(self, message: Any) -> Any:
        """A message whose images are files in `folder`, named by their bytes."""
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            return message
        return {**message, "content": [self._part(part) for part in message["content"]]}

    def _part(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            return part
        url = part.get("image_url") if kind == "image_url" else None
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not url.startswith("data:"):
            raise LaidError("a part of a message is neither text nor an image_url with a data: URL")
        try:
            content = base64.b64decode(url.partition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            raise LaidError(f"an image's URL {url[:40]} is not base64") from None
        name = hashlib.sha256(content).hexdigest()
        (self.folder / name).write_bytes(content)
        return {"type": "image", "image": name}

    def _listed(self, logits: torch.Tensor, count: int) -> dict[str, Any]:
        """The likeliest token, and the `count` likeliest."""
        chances, ids = logits.float().log_softmax(-1).topk(max(count, 1))
        tokens = [self._token(i, chance) for i, chance in zip(ids.tolist(), chances.tolist(), strict=True)]
        return {**tokens[0], "top_logprobs": tokens[:count]}

    def _token(self, token: int, chance: float) -> dict[str, Any]:
        text = self.processor.tokenizer.decode([token])
        return {"token": text, "logprob": chance, "bytes": list(text.encode())}


def _count(request: dict[str, Any], key: str) -> int | None:
    found = request.get(key)
    if found is not None and (type(found) is not int or found < 0):
        raise LaidError(f"{key} is {found!r:.40}, expected a whole number")
    return found


class Server(ThreadingHTTPServer):
    """Takes requests on an address at once; they are answered when `completions` is there and serve_forever runs."""

    daemon_threads = True
    completions: Completions

    def __init__(self, host: str, port: int) -> None:
        if not host:  # which would be every address of this machine
            raise LaidError("--host: is empty: 0.0.0.0 listens to all networks, 127.0.0.1 to this machine")
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError, UnicodeError) as error:
            raise LaidError(f"{host}:{port}: {getattr(error, 'strerror', None) or error}") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """What clients take as base URL."""
        return f"http://{self.server_address[0]}:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if self.path.rstrip("/") != "/v1/models":
            return self._refuse(404, f"{self.path[:80]}: there are /v1/models and /v1/chat/completions")
        entry = {"id": self.server.completions.name, "object": "model", "owned_by": "laid"}
        return self._send(200, {"object": "list", "data": [entry]})

    def do_POST(self) -> None:
        said = self.headers.get("Content-Length") or ""
        if not re.fullmatch("[0-9]{1,12}", said) or int(said) > MOST_BYTES:
            self.close_connection = True  # where the next request begins nobody knows
            return self._refuse(400, f"Content-Length is {said!r:.40}, expected at most {MOST_BYTES:,} bytes")
        body = self.rfile.read(int(said))
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self._refuse(404, f"{self.path[:80]}: there are /v1/models and /v1/chat/completions")
        completions = self.server.completions
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return self._refuse(400, "the request is not JSON")
        try:
            wanted = request.get("model") if isinstance(request, dict) else None
            if wanted not in (None, completions.name):
                return self._refuse(404, f"no model {wanted!r:.80} here; there is {completions.name}")
            return self._send(200, completions.answer(request))
        except LaidError as error:
            return self._refuse(400, str(error))
        except ConnectionError:  # gone before it was answered
            raise
        except (
            RuntimeError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            OSError,
        ):  # the next one may do
            traceback.print_exc()
            return self._refuse(500, "failed here: the server's own output says at what")

    def _refuse(self, status: int, message: str) -> None:
        kind = "server_error" if status == 500 else "invalid_request_error"
        self._send(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
