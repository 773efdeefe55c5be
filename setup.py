"""Metadata of diffusers_cf: what pip installs, what the wheel carries."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
REPOSITORY = "https://github.com/OWNER/diffusers_cf"  # where the project is published


def long_description() -> str:
    """Return the README with addresses for links and images, which an index page would look for beside itself."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)"
    kinds = {"!": "raw", "": "blob"}
    return re.sub(relative, lambda m: f"{m[1]}[{m[2]}]({REPOSITORY}/{kinds[m[1]]}/main/{m[3]})", readme)


extras = {
    "phantom": ["nilearn>=0.14"],
    "app": ["gradio>=6.31", "nilearn>=0.14"],
    "dicom": ["pydicom", "highdicom", "pylibjpeg", "pylibjpeg-openjpeg"],
    "skull": ["deepbet"],
    "train": ["tensorboard"],
    "docs": ["mkdocs-material", "mkdocstrings[python]"],
    # 2.3 brought --session-timeout, by which `make test` keeps its time budget
    # playwright drives the Chromium that is installed, and needs none of its own
    "test": ["pytest", "pytest-timeout>=2.3", "pytest-xdist", "playwright"],
}
extras["test"] += extras["docs"]
extras["dev"] = [
    "ruff",
    *extras["phantom"],
    *extras["app"],
    *extras["dicom"],
    *extras["skull"],
    *extras["train"],
    *extras["test"],
]

setup(
    name="diffusers_cf",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "diffusers_cf/__init__.py").read_text(), re.M).group(1),
    description="Lesion localisation from image-level labels by counterfactual diffusion, on diffusers",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    # the code; the weights of flair_tumour_small have the license of their training data
    license="Apache-2.0 AND CC-BY-SA-4.0",
    license_files=["LICENSE", "THIRD_PARTY.md", "diffusers_cf/pretrained/*/LICENSE"],
    author="The diffusers_cf contributors",
    url=REPOSITORY,
    project_urls={
        "Source": REPOSITORY,
        "Issues": f"{REPOSITORY}/issues",
        "Changes": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Security": f"{REPOSITORY}/blob/main/SECURITY.md",
        "Paper": "https://arxiv.org/abs/2207.12268",
    },
    keywords="diffusion counterfactual anomaly-detection weakly-supervised segmentation brain mri lesion diffusers",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["diffusers_cf", "diffusers_cf.*"]),
    # the script lies beside the package; as a module it also reaches users of the wheel:
    # accelerate launch -m train_counterfactual
    py_modules=["train_counterfactual"],
    package_data={
        "diffusers_cf": [f"pretrained/**/*.{kind}" for kind in ("json", "safetensors", "md", "png")]
        + ["pretrained/*/LICENSE", "templates/*", "py.typed"]
    },
    install_requires=[
        "torch",
        "diffusers>=0.38",
        "accelerate",
        "datasets>=4.2",
        "transformers",
        "safetensors",
        "numpy",
        "huggingface_hub>=1.0",  # RemoteEntryNotFoundError
        "nibabel",
        "scikit-learn",
        "scipy>=1.15",
        "jinja2",
        "matplotlib",
        "pyarrow",
        "pillow",
        "filelock",
        "threadpoolctl",
        "tqdm",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["diffusers-cf = diffusers_cf.cli:main"]},
)
