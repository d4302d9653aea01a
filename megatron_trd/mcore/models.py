"""The shapes of a run's two models, checked against its flags."""

from __future__ import annotations

from megatron_trd.config.schema import Config
from megatron_trd.mcore.acceleration import require_shapes
from megatron_trd.mcore.experts import require_expert_grid
from megatron_trd.mcore.hf_config import HFModel, common_padding, read_hf_model


def read_models(config: Config) -> tuple[HFModel, HFModel]:
    """Read the shapes of student and teacher, with their vocabularies padded to the same rows. Needs no GPU.

    Returns:
        Both; in OPSD the student's twice.

    Raises:
        ValueError: a model cannot be used, or not with these flags.
    """
    tp_size = config.parallel.tensor_model_parallel_size
    student = read_hf_model(config.model.hf_checkpoint, "hf-checkpoint", tp_size)
    teacher, models = student, {"hf-checkpoint": student}
    if config.model.teacher_hf_checkpoint is not None:
        teacher = read_hf_model(config.model.teacher_hf_checkpoint, "teacher-hf-checkpoint", tp_size)
        models["teacher-hf-checkpoint"] = teacher
    require_expert_grid(config.parallel, models, config.model.moe_aux_loss_coeff)
    require_shapes(config, student)
    return common_padding(student, teacher, config.model.make_vocab_size_divisible_by, tp_size)
