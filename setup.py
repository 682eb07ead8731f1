"""Where the two packages live; everything else is in pyproject.toml.

`kernels/` is only a source root: a package called `kernels` would shadow Hugging Face's, which transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["fdpg_fast*"]) + find_packages("kernels"),
    package_dir={"fdpg_kernels": "kernels/fdpg_kernels"},
)
