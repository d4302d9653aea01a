"""The matrix products of a computation alone, repeated on buffers laid out as the originals were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"aten::mm": torch.mm, "aten::addmm": torch.addmm, "aten::addmm_": torch.addmm}


class Layout(NamedTuple):
    """Where a tensor lay. Tensors of one storage share a buffer in the replay too, so caches behave alike."""

    storage: tuple[int, int, torch.dtype]
    """Address, bytes, dtype."""
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """Describe `x` without keeping it."""
        storage = x.untyped_storage()
        return cls((storage.data_ptr(), storage.nbytes(), x.dtype), x.shape, x.stride(), x.storage_offset())


class Product(NamedTuple):
    """One call of `mm` or `addmm`."""

    function: Callable[..., Tensor]
    operands: tuple[Layout, ...]
    options: dict[str, Any]
    out: Layout

    @property
    def flops(self) -> int:
        """Multiplications and additions of the product."""
        (rows, inner), (_, columns) = self.operands[-2].shape, self.operands[-1].shape
        return 2 * rows * inner * columns


class Recorder(TorchDispatchMode):
    """Notes every operator and every matrix product run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.products: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        self.operators.append(name)
        if name in PRODUCTS:
            options = {key: value for key, value in kwargs.items() if key != "out"}
            if isinstance(args[-1], torch.dtype):
                options["out_dtype"] = args[-1]
            operands = tuple(Layout.of(x) for x in args if isinstance(x, Tensor))
            self.products.append(Product(PRODUCTS[name], operands, options, Layout.of(out)))
        return out


@dataclass(frozen=True)
class Replay:
    """Calls the products; nothing is allocated and nothing else is computed."""

    calls: list[Callable[[], Tensor]]
    flops: int

    @classmethod
    def of(cls, products: list[Product], device: str) -> Replay:
        """Allocate the buffers, full of random numbers: a device multiplies zeros faster."""
        buffers: dict[tuple[int, int, torch.dtype], Tensor] = {}

        def tensor(layout: Layout) -> Tensor:
            if layout.storage not in buffers:
                _, num_bytes, dtype = layout.storage
                buffers[layout.storage] = torch.randn(num_bytes // dtype.itemsize, device=device, dtype=dtype)
            return buffers[layout.storage].as_strided(layout.shape, layout.strides, layout.offset)

        def call(product: Product) -> Callable[[], Tensor]:
            operands, out = [tensor(x) for x in product.operands], tensor(product.out)
            return lambda: product.function(*operands, **product.options, out=out)

        return cls([call(x) for x in products], sum(x.flops for x in products))

    @torch.no_grad()
    def __call__(self) -> None:
        """Run all products in their order."""
        for call in self.calls:
            call()
