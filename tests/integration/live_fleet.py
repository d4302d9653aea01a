"""Servers whose weights tests change, and what must be true of them afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_trd.rollout.engine import SamplingParams
from megatron_trd.rollout.server_client import Server
from megatron_trd.rollout.server_process import ServerProcess
from megatron_trd.rollout.sglang import SGLangFleet
from megatron_trd.weight_sync.base import WeightSync
from megatron_trd.weight_sync.disk import DiskWeightSync
from megatron_trd.weight_sync.distributed import DistributedWeightSync
from megatron_trd.weight_sync.tensors import TensorWeightSync

PROMPT = (3, 20, 66, 70, 81)
RESPONSE = (85, 88, 12, 40, 7, 3, 66)
ENDLESS = SamplingParams(max_new_tokens=240, temperature=0.9, stop_token_ids=())
DEADLINE_S = 240.0
BUCKET_BYTES = 100_000
"""The tiny models need four."""
Weights = dict[str, Tensor]


def weights_of(directory: Path) -> Weights:
    """Read a directory of one file."""
    return load_file(directory / "model.safetensors")


def fleet_of(servers: Iterable[ServerProcess | str]) -> SGLangFleet:
    """Return a client that is quick to try again."""
    return SGLangFleet([s if isinstance(s, str) else s.url for s in servers], first_backoff_s=0.01)


def make_sync(transport: str, checkpoint: Path, fleet: SGLangFleet, directory: Path, **settings: Any) -> WeightSync:
    """Make a transport with small buckets."""
    if transport == "disk":
        return DiskWeightSync(directory, checkpoint, fleet, **settings)
    kind = {"tensor": TensorWeightSync, "distributed": DistributedWeightSync}[transport]
    return kind(checkpoint, fleet, bucket_bytes=BUCKET_BYTES, **settings)


def within_deadline(coroutine: Any) -> Any:
    """Run to the end, which must come."""
    return asyncio.run(asyncio.wait_for(coroutine, DEADLINE_S))


def expected_logprobs(directory: Path, weights: Weights | None = None) -> list[float]:
    """Return the log-probs of RESPONSE after PROMPT, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if weights is not None:
        model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    with torch.no_grad():
        logprobs = model(torch.tensor([[*PROMPT, *RESPONSE]])).logits[0].log_softmax(-1)
    return [logprobs[len(PROMPT) - 1 + i, token].item() for i, token in enumerate(RESPONSE)]


async def served_logprobs(server: Server) -> list[float]:
    """Return the same by one server, whatever the fleet thinks of it."""
    body = {
        "input_ids": [*PROMPT, *RESPONSE],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(PROMPT) - 1,
    }
    answer = await server.post("/generate", body, 60.0)
    return [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]


async def checksums(servers: Sequence[Server]) -> list[Any]:
    """Return the checksums of all servers."""
    return [dict(await server.weight_checksums()) for server in servers]


def processes_of(server: ServerProcess) -> list[psutil.Process]:
    """Return every process of a server."""
    guard = psutil.Process(server.process.pid)
    return [guard, *guard.children(recursive=True)]


def kill(server: ServerProcess) -> None:
    """End all of it at once, as a lost machine does, and wait until it is gone."""
    processes = processes_of(server)
    for process in processes:
        process.kill()
    _, alive = psutil.wait_procs(processes[1:], timeout=30)
    assert not alive
    server.process.wait(timeout=30)


def disturbed(weights: Weights, after: int, action: Callable[[], object]) -> Iterator[tuple[str, Tensor]]:
    """Do something before the tensor number `after` of an export."""
    for i, item in enumerate(weights.items()):
        if i == after:
            action()
        yield item
