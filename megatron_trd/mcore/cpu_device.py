"""Lets Megatron-Core run on a machine without CUDA: the one monkey-patch of the project.

Megatron-Core names the device in five ways, and each needs its own answer:

- literals inside its functions (`device="cuda"`, `'torch.cuda.FloatTensor'`): the constants of those functions'
  code objects are replaced, which touches nothing outside Megatron;
- `torch.cuda.current_device()` and `torch.cuda.synchronize()`: raise without CUDA, here they name the CPU;
- `tensor.cuda()`: the identity;
- the CUDA random number generator: the CPU's default generator;
- the stream on which the experts' token counts come to the host: they are there already.

And gloo cannot gather or reduce-scatter parts of unequal size, which the tokens of split experts are. SwiGLU's few
operations stay uncompiled: a compiler for the CPU would take longer than a test.

The tensor factories (`torch.zeros`, ...) are never wrapped: torch keeps a cached set of them for
`with torch.device(...)`, and a wrapped one makes `transformers` load wrong weights without an error.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch

_CPU = torch.device("cpu")
_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_MODULES_WITH_LITERALS = (
    "pipeline_parallel.schedules",
    "optimizer.clip_grads",
    "optimizer.optimizer",
    "optimizer.distrib_optimizer",
    "optimizer.grad_scaler",
    "transformer.utils",
    "tensor_parallel.data",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "utils",
)
_applied = False


def use_cpu_where_there_is_no_cuda() -> torch.device:
    """Patch Megatron-Core once if this machine has no CUDA; return the device of this process.

    Call it before any Megatron module is built. With CUDA it changes nothing.
    """
    global _applied
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not _applied:
        _applied = True
        _retarget_literals()
        _redirect_torch_cuda()
        _redirect_random_state()
        _keep_token_dispatcher_off_streams()
        _allow_unequal_parts()
        _leave_swiglu_uncompiled()
    return _CPU


def _replaced(constant: Any) -> Any:
    if isinstance(constant, str):
        return _LITERALS.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(map(_replaced, constant))
    if isinstance(constant, frozenset):
        return frozenset(map(_replaced, constant))
    if isinstance(constant, CodeType):
        return constant.replace(co_consts=tuple(map(_replaced, constant.co_consts)))
    return constant


def _retarget(function: Any) -> None:
    function = getattr(function, "__func__", function)  # staticmethod, classmethod
    while hasattr(function, "__wrapped__"):  # no_grad, lru_cache, ...
        function = function.__wrapped__
    if isinstance(function, FunctionType):
        function.__code__ = _replaced(function.__code__)


def _retarget_literals() -> None:
    for name in _MODULES_WITH_LITERALS:
        module = importlib.import_module(f"megatron.core.{name}")
        for thing in list(vars(module).values()):
            if getattr(thing, "__module__", None) == module.__name__:
                for function in vars(thing).values() if isinstance(thing, type) else (thing,):
                    _retarget(function)


def _redirect_torch_cuda() -> None:
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    # Megatron 0.19 asks for it before it looks whether there is an event to wait for; here there is none.
    torch.cuda.current_stream = lambda *args, **kwargs: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _redirect_random_state() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # torch.manual_seed calls this one, so it must not call torch.manual_seed.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]

    @contextlib.contextmanager
    def fork(self: Any, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Megatron's own `fork` warns at each use when it finds the CPU generator moved, which here it must.

        Forks nest: adapters' dropout forks the state that sequence parallelism has forked around the whole block.
        """
        if name not in self.states_:
            raise KeyError(f"random state {name!r} was never added")
        outside, outer = torch.get_rng_state(), self._current_state_name
        if outer in self.states_:
            self.states_[outer] = outside
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(self.states_.get(outer, outside))
            self._current_state_name = outer

    megatron_random.CudaRNGStatesTracker.fork = fork


def _keep_token_dispatcher_off_streams() -> None:
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    def fetch(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                splits = getattr(self, name)
                setattr(self, name, None if splits is None else splits.numpy())
        return tokens_per_expert

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _CPU  # any value keeps its constructor from making one
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = fetch


def _allow_unequal_parts() -> None:
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_padded(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, use_global_buffer)
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: input_.size(0)] = input_
        parts = gather(padded, group).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def reduce_and_take(input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, None, use_global_buffer)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()]

    mappings._gather_along_first_dim = gather_padded
    mappings._reduce_scatter_along_first_dim = reduce_and_take


def _leave_swiglu_uncompiled() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    for name, function in list(vars(fused_bias_swiglu).items()):
        if original := getattr(function, "_torchdynamo_orig_callable", None):
            setattr(fused_bias_swiglu, name, original)
