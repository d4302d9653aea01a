"""Every prompt of a few problems as the servers get it, for people to read before a run."""

from __future__ import annotations

from megatron_trd.config.schema import Config
from megatron_trd.rollout.renderer import Renderer
from megatron_trd.rollout.vocabulary import load_tokenizer, stop_token_ids
from megatron_trd.tasks.base import Task

_NO_RESPONSE = "(the student's response)"


def show_prompts(config: Config, task: Task, num_problems: int) -> str:
    """Return the prompts of the first training problems, decoded with special tokens, with their lengths and cuts.

    In the refinement prompt the reference solution stands for y_o, which nobody has written yet.

    Raises:
        ValueError: a prompt does not fit its budget, or a file or the tokenizer cannot be used.
    """
    tokenizer = load_tokenizer(config.model.hf_checkpoint, "hf-checkpoint")
    renderer = Renderer.from_config(config, task, tokenizer)
    stops = ", ".join(f"{stop} {tokenizer.decode([stop])}" for stop in stop_token_ids(tokenizer))
    blocks = [f"a response ends with: {stops}"]
    for index in range(num_problems):
        problem = task.train_problem(index)
        y_o = problem.reference_solution or _NO_RESPONSE
        prompts = {"solve": (renderer.solve(problem), 0)}
        if config.method.mode == "opsd":
            prompts["teacher's context along y_o"] = renderer.vanilla(problem)
        if config.method.trajectory == "y_r":
            stand_in = "y* in place of y_o" if problem.reference_solution else "y_o not written yet"
            prompts[f"refine, {stand_in}"] = renderer.refine(problem, y_o)
        for name, (ids, num_cut) in prompts.items():
            cut = f", {num_cut} cut" if num_cut else ""
            blocks.append(f"=== {problem.id}: {name} ({len(ids)} tokens{cut}) ===\n{tokenizer.decode(ids)}")
    return "\n\n".join(blocks) + "\n"
