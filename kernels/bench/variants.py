"""The operator, its ideal and its rivals, each as a job that returns the gradients of one case."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cases import OBJECTIVES, TOP_K, Case, Gradients, Heads
from gemm_replay import Recorder, Replay
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trd_kernels import linear_kl_div

Loss = Callable[[Heads], Tensor]
Job = Callable[[], Gradients | None]

LIGER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


class UnavailableError(Exception):
    """A variant cannot run here or has no such objective; the message says why."""


def forward_and_backward(loss: Loss, case: Case) -> Job:
    """Return a job that computes the loss and its gradients."""

    def run() -> Gradients:
        hidden = case.heads.student_input.detach().requires_grad_()
        weight = case.heads.student_weight.detach().requires_grad_(case.is_trainable)
        total = loss(case.heads._replace(student_input=hidden, student_weight=weight))
        return torch.autograd.grad(total, (hidden, weight) if case.is_trainable else (hidden,))

    return run


def ours(case: Case, backend: str = "auto") -> Job:
    """The operator of this package."""
    s = case.settings
    sizes = {"chunk": s.chunk, "workspace_mb": s.workspace_mb}
    options: dict[str, Any] = {name: x for name, x in sizes.items() if x is not None} | OBJECTIVES[case.objective]
    return forward_and_backward(
        lambda heads: linear_kl_div(*heads, vocab_size=s.vocab_size, backend=backend, **options).loss, case
    )


def _recorded(job: Job) -> Recorder:
    with Recorder() as recorder:
        job()
    return recorder


def ours_torch(case: Case) -> Job:
    """The same without row kernels, where there are any."""
    job = ours(case, "torch")
    if _recorded(job).operators == _recorded(ours(case)).operators:
        raise UnavailableError("backend auto is torch here")
    return job


def gemm_only(case: Case) -> Job:
    """The matrix products of `ours` and nothing else: what a perfect operator of this design would take."""
    return Replay.of(_recorded(ours(case)).products, case.settings.device)


def divergence(
    objective: str, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor
) -> Tensor:
    """Return the sum of token divergences as one would write it: fp32 log-softmaxes of all the logits `[N, V]`."""
    z_student = (student_input @ student_weight.T).float()
    with torch.no_grad():
        z_teacher = (teacher_input @ teacher_weight.T).float()
    if objective == "top_k":
        support = z_teacher.topk(TOP_K).indices
        z_student, z_teacher = z_student.gather(1, support), z_teacher.gather(1, support)
    log_q, log_p = z_student.log_softmax(1), z_teacher.log_softmax(1)
    kl = partial(F.kl_div, reduction="sum", log_target=True)  # kl(b, a) is KL(a||b)
    if objective == "reverse_kl":
        return kl(log_p, log_q)
    if objective == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return (kl(log_m, log_p) + kl(log_m, log_q)) / 2
    return kl(log_q, log_p)


def _compiled(case: Case) -> Callable[..., Tensor]:
    return torch.compile(divergence, dynamic=False) if case.settings.compile else divergence


def naive(case: Case) -> Job:
    """All the logits at once."""
    return forward_and_backward(lambda heads: divergence(case.objective, *heads), case)


def naive_compiled(case: Case) -> Job:
    """The same under `torch.compile`."""
    if not case.settings.compile:
        raise UnavailableError("--no-compile")
    function = _compiled(case)
    return forward_and_backward(lambda heads: function(case.objective, *heads), case)


def token_chunks(case: Case, rows: int) -> Job:
    """Compiled chunks of `rows` tokens whose logits are computed again in the backward pass."""
    function = _compiled(case)

    def loss(heads: Heads) -> Tensor:
        chunks = zip(heads.student_input.split(rows), heads.teacher_input.split(rows), strict=True)
        losses = []
        for hidden, teacher in chunks:
            chunk = heads._replace(student_input=hidden, teacher_input=teacher)
            losses.append(checkpoint(function, case.objective, *chunk, use_reentrant=False))
        return torch.stack(losses).sum()

    return forward_and_backward(loss, case)


def _liger_beta(case: Case) -> float:
    if case.objective not in LIGER_BETA:
        raise UnavailableError(f"has no objective {case.objective}")
    try:
        import liger_kernel  # noqa: F401
    except ImportError as error:
        raise UnavailableError(f"liger_kernel cannot be imported ({error})") from error
    return LIGER_BETA[case.objective]


def liger_jsd(case: Case) -> Job:
    """`LigerFusedLinearJSD`; it returns the mean over tokens."""
    beta = _liger_beta(case)
    if case.settings.device == "cpu":
        raise UnavailableError("its Triton kernels need CUDA")
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=beta)
    return forward_and_backward(lambda heads: module(*heads, None) * case.settings.tokens, case)


def liger_chunked(case: Case) -> Job:
    """`chunked_loss.LigerFusedLinearJSDLoss` without its cross-entropy; it returns the mean over tokens."""
    beta = _liger_beta(case)
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=case.settings.compile
    )
    labels = torch.zeros(case.settings.tokens, dtype=torch.int64, device=case.settings.device)
    return forward_and_backward(lambda heads: module(*heads, labels) * case.settings.tokens, case)


VARIANTS: dict[str, Callable[[Case], Job]] = {
    "gemm-only": gemm_only,
    "ours": ours,
    "ours-torch": ours_torch,
    "naive": naive,
    "naive-compiled": naive_compiled,
    "chunks-256": partial(token_chunks, rows=256),
    "chunks-1024": partial(token_chunks, rows=1024),
    "liger-jsd": liger_jsd,
    "liger-chunked": liger_chunked,
}
