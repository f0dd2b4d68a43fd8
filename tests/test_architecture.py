"""What import-linter cannot state: what stays free of torch at the top, and that only the command line prints."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import internvit_cli
from internvit_cli.cli.app import COMMANDS

PACKAGE = Path(internvit_cli.__file__).parent


@functools.cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") or "__init__"
        found[name] = ast.parse(path.read_text())
    assert len(found) > 100
    return found


@functools.cache
def imported_modules(tree: ast.AST) -> set[str]:
    """Names of imported modules, those imported for type checking left out."""
    names = set()
    hidden = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def test_only_model_and_encoder_import_torch_at_the_top() -> None:
    allowed = {
        "commands.torch_info",
        "model.chat_inputs",
        "model.tensors",
        "api.dataset",
        "api.extractor",
        "api.stream",
    }
    allowed |= {module for module in modules() if module.startswith("encode.")}
    allowed |= {"model.vit", "model.unshuffle", "model.loading", "model.features", "model.native"}
    allowed |= {module for module in modules() if module.startswith("model.kernels.")}
    allowed |= {
        "probe.attention",
        "probe.data",
        "probe.evaluate",
        "probe.heads",
        "probe.linear",
        "probe.results_folder",
    }
    allowed |= {"probe.segment", "probe.segmenters", "probe.training"}
    users = {module for module, tree in modules().items() if "torch" in imported_modules(tree)}
    assert users <= allowed


def test_triton_is_imported_only_by_its_own_modules_which_are_imported_only_when_a_card_is_there() -> None:
    own = {module for module in modules() if module.rpartition(".")[2].startswith("triton_")}
    for module, tree in modules().items():
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        top = {name for node in imports for name in imported_modules(node)}
        used = {name for name in top if "triton" in name}
        assert not used or module in own, f"{module} imports {used}"


def test_only_the_command_line_prints_or_exits() -> None:
    for module, tree in modules().items():
        if module.startswith(("cli", "__main__", "extract.multi_device.worker")):  # the last is a process of its own
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "sys.exit", "exit", "quit", "os._exit"}, f"{module} calls {called}"


def test_test_modules_do_not_import_each_other() -> None:
    """What several of them need lives in a module of helpers, so that each can be run, moved and read alone."""
    for path in Path(__file__).parent.glob("*.py"):
        shared = {name for name in imported_modules(ast.parse(path.read_text())) if name.startswith("test_")}
        assert not shared, f"{path.name} imports {shared}"


def opens_for_writing(call: ast.Call) -> bool:
    """Whether a call opens a file by its name to write it."""
    name = ast.unparse(call.func)
    words = [ast.unparse(argument) for argument in (*call.args[1:], *(keyword.value for keyword in call.keywords))]
    if name == "open":
        return any(set(word.strip("'")) & set("wax+") and len(word) <= 5 for word in words)
    return name == "os.open" and any("O_RDWR" in word or "O_WRONLY" in word or "O_CREAT" in word for word in words)


def test_files_are_made_in_one_place_that_follows_no_link() -> None:
    own = {
        "cli.console": "the null device",
        "commands.doctor": "a file of tempfile's, tried out",
        "model.kernels.stamps": "an empty file that must not exist, in a cache folder",
    }
    users = {
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and opens_for_writing(node)
    }
    assert users - {"storage.durable", "storage.lock"} == set(own)


def modules_loaded_by(*lines: list[str]) -> set[str]:
    """What is loaded in a process when it has run some command lines."""
    code = (
        f"import sys; from internvit_cli.cli.app import run; codes = [run(line) for line in {lines}];"
        "print('\\nMODULES', *sorted(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.rpartition("MODULES")[2].split())


def test_help_and_usage_errors_load_neither_torch_nor_numpy_nor_transformers() -> None:
    lines: list[list[str]] = [
        *([command, "--help"] for command in COMMANDS),
        ["--help"],
        ["extract"],
        ["extract", "x", "--bogus"],
        ["--version"],
    ]
    assert not modules_loaded_by(*lines) & {"torch", "transformers", "numpy", "h5py"}


def test_importing_the_package_loads_nothing_and_reading_features_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, internvit_cli; names = dir(internvit_cli);"
        "assert not {'numpy', 'torch', 'h5py'} & set(sys.modules);"
        "from internvit_cli import InternvitError, open_features\n"
        "try: open_features('nothing.h5')\n"
        "except InternvitError: assert 'torch' not in sys.modules\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_info_and_plan_load_no_torch(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    loaded = modules_loaded_by(["plan", str(tmp_path), "--model", "tiny-random"])
    assert "numpy" in loaded and not loaded & {"torch", "transformers"}
    assert not modules_loaded_by(["info", str(tmp_path / "nothing.h5")]) & {"torch", "transformers"}
