"""Package definition: the topographic layer (core) and the Topographic VAEs built on it (extra `train`)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="tvae-kernels",
    version="0.1.0",
    description="Fused Triton kernels for the topographic layer of Topographic VAEs, and the models that live on it",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["tvae_kernels", "tvae_kernels.*", "tvae", "tvae.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        # The wheels of torch for Linux bring Triton already; elsewhere the package falls back to plain PyTorch.
        'triton>=3.2; platform_system == "Linux" and platform_machine == "x86_64"',
    ],
    extras_require={
        "train": [
            "torchvision",
            "lightning-fabric>=2.4",
            "torchmetrics>=1.5",
            "scipy>=1.11",
            "scikit-learn>=1.4",
            "threadpoolctl>=3",
            "safetensors>=0.4",
            "tensorboard>=2.17",
            "matplotlib>=3.8",
            "pillow>=10",
            "tyro>=0.9",
            "rich>=13",
            "filelock>=3.12",
            "jaxtyping>=0.2.30",
            "pydantic>=2.7",
            "typing_extensions>=4.10",
        ],
        "shapes3d": ["h5py>=3.10"],  # to read the real 3D Shapes, and nothing else
        "video": ["av>=14"],  # to read videos of the user's own, and to write mp4
        "play": ["nicegui>=3"],  # for the page of `tvae play`
        "test": [
            "pytest>=8",
            "pytest-xdist>=3",
            "hypothesis>=6",
            "h5py>=3.10",
            "av>=14",
            "nicegui>=3",
            "selenium>=4",  # with a Chromium, if there is one
            "ruff",
        ],
        "bench": ["pytest-benchmark>=4"],
    },
    entry_points={"console_scripts": ["tvae = tvae.__main__:main"]},
)
