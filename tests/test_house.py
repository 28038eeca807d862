"""The house: seven files that are read in order, and rooms around them. Nothing here runs the code; it reads
the imports."""
import ast
import glob
import os
import re
import subprocess
import sys

from conftest import ROOT

BOOK = ["streams", "model", "mimi", "prepare", "train", "chat", "eval"]

# The latest file of the book that each room has to import; None: it needs none of them.
LATEST = {
    "files": None,  # reads and writes what others hand to it
    "layouts": "streams",  # arranges utterances in its grid
    "kernels": "model",  # has a kernel of its depth transformer
    "training": "model",  # allocates and shards it
    "published": "model",  # loads and exports it
    "toy": "mimi",  # trains its small codec
    "corpora": "mimi",  # conversations are a whole number of frames long
    "live": "mimi",  # audio comes and goes in frames; the engine is handed the rest
    "page": "chat",  # exports its step
    "evals": "train",  # the recogniser is trained by the same loop
    "questions": "eval",  # trains variants, and measures them
    "teaching": "eval",  # fine-tunes a model, and scores it before and after
}


def tracked(*endings):
    """The files that git tracks; in a download without git, those of the top level and of the rooms."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = done.stdout.splitlines()
    if done.returncode:
        names = [name for pattern in ("*", "*/*") for name in glob.glob(pattern, root_dir=ROOT)]
    return sorted(n for n in names if n.endswith(endings) and os.path.exists(os.path.join(ROOT, n)))


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name
           for name in tracked(".py") if not name.startswith("tests/")}


def imports(module):
    """Our modules that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(read(MODULES[module]))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
    return found & MODULES.keys() - {module}


def room(module):
    """A room is one node, and so is a file of the book."""
    return module.split(".")[0]


def circle(graph):
    """A circle in {node: its successors}, as a list of nodes, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node):] + [node]
        if node in done:
            return None
        path.append(node)
        for successor in sorted(graph[node]):
            found = visit(successor)
            if found:
                return found
        done.add(path.pop())

    return next(filter(None, map(visit, sorted(graph))), None)


def test_circle_finds_circles():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_import_circle_between_modules():
    assert circle({module: imports(module) for module in MODULES}) is None


def test_no_import_circle_between_rooms():
    graph = {room(module): set() for module in MODULES}
    for module in MODULES:
        graph[room(module)] |= {room(other) for other in imports(module)} - {room(module)}
    assert circle(graph) is None


def test_no_book_file_imports_a_later_one():
    for i, module in enumerate(BOOK):
        assert not imports(module) & set(BOOK[i:]), module


def test_no_room_imports_a_later_book_file_than_it_must():
    assert set(LATEST) == {room(module) for module in MODULES} - set(BOOK)
    latest = dict.fromkeys(LATEST, -1)
    for module in MODULES.keys() - set(BOOK):
        books = [BOOK.index(other) for other in imports(module) & set(BOOK)]
        latest[room(module)] = max([latest[room(module)], *books])
    assert {name: BOOK[i] if i >= 0 else None for name, i in latest.items()} == LATEST


def test_each_room_says_what_it_is_for_and_nothing_else():
    for name in LATEST:
        tree = ast.parse(read(f"{name}/__init__.py"))
        assert len(tree.body) == 1 and ast.get_docstring(tree), name


def test_the_top_level_is_the_book():
    assert {name for name in tracked(".py") if "/" not in name} == {f"{module}.py" for module in BOOK}


def test_pyproject_lists_what_is_there():
    listed = re.search(r"\[tool\.setuptools\]\n(.*?)\n\n", read("pyproject.toml"), re.S)[1]
    value = lambda key: re.findall(r'"([\w.]+)"', re.search(rf"^{key} = \[(.*?)\]", listed, re.M | re.S)[1])
    assert sorted(value("py-modules")) == sorted(BOOK)
    assert sorted(value("packages")) == sorted(LATEST)


def test_no_line_is_longer_than_110_columns():
    long = [f"{name}:{number}" for name in tracked(".py", ".cu", ".h")
            for number, line in enumerate(read(name).splitlines(), 1) if len(line) > 110]
    assert long == []


def test_every_module_says_what_it_is():
    for module, name in MODULES.items():
        assert ast.get_docstring(ast.parse(read(name))), module


def test_the_book_needs_no_extra(tmp_path):
    """Every file of the book can be imported with torch, numpy, tiktoken, soundfile and tqdm alone."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {ROOT!r})
        for extra in ("espeakng_loader", "safetensors", "aiohttp", "sounddevice", "matplotlib", "torchao",
                      "pyarrow", "onnx", "onnxruntime"):
            sys.modules[extra] = None
        import {", ".join(BOOK)}
        """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_imported_in_vain():
    """At the top of a file."""
    for name in tracked(".py"):
        tree = ast.parse(read(name))
        found = {(alias.asname or alias.name).split(".")[0] for node in tree.body
                 if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not found - used, name
