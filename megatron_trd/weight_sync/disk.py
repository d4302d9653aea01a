"""Weights by way of a directory that trainer and servers share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_trd.weight_sync.base import SyncReport, WeightServers
from megatron_trd.weight_sync.session import WeightUpdate, exhausting

MAX_SHARD_BYTES = 2 << 30
_INDEX = "model.safetensors.index.json"
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")


class DiskWeightSync:
    """Writes each version to its own directory and has every server load it."""

    def __init__(
        self,
        directory: str | Path,
        template_dir: str | Path,
        servers: WeightServers,
        *,
        timeout_s: float = 600.0,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        num_kept: int = 2,
        check_equal: bool = False,
    ) -> None:
        """Remember where and to whom.

        Args:
            directory: seen under the same path by the trainer and by all servers.
            template_dir: Hugging Face directory whose config and tokenizer accompany the weights.
            timeout_s: deadline of one publication.
            num_kept: versions kept in `directory`.
            check_equal: compare the servers' checksums after each publication.
        """
        self.directory, self.template_dir, self.servers = Path(directory).resolve(), Path(template_dir), servers
        self.timeout_s, self.max_shard_bytes, self.num_kept = timeout_s, max_shard_bytes, num_kept
        self.check_equal = check_equal

    async def publish(
        self, weights: Iterable[tuple[str, Tensor]], version: str, only: Collection[str] | None = None
    ) -> SyncReport:
        """Write, then update all servers at once; see `WeightSync.publish`."""
        if Path(version).name != version or version.startswith("."):
            raise ValueError(f"weight version {version!r}: must be a plain file name")
        update = WeightUpdate(
            self.servers,
            version,
            timeout_s=self.timeout_s,
            in_session=False,
            check_equal=self.check_equal,
            only=only,
        )
        destination = self.directory / version
        with exhausting(weights) as export:
            update.num_bytes = write_hf_directory(
                export, destination, self.template_dir, max_shard_bytes=self.max_shard_bytes
            )
        async with update:
            await update.each(
                lambda server: server.update_weights_from_disk(str(destination), version, update.left_s())
            )
        report = update.report()
        self._prune(destination)
        return report

    async def close(self) -> None:
        """Nothing is held."""

    def _prune(self, newest: Path) -> None:
        versions = sorted(
            (path for path in self.directory.iterdir() if path.is_dir() and (path / "config.json").is_file()),
            key=lambda path: path.stat().st_mtime_ns,
        )
        for path in versions[: -self.num_kept]:
            if path != newest:
                shutil.rmtree(path)


def write_hf_directory(
    weights: Iterable[tuple[str, Tensor]],
    destination: str | Path,
    template_dir: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write a complete Hugging Face model directory that appears under its name only when all of it is on disk.

    Args:
        weights: Hugging Face names and whole tensors; a tensor must not change before the iterator is exhausted.
        destination: replaced if it exists.
        template_dir: directory whose config, tokenizer and chat template are copied.
        max_shard_bytes: a file is closed before it would grow beyond this; one tensor may be larger.

    Returns:
        The bytes of all tensors.
    """
    destination = Path(destination)
    partial = destination.parent / f".tmp-{destination.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    dtypes: set[str] = set()
    pending_bytes = num_bytes = 0

    def close_shard() -> None:
        save_readable(pending, partial / f"{len(shards)}.part")
        shards.append(list(pending))
        pending.clear()

    for name, tensor in weights:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            close_shard()
            pending_bytes = 0
        pending[name] = tensor.detach().cpu().contiguous()
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        pending_bytes += tensor.nbytes
        num_bytes += tensor.nbytes
    close_shard()
    _name_shards(partial, shards, num_bytes)
    copy_template(Path(template_dir), partial, dtypes)
    for path in (*partial.iterdir(), partial):
        bring_to_disk(path)
    shutil.rmtree(destination, ignore_errors=True)
    partial.rename(destination)
    bring_to_disk(destination.parent)
    return num_bytes


def save_readable(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file for all who may list its directory; the library gives it to its owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def _name_shards(directory: Path, shards: list[list[str]], num_bytes: int) -> None:
    if len(shards) == 1:
        (directory / "0.part").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{i}.part").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_template(template: Path, directory: Path, dtypes: set[str]) -> None:
    """Copy config and tokenizer; the config names the dtype that the weights really have."""
    for source in sorted({path for pattern in _COPIED for path in template.glob(pattern)}):
        if not source.name.endswith(".index.json"):
            shutil.copyfile(source, directory / source.name)
    config = json.loads((template / "config.json").read_text())
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop()
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def bring_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
