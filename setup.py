"""Package metadata. Exact versions for a working installation are in scripts/requirements.txt."""

from setuptools import find_packages, setup

setup(
    name="rethink_d2",
    version="0.1.0",
    description="Training detectors with and without pre-training, on Detectron2",
    license="Apache-2.0",
    python_requires=">=3.11",
    # configs/ stays at the top of the checkout, as in Detectron2, and ships inside the package.
    packages=find_packages(include=["rethink_d2", "rethink_d2.*"]) + ["rethink_d2.configs"],
    package_dir={"rethink_d2.configs": "configs"},
    package_data={
        "rethink_d2.configs": ["**/*.yaml"],
        "rethink_d2.paper": ["*.csv"],
        "rethink_d2.sweep": ["*.csv"],
        "rethink_d2.report": ["*.html", "*.j2", "*.css", "*.js"],
    },
    # Without detectron2: PyPI has no official package of it, so pip could not resolve it.
    install_requires=[
        "torch",
        "torchvision",
        "numpy",
        "Pillow",
        "pycocotools",
        # Exact, as evaluation/coco.py builds on what is no public interface of it.
        "faster-coco-eval==1.8.0",
        "fvcore",
        "iopath",
        "opencv-python",
        "matplotlib",
        "tensorboard",
        "tabulate",
        "tqdm",
        "msgspec",
        "filelock",
        "rich",
        "submitit",
        "optuna",
        "PyYAML",
        "plotly",
        "Jinja2",
    ],
    extras_require={
        "wandb": ["wandb"],
        "test": [
            *("pytest", "pytest-timeout", "hypothesis", "ruff"),
            *("mean-average-precision", "pandas", "playwright"),
        ],
    },
)
