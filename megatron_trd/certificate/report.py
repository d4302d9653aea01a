"""A certificate in words: a table, a verdict, and what the pattern of errors is a sign of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_trd.certificate.comparison import Certificate, Finding
from megatron_trd.config.schema import Config

SHOWN = 12
"""Rows of each table that are printed, besides all that fail."""

# What fails, and nothing else does -> what it is a sign of. The first that fits.
_PATTERNS = (
    (r"\.[qk]_norm\.", "the gradients of q_norm and k_norm are not summed over the tensor-parallel ranks"),
    (r"norm\.", "the gradients of norms are not summed over the ranks that share a sequence (tensor, context)"),
    (
        r"embed_tokens|lm_head",
        "embedding and output head: a tied copy on another stage, or a part of the vocabulary, is missing from the sum",
    ),
    (r"\.mlp\.gate\.", "the routers' gradients are not summed over the ranks that share a sequence"),
    (r"\.mlp\.experts\.", "experts: their gradients are summed over the wrong ranks, or tokens reach the wrong one"),
    (r"lora_A", "the A of adapters: split or summed in the wrong way over the tensor-parallel ranks"),
    (r"lora_B", "the B of adapters: split or summed in the wrong way over the tensor-parallel ranks"),
    (r"bias", "the biases: split or summed in the wrong way over the tensor-parallel ranks"),
    (r"\.self_attn\.", "attention: heads, positions, or the exchange between context-parallel ranks"),
    (r"\.mlp\.", "feed-forward layers: the cut of gate, up and down over the tensor-parallel ranks"),
)


def hints(certificate: Certificate) -> list[str]:
    """Say what the failures are a sign of; nothing where there are none."""
    found = []
    if not certificate.yardstick_is_good:
        found.append("transformers itself loses too much in this precision to say anything; certify with --no-bf16")
    wrong = [finding for finding in certificate.gradients if not finding.ok]
    if wrong:
        found.append(_hint_of_gradients(certificate, wrong))
    elif not certificate.loss.ok:
        found.append("the gradients are right and the reported loss is not: the sum of the loss over ranks")
    elif not certificate.grad_norm.ok:
        found.append("the gradients are right and their norm is not: copies are counted twice, or parts left out")
    if not wrong and any(not finding.ok for finding in certificate.updates):
        found.append(
            "the gradients are right and the update is not: clipping, weight decay, or a rank's part of the "
            "optimizer's state that is not handed to the others"
        )
    if certificate.unequal_copies:
        found.append(
            "ranks that should hold the same weights do not: a gradient or an updated weight misses some ranks"
        )
    return found


def _hint_of_gradients(certificate: Certificate, wrong: Sequence[Finding]) -> str:
    scales = sorted(finding.scale for finding in wrong)
    middle = scales[len(scales) // 2]
    alike = scales[-1] - scales[0] <= 0.05 * abs(middle)
    if alike and len(wrong) == len(certificate.gradients) and min(f.cosine for f in wrong) > 0.999:
        return f"every gradient is {middle:.4g} times what it should be: the loss's normaliser, or a sum over ranks"
    for pattern, meaning in _PATTERNS:
        if all(re.search(pattern, finding.name) for finding in wrong):
            return meaning
    layers = {match[1] for finding in wrong if (match := re.search(r"layers\.(\d+)\.", finding.name))}
    if certificate.loss.ok:
        where = f"layers {', '.join(sorted(layers, key=int))}" if layers else "no layer"
        return f"the loss is right, gradients ({where}) are not: the backward pass, or the sum of gradients over ranks"
    return (
        "loss and gradients are wrong: the forward pass, its weights, or the samples and weights of tokens that each "
        "rank gets"
    )


def layout(config: Config, num_ranks: int) -> str:
    """Name a layout in one line."""
    parallel, model = config.parallel, config.model
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "virtual stages": parallel.num_virtual_stages_per_pipeline_rank,
        "context": parallel.context_parallel_size,
        "data": num_ranks // parallel.model_parallel_size,
        "expert": parallel.expert_model_parallel_size,
    }
    switches = {
        "sequence parallel": parallel.sequence_parallel,
        "distributed optimizer": parallel.use_distributed_optimizer,
        "overlapped gradients": parallel.overlap_grad_reduce,
        "overlapped parameters": parallel.overlap_param_gather,
        f"recompute {model.recompute_granularity}": model.recompute_granularity != "none",
        f"LoRA rank {config.lora.lora_rank}": config.lora.lora_rank > 0,
    }
    precision = "bf16" if model.bf16 else "fp32"
    named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return ", ".join([f"{num_ranks} ranks", *named, *(name for name, on in switches.items() if on), precision])


def text(certificate: Certificate, layout: str, notes: Sequence[str]) -> str:
    """Return everything that a user reads."""
    lines = [f"layout: {layout}", *(f"note: {note}" for note in notes), ""]
    lines.append(f"transformers in this precision: gradients off by {certificate.yardstick:.1e}, all together")
    for finding in (certificate.loss, certificate.grad_norm):
        lines.append(f"{finding.name}: off by {finding.error:.1e} (limit {finding.limit:.1e}){_mark(finding)}")
    for title, findings in (("gradient", certificate.gradients), ("update", certificate.updates)):
        shown = [f for i, f in enumerate(findings) if i < SHOWN or not f.ok]
        width = max(len(f.name) for f in shown)
        lines += ["", f"{title:<{width}}  {'error':>8}  {'limit':>8}  {'cosine':>9}  {'scale':>9}"]
        lines += [
            f"{f.name:<{width}}  {f.error:8.1e}  {f.limit:8.1e}  {f.cosine:9.6f}  {f.scale:9.6f}{_mark(f)}"
            for f in shown
        ]
        if len(shown) < len(findings):
            lines.append(f"... and {len(findings) - len(shown)} more, all within their limits")
    lines += ["", *(f"unequal copies: {name}" for name in certificate.unequal_copies), verdict(certificate)]
    return "\n".join([*lines, *(f"hint: {hint}" for hint in hints(certificate)), ""])


def _mark(finding: Finding) -> str:
    return "" if finding.ok else "  WRONG"


def failures(certificate: Certificate) -> list[str]:
    """Name everything that is not as it should be, worst first."""
    found = [f.name for f in (certificate.loss, certificate.grad_norm) if not f.ok]
    found += [f"gradient of {f.name}" for f in certificate.gradients if not f.ok]
    found += [f"update of {f.name}" for f in certificate.updates if not f.ok]
    return found + [f"copies of {name}" for name in certificate.unequal_copies]


def verdict(certificate: Certificate) -> str:
    """Return the last line: CERTIFIED, or NOT CERTIFIED and why."""
    number = len(certificate.gradients)
    if certificate.certified:
        return f"CERTIFIED: loss, norm, {number} gradients and updates are the reference's; all copies are equal"
    wrong = failures(certificate) or ["the yardstick"]
    more = f", and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    return f"NOT CERTIFIED: {', '.join(wrong[:8])}{more}"


def as_json(certificate: Certificate, layout: str, notes: Sequence[str]) -> dict[str, Any]:
    """Return all numbers."""
    return {
        "certified": certificate.certified,
        "layout": layout,
        "notes": list(notes),
        "failures": failures(certificate),
        "hints": hints(certificate),
        **asdict(certificate),
    }
