"""Other libraries' functions for tests of parity; a test is skipped, with what to install, where one is not there."""

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import pytest

VERSIONS = {"trl": "1.16.0", "liger-kernel": "0.8.5", "verl": "0.9.1"}


def rival(package, module, *, exactly=False):
    """Import a module of a package in VERSIONS; `exactly` asks for that version, as a defect is that version's."""
    version = VERSIONS[package]
    try:
        installed = importlib.metadata.version(package)
        if package == "verl":
            _as_namespaces("verl", "verl.utils", "verl.utils.kernel", "verl.utils.experimental")
        found = importlib.import_module(module)
    except ImportError as missing:
        pytest.skip(f"{missing}: pip install {package}=={version}")
    if exactly and installed != version:
        pytest.skip(f"the defect is that of {package} {version}; {installed} is installed")
    return found


def _as_namespaces(*packages):
    """Folders as packages, their __init__ left out: verl's starts ray, which its functions do not need."""
    for name in packages:
        if name in sys.modules:
            continue
        parent, _, child = name.rpartition(".")
        if parent:
            folders = [f"{folder}/{child}" for folder in sys.modules[parent].__path__]
        else:
            spec = importlib.util.find_spec(name)
            folders = list(spec.submodule_search_locations) if spec else []
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = folders
