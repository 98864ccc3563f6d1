"""Everything is in pyproject.toml; this refuses a checkout whose links are broken, where half of the package would be missing."""

from pathlib import Path

from setuptools import setup

for name in ("server", "engines", "distill", "proto"):
    if not Path("flashdiff", name, "__init__.py").is_file():
        raise SystemExit(
            f"flashdiff/{name} must be a symbolic link to ../{name}: check out again with `git config core.symlinks true`"
        )

setup()
