"""
The core suite in fresh environments at both ends of the supported versions, and beside another PyTorch:

    nox                              # lowest and highest
    nox -s lowest -- tests/test_trainer.py
    TORCH=2.14.0 nox -s highest
"""

import os
from pathlib import Path

import nox

nox.needs_version = ">=2026.2.9"
nox.options.sessions = ["lowest", "highest"]

CORE = ("-n", "2", "--dist", "loadfile", "-m", "not ci and not slow and not gpu and not multi_gpu")


@nox.session(venv_backend="venv")
def lowest(session: nox.Session) -> None:
    """The lowest versions that the package claims."""
    run(session, "constraints.txt", "constraints-lowest.txt")


@nox.session(venv_backend="venv")
def highest(session: nox.Session) -> None:
    """The highest ones."""
    run(session, "constraints.txt", "constraints-highest.txt")


def run(session: nox.Session, *files: str) -> None:
    pins = {}
    for file in files:  # what a later one says counts
        lines = (line.strip() for line in Path(file).read_text().splitlines())
        pins |= {line.split("==")[0].lower(): line for line in lines if line and not line.startswith("#")}
    if version := os.environ.get("TORCH"):
        pins |= {"torch": f"torch=={version}", "triton": ""}  # whose release PyTorch chooses
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(pins.values()))
    session.install("--constraint", str(constraints), "--editable", ".[test]", env={"DS_BUILD_OPS": "0"})
    session.run("python", "-m", "pip", "list")
    session.run("python", "-m", "pytest", *CORE, *session.posargs)
