"""Packaging of kinetok: the rooms live at the top level and are reached through links in ``src/kinetok``."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
ROOMS = ("kernels", "motion", "model", "runtime", "train", "export")
for room in ROOMS:
    link = HERE / "src" / "kinetok" / room
    if not link.is_dir():  # a Windows checkout with symlinks off leaves a text file in place of the link
        raise SystemExit(
            f"{link} must be a link to ../../{room}, but is not a directory. Check the repository out with symbolic "
            "links enabled (git clone -c core.symlinks=true; on Windows with developer mode on)."
        )

TEXT = ["transformers>=5.17", "sentencepiece"]
FILES = ["pybvh>=0.9,<0.10", "pygltflib>=1.16.5", "pillow>=11", "imageio-ffmpeg>=0.6"]
VIEWER = ["viser>=1.1.1"]
TRAIN = ["tensorboard>=2.18"]
DATA = ["pyarrow>=20"]
TRITON = ["triton>=3.6,<3.10; sys_platform == 'linux'"]
# 96 MB to fetch; wheels for Linux on x86-64 alone.
RTX = ["tensorrt-rtx-cu13>=1.7,<1.8; sys_platform == 'linux' and platform_machine == 'x86_64'"]
ONNX = ["onnx>=1.20", "onnxruntime>=1.30,<1.32"]
DEV = [
    "hypothesis",
    "import-linter",
    "mypy",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "pywavelets",
    "ruff",
    "scipy",
    "triton>=3.6,<3.10; sys_platform == 'linux'",
]

setup(
    name="kinetok",
    version="0.1.0",
    description="Text to human motion at the speed of the memory bus: tokenizer, decoder and runtime of MotionMillion",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"kinetok": ["py.typed"], "kinetok.model": ["default/*"], "kinetok.train": ["default/*"]},
    install_requires=[
        "numpy>=2,<2.6",
        "torch>=2.11,<2.14",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "typer>=0.16",
        "rich>=13,<15",
    ],
    extras_require={
        "gpu": TRITON,
        "flash": ["flash-attn>=2.8"],
        "text": TEXT,
        "files": FILES,
        "viewer": VIEWER,
        "train": TRAIN,
        "data": DATA,
        "onnx": ONNX,
        "tensorrt": ["tensorrt>=11"],
        "tensorrt-rtx": RTX,
        "dev": [*TEXT, *FILES, *VIEWER, *TRAIN, *DATA, *TRITON, *ONNX, *RTX, *DEV],
    },
    entry_points={"console_scripts": ["kinetok=kinetok.__main__:main"]},
)
