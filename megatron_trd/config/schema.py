"""The only configuration: a frozen tree of dataclasses.

Each field is a flag (`top_k` <-> `--top-k`), its docstring is the help text, and `docs/configuration.md` is
generated from here. Names are Megatron-LM's where the concept is Megatron's. Checks that need one section
live in its `__post_init__`; checks across sections live in `Config.__post_init__`. Every error names the
flag, its value and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def _require(ok: bool, flag: str, value: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"--{flag} {value}: {remedy}")


RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act")


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodConfig:
    """Which distillation: who teaches, along which trajectory."""

    mode: Literal["opd", "opsd"] = "opsd"
    """`opd`: a separate teacher model; `opsd`: the student's own backbone, which also sees the reference solution."""
    trajectory: Literal["y_r", "y_o"] = "y_r"
    """Response the loss runs along: `y_r`, the teacher's rewrite (TRD), or `y_o`, the raw rollout (the baselines)."""
    opsd_teacher: Literal["initial", "current"] = "initial"
    """Weights of the OPSD teacher: the ones training started from, or the student's current ones."""
    trajectory_filter: Literal["full", "fail", "succ", "fail_to_succ"] = "full"
    """Train on all problems, or only where y_o was wrong, right, or wrong with a right y_r."""
    on_bad_refinement: Literal["keep", "drop", "use_y_o"] = "use_y_o"
    """What to train on when y_r is empty, truncated or failed: `keep` it if it has tokens, `drop` the problem, or
    `use_y_o` with the vanilla teacher context. Counted in the metrics."""
    refine_samples: int = 1
    """Refinements sampled of each y_o; all are graded and `--refine-select` takes one."""
    refine_select: Literal["first", "verified", "shortest-verified"] = "first"
    """The refinement that becomes y_r: the first, the first that is right, or the one with the fewest tokens among
    those that are right; the first where none is."""
    refine_from: Literal["start", "failing-prefix"] = "start"
    """Where y_r parts from a wrong y_o: at its start, or behind the last step from which the student still reaches the
    answer. Of a right y_o all is rewritten."""
    prefix_steps: Literal["lines", "paragraphs", "tokens"] = "lines"
    """What a step of y_o is for `--refine-from failing-prefix`."""
    prefix_continuations: int = 4
    """Continuations that the student samples from each prefix of y_o that is tried."""
    prefix_min_correct: int = 1
    """Right ones among them for the prefix to count as one that still reaches the answer."""
    prefix_loss: Literal["whole", "rewritten"] = "whole"
    """Train on the whole y_r, or only on what the refiner wrote behind the kept prefix of y_o."""
    refiner_reasoning: Literal["auto", "keep", "context", "drop"] = "auto"
    """The reasoning block of y_r: `keep` trains on it, `context` shows it to the teacher alone, `drop` to nobody;
    `auto` = `context` where y_r has one."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("refine-samples", self.refine_samples),
            ("prefix-continuations", self.prefix_continuations),
            ("prefix-min-correct", self.prefix_min_correct),
        ):
            _require(value >= 1, flag, value, "give a positive integer")
        _require(
            self.refine_select == "first" or self.refine_samples > 1,
            "refine-select",
            self.refine_select,
            "there is nothing to choose from; raise --refine-samples",
        )
        _require(
            self.prefix_min_correct <= self.prefix_continuations,
            "prefix-min-correct",
            self.prefix_min_correct,
            f"no prefix can have that many; give at most --prefix-continuations {self.prefix_continuations}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Models and their precision. Shapes come from the Hugging Face `config.json`, never from flags."""

    hf_checkpoint: str = ""
    """Hugging Face directory of the student: config.json, safetensors and tokenizer."""
    teacher_hf_checkpoint: str | None = None
    """Hugging Face directory of the OPD teacher. Same tokenizer; width, depth and vocabulary padding may differ."""
    megatron_checkpoint: str | None = None
    """Distributed checkpoint, of Megatron-LM or of a run, that the student's first weights are read from at any grid;
    unset = `--hf-checkpoint`, which gives config and tokenizer in either case."""
    teacher_megatron_checkpoint: str | None = None
    """The same for the OPD teacher and `--teacher-hf-checkpoint`."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of the transformer: Megatron's own (`local`), Transformer Engine's, or `auto`: the latter where
    it imports."""
    bf16: bool = True
    """Train in bf16 with fp32 main weights; `--no-bf16` trains in fp32."""
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """Multiply the layers' matrices in FP8: `hybrid` (e4m3, and e5m2 for gradients) or `e4m3`; unset = off. Weights
    stay in bf16; so do embedding, norms, attention and output head, and a teacher with weights of its own. Needs
    Transformer Engine."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """Scaling of FP8 values: per tensor from its history (`delayed`) or its present values (`tensorwise`), both on
    compute capability 8.9 and above; per block (`blockwise`, 9.0; `mxfp8`, 10.0)."""
    fp8_margin: int = 0
    """`delayed`: the scale keeps a distance of 2^margin from FP8's largest value."""
    fp8_amax_history_len: int = 1
    """`delayed`: steps of history that the scale comes from."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """`delayed`: what of that history to take."""
    first_last_layers_bf16: bool = False
    """With `--fp8-format`, keep the first and the last layers in bf16 (not with `delayed`)."""
    num_layers_at_start_in_bf16: int = 1
    """How many first layers `--first-last-layers-bf16` keeps."""
    num_layers_at_end_in_bf16: int = 1
    """How many last layers `--first-last-layers-bf16` keeps."""
    gradient_accumulation_fusion: bool = True
    """Add weight gradients to the fp32 gradient buffer inside their matrix product: in the output head always, in the
    layers where Transformer Engine's or apex's kernel is there. `--no-gradient-accumulation-fusion` adds afterwards."""
    make_vocab_size_divisible_by: int = 1
    """Vocabulary rows are padded to a multiple of this times the tensor-parallel size. Padding never enters
    the loss."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: `full` layers, or `selective` parts of them."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """`full`: recompute all layers in groups (`uniform`), or only the first few of each pipeline chunk (`block`)."""
    recompute_num_layers: int = 1
    """`uniform`: layers in a group; `block`: layers that are recomputed."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """`selective`: any of `core_attn`, `mlp`, `moe` and, with Transformer Engine, `layernorm`, `moe_act`."""
    cpu_offloading_num_layers: int = 0
    """Keep the activations of this many layers in CPU memory between forward and backward pass (Transformer Engine)."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss that each layer of a student with experts adds. A student that imitates a
    teacher needs none."""
    offload_teacher: bool = False
    """Keep a teacher's own weights in host memory between its forward passes; its output layer stays on the device."""
    teacher_hidden_mb: int = 4096
    """Teacher hidden states of a step that stay on the device, in MiB; what is beyond waits in pinned host memory.
    Pipeline stages and `--offload-teacher` keep those of a whole step, other runs those of one micro-batch."""

    def __post_init__(self) -> None:
        _require(
            self.make_vocab_size_divisible_by >= 1,
            "make-vocab-size-divisible-by",
            self.make_vocab_size_divisible_by,
            "give a positive integer",
        )
        self._check_fp8()
        self._check_activation_memory()
        _require(
            self.moe_aux_loss_coeff >= 0.0, "moe-aux-loss-coeff", self.moe_aux_loss_coeff, "give zero or a small number"
        )
        _require(self.teacher_hidden_mb >= 0, "teacher-hidden-mb", self.teacher_hidden_mb, "give 0 or more")

    @property
    def tokens_multiple(self) -> int:
        """What the number of a rank's tokens must be a multiple of: FP8 products take blocks of 16, `mxfp8` of 32."""
        if self.fp8_format is None:
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    def _check_fp8(self) -> None:
        for flag, value, least in (
            ("fp8-margin", self.fp8_margin, 0),
            ("fp8-amax-history-len", self.fp8_amax_history_len, 1),
            ("num-layers-at-start-in-bf16", self.num_layers_at_start_in_bf16, 0),
            ("num-layers-at-end-in-bf16", self.num_layers_at_end_in_bf16, 0),
        ):
            _require(value >= least, flag, value, f"give {least} or more")
        if self.fp8_format is None:
            return
        _require(self.bf16, "fp8-format", self.fp8_format, "FP8 is rounded from bf16; leave out --no-bf16")
        _require(
            self.transformer_impl != "local",
            "fp8-format",
            self.fp8_format,
            "Megatron's own layers have no FP8; use --transformer-impl transformer_engine",
        )
        _require(
            not self.first_last_layers_bf16 or self.fp8_recipe != "delayed",
            "first-last-layers-bf16",
            self.first_last_layers_bf16,
            "--fp8-recipe delayed scales all layers together; use tensorwise, blockwise or mxfp8",
        )

    def _check_activation_memory(self) -> None:
        _require(
            self.recompute_num_layers >= 1,
            "recompute-num-layers",
            self.recompute_num_layers,
            "give a positive integer",
        )
        for module in self.recompute_modules:
            _require(
                module in RECOMPUTE_MODULES, "recompute-modules", module, f"use any of {', '.join(RECOMPUTE_MODULES)}"
            )
        _require(bool(self.recompute_modules), "recompute-modules", "(empty)", "name one, or leave it out")
        for module in ("layernorm", "moe_act"):
            if self.recompute_granularity == "selective" and module in self.recompute_modules:
                _require(
                    self.transformer_impl != "local",
                    "recompute-modules",
                    module,
                    "needs Transformer Engine; use --transformer-impl transformer_engine, or leave it out",
                )
                _require(
                    self.fp8_format is None or self.fp8_recipe != "delayed",
                    "recompute-modules",
                    module,
                    "does not go with --fp8-recipe delayed; use tensorwise, or leave it out",
                )
        _require(
            self.cpu_offloading_num_layers >= 0,
            "cpu-offloading-num-layers",
            self.cpu_offloading_num_layers,
            "give 0 or more",
        )
        _require(
            not self.cpu_offloading_num_layers or self.transformer_impl != "local",
            "cpu-offloading-num-layers",
            self.cpu_offloading_num_layers,
            "needs Transformer Engine; use --transformer-impl transformer_engine",
        )
        _require(
            not self.cpu_offloading_num_layers or self.recompute_granularity == "none",
            "cpu-offloading-num-layers",
            self.cpu_offloading_num_layers,
            f"does not go with --recompute-granularity {self.recompute_granularity}; use one of the two",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The grid of ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    sequence_parallel: bool = False
    """Split activations between matrix products along the sequence over the tensor-parallel ranks."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages: ranks that share the layers. Must divide the layers of student and teacher."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Chunks of the student's layers that each pipeline rank holds; more than 1 = the interleaved schedule, which
    waits less."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """Ranks that share out the experts of each layer. Must divide the number of experts; the ranks are those of the
    tensor-, context- and data-parallel groups, no more."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices; unset = `--tensor-model-parallel-size`, Megatron's rule. Small experts
    want 1."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the parameter all-gather of the distributed optimizer with the forward pass."""
    distributed_timeout_minutes: float = 10.0
    """Deadline of one collective in training."""
    rollout_timeout_minutes: float = 240.0
    """How long the other ranks wait for rank 0's rollouts of one iteration."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("tensor-model-parallel-size", self.tensor_model_parallel_size),
            ("pipeline-model-parallel-size", self.pipeline_model_parallel_size),
            ("num-virtual-stages-per-pipeline-rank", self.num_virtual_stages_per_pipeline_rank),
            ("context-parallel-size", self.context_parallel_size),
            ("expert-model-parallel-size", self.expert_model_parallel_size),
            ("expert-tensor-parallel-size", self.expert_tensor_parallel_size or 1),
        ):
            _require(value >= 1, flag, value, "give a positive integer")
        _require(
            self.num_virtual_stages_per_pipeline_rank == 1 or self.pipeline_model_parallel_size > 1,
            "num-virtual-stages-per-pipeline-rank",
            self.num_virtual_stages_per_pipeline_rank,
            "needs --pipeline-model-parallel-size > 1",
        )
        _require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence-parallel",
            self.sequence_parallel,
            "needs --tensor-model-parallel-size > 1",
        )
        _require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "overlap-param-gather",
            self.overlap_param_gather,
            "needs --use-distributed-optimizer and --overlap-grad-reduce",
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on the same micro-batch."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """The per-token divergence between teacher p and student q, and how tokens are weighted."""

    divergence: Literal["forward-kl", "reverse-kl", "jsd", "mixed"] = "forward-kl"
    """`forward-kl` = KL(p||q); `reverse-kl` = KL(q||p); `jsd`: see `--beta`; `mixed` = beta KL(p||q) +
    (1-beta) KL(q||p)."""
    beta: float = 0.5
    """Weight in `jsd` = beta KL(p||m) + (1-beta) KL(q||m) with m = beta p + (1-beta) q, and in `mixed`."""
    distill_temperature: float = 1.0
    """Divides both sides' logits, once."""
    teacher_top_k: int = 0
    """Restrict the divergence to the teacher's K most likely tokens; 0 = the full vocabulary."""
    top_k_mode: Literal["renorm_both", "renorm_teacher", "tail_bucket"] = "renorm_both"
    """With `--teacher-top-k`: renormalise both sides on the support, only the teacher, or add the rest as one
    bucket."""
    token_clip: float | None = None
    """Cap each token's divergence at this many nats (a capped token has no gradient); unset = no cap."""
    entry_clip: float | None = None
    """Cap each vocabulary entry's p log(p/q) at this many nats before the sum (forward KL); unset = no cap."""
    loss_normalization: Literal["sequence", "token"] = "sequence"
    """`sequence`: mean over sequences of the token mean (Eq. 6); `token`: mean over all tokens of the step."""
    kl_workspace_mb: int | None = None
    """Upper bound in MiB on the logits workspace of the loss on each rank, whatever the number of tokens; unset = 1200
    divided by `--tensor-model-parallel-size`."""
    kl_backend: Literal["auto", "torch", "triton"] = "auto"
    """Row kernels of the loss: `auto` takes Triton on a GPU and plain torch elsewhere."""

    def __post_init__(self) -> None:
        _require(
            self.divergence not in ("jsd", "mixed") or 0.0 < self.beta < 1.0,
            "beta",
            self.beta,
            f"{self.divergence} needs a value strictly between 0 and 1 (the ends are forward-kl and reverse-kl)",
        )
        _require(self.distill_temperature > 0, "distill-temperature", self.distill_temperature, "must be positive")
        _require(self.teacher_top_k >= 0, "teacher-top-k", self.teacher_top_k, "give 0 (full vocabulary) or more")
        for flag, value in (("token-clip", self.token_clip), ("entry-clip", self.entry_clip)):
            _require(value is None or value > 0, flag, value, "must be positive; leave it out for no cap")
        _require(
            self.entry_clip is None or self.divergence == "forward-kl",
            "entry-clip",
            self.entry_clip,
            f"is defined for forward-kl only, not {self.divergence}",
        )
        _require(
            self.entry_clip is None or self.teacher_top_k == 0,
            "entry-clip",
            self.entry_clip,
            "cannot be combined with --teacher-top-k",
        )
        _require(
            self.teacher_top_k == 0 or self.top_k_mode != "renorm_teacher" or self.divergence == "forward-kl",
            "top-k-mode",
            self.top_k_mode,
            f"works with forward-kl, not {self.divergence}; use renorm_both or tail_bucket",
        )
        mb = self.kl_workspace_mb
        _require(mb is None or mb >= 1, "kl-workspace-mb", mb, "give at least 1, or leave it unset")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on q, k, v, o, gate, up and down."""

    lora_rank: int = 0
    """Rank of the adapters; 0 trains all weights. In a student with experts the adapters are on attention alone;
    router, experts and feed-forwards stay as they are."""
    lora_alpha: float = 128.0
    """The adapter's output is scaled by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input."""

    def __post_init__(self) -> None:
        _require(self.lora_rank >= 0, "lora-rank", self.lora_rank, "give 0 (full fine-tuning) or more")
        _require(0.0 <= self.lora_dropout < 1.0, "lora-dropout", self.lora_dropout, "must lie in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then decay over all steps of the run."""

    lr: float = 5e-6
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end; unset = a tenth of `--lr`."""
    lr_warmup_fraction: float = 0.1
    """Share of the steps spent in the linear warm-up."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay after the warm-up."""
    weight_decay: float = 0.005
    """Decoupled weight decay (norms and biases are exempt)."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    optimizer_cpu_offload: bool = False
    """Keep main weights and moments in CPU memory and update there. Needs CUDA, Transformer Engine, bf16 and
    `--use-distributed-optimizer`."""
    optimizer_offload_fraction: float = 1.0
    """Share of the parameters that `--optimizer-cpu-offload` moves."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "lr", self.lr, "must be positive")
        _require(
            self.min_lr is None or 0 <= self.min_lr <= self.lr, "min-lr", self.min_lr, "must lie between 0 and --lr"
        )
        _require(
            0.0 <= self.lr_warmup_fraction < 1.0, "lr-warmup-fraction", self.lr_warmup_fraction, "must lie in [0, 1)"
        )
        fraction = self.optimizer_offload_fraction
        _require(0.0 < fraction <= 1.0, "optimizer-offload-fraction", fraction, "must lie in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Problems and batches. An iteration is one rollout batch; a step is one optimizer update."""

    task: str = "arithmetic"
    """Name of the task: its problems, verifier and prompt templates."""
    train_data: tuple[str, ...] = ()
    """Files of training problems, for tasks that read files (`tools/prepare_data.py` makes them); each epoch has its
    own order."""
    eval_data: tuple[str, ...] = ()
    """Files of held-out problems, taken in their order. None of them may be a training problem."""
    math_verifier_profile: Literal["default", "strict-string", "amo"] = "default"
    """How `--task math` compares answers: as mathematics, by the string rule of published scores, or by AMO-Bench's
    parser."""
    code_python: str | None = None
    """Interpreter of the programs that `--task code` runs, with the packages they may import; unset = the system's
    python3."""
    unsafe_code_execution: bool = False
    """Run the programs of `--task code` without a sandbox, with resource limits alone: they can read your files and use
    the network. For machines where bubblewrap does not work, and programs that you trust."""
    prompt_dir: str | None = None
    """Directory with your own prompt templates; unset = the task's."""
    trajectories: str | None = None
    """Train from this JSONL file of trajectories (made by `megatron_trd.generate`) instead of rolling out."""
    num_iterations: int = 100
    """Rollout batches in the run."""
    rollout_batch_size: int = 128
    """Problems per iteration."""
    global_batch_size: int = 128
    """Sequences per optimizer step; must divide `--rollout-batch-size`."""
    max_tokens_per_micro_batch: int = 16384
    """Most tokens packed into one micro-batch, for the longer of the student's and the teacher's stream."""
    seed: int = 1234
    """Seeds adapters, dropout, sampling and the order of problems."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("num-iterations", self.num_iterations),
            ("rollout-batch-size", self.rollout_batch_size),
            ("global-batch-size", self.global_batch_size),
            ("max-tokens-per-micro-batch", self.max_tokens_per_micro_batch),
        ):
            _require(value >= 1, flag, value, "give a positive integer")
        _require(
            self.rollout_batch_size % self.global_batch_size == 0,
            "global-batch-size",
            self.global_batch_size,
            f"must divide --rollout-batch-size {self.rollout_batch_size}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """Generation servers (SGLang's HTTP API) and how to sample from them."""

    student_urls: tuple[str, ...] = ()
    """Base URLs of the servers that hold the student and receive its new weights."""
    teacher_urls: tuple[str, ...] = ()
    """Base URLs of the servers that write y_r: the OPD teacher, or the initial weights in OPSD. They are never
    resynced.
    Unset in OPSD with `--opsd-teacher current`: the student's servers."""
    student_router_url: str | None = None
    """SGLang's router in front of the student's servers: requests go to it, weights to each of `--student-urls`."""
    teacher_router_url: str | None = None
    """SGLang's router in front of the servers of `--teacher-urls`."""
    rollout_temperature: float = 0.6
    """Sampling temperature of both stages and, unless `--eval-sampling` says otherwise, of evaluation."""
    rollout_top_p: float = 0.95
    """Nucleus of the same."""
    rollout_top_k: int = 20
    """Sample from the k likeliest tokens only; -1 = all."""
    max_prompt_tokens: int = 4096
    """Longest plain prompt; a longer one is an error that names the problem."""
    max_response_tokens: int = 16384
    """Budget of y_o, of y_r and, without `--eval-max-response-tokens`, of an evaluation response."""
    max_refine_prompt_tokens: int = 18432
    """Budget of the refinement prompt; y_o, then y*, are cut in the middle with a visible mark to keep it."""
    thinking: bool = False
    """Let the student reason in a block of its own, where its chat template has such a switch. The teacher's context
    along y_o follows y_o."""
    refiner_thinking: bool | None = None
    """The same for the refinement prompt, at generation and in the loss; unset = as `--thinking`."""
    request_timeout_s: float = 3600.0
    """Deadline of one try of a generation request, in seconds; all its tries have (retries + 1) times as much."""
    server_timeout_s: float = 60.0
    """How long to wait at the start for every server to answer, in seconds."""
    request_retries: int = 3
    """Tries on another server after a failed request before the completion counts as failed. Waiting for a full server
    and going on from tokens that are there cost none."""
    max_concurrent_requests: int = 512
    """Requests in flight per server group."""
    hedge_after_s: float | None = None
    """Send a request that is still running after this many seconds to a second server as well and take the first
    answer; unset = never."""
    server_api_key_file: str | None = None
    """File whose only line is the key that the servers ask for; unset = none."""
    rollout_staleness: int = 0
    """Iterations that rollouts may be behind the weights in training: 0 = strictly on-policy; S > 0: a process of its
    own rolls out up to S iterations ahead while the trainer trains."""
    drift_alarm_nats: float | None = None
    """Warn when trainer and servers disagree on a token's log-probability by more than this; unset = 1e-3 in fp32, 0.5
    in bf16."""
    colocate: bool = False
    """Servers share the trainer's GPUs: they give their memory back while it trains. Needs --enable-memory-saver on
    the servers."""

    def __post_init__(self) -> None:
        _require(self.rollout_staleness >= 0, "rollout-staleness", self.rollout_staleness, "give 0 or more")
        for flag, seconds in (("hedge-after-s", self.hedge_after_s), ("drift-alarm-nats", self.drift_alarm_nats)):
            _require(seconds is None or seconds > 0, flag, seconds, "must be positive; leave it out otherwise")
        _require(self.rollout_temperature >= 0, "rollout-temperature", self.rollout_temperature, "must not be negative")
        _require(0 < self.rollout_top_p <= 1, "rollout-top-p", self.rollout_top_p, "must lie in (0, 1]")
        _require(
            self.rollout_top_k == -1 or self.rollout_top_k >= 1,
            "rollout-top-k",
            self.rollout_top_k,
            "give -1 (all tokens) or a positive integer",
        )
        for flag, value in (
            ("max-prompt-tokens", self.max_prompt_tokens),
            ("max-response-tokens", self.max_response_tokens),
            ("max-refine-prompt-tokens", self.max_refine_prompt_tokens),
            ("max-concurrent-requests", self.max_concurrent_requests),
        ):
            _require(value >= 1, flag, value, "give a positive integer")
        _require(self.request_retries >= 0, "request-retries", self.request_retries, "give 0 or more")
        for url in (*self.student_urls, *self.teacher_urls):
            _require(
                url.startswith(("http://", "https://")), "student-urls/--teacher-urls", url, "start it with http://"
            )
        for role, router, urls in (
            ("student", self.student_router_url, self.student_urls),
            ("teacher", self.teacher_router_url, self.teacher_urls),
        ):
            _require(
                router is None or (router.startswith(("http://", "https://")) and bool(urls)),
                f"{role}-router-url",
                router,
                f"start it with http://, and name the servers behind it as --{role}-urls",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSyncConfig:
    """How new weights reach the student's servers."""

    weight_sync: Literal["disk", "distributed", "tensor", "adapter"] = "disk"
    """Transport: `disk`: a Hugging Face directory that the servers load; `distributed`: broadcast in a process group
    (NCCL, gloo on a CPU); `tensor`: through the servers' HTTP door, on a GPU as CUDA-IPC handles, which needs trainer
    and servers on the same GPUs; `adapter`: the LoRA adapter alone, loaded beside the frozen weights."""
    weight_sync_dir: str | None = None
    """Directory that trainer and servers share, for `disk`; unset = `<run-dir>/weights`."""
    weight_sync_timeout_s: float = 600.0
    """Longest time that servers rest for one publication, in seconds."""
    weight_sync_bucket_mb: int = 512
    """Tensors travel in buckets of about this size in MiB (`distributed`, `tensor`)."""
    weight_sync_retries: int = 1
    """Further publications to the servers that failed at one, before the run goes on without them."""
    weight_sync_address: str | None = None
    """Address at which servers reach the trainer (`distributed`); unset = loopback if all servers are there, else
    this machine's address towards them."""
    check_weight_update_equal: bool = False
    """Compare the checksums of all servers after each publication."""

    def __post_init__(self) -> None:
        _require(
            self.weight_sync_timeout_s > 0, "weight-sync-timeout-s", self.weight_sync_timeout_s, "must be positive"
        )
        _require(
            self.weight_sync_bucket_mb >= 1, "weight-sync-bucket-mb", self.weight_sync_bucket_mb, "give at least 1"
        )
        _require(self.weight_sync_retries >= 0, "weight-sync-retries", self.weight_sync_retries, "give 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Sampling evaluation on held-out problems through the student's servers."""

    eval_interval: int = 0
    """Iterations between evaluations; 0 = only before and after training."""
    eval_num_problems: int = 128
    """Held-out problems; 0 switches evaluation off."""
    eval_num_samples: int = 8
    """Samples per problem: the k of avg@k and pass@k."""
    eval_sampling: Literal["rollout", "paper", "qwen3"] = "rollout"
    """How evaluation samples: by the `--rollout-*` flags; as the paper does (T 0.6, top-p 0.95, top-k 20); or as Qwen3
    recommends (with `--thinking` the same, without it T 0.7, top-p 0.8, top-k 20)."""
    eval_max_response_tokens: int | None = None
    """Budget of an evaluation response; unset = the benchmark's own (38912 for mathematics, 16384 for code), or
    `--max-response-tokens` for the task's held-out problems."""
    livecodebench_mode: Literal["faithful", "official"] = "faithful"
    """How LiveCodeBench's programs are run: as real programs, or as its published harness does it, oddities
    included."""

    def __post_init__(self) -> None:
        _require(self.eval_interval >= 0, "eval-interval", self.eval_interval, "give 0 or more")
        _require(self.eval_num_problems >= 0, "eval-num-problems", self.eval_num_problems, "give 0 or more")
        _require(self.eval_num_samples >= 1, "eval-num-samples", self.eval_num_samples, "give 1 or more")
        tokens = self.eval_max_response_tokens
        _require(tokens is None or tokens >= 1, "eval-max-response-tokens", tokens, "give a positive integer")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What a run leaves on disk."""

    run_dir: str = "runs/default"
    """Directory of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, summary.json."""
    save_interval: int = 0
    """Iterations between distributed checkpoints; 0 = none but the last one."""
    save_checkpoints: bool = True
    """Save a distributed checkpoint at the end (and every `--save-interval`)."""
    resume: Literal["auto", "require", "never"] = "auto"
    """`auto`: go on from the newest good checkpoint of `--run-dir` if there is one; `require`: fail if there is none,
    or if the newest is damaged; `never`: start anew (refused when the directory already holds checkpoints)."""
    async_save: bool = False
    """Go on training while a checkpoint is written; its state is copied to host memory first."""
    keep_checkpoints: int | None = None
    """Keep this many of the newest complete checkpoints and delete older ones; unset = all."""
    keep_every: int | None = None
    """With `--keep-checkpoints`: also keep the checkpoints of iterations that are multiples of this."""
    verify_checkpoint: bool = True
    """Compare the checksums of all files before resuming; the ranks share the reading. Off: only their sizes."""
    save_hf: str | None = None
    """Export the trained student (adapters merged) to this Hugging Face directory at the end."""
    save_adapter: str | None = None
    """Export the LoRA adapter to this PEFT directory at the end."""
    save_trajectories: bool = False
    """Keep the trajectories of each iteration in `trajectories/` of `--run-dir`, as `megatron_trd.generate` writes
    them: for reports and audits, or to train on again."""
    diagnose_interval: int = 0
    """Iterations between audits that compare the teacher's signal on y_o and on y_r without training; 0 = only
    the first
    iteration; -1 = never."""

    def __post_init__(self) -> None:
        _require(self.save_interval >= 0, "save-interval", self.save_interval, "give 0 or more")
        for flag, count in (("keep-checkpoints", self.keep_checkpoints), ("keep-every", self.keep_every)):
            _require(count is None or count >= 1, flag, count, "give a positive integer; leave it out to keep all")
        _require(
            self.keep_every is None or self.keep_checkpoints is not None,
            "keep-every",
            self.keep_every,
            "nothing is deleted without --keep-checkpoints; give that too, or leave it out",
        )
        _require(self.diagnose_interval >= -1, "diagnose-interval", self.diagnose_interval, "give -1, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole run."""

    method: MethodConfig = field(default_factory=MethodConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _require(bool(self.model.hf_checkpoint), "hf-checkpoint", "(unset)", "give the student's directory")
        self._check_teacher()
        self._check_offloading()
        self._check_servers()
        self._check_refinement()
        self._check_adapter()

    def _check_teacher(self) -> None:
        opd = self.method.mode == "opd"
        _require(
            not opd or self.model.teacher_hf_checkpoint is not None,
            "teacher-hf-checkpoint",
            "(unset)",
            "--mode opd needs the teacher's directory",
        )
        for flag, value in (
            ("teacher-hf-checkpoint", self.model.teacher_hf_checkpoint),
            ("teacher-megatron-checkpoint", self.model.teacher_megatron_checkpoint),
        ):
            remedy = "--mode opsd teaches with the student's own weights; leave it out or use --mode opd"
            _require(opd or value is None, flag, value, remedy)
        shares = not opd and (self.method.opsd_teacher == "current" or self.lora.lora_rank > 0)
        _require(
            not (self.model.offload_teacher and shares),
            "offload-teacher",
            True,
            "this teacher is the student's own backbone and has no weights of its own; leave it out",
        )

    def _check_servers(self) -> None:
        online = self.data.trajectories is None
        _require(
            not online or bool(self.rollout.student_urls),
            "student-urls",
            "(unset)",
            "give at least one server, or train from a file with --trajectories",
        )
        refines = online and (self.method.trajectory == "y_r")
        own_refiner = self.method.mode == "opsd" and self.method.opsd_teacher == "current"
        _require(
            not refines or own_refiner or bool(self.rollout.teacher_urls),
            "teacher-urls",
            "(unset)",
            "y_r needs a server with the teacher's weights (OPSD: the initial ones, or use --opsd-teacher current)",
        )
        _require(
            online or not self.checkpoint.save_trajectories,
            "save-trajectories",
            True,
            "they are in the file of --trajectories already; leave it out",
        )
        _require(
            online or self.rollout.rollout_staleness == 0,
            "rollout-staleness",
            self.rollout.rollout_staleness,
            "nothing is rolled out with --trajectories; leave it out",
        )
        _require(
            not (self.rollout.colocate and self.rollout.rollout_staleness),
            "rollout-staleness",
            self.rollout.rollout_staleness,
            "servers on the trainer's GPUs cannot roll out while it trains; use 0, or leave out --colocate",
        )

    def _check_adapter(self) -> None:
        _require(
            self.weight_sync.weight_sync != "adapter" or self.lora.lora_rank > 0,
            "weight-sync",
            "adapter",
            "there is no adapter without --lora-rank; use disk, distributed or tensor",
        )
        _require(
            self.checkpoint.save_adapter is None or self.lora.lora_rank > 0,
            "save-adapter",
            self.checkpoint.save_adapter,
            "there is no adapter without --lora-rank",
        )

    def _check_refinement(self) -> None:
        online = self.data.trajectories is None
        for flag, chosen, plain in (
            ("refine-samples", self.method.refine_samples, 1),
            ("refine-from", self.method.refine_from, "start"),
        ):
            _require(
                not online or self.method.trajectory == "y_r" or chosen == plain,
                flag,
                chosen,
                "--trajectory y_o trains on the raw rollout; leave it out",
            )
        thinking = self.rollout.refiner_thinking
        _require(
            self.method.refine_from == "start" or thinking in (None, self.rollout.thinking),
            "refiner-thinking",
            thinking,
            "with --refine-from failing-prefix the refiner goes on from the student's tokens; leave it out",
        )

    def _check_offloading(self) -> None:
        _require(
            not self.model.cpu_offloading_num_layers or self.parallel.pipeline_model_parallel_size == 1,
            "cpu-offloading-num-layers",
            self.model.cpu_offloading_num_layers,
            "does not go with pipeline stages; use --recompute-granularity, or --pipeline-model-parallel-size 1",
        )
        _require(
            not self.optimizer.optimizer_cpu_offload or (self.model.bf16 and self.parallel.use_distributed_optimizer),
            "optimizer-cpu-offload",
            self.optimizer.optimizer_cpu_offload,
            "needs bf16 and --use-distributed-optimizer",
        )
