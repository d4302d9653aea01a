"""AdamW with the paper's schedule, on Megatron's optimizer."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_trd.config.schema import OptimizerConfig, ParallelConfig


def build_optimizer(
    chunks: list[DistributedDataParallel], config: OptimizerConfig, parallel: ParallelConfig, total_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Return the optimizer over all chunks' trainable parameters, and its schedule over `total_steps` steps."""
    _mend_distributed_adamw()
    _mend_saving_of_buckets()
    bf16 = chunks[0].module.config.bf16
    min_lr = config.lr / 10 if config.min_lr is None else config.min_lr
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
            optimizer_cpu_offload=config.optimizer_cpu_offload,
            optimizer_offload_fraction=config.optimizer_offload_fraction,
            use_precision_aware_optimizer=config.optimizer_cpu_offload,  # which keeps the main weights with the moments
        ),
        chunks,
    )
    _give_adamw_its_state(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=min_lr,
        lr_warmup_steps=int(config.lr_warmup_fraction * total_steps),
        lr_decay_steps=max(total_steps, 1),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows its flags: more iterations, another rate
    )
    return optimizer, scheduler


def _give_adamw_its_state(optimizer: MegatronOptimizer) -> None:
    """Create torch AdamW's moments now: a checkpoint is described by them, also before the first step."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if not isinstance(inner, torch.optim.Adam):  # AdamW is one; Transformer Engine's FusedAdam is not
            continue
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                inner.state[parameter].update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(parameter.data),
                    exp_avg_sq=torch.zeros_like(parameter.data),
                )


def _mend_distributed_adamw() -> None:
    """Mend three faults of megatron-core 0.16 in resuming torch's AdamW, which it uses without apex and TE.

    1. Restoring a parameter's state looks up a tensor for AdamW's `step` and fails: `step` is kept apart.
    2. All parameters get one shared `step` tensor, which AdamW then counts up once per parameter: every update
       after the resume is wrong, without an error.
    3. The experts' optimizer on a pipeline stage without experts has no parameter, and fails to be saved for want of
       a `step`.
    """
    optimizer_class = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(optimizer_class, "_trd_mended"):
        return
    optimizer_class._trd_mended = True
    load_state_dict, state_dict = optimizer_class.load_state_dict, optimizer_class.state_dict

    @torch.no_grad()
    def set_state(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][index]
        for name, target in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step":
                target.copy_(tensors[name])

    def load(self: Any, state_dict: dict[str, Any]) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def state(self: Any) -> dict[str, Any]:
        if self.optimizer.state:
            return state_dict(self)
        groups = self.optimizer.state_dict()["param_groups"]
        return {"optimizer": {"param_groups": [{**group, "step": 0} for group in groups]}}

    optimizer_class.state_dict = state
    optimizer_class._set_main_param_and_optimizer_states = set_state
    optimizer_class.load_state_dict = load


def _mend_saving_of_buckets() -> None:
    """Mend a fault of megatron-core 0.16 in saving the distributed optimizer's state.

    It collects the buckets without the padding between them, but looks parameters up where they are with it: after
    the first padded bucket each parameter is saved with its neighbour's numbers.
    """
    optimizer_class = distrib_optimizer.DistributedOptimizer
    if hasattr(optimizer_class, "_trd_buckets_mended"):
        return
    optimizer_class._trd_buckets_mended = True
    save = optimizer_class.sharded_param_state_fully_reshardable

    def save_where_they_are(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                before = itertools.accumulate((b.numel_unpadded for b in buffer.buckets), initial=0)
                padding = [bucket.offset - start for bucket, start in zip(buffer.buckets, before, strict=False)]
                buffer.param_index_map = {
                    parameter: (start - padding[bucket], end - padding[bucket], bucket)
                    for parameter, (start, end, bucket) in buffer.param_index_map.items()
                }
            return save(self, *args, **kwargs)
        finally:
            for buffer, index_map in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = index_map

    optimizer_class.sharded_param_state_fully_reshardable = save_where_they_are
