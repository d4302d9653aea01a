"""Tensors as the text that servers take them in: base64 of a pickle that SGLang's restricted unpickler accepts."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from megatron_trd.weight_sync.buckets import Bucket

PROTOCOL = 4
_DEVICE = 6
"""Where the arguments of `rebuild_cuda_tensor` name the device."""


def inline(tensors: Mapping[str, Tensor]) -> str:
    """Encode named tensors with their data, for any machine."""
    return _encoded(pickle.dumps({name: _alone(tensor) for name, tensor in tensors.items()}, PROTOCOL))


def bucket_payload(bucket: Bucket) -> str:
    """Encode a bucket (`load_format: flattened_bucket`): data from a CPU, a CUDA-IPC handle from a GPU."""
    metadata = [
        SimpleNamespace(
            name=name, dtype=dtype, shape=torch.Size(shape), start_idx=start, end_idx=end, numel=end - start
        )
        for name, dtype, shape, (start, end) in zip(
            bucket.names, bucket.dtypes, bucket.shapes, bucket.spans(), strict=True
        )
    ]
    flat = bucket.flat if bucket.flat.is_cuda else _alone(bucket.flat)
    stream = io.BytesIO()
    pickler = (_HandlePickler if flat.is_cuda else pickle.Pickler)(stream, PROTOCOL)
    pickler.dump({"flattened_tensor": flat, "metadata": metadata})
    return _encoded(stream.getvalue())


class _HandlePickler(ForkingPickler):
    """Pickles CUDA tensors as handles. Devices go by UUID, as in SGLang: numbers differ between processes."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        rebuild, arguments = reduce_tensor(obj)
        uuid = str(torch.cuda.get_device_properties(obj.device).uuid)
        return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])


def _alone(tensor: Tensor) -> Tensor:
    """Return it on the CPU with a storage of its own: a pickled view takes the whole storage along."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()


def _encoded(pickled: bytes) -> str:
    return base64.b64encode(pickled).decode()
