"""Nothing in the package can run code that a file brings: no pickle, no eval, no unsafe loader.

Python's own multiprocessing pickles what we hand to worker processes that we started, and Apache Beam does so too; no
such bytes are ever read from a file.
"""

import ast

import pytest

from tiny_runs import ROOT

FILES = [path for package in ("meap_jax", "experiments", "configs") for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle", "dbm"}
CALLS = {"eval", "exec", "__import__", "compile"}


def name_of(node):
    """The dotted name of what is called, "torch.load"."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(source):
    """What in a module could run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name, given = name_of(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in CALLS:
            yield f"calls {name}"
        if given.get("allow_pickle", "False") != "False" or (name in ("np.load", "numpy.load") and len(node.args) > 2):
            yield f"{name} with allow_pickle"
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if name.startswith("yaml.") and name.endswith("load") and name != "yaml.safe_load":
            yield f"calls {name}"
        if given.get("trust_remote_code", "False") != "False":
            yield f"{name} with trust_remote_code"
        if given.get("shell", "False") != "False" or name in ("os.system", "os.popen"):
            yield f"{name} runs a shell"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_run_code_from_a_file(path):
    assert not list(faults(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import a, joblib", "import xml.dom, marshal", "eval('1')",
        "np.load(f, allow_pickle=True)", "np.load(f, None, True)", "np.load(f, allow_pickle=flag)", "torch.load(f)",
        "torch.load(f, weights_only=False)", "yaml.load(f)", "yaml.unsafe_load(f)", "os.system('ls')",
        "AutoModel.from_pretrained(f, trust_remote_code=True)", "subprocess.run('ls', shell=True)",
    ],
)  # fmt: skip
def test_each_of_them_would_be_found(source):
    assert list(faults(source))


def test_numpy_does_not_unpickle_unless_it_is_asked():
    import inspect

    import numpy as np

    assert inspect.signature(np.load).parameters["allow_pickle"].default is False
