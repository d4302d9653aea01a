from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_trd" / "__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="megatron-trd",
    version=VERSION,
    description="Trajectory-Refined Distillation on Megatron-Core and SGLang",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["megatron_trd", "megatron_trd.*"]),
        *find_packages("kernels", include=["trd_kernels", "trd_kernels.*"]),
    ],
    package_dir={"trd_kernels": "kernels/trd_kernels"},
    package_data={"megatron_trd.tasks": ["templates/**/*"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "transformers>=5.0",
        "tokenizers",
        "safetensors",
        "numpy",
        "aiohttp",
        "jinja2",  # chat templates
        "pyyaml",
        "tensorboard",
        "math-verify[antlr4_13_2]",
        "matplotlib",  # pictures of the report
        "psutil",  # Megatron's checkpoint writer fails without it and does not ask for it
    ],
)
