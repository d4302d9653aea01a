"""Convert whole models between Hugging Face directories and Megatron's distributed checkpoints, on the CPU.

    python tools/convert_checkpoint.py to-megatron --hf-checkpoint DIR --output DIR
    python tools/convert_checkpoint.py to-hf --megatron-checkpoint DIR --hf-template DIR --output DIR
    torchrun --nproc-per-node 4 tools/convert_checkpoint.py ...     the same, with the work shared by 4 processes

A process holds one parameter, and on the way to Hugging Face one file, at a time. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_trd.config.cli import exit_on_value_error
from megatron_trd.log import configure

if TYPE_CHECKING:
    from megatron_trd.mcore.conversion.sharing import Conversion
    from megatron_trd.mcore.groups import Groups
    from megatron_trd.mcore.hf_config import HFModel

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_DEADLINE = timedelta(hours=24)
"""For the rank with the least to do, which waits for the others."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--output", type=Path, required=True, help="directory to make; must not be there yet")
    both.add_argument("--dtype", choices=DTYPES, help="of all tensors; default: as they are stored")
    both.add_argument("--dry-run", action="store_true", help="check everything, list what would be written, and stop")
    to = commands.add_parser("to-megatron", parents=[both], help="from Hugging Face to Megatron")
    to.add_argument("--hf-checkpoint", type=Path, required=True, help="Hugging Face directory")
    to.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        help="pad the vocabulary to a multiple of this (Megatron loads it with any other padding too)",
    )
    back = commands.add_parser("to-hf", parents=[both], help="from Megatron to Hugging Face")
    back.add_argument(
        "--megatron-checkpoint", type=Path, required=True, help="directory with checkpoints, or one of them"
    )
    back.add_argument(
        "--hf-template",
        type=Path,
        required=True,
        help="Hugging Face directory: config and tokenizer are copied; the weights that adapters are merged with",
    )
    back.add_argument("--shard-size-gb", type=float, default=5.0, help="largest file, in GiB")
    back.add_argument("--adapter", action="store_true", help="write the adapters alone, as a PEFT directory")
    args = parser.parse_args(argv)
    if args.command == "to-megatron" and args.make_vocab_size_divisible_by < 1:
        parser.error(f"--make-vocab-size-divisible-by {args.make_vocab_size_divisible_by}: give a positive integer")
    if args.command == "to-hf" and args.shard_size_gb <= 0:
        parser.error(f"--shard-size-gb {args.shard_size_gb}: must be positive")
    if args.command == "to-hf" and args.adapter and args.dtype:
        parser.error(f"--dtype {args.dtype}: adapters are written as they are stored; leave it out")
    return args


def plan(args: argparse.Namespace, groups: Groups) -> Conversion:
    """Read both sides' tables of contents, and compare them."""
    import torch

    from megatron_trd.mcore.conversion.to_hf import to_adapter, to_hf
    from megatron_trd.mcore.conversion.to_megatron import to_megatron

    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    if args.command == "to-megatron":
        divisible_by = args.make_vocab_size_divisible_by
        return to_megatron(
            args.hf_checkpoint,
            args.output,
            groups,
            divisible_by=divisible_by,
            dtype=dtype,
            common=lambda hf: megatron_common(hf, divisible_by),
        )
    if args.adapter:
        return to_adapter(args.megatron_checkpoint, args.hf_template, args.output, groups)
    return to_hf(
        args.megatron_checkpoint,
        args.hf_template,
        args.output,
        groups,
        shard_bytes=int(args.shard_size_gb * 2**30),
        dtype=dtype,
    )


def megatron_common(hf: HFModel, divisible_by: int) -> dict[str, Any]:
    """Return what Megatron-LM reads beside the tensors: its `--use-checkpoint-args` takes the model's shape from it."""
    geometry = hf.geometry
    moe: dict[str, Any] = {}
    if hf.moe is not None:
        moe = {
            "num_experts": hf.moe.num_experts,
            "moe_router_topk": hf.moe.top_k,
            "moe_ffn_hidden_size": hf.moe.expert_ffn_hidden_size,
            "moe_router_pre_softmax": not hf.moe.norm_topk_prob,
            "moe_layer_freq": [int(sparse) for sparse in hf.moe.sparse_layers],
        }
    args = argparse.Namespace(
        num_layers=geometry.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_hidden_size,
        num_attention_heads=geometry.num_query_groups * geometry.heads_per_group,
        group_query_attention=True,
        num_query_groups=geometry.num_query_groups,
        kv_channels=geometry.head_dim,
        qk_layernorm=hf.family.qk_norm,
        max_position_embeddings=hf.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=int(hf.rope_theta),
        rotary_percent=1.0,
        rotary_interleaved=False,
        add_bias_linear=False,
        add_qkv_bias=hf.family.qkv_bias,
        swiglu=True,
        normalization="RMSNorm",
        norm_epsilon=hf.norm_epsilon,
        untie_embeddings_and_output_weights=not hf.tied,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        make_vocab_size_divisible_by=divisible_by,
        padded_vocab_size=geometry.padded_vocab_size,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
        **moe,
    )
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0}


def main(argv: Sequence[str] | None = None) -> None:
    """Convert on this rank."""
    args = arguments(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    import torch.distributed as dist

    from megatron_trd.config.schema import ParallelConfig
    from megatron_trd.mcore.groups import destroy_groups, initialize_groups

    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=_DEADLINE)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    configure(dist.get_rank())
    with exit_on_value_error():
        groups = initialize_groups(ParallelConfig(distributed_timeout_minutes=_DEADLINE.total_seconds() / 60), 0, 0)
        start = time.perf_counter()
        conversion = plan(args, groups)
        if not args.dry_run:
            conversion.write()
        if groups.rank == 0:
            report(conversion, args.output, None if args.dry_run else time.perf_counter() - start)
    destroy_groups()


def report(conversion: Conversion, output: Path, seconds: float | None) -> None:
    """Print the files, or how long it took to write them."""
    gib = conversion.num_bytes / 2**30
    if seconds is not None:
        print(f"{output}: {gib:.3f} GiB in {seconds:.1f} s, {gib / seconds:.3f} GiB/s")
        return
    for name, size in conversion.files.items():
        print(f"{size / 2**30:10.3f} GiB  {output / name}")
    print(f"{gib:10.3f} GiB  in {len(conversion.files)} files; nothing was written")


if __name__ == "__main__":
    main()
