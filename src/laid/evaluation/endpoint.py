"""Questions asked of a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, hosted models, `laid serve`).

Images go as data: URLs. Yes and no are told by the log-probabilities of the answer's first token where the server lists them and one of
the two is among them, else by the words of the answer. What nobody outside the server can know, the record says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from laid import provenance
from laid.data.http import Http, Refused
from laid.data.images import data_url, require_images
from laid.data.questions import Question, ordered_images
from laid.errors import LaidError
from laid.evaluation.measure import measure
from laid.evaluation.scoring import probability_listed
from laid.evaluation.sets import QuestionSet, prompt_of
from laid.io import dumps, half_character, require_place, safe_join
from laid.settings import Settings
from laid.settings.measuring import Evaluation

KEY = "OPENAI_API_KEY"
UNKNOWN = (
    "weights", "number format", "attention", "image resolution", "chat template", "M-RoPE positions", "software of the server",
)  # fmt: skip
PATIENCE = {
    "retries": 6,
    "timeout": 600.0,
    "wait": 1.0,
}  # of laid.data.http: a prompt of 1,000 images takes minutes
MOST_AT_ONCE = 512  # each has a thread
LISTED = 20  # likeliest tokens asked for: as many as OpenAI and vLLM list
FEWER = 5  # what others list
NAMED = "is this the address up to /v1, and --model a model there?"


class Endpoint:
    """Asks one model of a server, `concurrent` questions at a time. url: up to /v1."""

    def __init__(
        self, url: str, name: str, coco_root: str | Path, settings: Evaluation, concurrent: int
    ) -> None:
        if concurrent > MOST_AT_ONCE:
            raise LaidError(
                f"--concurrent {concurrent}: at most {MOST_AT_ONCE} questions are under way at a time"
            )
        self.base, self.name, self.root, self.settings = address(url), name, coco_root, settings
        self.concurrent = concurrent
        self.http = Http(connections=concurrent, key=key(), **PATIENCE)
        self.asking: dict[str, Any] = {"temperature": 0, "max_tokens": settings.max_new_tokens}
        if settings.scoring == "logits":
            self.asking |= {"logprobs": True, "top_logprobs": LISTED}

    def answers(self, part: QuestionSet, done: Container[Any]) -> Iterator[list[dict[str, Any]]]:
        """Answers of a set as they come, one by one. done: ids that are not asked again.

        Raises LaidError where the server refuses a question or cannot be reached; what was under way is waited for.
        """
        first, *others = [q for q in part.questions if q.id not in done] or [None]
        if first is None:
            return
        yield [self._first(first, part.spoken)]
        pool = ThreadPoolExecutor(self.concurrent)
        try:
            waiting = [pool.submit(self._ask, question, part.spoken) for question in others]
            failed: LaidError | None = None
            for answer in as_completed(waiting):
                try:
                    yield [answer.result()]
                except CancelledError:
                    continue
                except LaidError as error:
                    failed = failed or error
                    for other in waiting:
                        other.cancel()
            if failed is not None:
                raise failed
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _first(self, question: Question, spoken: Callable[[str], str]) -> dict[str, Any]:
        """The answer to a question that finds out how the server wants to be asked."""
        while True:
            try:
                return self._ask(question, spoken)
            except _Unasked as error:
                if not self._gives_way(error.said):
                    raise

    def _gives_way(self, said: str) -> bool:
        """Ask otherwise, where a server names what it does not take; False where it does not."""
        asking = self.asking
        if "logprobs" in said and "logprobs" in asking:
            if asking["top_logprobs"] > FEWER:
                asking["top_logprobs"] = FEWER
            else:
                del asking["logprobs"], asking["top_logprobs"]
        elif "max_completion_tokens" in said and "max_tokens" in asking:
            asking["max_completion_tokens"] = asking.pop("max_tokens")
        elif "temperature" in said and "temperature" in asking:
            del asking["temperature"]
        else:
            return False
        return True

    def _ask(self, question: Question, spoken: Callable[[str], str]) -> dict[str, Any]:
        paths, needles = ordered_images(question, self.settings.order_seed)
        images = [
            {"type": "image_url", "image_url": {"url": data_url(safe_join(self.root, p))}} for p in paths
        ]
        text = {"type": "text", "text": prompt_of(question) + question.text}
        url, asking = f"{self.base}/chat/completions", dict(self.asking)
        message = {"role": "user", "content": [*images, text]}
        try:
            reply = self.http.post(url, {"model": self.name, "messages": [message], **asking})
        except Refused as error:
            raise _Unasked(question, self.name, error) from None
        try:
            choice = reply["choices"][0]
            said = _text(choice["message"].get("content")) or ""
            p_yes = probability_listed(_listed(choice)) if "logprobs" in asking else None
            tokens = (reply.get("usage") or {}).get("prompt_tokens")
            by = {name: _text(reply.get(name)) for name in ("model", "system_fingerprint")} | asking
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            raise LaidError(f"{url}: the answer is no chat completion: {ascii(reply)[:200]}") from None
        return {
            "id": question.id,
            "label": question.answer,
            "answer": spoken(said) if p_yes is None else "yes" if p_yes > 0.5 else "no",
            "p_yes": None if p_yes is None else round(p_yes, 6),
            "needles": needles,
            "tokens": tokens if type(tokens) is int and tokens > 0 else None,
            "positions": None,
            "by": by,
        }


class _Unasked(LaidError):
    """A question that a server does not take."""

    def __init__(self, question: Question, name: str, error: Refused) -> None:
        what = {
            401: f"the key is read from {KEY}",
            403: f"the key is read from {KEY}",
            404: NAMED,
        }.get(
            error.status,
            f"where it takes fewer than {question.size} images, ask smaller --sizes or let it take more"
            " (vLLM: --limit-mm-per-prompt, --max-model-len)",
        )
        if repr(name) in error.said:  # transformers serve says it with 400
            what = NAMED
        super().__init__(f"{str(error).rstrip('.')}: {what}")
        self.said = error.said


def _listed(choice: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The likeliest first tokens of an answer, and their log-probabilities."""
    content = (choice.get("logprobs") or {}).get("content") or [{}]
    for entry in content[0].get("top_logprobs") or ():
        chance = float(entry["logprob"])
        if not chance <= 1e-3:  # rounding may lift it above 0
            raise ValueError
        yield entry["token"], chance


def _text(value: Any) -> str | None:
    """A text of an answer; ValueError for anything else, and for halves of characters."""
    if value is not None and (not isinstance(value, str) or half_character(value)):
        raise ValueError
    return value


def address(url: str) -> str:
    """The address of a server up to /v1. Raises LaidError for one with a key or a question in it: it stands in cells."""
    try:
        parts = urlsplit(url.removesuffix("/").removesuffix("/chat/completions"))
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets, a port that is none
        known = False
    if not known or re.search(r"\s", url):
        shown = re.sub(r"[^/]*@|[?#].*", "...", url)  # without a key
        raise LaidError(f"--endpoint {shown}: expected an address as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise LaidError(
            f"--endpoint {parts.scheme}://{parts.hostname}...: holds more than an address, which would stand in the cells: a key goes"
            f" into the environment variable {KEY}"
        )
    return parts.geturl()


def key() -> str | None:
    """The key of the environment. Raises LaidError, without showing it, for one that no header can hold."""
    found = os.environ.get(KEY, "").strip()
    if not (found.isascii() and found.isprintable()):
        raise LaidError(f"{KEY}: holds characters that no key has")
    return found or None


def evaluate_endpoint(
    config: Settings,
    student: str,
    method: str,
    url: str,
    name: str,
    coco_root: str | Path,
    sets: Sequence[QuestionSet],
    out: str | Path,
    concurrent: int = 8,
    cost: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Ask the model `name` of a server every question of every set; write out/<size>.json each, as evaluate_cells does.

    student, method: under which names the cells stand in tables. Raises LaidError for a server that cannot be reached or refuses a
    question; cells of the sizes before it are written, answers are kept.
    """
    for part in sets:
        require_place(Path(out) / f"{part.size}.json", file=True)
    if method not in config.methods:
        raise LaidError(f"no method {method!r}; methods: {', '.join(config.methods)}")
    require_images(coco_root, sorted({p for part in sets for p in part.images}), [part.file for part in sets])
    endpoint = Endpoint(url, name, coco_root, config.evaluation, concurrent)
    about = {"url": endpoint.base, "model": name, "unknown": list(UNKNOWN)}
    records = [
        provenance.collect(
            "served",
            config,
            part.inputs(coco_root),
            student=student,
            method=method,
            size=part.size,
        )
        | {"endpoint": about}
        for part in sets
    ]

    def found(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Who answered, by the server's own word, and how it was asked."""
        by = {dumps(answer["by"], None): answer["by"] for answer in answers}
        return {"endpoint": about | {"answered_by": [by[text] for text in sorted(by)]}}

    return measure(
        config, student, method, sets, out, lambda _, part, done: endpoint.answers(part, done),
        label=config.models.labels.get(student) or name, records=records, by=None, found=found, cost=cost,
    )  # fmt: skip
