"""Batched, KV-cached generation with transformers on a CPU: the machine room of the embedded server.

One thread owns the model and the rows that decode. A turn of its loop runs the control calls that came in,
prefills what waits, lets the new rows join the old ones, and decodes one token for all: a new request waits for
one decoding step at most, never for another request to end.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from megatron_trd.rollout.embedded.batch import Batch, Request
from megatron_trd.rollout.embedded.lora import LoraModel
from megatron_trd.rollout.embedded.weights import ServedWeights

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
        on_progress: Callable[[Sequence[Request]], object],
        *,
        weight_version: str = "default",
        max_running_requests: int = 1024,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load the model; `start` begins to serve.

        Args:
            on_progress: called in the engine's thread with the requests that just got their finish reason, and with
                streamed ones after each token.
        """
        self.model_path, self.weight_version = model_path, weight_version
        transformers_logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        base = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa").eval()
        self.model, self.weights = LoraModel(base), ServedWeights(base)
        self.config = base.config
        self.vocab_size: int = base.config.vocab_size
        self.context_length: int = base.config.max_position_embeddings
        eos = base.generation_config.eos_token_id
        self.eos_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self.paused = False
        self.max_running_requests = max_running_requests
        self._on_progress = on_progress
        self._inbox: queue.SimpleQueue[Request | Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._held: list[Request] = []
        """Came while paused. Not in the engine yet as far as aborting all is concerned; SGLang's rule."""
        self._batch: Batch | None = None
        self._when_quiet: deque[Callable[[], None]] = deque()
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
        """Queue a request; `on_progress` will get it."""
        self._inbox.put(request)

    def call(self, action: Callable[[], T]) -> Future[T]:
        """Run `action` between two steps of the engine; what it raises reaches the caller."""
        future: Future[T] = Future()
        self._inbox.put(lambda: _resolve(future, action))
        return future

    # ------------------------------------------------------------- control calls, in the engine's thread

    def close(self) -> None:
        """Abort everything and end the thread."""
        self.resume()
        self.abort(None, "The server is shutting down.")
        self._closing = True

    @property
    def num_running(self) -> int:
        """Requests that hold KV cache."""
        return self._batch.num_live if self._batch else 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold none yet."""
        return len(self._waiting) + len(self._held)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens whose keys and values are cached."""
        return sum(len(r.prompt_ids) + len(r.token_ids) for r in self._running())

    @property
    def _may_decode(self) -> bool:
        return not self.paused and self.weights.trouble is None

    @property
    def is_flushed(self) -> bool:
        """Whether no cache is in use; while paused, requests that wait hold none."""
        return self.num_running == 0 and (self.paused or not self._waiting)

    def abort(self, rid: str | None, message: str = "Aborted") -> None:
        """End one request, or all of them (None) but those that came while paused, with what it has sampled so far."""
        present = [*self._running(), *self._waiting]
        chosen = present if rid is None else [r for r in (*present, *self._held) if r.rid == rid]
        for request in chosen:
            request.finish_reason = {"type": "abort", "message": message}
        self._waiting = deque(r for r in self._waiting if r.finish_reason is None)
        self._held = [r for r in self._held if r.finish_reason is None]
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
        self._waiting.extend(self._held)
        self._held = []

    def when_quiet(self, action: Callable[[], T]) -> Future[T]:
        """Run `action` as soon as nothing decodes (at once while paused); new requests wait meanwhile."""
        future: Future[T] = Future()
        self._when_quiet.append(lambda: _resolve(future, action))
        return future

    def update_weights(self, copy: Callable[[], None], version: str | None, *, flush: bool = True) -> Future[None]:
        """Let `copy` change the weights when nothing decodes, and name them `version`.

        Args:
            flush: refuse with ValueError while requests hold keys and values of the old weights.
        """

        def update() -> None:
            if flush and self.num_running:
                raise ValueError(
                    f"{self.num_running} requests hold keys and values of the old weights; "
                    "pause with mode retract or abort, or send flush_cache: false"
                )
            copy()
            self.weight_version = self.weight_version if version is None else version

        return self.when_quiet(update)

    def load_weights(self, directory: str, version: str | None, *, flush: bool = True) -> Future[None]:
        """Replace all weights by those of a directory."""

        def load() -> None:
            self.weights.copy_directory(directory)
            self.model_path = directory

        return self.update_weights(load, version, flush=flush)

    def release_memory(self, tags: Sequence[str]) -> None:
        """Free memory; see `ServedWeights`. Raises ValueError unless nothing runs."""
        if not self.is_flushed:
            raise ValueError("release_memory_occupation should be called only when server is idle.")
        self.weights.release_memory(tags)

    # ------------------------------------------------------------- the loop

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._closing:
                self._receive()
                while self._when_quiet and (self.paused or self._batch is None):
                    self._when_quiet.popleft()()
                if self._may_decode:
                    if not self._when_quiet:
                        self._admit()
                    self._step()
        finally:
            while not self._inbox.empty():
                item = self._inbox.get_nowait()
                if isinstance(item, Request):
                    self._held.append(item)
            self.resume()
            self.abort(None, "The engine has stopped.")

    def _receive(self) -> None:
        """Take what arrived; block when there is nothing else to do."""
        has_work = self._may_decode and (self._batch is not None or bool(self._waiting))
        timeout = 0.0 if has_work or self._when_quiet else None
        while True:
            try:
                item = self._inbox.get(timeout=timeout) if timeout != 0.0 else self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, Request):
                (self._held if self.paused else self._waiting).append(item)
                if timeout is None:
                    timeout = ARRIVAL_GAP_S
            else:
                item()
                timeout = 0.0

    def _admit(self) -> None:
        """Prefill the oldest requests that fit and let them join the batch."""
        chosen: list[Request] = []
        width, free = 0, self.max_running_requests - self.num_running
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
        news = [r for r in requests if r.finish_reason is not None or r.is_streamed]
        if news:
            self._on_progress(news)

    def _running(self) -> list[Request]:
        return [r for r in self._batch.requests if r.finish_reason is None] if self._batch else []


def _resolve(future: Future[T], action: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():  # its client hung up
        return
    try:
        result = action()
    except (ValueError, OSError, RuntimeError) as error:
        future.set_exception(error)
    except SafetensorError as error:  # torn files; it has no base but Exception
        future.set_exception(ValueError(str(error)))
    else:
        future.set_result(result)
