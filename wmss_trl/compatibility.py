"""What the package relies on beyond the public interfaces of the libraries that it builds on."""

from importlib.metadata import version

# The versions with which all of it was checked
CHECKED_WITH = {"transformers": "5.23", "trl": "1.16", "accelerate": "1.15"}


def versions(*packages: str) -> str:
    """The installed versions of packages and those that were checked, for a message."""
    installed = ", ".join(f"{package} {version(package)}" for package in packages)
    checked = ", ".join(f"{package} {CHECKED_WITH[package]}" for package in packages)
    return f"installed: {installed}; checked: {checked}"
