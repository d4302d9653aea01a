"""SGLang's HTTP API spoken with the standard library, and what its answers must be, computed with transformers alone.

A pytest plugin of the conformance tests: `engine` is each kind of server in turn, `partner` a second, embedded one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TIMEOUT_S = 60
PROMPT = [3, 20, 66, 70, 81, 85, 88]
CONTEXT = 2048
ENDLESS = {"temperature": 0.9, "max_new_tokens": 1900, "ignore_eos": True}
"""Seconds of work, so that it is still under way when the next call arrives, however busy the machine is."""
LONG = {**ENDLESS, "max_new_tokens": 500}
"""The same for what must come to its end in the test."""
Weights = Mapping[str, Tensor]

DIFFERENCES = {
    "dies": {
        "sglang": "an id outside the vocabulary, an empty prompt in a batch, a wrong shape (also in a directory) or a "
        "payload that is no pickle end the scheduler and with it the server; never sent here",
    },
    "unpaused": {
        "sglang": "an update from disk that finds the scheduler not quite idle fails an assertion, which ends the "
        "server: pause and flush first"
    },
    "seed": {"sglang": "sampling_seed acts with --enable-deterministic-inference alone, which no CPU backend has"},
    "unfit": {"sglang": "parameters of an unknown name are skipped, HTTP 200"},
    "sampling_types": {"sglang": "an unknown sampling key or a value of a wrong type is HTTP 500 without a body"},
    "paused_health": {
        "sglang": "/ready is 503 while paused; so is /health, after 20 s, and then /ready until the next good /health"
    },
    "prefix": {"sglang": "/abort_request with the rid of a request takes all whose rid begins with it along"},
    "patience": {"sglang": "/flush_cache with a timeout counts retracted requests as running; without one it does not"},
    "fused": {"sglang": "weights are stored as qkv_proj and gate_up_proj, and 64 rows of the vocabulary at a time"},
    "by_name": {"sglang": "/get_weights_by_name knows Llama alone: HTTP 400 for Qwen3"},
    "text": {"sglang": "the text goes on from the prompt's: a space that a tokenizer drops at a text's start is there"},
    "greedy": {
        "sglang": "top_k=1 is taken as temperature 0: where all of a batch is so, log-probs are at temperature 1"
    },
    "context": {"sglang": "the last two places of the context stay empty: finish_reason length comes so much earlier"},
    "told": {"sglang": "tells no vocab_size, and context_length in /server_info only when it was a flag"},
}
"""What is SGLang's nature (0.5.21 on a CPU) and no fault of the embedded server: what differs, of whom, and how."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A server under test."""

    kind: str
    url: str

    def differs(self, what: str) -> bool:
        """Whether this kind of server is named in DIFFERENCES[what]."""
        return self.kind in DIFFERENCES[what]

    def send(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        raw: bytes | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> tuple[int, Any]:
        """Send JSON, or `raw` bytes; return the status and the decoded answer."""
        try:
            with self._open(path, body, method, raw, timeout_s) as response:
                return response.status, _decoded(response)
        except urllib.error.HTTPError as error:
            return error.code, _decoded(error)

    def get(self, path: str) -> Any:
        """Return what a GET with status 200 answers."""
        status, answer = self.send(path, method="GET")
        assert status == 200, (path, status, answer)
        return answer

    def post(self, path: str, /, **body: Any) -> Any:
        """Return what a POST with status 200 answers."""
        status, answer = self.send(path, body)
        assert status == 200, (path, status, answer)
        return answer

    def generate(self, ids: Any, sampling: Any, **more: Any) -> Any:
        """Return the answer of `/generate`, with log-probs."""
        return self.post("/generate", input_ids=ids, sampling_params=sampling, return_logprob=True, **more)

    def stream(self, ids: Sequence[int], sampling: Mapping[str, Any], **more: Any) -> Iterator[dict[str, Any]]:
        """Yield the events of a streamed `/generate`; the last line must be `[DONE]`."""
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True, "return_logprob": True, **more}
        with self._open("/generate", body, "POST", None, TIMEOUT_S) as response:
            assert response.headers.get_content_type() == "text/event-stream"
            last = ""
            for line in filter(None, (line.decode().strip() for line in response)):
                assert line.startswith("data: ") and last != "[DONE]", line
                last = line.removeprefix("data: ")
                if last != "[DONE]":
                    yield json.loads(last)
            assert last == "[DONE]"

    def _open(self, path: str, body: Any, method: str, raw: bytes | None, timeout_s: float) -> Any:
        data = (
            None if method == "GET" else raw if raw is not None else json.dumps({} if body is None else body).encode()
        )
        headers = {"Content-Type": "application/json"}
        return urllib.request.urlopen(
            urllib.request.Request(self.url + path, data=data, headers=headers, method=method), timeout=timeout_s
        )

    @contextmanager
    def paused(self, mode: str) -> Iterator[None]:
        """Pause for the length of a `with` block."""
        self.post("/pause_generation", mode=mode)
        try:
            yield
        finally:
            self.post("/continue_generation")

    @contextmanager
    def update(self) -> Iterator[None]:
        """Pause, flush and open a weight-update session for the length of a `with` block."""
        with self.paused("retract"):
            self.post("/flush_cache")
            self.post("/begin_weight_update", selector="target")
            try:
                yield
            finally:
                self.post("/end_weight_update")

    def load(self, directory: Path, version: str) -> None:
        """Take the weights of a directory."""
        with self.paused("retract"):
            self.post("/flush_cache")
            self.post("/update_weights_from_disk", model_path=str(directory), weight_version=version)

    def checksums(self) -> dict[str, str]:
        """Return the first 16 hex digits of the SHA-256 of each parameter."""
        (rank,) = self.post("/weights_checker", action="checksum")["ranks"]
        return {name: value[:16] for name, value in rank["checksums"].items()}

    def expected_checksums(self, weights: Weights) -> dict[str, str]:
        """Return what `checksums` must be when the server holds `weights` (Hugging Face names) in float32."""
        stored = {name: weight.float() for name, weight in weights.items()}
        if self.differs("fused"):
            for fused, parts in (
                ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
                ("gate_up_proj", ("gate_proj", "up_proj")),
            ):
                for name in [name for name in stored if parts[0] in name]:
                    rows = [stored.pop(name.replace(parts[0], part)) for part in parts]
                    stored[name.replace(parts[0], fused)] = torch.cat(rows)
            words = stored["model.embed_tokens.weight"]
            stored["model.embed_tokens.weight"] = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % 64))
        return {n: hashlib.sha256(w.contiguous().numpy().tobytes()).hexdigest()[:16] for n, w in stored.items()}


def _decoded(response: Any) -> Any:
    text = response.read().decode()
    return json.loads(text) if response.headers.get_content_type() == "application/json" else text


def in_background(action: Any, *args: Any, **kwargs: Any) -> Future[Any]:
    """Call in a thread; ask its result with a deadline."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(action, *args, **kwargs)
    pool.shutdown(wait=False)
    return future


class Running:
    """A streamed request that has begun to decode and is far from its end."""

    def __init__(self, engine: Engine, rid: str, sampling: Mapping[str, Any] = ENDLESS, **more: Any) -> None:
        """Send it and wait for its first token."""
        self._events = engine.stream(PROMPT, sampling, rid=rid, **more)
        next(self._events)

    def finish(self) -> dict[str, Any]:
        """Wait for its end; return the last event."""
        *_, last = self._events
        assert last["meta_info"]["finish_reason"] is not None, last
        return last


# ------------------------------------------------------------------ references


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """log softmax(logits / T) of ids[1:], one plain forward in float32."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double() / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def greedy(model: Any, ids: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers' own `generate` continues with."""
    given = torch.tensor([ids])
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=num_tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


def random_prompts(num: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 3 to 30 ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 90, (3 + 5 * i % 29,), generator=generator).tolist() for i in range(num)]


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of a model directory."""
    return load_file(directory / "model.safetensors")


# ------------------------------------------------------------------ payloads


def pickled(content: Any) -> str:
    """Encode tensors as SGLang's wire has them: base64 of a pickle with the data inside."""
    return base64.b64encode(pickle.dumps(content, protocol=4)).decode()


def as_bytes(weights: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors of any dtype into one of bytes."""
    return torch.cat([weight.contiguous().flatten().view(torch.uint8) for weight in weights])


def bucket(weights: Weights) -> dict[str, Any]:
    """Return a `flattened_bucket`: one tensor of bytes, and where in it each weight lies."""
    metadata, end = [], 0
    for name, weight in weights.items():
        start, end = end, end + weight.nbytes
        place = {"start_idx": start, "end_idx": end, "numel": weight.nbytes}
        metadata.append(SimpleNamespace(name=name, shape=weight.shape, dtype=weight.dtype, **place))
    return {"flattened_tensor": as_bytes(weights.values()), "metadata": metadata}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: PEFT's configuration and tensors, and the same as merged weights."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    merged: dict[str, Tensor]

    def save(self, directory: Path) -> Path:
        """Write it as PEFT does."""
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, directory / "adapter_model.safetensors")
        return directory


def make_adapter(weights: Weights, seed: int, rank: int = 4, alpha: int = 8) -> Adapter:
    """Disturb every projection by alpha / rank * B A."""
    generator = torch.Generator().manual_seed(seed)
    tensors, merged, modules = {}, {name: w.float() for name, w in weights.items()}, set()
    for name in sorted(merged):
        if "_proj" not in name:
            continue
        a, b = (
            torch.randn(rank, merged[name].shape[1], generator=generator),
            torch.randn(merged[name].shape[0], rank, generator=generator),
        )
        a, b = 0.1 * a, 0.1 * b
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        merged[name] = merged[name] + alpha / rank * b @ a
        modules.add(name.split(".")[-2])
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    return Adapter(config | {"target_modules": sorted(modules), "lora_dropout": 0.0}, tensors, merged)
