"""GPUs that a plan can be made for, and the efficiencies it assumes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.planning.activations import Implementation


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU of a usual machine. Peaks are the vendor's, without sparsity; links are one GPU's, in one direction."""

    memory_gib: float
    """As the driver reports it."""
    bf16_tflops: float
    fp8_tflops: float | None
    memory_tb_s: float
    node_gb_s: float
    """To the other GPUs of the machine: NVLink, or PCIe."""
    network_gb_s: float
    """To other machines."""
    gpus_per_node: int
    source: str


DEVICES = {
    "h100-80gb": Device(
        memory_gib=79.6,
        bf16_tflops=989,
        fp8_tflops=1979,
        memory_tb_s=3.35,
        node_gb_s=450,
        network_gb_s=50,
        gpus_per_node=8,
        source="NVIDIA H100 SXM5 datasheet; DGX H100: 400 Gb/s a GPU",
    ),
    "h200": Device(
        memory_gib=140.4,
        bf16_tflops=989,
        fp8_tflops=1979,
        memory_tb_s=4.8,
        node_gb_s=450,
        network_gb_s=50,
        gpus_per_node=8,
        source="NVIDIA H200 SXM datasheet; DGX H200: 400 Gb/s a GPU",
    ),
    "a100-80gb": Device(
        memory_gib=80.0,
        bf16_tflops=312,
        fp8_tflops=None,
        memory_tb_s=2.04,
        node_gb_s=300,
        network_gb_s=25,
        gpus_per_node=8,
        source="NVIDIA A100 80GB SXM datasheet; DGX A100: 200 Gb/s a GPU",
    ),
    "b200": Device(
        memory_gib=179.1,
        bf16_tflops=2250,
        fp8_tflops=4500,
        memory_tb_s=7.7,
        node_gb_s=900,
        network_gb_s=50,
        gpus_per_node=8,
        source="NVIDIA HGX B200 datasheet; DGX B200: 400 Gb/s a GPU",
    ),
    "l40s": Device(
        memory_gib=45.0,
        bf16_tflops=362,
        fp8_tflops=733,
        memory_tb_s=0.864,
        node_gb_s=32,
        network_gb_s=12.5,
        gpus_per_node=8,
        source="NVIDIA L40S datasheet; PCIe 4.0 x16, 100 Gb/s a GPU assumed",
    ),
    "rtx4090": Device(
        memory_gib=24.0,
        bf16_tflops=165,
        fp8_tflops=330,
        memory_tb_s=1.008,
        node_gb_s=32,
        network_gb_s=1.6,
        gpus_per_node=8,
        source="NVIDIA Ada architecture whitepaper (fp32 accumulation); PCIe 4.0 x16, 100 Gb/s a machine assumed",
    ),
    "cpu": Device(
        memory_gib=16.0,
        bf16_tflops=0.05,
        fp8_tflops=None,
        memory_tb_s=0.02,
        node_gb_s=2,
        network_gb_s=1,
        gpus_per_node=8,
        source="a core or two: for tests and rehearsals, not for times",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a roofline cannot know. Every value is a flag of `tools/plan_run.py` and is printed with the plan."""

    train_efficiency: float = 0.40
    """Share of the peak that matrix products reach in training."""
    attention_efficiency: float = 0.35
    """The same of attention."""
    prefill_efficiency: float = 0.45
    """The same of a server that reads prompts."""
    decode_efficiency: float = 0.60
    """Share of the memory bandwidth that a decoding server reaches."""
    decode_overhead_ms: float = 2.0
    """What a decoding step takes beside reading memory: launches, sampling, scheduling."""
    link_efficiency: float = 0.70
    """Share of a link's bandwidth that collectives reach."""
    overlap: float = 0.80
    """Share of a collective that its overlap flag hides."""
    disk_gb_s: float = 2.0
    """The disk that trainer and servers share, for `--weight-sync disk`."""
    server_memory_fraction: float = 0.88
    """Of a server GPU, for weights and cache."""
    context_gib: float = 2.0
    """Of a training GPU, for the CUDA context, NCCL's buffers and cuBLAS."""
    fragmentation: float = 0.05
    """Of the tensors' bytes, what the caching allocator cannot use."""
    expert_imbalance: float = 1.2
    """Tokens at the busiest rank's experts, over the mean."""


def find_device(name: str) -> Device:
    """Look a device up.

    Raises:
        ValueError: it is not in the table.
    """
    if name not in DEVICES:
        raise ValueError(f"--gpu {name}: is not in the table; use one of {', '.join(DEVICES)}")
    return DEVICES[name]


def implementation_of(device: str, transformer_impl: str) -> Implementation:
    """Return which layers a run would have there; `auto` is Transformer Engine's, as where it is installed."""
    if device == "cpu":
        return "cpu"
    return "local" if transformer_impl == "local" else "te"


def this_device(name: str | None) -> str:
    """Return the entry of a GPU by what its driver calls it; an H100 where there is none, or one not in the table."""
    words = (name or "").lower().replace(" ", "")
    known = {"h100": "h100-80gb", "h200": "h200", "a100": "a100-80gb", "b200": "b200", "l40s": "l40s"}
    return next((entry for part, entry in (known | {"4090": "rtx4090"}).items() if part in words), "h100-80gb")
