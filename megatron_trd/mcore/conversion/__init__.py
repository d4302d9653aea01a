"""Whole models between Hugging Face directories and Megatron's distributed checkpoints, a parameter at a time."""
