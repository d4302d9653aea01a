"""Routes of the embedded server that change what it serves: weights, adapters, memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web

from megatron_trd.rollout.embedded.bodies import BodyError, error, field, outcome, read_json
from megatron_trd.rollout.embedded.engine import EmbeddedEngine
from megatron_trd.rollout.embedded.group import UpdateGroups
from megatron_trd.rollout.embedded.unpickling import FLATTENED_BUCKET, read_tensors
from megatron_trd.rollout.embedded.weights import MEMORY_TAGS

T = TypeVar("T")
DEFAULT_GROUP = "weight_update_group"


class UpdateRoutes:
    """Everything the trainer and the administrator ask for."""

    def __init__(self, engine: EmbeddedEngine, group_timeout_s: float, has_memory_saver: bool) -> None:
        """Remember the engine."""
        self.engine = engine
        self.groups = UpdateGroups(group_timeout_s)
        self._has_memory_saver = has_memory_saver
        self._is_open = False
        """Whether a weight-update session is."""

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Register the routes."""
        for handler in (
            self.begin_weight_update,
            self.end_weight_update,
            self.update_weights_from_disk,
            self.update_weights_from_tensor,
            self.update_weights_from_distributed,
            self.init_weights_update_group,
            self.destroy_weights_update_group,
            self.update_weight_version,
            self.load_lora_adapter,
            self.load_lora_adapter_from_tensors,
            self.unload_lora_adapter,
        ):
            router.add_post(f"/{handler.__name__}", handler)
        for handler in (
            self.weights_checker,
            self.get_weights_by_name,
            self.release_memory_occupation,
            self.resume_memory_occupation,
        ):
            for method in ("GET", "POST"):
                router.add_route(method, f"/{handler.__name__}", handler)

    # ------------------------------------------------------------- weights

    async def begin_weight_update(self, request: web.Request) -> web.Response:
        """Open a session: tensors may come, in as many calls as it takes."""
        selector = field(await read_json(request), "selector", str, "all")
        if selector not in ("target", "draft", "all"):
            raise BodyError(f"selector must be target, draft or all, not {selector!r}")
        await self._when_quiet()
        if self._is_open:
            return outcome(False, "a weight-update session is already open; call end_weight_update() first")
        self._is_open = True
        return outcome(True, "Success")

    async def end_weight_update(self, request: web.Request) -> web.Response:
        """Close it."""
        await read_json(request)
        await self._when_quiet()
        if not self._is_open:
            return outcome(False, "no weight-update session is open; call begin_weight_update() first")
        self._is_open = False
        return outcome(True, "Success")

    async def update_weights_from_disk(self, request: web.Request) -> web.Response:
        """Load a directory of safetensors; on 400 the old weights stay."""
        body = await read_json(request)
        path, version = field(body, "model_path", str), field(body, "weight_version", str, None)
        flush = field(body, "flush_cache", bool, True)
        await self._abort_if_asked(body)
        try:
            await self._in_engine(lambda: self.engine.load_weights(path, version, flush=flush))
        except (ValueError, OSError, RuntimeError) as problem:
            message = f"Failed to update weights from {path}: {problem}. The old weights stay."
            return outcome(False, message, num_paused_requests=0)
        return outcome(True, "Succeeded to update model weights.", num_paused_requests=0)

    async def update_weights_from_tensor(self, request: web.Request) -> web.Response:
        """Take tensors out of the body."""
        body = await read_json(request)
        payloads = field(body, "serialized_named_tensors", list)
        load_format = field(body, "load_format", str, None)
        if not self._is_open:
            return _outside_session("update_weights_from_tensor")
        try:
            named = await asyncio.to_thread(read_tensors, payloads, load_format)
        except ValueError as problem:
            return outcome(False, str(problem))
        return await self._take(body, named, "Success")

    async def update_weights_from_distributed(self, request: web.Request) -> web.Response:
        """Take tensors that rank 0 of a group broadcasts; all of them, also if they do not fit, to stay in step."""
        body = await read_json(request)
        names, dtypes, shapes = (field(body, name, list) for name in ("names", "dtypes", "shapes"))
        group, load_format = field(body, "group_name", str, DEFAULT_GROUP), field(body, "load_format", str, None)
        if not self._is_open:
            return _outside_session("update_weights_from_distributed")
        try:
            named = await self.groups.receive(group, names, dtypes, shapes, load_format == FLATTENED_BUCKET)
        except ValueError as problem:
            return outcome(False, f"Failed to receive weights: {problem}")
        return await self._take(body, named, "Succeeded to update parameter online.")

    async def _take(self, body: Mapping[str, Any], named: Any, message: str) -> web.Response:
        version, flush = field(body, "weight_version", str, None), field(body, "flush_cache", bool, True)
        await self._abort_if_asked(body)
        try:
            await self._in_engine(
                lambda: self.engine.update_weights(lambda: self.engine.weights.copy(named), version, flush=flush)
            )
        except (ValueError, RuntimeError) as problem:
            return outcome(False, f"Failed to update weights: {problem}")
        return outcome(True, message + (f" Weight version updated to {version}." if version is not None else ""))

    async def init_weights_update_group(self, request: web.Request) -> web.Response:
        """Join a trainer's process group; answers when all members are there, or too late."""
        body = await read_json(request)
        name, backend = field(body, "group_name", str, DEFAULT_GROUP), field(body, "backend", str, "nccl")
        address, port = field(body, "master_address", str), field(body, "master_port", int)
        rank, world_size = field(body, "rank_offset", int), field(body, "world_size", int)
        try:
            await self.groups.join(name, backend, address, port, rank, world_size)
        except ValueError as problem:
            return outcome(False, f"Failed to initialize custom process group: {problem}.")
        return outcome(True, "Succeeded to initialize custom process group.")

    async def destroy_weights_update_group(self, request: web.Request) -> web.Response:
        """Leave it."""
        try:
            await self.groups.leave(field(await read_json(request), "group_name", str, DEFAULT_GROUP))
        except ValueError as problem:
            return outcome(False, str(problem))
        return outcome(True, "Succeeded to destroy custom process group.")

    async def update_weight_version(self, request: web.Request) -> web.Response:
        """Rename the weights; aborts everything unless told otherwise, as SGLang does."""
        body = await read_json(request)
        version = field(body, "new_version", str)
        await self._abort_if_asked(body, default=True)

        def rename() -> None:
            self.engine.weight_version = version

        await self._call(rename)
        return outcome(True, f"Weight version updated to {version}", new_version=version)

    async def weights_checker(self, request: web.Request) -> web.Response:
        """Checksums of all weights, as of one rank."""
        action = field(await _optional_json(request), "action", str, "checksum")
        if action != "checksum":
            return outcome(False, f"Unsupported action={action!r}; the embedded server knows checksum")
        try:
            checksums = await self._call(lambda: self.engine.weights.checksums())
        except ValueError as problem:
            return outcome(False, str(problem))
        whole = hashlib.sha256("".join(name + checksums[name] for name in sorted(checksums)).encode()).hexdigest()
        place = {"role": "target", "rank": 0, "size": 1}
        place |= {f"{kind}_{what}": value for kind in ("tp", "dp", "pp") for what, value in (("rank", 0), ("size", 1))}
        rank = {"checksums": checksums, "per_gpu_checksum": whole, "parallelism_info": [place]}
        engine_sum = hashlib.sha256(whole.encode()).hexdigest()
        return outcome(True, "Success.", ranks=[rank], per_engine_checksum=engine_sum)

    async def get_weights_by_name(self, request: web.Request) -> web.Response:
        """The first rows of one weight, under its Hugging Face name."""
        body = await read_json(request)
        name, num = field(body, "name", str), field(body, "truncate_size", int, 100)
        rows = await self._call(lambda: self.engine.weights.rows(name, num))
        return error("Get parameter by name failed", 400) if rows is None else web.json_response(rows)

    # ------------------------------------------------------------- adapters

    async def load_lora_adapter(self, request: web.Request) -> web.Response:
        """Add an adapter from a directory."""
        body = await read_json(request)
        name, path = field(body, "lora_name", str), field(body, "lora_path", str)
        return await self._change_adapters(lambda: self.engine.model.load_directory(name, path))

    async def load_lora_adapter_from_tensors(self, request: web.Request) -> web.Response:
        """Add an adapter from the body."""
        body = await read_json(request)
        name, config = field(body, "lora_name", str), field(body, "config_dict", dict)
        payloads = field(body, "serialized_named_tensors", list)
        load_format = field(body, "load_format", str, None)

        def load() -> None:
            self.engine.model.load(name, "__tensor__", config, dict(read_tensors(payloads, load_format)))

        return await self._change_adapters(load)

    async def unload_lora_adapter(self, request: web.Request) -> web.Response:
        """Forget an adapter."""
        name = field(await read_json(request), "lora_name", str)
        return await self._change_adapters(lambda: self.engine.model.unload(name))

    async def _change_adapters(self, action: Callable[[], None]) -> web.Response:
        message = ""
        try:
            await self._call(action)
        except (ValueError, OSError, RuntimeError) as problem:
            message = str(problem)
        held = {name: adapter.path for name, adapter in self.engine.model.adapters.items()}
        body = {"success": not message, "error_message": message, "loaded_adapters": held}
        return web.json_response(body, status=400 if message else 200)

    # ------------------------------------------------------------- memory

    async def release_memory_occupation(self, request: web.Request) -> web.Response:
        """Free memory; nothing may run."""
        tags = self._tags(await _optional_json(request))
        await self._call(lambda: self.engine.release_memory(tags))
        return web.json_response(None)

    async def resume_memory_occupation(self, request: web.Request) -> web.Response:
        """Take it again; weights must be sent afterwards."""
        tags = self._tags(await _optional_json(request))
        await self._call(lambda: self.engine.weights.resume_memory(tags))
        return web.json_response(None)

    def _tags(self, body: Mapping[str, Any]) -> list[str]:
        if not self._has_memory_saver:
            raise ValueError("memory stays where it is: start the server with --enable-memory-saver")
        tags = field(body, "tags", list, None) or list(MEMORY_TAGS)
        if not set(tags) <= set(MEMORY_TAGS):
            raise ValueError(f"tags {tags} must be among {', '.join(MEMORY_TAGS)}")
        return tags

    # ------------------------------------------------------------- the engine's thread

    async def _abort_if_asked(self, body: Mapping[str, Any], default: bool = False) -> None:
        if field(body, "abort_all_requests", bool, default):
            await self._call(lambda: self.engine.abort(None))

    async def _when_quiet(self) -> None:
        await self._in_engine(lambda: self.engine.when_quiet(lambda: None))

    async def _in_engine(self, start: Callable[[], Any]) -> Any:
        """Start something in the engine's thread and wait until it is done."""
        return await asyncio.wrap_future(await self._call(start))

    async def _call(self, action: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self.engine.call(action))


async def _optional_json(request: web.Request) -> Mapping[str, Any]:
    return await read_json(request) if request.can_read_body else {}


def _outside_session(route: str) -> web.Response:
    return outcome(False, f"{route} must run between begin_weight_update() and end_weight_update()")
