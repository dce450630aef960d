"""A test double of vLLM's HTTP protocol over a tiny model, made from its documentation; it can
misbehave.

It implements the part of /v1/completions that served teachers use: token ids in,
``prompt_logprobs`` out. The first entry of a prompt is null; each other one is an object with the k
likeliest ids and the prompt's own, each with its log-probability (float32), its rank in the
vocabulary from 1, and its text.
"""

import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import transformers

SLOW = 0.6  # seconds that a slow answer takes


class Double(ThreadingHTTPServer):
    """Serves the causal LM in ``folder`` as ``name``. The next completion requests fail, one for
    each of ``faults``; ``asked`` has the bodies of all requests.
    """

    daemon_threads = True
    max_logprobs, max_model_len = 20, 64
    api_key: str | None = None
    retry_after = "0.02"
    other: Path  # swapped in behind the name

    def __init__(self, folder: Path, name: str = "tiny"):
        super().__init__(("127.0.0.1", 0), Answering)
        self.name, self.faults, self.asked = name, list[str](), list[dict[str, Any]]()
        self.keys = set[str | None]()
        self.hung, self.let_go = threading.Event(), threading.Event()  # for requests that hang
        self.lock = threading.Lock()
        self.serve(folder)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, folder: Path) -> None:
        """Serve the model in ``folder`` under the name from now on."""
        self.folder = folder
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that leave."""

    def said_of(self, prompt: list[int], k: int) -> list[dict[str, Any] | None]:
        with self.lock, torch.inference_mode():
            logits = self.model(torch.tensor([prompt])).logits[0].float()
        log_probs = torch.log_softmax(logits, -1)
        entries: list[dict[str, Any] | None] = [None]
        for own, row in zip(prompt[1:], log_probs[:-1], strict=True):
            ids = row.topk(k).indices
            ranks = {own: int((row >= row[own]).sum())}
            ranks |= {number: rank for rank, number in enumerate(ids.tolist(), start=1)}
            entry = {
                str(number): {
                    "logprob": row[number].item(),
                    "rank": rank,
                    "decoded_token": self.tokenizer.decode([number]),
                }
                for number, rank in ranks.items()
            }
            entries.append(entry)
        return entries


class Refused(Exception):
    """An error with its HTTP status and body."""


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer's body waits 40 ms
    server: Double

    def do_GET(self) -> None:
        if self.path == "/version":
            self.send(200, {"version": "0.11.0"})
        elif not self.allowed():
            self.send(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            card = {"id": self.server.name, "object": "model", "root": "org/tiny"}
            card |= {"max_model_len": self.server.max_model_len, "owned_by": "vllm"}
            self.send(200, {"object": "list", "data": [card]})
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else ""
        if not self.allowed():
            self.send(401, {"error": "Unauthorized"})
            return
        if fault == "drop":
            self.close_connection = True
            return
        if fault.isdecimal():
            later = {"Retry-After": self.server.retry_after}
            self.send(int(fault), _error(int(fault), "later"), later)
            return
        if fault == "hang":
            self.server.hung.set()
            self.server.let_go.wait(60)
        if fault == "swap":
            self.server.serve(self.server.other)
        if fault == "slow":
            time.sleep(SLOW)
        try:
            answer = self.completions(body)
        except Refused as refused:
            status, message = refused.args
            self.send(status, _error(status, message))
            return
        spoil(answer, fault)
        self.send(200, answer, cut=fault == "cut")

    def allowed(self) -> bool:
        self.server.keys.add(given := self.headers.get("Authorization"))
        return self.server.api_key is None or given == f"Bearer {self.server.api_key}"

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        server, prompts, k = self.server, body["prompt"], body["prompt_logprobs"]
        if body["model"] != server.name:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        if k > server.max_logprobs:
            most = server.max_logprobs
            raise Refused(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {most}"
            )
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        for prompt in prompts:
            if len(prompt) + body["max_tokens"] > server.max_model_len:
                raise Refused(400, f"maximum context length is {server.max_model_len} tokens")
        choices = [
            {
                "index": index,
                "text": "a",
                "logprobs": None,
                "finish_reason": "length",
                "prompt_logprobs": server.said_of(prompt, k),
                "prompt_token_ids": prompt if body.get("return_token_ids") else None,
            }
            for index, prompt in enumerate(prompts)
        ]
        read = sum(map(len, prompts))
        usage = {"prompt_tokens": read, "completion_tokens": len(prompts)}
        about = {"id": "cmpl-1", "object": "text_completion", "model": server.name}
        return about | {"choices": choices, "usage": usage}

    def send(
        self,
        status: int,
        body: dict[str, Any],
        headers: dict[str, str] | None = None,
        cut: bool = False,
    ) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def _error(status: int, message: str) -> dict[str, Any]:
    told = {"message": message, "type": "BadRequestError", "param": None, "code": status}
    return {"error": told}


def spoil(answer: dict[str, Any], fault: str) -> None:
    """Make the answer wrong in one way, or reorder it."""
    choices = answer["choices"]
    entries = choices[0]["prompt_logprobs"]
    value = next(iter(entries[2].values())) if len(entries) > 2 else {}
    if fault == "reordered":
        choices.reverse()
    elif fault == "count":
        answer["usage"]["prompt_tokens"] += 1
    elif fault == "tokens":
        choices[0]["prompt_token_ids"] = [*choices[0]["prompt_token_ids"][1:], 1]
    elif fault == "short":
        del entries[-1]
    elif fault == "shifted":
        del entries[1]
        entries.append(entries[-1])
    elif fault == "above":
        value["logprob"] = 0.5
    elif fault == "nan":
        value["logprob"] = math.nan
    elif fault == "rank":
        value["rank"] = None
    elif fault == "ids":
        for number, other in enumerate([*entries[2]][1:]):
            entries[2][str(999_999 + number)] = entries[2].pop(other)
    elif fault == "few":
        for number in [*entries[2]][2:]:
            del entries[2][number]
    elif fault == "hole":
        entries[2] = {n: said for n, said in entries[2].items() if said["rank"] != 3}
    elif fault == "null":
        entries[2] = None
    elif fault == "none":
        del choices[0]["prompt_logprobs"]
    elif fault == "index":
        choices[0]["index"] = 7


@contextmanager
def served(folder: Path) -> Iterator[Double]:
    """Serve the model in ``folder``."""
    double = Double(folder)
    try:
        yield double
    finally:
        double.shutdown()
        double.server_close()
