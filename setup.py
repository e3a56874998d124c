"""What is installed, and what it needs. The core needs nothing but Python."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megamoe" / "__init__.py").read_text())
assert VERSION is not None, "megamoe/__init__.py has no __version__"

# Files beside the code, by package.
PACKAGE_DATA = {
    "data_prep": ["sample/*", "sample/licenses/*"],
    "launch": ["clusters/*.toml", "templates/*"],
}

TRAIN = [
    "torch>=2.11",
    "numpy",
    "megatron-core>=0.16.1,<0.20",
    "rich",
    "matplotlib",  # the plot of a report; a report without it says so
]
DATA = ["tokenizers", "sentencepiece", "zstandard", "pyarrow", "orjson", "numpy", "rich"]
CONVERT = ["torch>=2.11", "numpy", "safetensors>=0.5"]
TRACK = ["tensorboard", "wandb"]
EXTRAS = {
    "train": TRAIN,
    "data": DATA,
    "track": TRACK,
    "convert": CONVERT,
    # Found at run time and never required. Its torch part is compiled, which needs the CUDA toolkit.
    "gpu": ["transformer-engine[pytorch]; sys_platform == 'linux'"],
    # For launching on Kubernetes, which this version does not do yet.
    "k8s": ["kubernetes"],
    "dev": [
        *TRAIN,
        *DATA,
        *TRACK,
        *CONVERT,
        "transformers>=5.15",  # reads what `megamoe convert` writes, in tests
        "ruff>=0.17,<0.18",  # formats: another version may format otherwise
        "mypy>=2.4,<3",
        "import-linter>=2.16,<3",
        "pytest>=9.2,<10",
        "hypothesis",
        "codespell",
        "pre-commit",
    ],
}

setup(
    name="megamoe",
    version=VERSION.group(1),
    description="Pretrain Mixture-of-Experts language models on Megatron-core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=[
        *find_packages(include=["megamoe*", "launch*", "data_prep*", "model_configs*"]),
        "megamoe_kernels",  # not `kernels`, which is the name of a Hugging Face package
    ],
    package_dir={"megamoe_kernels": "kernels/megamoe_kernels"},
    package_data=PACKAGE_DATA,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megamoe = megamoe.__main__:main"]},
)
