"""The LoRA adapter alone: servers hold it beside the base weights, which are never touched."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_trd.config.schema import LoraConfig
from megatron_trd.log import get_logger
from megatron_trd.weight_sync.base import ServerError, SyncReport, WeightServer, WeightServers
from megatron_trd.weight_sync.payload import inline
from megatron_trd.weight_sync.session import WeightUpdate, exhausting

logger = get_logger(__name__)

NUM_KEPT = 2
"""Adapters a server holds: the new one, and the one before it, which requests under way name."""


def adapter_config(lora: LoraConfig, base: str | Path, names: Iterable[str]) -> dict[str, Any]:
    """Return PEFT's `adapter_config.json` for tensors of these (PEFT) names."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": sorted({name.split(".")[-3] for name in names}),
        "bias": "none",
        "fan_in_fan_out": False,
    }


class AdapterWeightSync:
    """Loads each version as an adapter of its own. Servers need no rest: a request names the adapter it wants."""

    def __init__(
        self,
        lora: LoraConfig,
        base: str | Path,
        servers: WeightServers,
        *,
        timeout_s: float = 600.0,
    ) -> None:
        """Remember what to whom.

        Args:
            base: Hugging Face directory of the weights that the adapter belongs to.
            timeout_s: deadline of one publication.
        """
        self.lora, self.base, self.servers, self.timeout_s = lora, base, servers, timeout_s
        self._held: dict[str, list[str]] = {}

    async def publish(
        self, weights: Iterable[tuple[str, Tensor]], version: str, only: Collection[str] | None = None
    ) -> SyncReport:
        """Load, and have requests name it; `weights` has PEFT's names. See `WeightSync.publish`."""
        name = f"trd-{version}"
        update = WeightUpdate(
            self.servers,
            version,
            timeout_s=self.timeout_s,
            at_rest=False,
            in_session=False,
            adapter=name,
            only=only,
        )
        with exhausting(weights) as export:
            tensors = dict(export)
        update.num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        config, payload = adapter_config(self.lora, self.base, tensors), inline(tensors)
        async with update:
            await update.each(lambda server: self._load(server, name, config, payload, update))
        await update.each(lambda server: self._forget(server, name, update.left_s()))
        return update.report()

    async def _load(
        self, server: WeightServer, name: str, config: Mapping[str, Any], payload: str, update: WeightUpdate
    ) -> None:
        payloads = [payload] * server.tp_size
        try:
            await server.load_adapter(name, config, payloads, update.share_s())
        except ServerError as error:
            try:  # an earlier publication may have left one of this name
                await server.unload_adapter(name, update.share_s())
                await server.load_adapter(name, config, payloads, update.share_s())
            except ServerError:
                raise ServerError(
                    f"{error}; --weight-sync adapter: start the server with --enable-lora --max-lora-rank "
                    f"{config['r']} --lora-target-modules {' '.join(config['target_modules'])}, or by "
                    f"tools/launch_sglang.py --lora-rank {config['r']}"
                ) from error

    async def _forget(self, server: WeightServer, newest: str, timeout_s: float) -> None:
        """Drop adapters that no request names any more."""
        held = self._held.setdefault(server.url, [])
        held[:] = [name for name in held if name != newest] + [newest]
        while len(held) > NUM_KEPT:
            try:
                await server.unload_adapter(old := held.pop(0), timeout_s)
            except ServerError as error:
                logger.warning("%s keeps adapter %s: %s", server.url, old, error)

    async def close(self) -> None:
        """Nothing is held."""
