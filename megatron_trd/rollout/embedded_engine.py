"""Batched, KV-cached generation with transformers on a CPU: the machine room of the embedded server.

One thread owns the model and the rows that decode. A turn of its loop runs the control calls that came in,
prefills what waits, lets the new rows join the old ones, and decodes one token for all: a new request waits for
one decoding step at most, never for another request to end.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from megatron_trd.rollout.embedded_batch import Batch, Request

T = TypeVar("T")
PauseMode = Literal["abort", "retract", "in_place"]

MAX_PREFILL_TOKENS = 65536
MAX_SCORED_LOGITS = 1 << 26
"""Entries of the logits that scoring prompts may hold at once (256 MiB)."""
ARRIVAL_GAP_S = 0.002
"""An idle engine starts its first prefill when no further request has come for this long."""


class EmbeddedEngine:
    """A model, its thread, and the requests in it.

    `submit` and `call` may be used from any thread. Everything else runs in the engine's own: pass it to `call`.
    """

    def __init__(
        self,
        model_path: str,
        on_finished: Callable[[Sequence[Request]], object],
        *,
        weight_version: str = "default",
        max_running_requests: int = 1024,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the model; `start` begins to serve.

        Args:
            on_finished: called in the engine's thread with the requests that just got their finish reason.
        """
        self.model_path, self.weight_version = model_path, weight_version
        transformers_logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa").eval()
        self.vocab_size: int = self.model.config.vocab_size
        self.context_length: int = self.model.config.max_position_embeddings
        eos = self.model.generation_config.eos_token_id
        self.eos_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self.paused = False
        self._on_finished = on_finished
        self._max_running_requests = max_running_requests
        self._inbox: queue.SimpleQueue[Request | Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._batch: Batch | None = None
        self._when_quiet: Callable[[], None] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Queue a request; `on_finished` will get it."""
        self._inbox.put(request)

    def call(self, action: Callable[[], T]) -> Future[T]:
        """Run `action` between two steps of the engine; ValueError and OSError reach the caller."""
        future: Future[T] = Future()
        self._inbox.put(lambda: _resolve(future, action))
        return future

    # ------------------------------------------------------------- control calls, in the engine's thread

    def close(self) -> None:
        """Abort everything and end the thread."""
        self.abort(None, "The server is shutting down.")
        self._closing = True

    @property
    def num_running(self) -> int:
        """Requests that hold KV cache."""
        return self._batch.num_live if self._batch else 0

    @property
    def is_flushed(self) -> bool:
        """Whether no cache is in use; while paused, requests that wait hold none."""
        return self.num_running == 0 and (self.paused or not self._waiting)

    def abort(self, rid: str | None, message: str = "Aborted") -> None:
        """End one request, or all of them (None), with what it has sampled so far."""
        chosen = [r for r in (*self._running(), *self._waiting) if rid is None or r.rid == rid]
        for request in chosen:
            request.finish_reason = {"type": "abort", "message": message}
        self._waiting = deque(r for r in self._waiting if r.finish_reason is None)
        self._report(chosen)

    def pause(self, mode: PauseMode) -> None:
        """Stop decoding. `retract` drops the cache and reads prompt and response again later; `in_place` keeps it."""
        self.paused = True
        if mode == "abort":
            self.abort(None)
        if mode in ("abort", "retract"):
            retracted = self._running()
            for request in retracted:
                request.num_retractions += 1
            self._waiting.extendleft(reversed(retracted))
            self._batch = None

    def resume(self) -> None:
        """Go on decoding."""
        self.paused = False

    def load_weights(self, directory: str, version: str | None) -> Future[None]:
        """Replace all weights as soon as nothing decodes (at once while paused); new requests wait meanwhile."""
        future: Future[None] = Future()

        def load() -> None:
            copy_weights(self.model, directory)
            self.model_path = directory
            self.weight_version = self.weight_version if version is None else version

        if self._when_quiet is not None:
            future.set_exception(ValueError("another weight update is under way"))
        else:
            self._when_quiet = lambda: _resolve(future, load)
        return future

    def checksums(self) -> dict[str, str]:
        """Return a SHA-256 of every parameter's bytes."""
        return {
            name: hashlib.sha256(p.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, p in self.model.named_parameters()
        }

    # ------------------------------------------------------------- the loop

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._closing:
                self._receive()
                if self._when_quiet is not None and (self.paused or self._batch is None):
                    action, self._when_quiet = self._when_quiet, None
                    action()
                if not self.paused:
                    if self._when_quiet is None:
                        self._admit()
                    self._step()
        finally:
            while not self._inbox.empty():
                item = self._inbox.get_nowait()
                if isinstance(item, Request):
                    self._waiting.append(item)
            self.abort(None, "The engine has stopped.")

    def _receive(self) -> None:
        """Take what arrived; block when there is nothing else to do."""
        has_work = not self.paused and (self._batch is not None or bool(self._waiting))
        timeout = 0.0 if has_work or self._when_quiet is not None else None
        while True:
            try:
                item = self._inbox.get(timeout=timeout) if timeout != 0.0 else self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, Request):
                self._waiting.append(item)
                if timeout is None:
                    timeout = ARRIVAL_GAP_S
            else:
                item()
                timeout = 0.0

    def _admit(self) -> None:
        """Prefill the oldest requests that fit and let them join the batch."""
        chosen: list[Request] = []
        width, free = 0, self._max_running_requests - self.num_running
        while self._waiting and len(chosen) < free:
            request = self._waiting[0]
            widest = max(width, len(request.prompt_ids) + len(request.token_ids))
            size = (len(chosen) + 1) * widest
            too_large = size > MAX_PREFILL_TOKENS or (request.is_scored and size * self.vocab_size > MAX_SCORED_LOGITS)
            if chosen and (too_large or request.is_scored != chosen[0].is_scored):
                break
            width = widest
            chosen.append(self._waiting.popleft())
        if not chosen:
            return
        arrived = Batch(self.model, chosen, self.weight_version)
        self._report(chosen)
        arrived.compact()
        if self._batch is None:
            self._batch = arrived if arrived.requests else None
        elif arrived.requests:
            self._batch.compact()
            self._batch.join(arrived)

    def _step(self) -> None:
        if self._batch is None:
            return
        live = self._running()
        if live:
            self._batch.step(self.weight_version)
            self._report(live)
        num_live = self._batch.num_live
        if num_live == 0:
            self._batch = None
        elif num_live <= 0.75 * len(self._batch.requests):
            self._batch.compact()

    def _report(self, requests: Sequence[Request]) -> None:
        finished = [r for r in requests if r.finish_reason is not None]
        if finished:
            self._on_finished(finished)

    def _running(self) -> list[Request]:
        return [r for r in self._batch.requests if r.finish_reason is None] if self._batch else []


def _resolve(future: Future[T], action: Callable[[], T]) -> None:
    try:
        result = action()
    except (ValueError, OSError, SafetensorError) as error:
        future.set_exception(error)
    else:
        future.set_result(result)


@torch.no_grad()
def copy_weights(model: torch.nn.Module, directory: str) -> None:
    """Copy every weight from a directory of safetensors; all names and shapes are checked before the first copy.

    Raises:
        ValueError: files, names or shapes are not those of the model, which then keeps its weights.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"no *.safetensors in {directory}")
    parameters = dict(model.named_parameters())
    tied = {"lm_head.weight"} - parameters.keys()
    found: dict[str, Path] = {}
    problems: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                if name in tied:
                    continue
                shape = tuple(shard.get_slice(name).get_shape())
                if name not in parameters:
                    problems.append(f"unknown {name}")
                elif shape != tuple(parameters[name].shape):
                    problems.append(f"{name} is {shape}, not {tuple(parameters[name].shape)}")
                elif name in found:
                    problems.append(f"{name} is in {found[name].name} and in {file.name}")
                found[name] = file
    problems += [f"missing {name}" for name in sorted(parameters.keys() - found.keys())]
    if problems:
        raise ValueError(f"weights in {directory} do not fit: {_shortened(problems)}")
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                if name not in tied:
                    parameters[name].copy_(shard.get_tensor(name))


def _shortened(problems: Iterable[str], num: int = 4) -> str:
    first: list[Any] = list(problems)
    return ", ".join(first[:num]) + (f" and {len(first) - num} more" if len(first) > num else "")
