"""The table of what is private in other libraries: right for the installed versions, and complete."""

import ast
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import Trainer
from trl import SFTTrainer

import wmss_trl
from wmss_trl import WMSSTrainer, compatibility
from wmss_trl.compatibility import CHECKED_WITH, TABLE, changes, check_versions, warn_of_changes

ROOT = Path(wmss_trl.__file__).parent


@pytest.fixture
def all_imported():
    for entry in TABLE:
        importlib.import_module(entry.name.split(":")[0])


def listed_names():
    """Last components of the listed names, and what their code must mention."""
    return {name for entry in TABLE for name in (entry.name.split(".")[-1].split(":")[-1], *entry.mentions.split())}


def test_the_table_is_right_for_the_installed_versions(all_imported):
    assert changes() == []
    assert {entry.name.split(".")[0] for entry in TABLE} == set(CHECKED_WITH) - {"datasets"}
    assert len({entry.name for entry in TABLE}) == len(TABLE)
    for entry in TABLE:
        names = [entry.name.split(".")[-1].split(":")[-1], *entry.mentions.split()]
        for module in entry.used_by.split(", "):
            assert any(name in (ROOT / f"{module.replace(chr(46), chr(47))}.py").read_text() for name in names), (
                entry.name,
                module,
            )


def run_epoch(self, model, epoch, train_dataloader):
    pass


def log(self, logs, start_time=None):
    self._averages = logs


@pytest.mark.parametrize(
    ("cls", "name", "replacement", "change"),
    [
        (
            Trainer,
            "_run_epoch",
            run_epoch,
            "takes (self, model, epoch, train_dataloader), not (self, model, epoch, t",
        ),
        (SFTTrainer, "log", log, "does not use `_metrics` any more"),
        (SFTTrainer, "_prepare_dataset", None, "is gone"),
    ],
)
def test_a_change_gives_one_warning_at_import_that_names_it(monkeypatch, cls, name, replacement, change):
    if replacement is None:
        monkeypatch.delattr(cls, name)
    else:
        monkeypatch.setattr(cls, name, replacement)
    monkeypatch.setattr(compatibility, "_not_yet_checked", list(TABLE))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        importlib.reload(wmss_trl)
        importlib.reload(wmss_trl)  # once is enough
    (message,) = [str(warning.message) for warning in record if "private parts" in str(warning.message)]
    package = "transformers" if cls is Trainer else "trl"
    user = "trainer" if name == "log" else "loop.two_phase"
    assert f"{cls.__module__}.{cls.__name__}.{name}` (for {user}) {change}" in message
    assert f"checked: {package} {CHECKED_WITH[package][0]}" in message
    assert message.count("(for ") == 1


def test_what_is_imported_later_is_checked_then(monkeypatch, make_model, make_args, tokenizer, dataset):
    monkeypatch.setattr(compatibility, "_not_yet_checked", list(TABLE))
    monkeypatch.delattr("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func")
    with pytest.warns(UserWarning, match=r"load_balancing_loss_func` \(for modeling.lm_head\) is gone"):
        WMSSTrainer(make_model(), make_args(), train_dataset=dataset, processing_class=tokenizer)


def test_nothing_is_imported_and_nothing_is_said_when_all_is_well(monkeypatch, all_imported):
    monkeypatch.setattr(compatibility, "_not_yet_checked", list(TABLE))
    for name in ("deepspeed", "bitsandbytes"):
        for module in [m for m in compatibility.sys.modules if m.split(".")[0] == name]:
            monkeypatch.delitem(compatibility.sys.modules, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_changes()
    left = {entry.name.split(".")[0] for entry in compatibility._not_yet_checked}
    assert left == {"deepspeed", "bitsandbytes"}
    assert not left & set(compatibility.sys.modules)


# Versions


def pretend(path, package, version):
    """Metadata of another version, where it is found before that of the installed one."""
    folder = path / f"{package}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.mark.parametrize(("package", "version"), [("transformers", "5.16.0"), ("trl", "0.29.1"), ("peft", "0.1.0")])
def test_an_older_version_is_an_error_at_import(tmp_path, package, version):
    pretend(tmp_path, package, version)
    path = os.pathsep.join([str(tmp_path), str(ROOT.parent)])
    result = subprocess.run(
        [sys.executable, "-c", "import wmss_trl"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    lowest = CHECKED_WITH[package][0]
    assert f"ImportError: wmss_trl needs {package} {lowest} or later, but {package} {version} is" in result.stderr
    assert f"pip install --upgrade '{package}>={lowest}'" in result.stderr
    assert "site-packages" not in result.stderr  # nothing else has been imported


def test_newer_versions_give_one_warning_at_import(monkeypatch, tmp_path):
    pretend(tmp_path, "transformers", "5.99.0")
    pretend(tmp_path, "torch", "3.0.0+cu150")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="not checked with") as record:
        importlib.reload(wmss_trl)
    (message,) = [str(warning.message) for warning in record if "not checked with" in str(warning.message)]
    assert f"transformers 5.99.0 (checked: {' to '.join(CHECKED_WITH['transformers'])}), torch 3.0.0+cu150" in message


@pytest.mark.parametrize("package", ["transformers", "trl", "accelerate", "datasets", "peft", "torch"])
def test_checked_versions_and_their_patch_releases_give_none(monkeypatch, tmp_path, package):
    lowest, highest = CHECKED_WITH[package]
    monkeypatch.syspath_prepend(tmp_path)
    for number, version in enumerate((lowest, highest, f"{highest}.99", f"{highest}.1+cu130")):
        path = tmp_path / str(number)
        path.mkdir()
        pretend(path, package, version)
        monkeypatch.syspath_prepend(path)
        assert importlib.metadata.version(package) == version
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            check_versions()
        assert not [warning for warning in record if f"{package} " in str(warning.message)]


def test_the_requirements_are_what_was_checked():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    floors = {
        requirement.name: next((s.version for s in requirement.specifier if s.operator == ">="), None)
        for requirement in map(Requirement, wanted)
    }
    checked = ("transformers", "trl", "accelerate", "datasets", "peft", "torch")
    assert {name: floors[name] for name in checked} == {name: CHECKED_WITH[name][0] for name in checked}


# Completeness


def modules():
    for found in pkgutil.walk_packages([str(ROOT)], "wmss_trl."):
        try:
            yield importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            assert error.name == "triton"  # noqa: PT017


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def test_every_private_name_that_is_overridden_is_listed():
    overridden = set()
    for module in modules():
        classes = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
        for cls in classes:
            bases = [base for base in cls.__mro__[1:] if not base.__module__.startswith("wmss_trl")]
            for name in filter(is_private, vars(cls)):
                owner = next((base for base in bases if name in vars(base)), None)
                # Two whose metaclasses add names
                if owner is not None and owner.__module__ not in ("torch.autograd.function", "abc"):
                    overridden.add(f"{owner.__module__}.{owner.__qualname__}.{name}")
    assert {"transformers.trainer.Trainer._run_epoch", "trl.trainer.sft_trainer.SFTTrainer._tag_names"} <= overridden
    assert overridden - {entry.name.replace(":", ".") for entry in TABLE} == set()


def test_every_private_name_that_is_read_is_listed():
    trees = [ast.parse(path.read_text()) for path in ROOT.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in nodes:  # `self._x = ...` and `_x = ...`
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                ours.add(target.attr)
            ours |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)} if target else set()
    # Assigned or defined by us and yet theirs
    ours -= {"_tag_names", "_name", "_paper", "_total_train_tokens", "_VALID_DICT_FIELDS"}
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    read |= {  # `getattr(model, "_x", None)`
        node.args[1].value
        for node in nodes
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) in ("getattr", "hasattr", "setattr")
        and isinstance(node.args[1], ast.Constant)
    }
    private = {name for name in read if is_private(name)} - ours
    assert {"_metrics", "_old_forward", "_active_adapter"} <= private
    assert private - listed_names() == set()
