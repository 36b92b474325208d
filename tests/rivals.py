"""Other libraries' functions for tests of parity; a test is skipped, with what to install, where one is not there."""

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import pytest

VERSIONS = {"trl": "1.16.0", "liger-kernel": "0.8.5", "verl": "0.9.1", "openrlhf": "0.11.2"}


def rival(package, module, *, exactly=False):
    """Import a module of a package in VERSIONS; `exactly` asks for that version, as a defect is that version's."""
    version = VERSIONS[package]
    try:
        installed = importlib.metadata.version(package)
        if package == "verl":
            _as_namespaces("verl", "verl.utils", "verl.utils.kernel", "verl.utils.experimental")
        found = importlib.import_module(module)
    except ImportError as missing:
        pytest.skip(f"{missing}: pip install {package}=={version}", allow_module_level=True)
    if exactly and installed != version:
        pytest.skip(f"the defect is that of {package} {version}; {installed} is installed")
    return found


class VerlConfig(types.SimpleNamespace):
    """Settings for verl's losses, which ask of a configuration no more than attributes and `get`."""

    def get(self, name, default=None):
        """An attribute, or the default."""
        return getattr(self, name, default)


def verl_losses():
    """verl's policy losses by name; what their file imports for configuration and for advantages stands empty."""
    rival("verl", "verl.utils.torch_functional")
    _as_namespaces("verl.trainer", "verl.trainer.ppo", "verl.workers")
    empty = {
        "omegaconf": ("DictConfig",), "verl.trainer.config": ("AlgoConfig",),
        "verl.workers.config": ("ActorConfig", "CriticConfig"), "verl.utils": ("as_torch_index", "group_mean_std"),
    }  # fmt: skip
    for module, names in empty.items():
        found = sys.modules.setdefault(module, types.ModuleType(module))
        for name in names:
            if not hasattr(found, name):
                setattr(found, name, VerlConfig if name == "ActorConfig" else type(name, (), {}))
    return importlib.import_module("verl.trainer.ppo.core_algos")


def verl_updates():
    """The modules of verl that have the whole loss of an update, and the layout of its batches."""
    verl_losses()
    _as_namespaces("verl.workers.utils", "verl.utils.dataset")
    return [rival("verl", f"verl.workers.utils.{name}") for name in ("losses", "padding")]


def openrlhf(module):
    """A module of openrlhf; what it imports for GPUs and clusters stands empty where it is not installed."""
    importlib.import_module("transformers")  # which asks which of them are there
    others = "deepspeed", "ray", "flash_attn", "pylatexenc", "torchdata", "optree", "vllm", "aiohttp"
    stood_in = [name for name in others if importlib.util.find_spec(name) is None]
    finder = _Empty(stood_in)
    sys.meta_path.insert(0, finder)
    try:
        return rival("openrlhf", module)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in stood_in]:
            del sys.modules[name]


class _Empty:
    """Finds every module of some packages, and anything in it: a decorator that does nothing."""

    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, name, *_):
        if name.partition(".")[0] in self.packages:
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, _spec):
        return None

    def exec_module(self, module):
        module.__getattr__ = lambda name: _anything


def _anything(*given, **_):
    return given[0] if given else _anything


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
