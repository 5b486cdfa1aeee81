"""The domain never imports Ray, nor what is built around it"""

import ast
from collections.abc import Iterator
from pathlib import Path

import addressvlm

DOMAIN = Path(addressvlm.__file__).parent
BEYOND = {"ray", "ray_jobs", "serve"}


def imported(source: str) -> Iterator[str]:
    """The packages that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.unparse(node.args[0]).strip("'\"").partition(".")[0]


def test_the_domain_imports_nothing_of_ray() -> None:
    modules = {path.relative_to(DOMAIN).as_posix(): BEYOND & set(imported(path.read_text())) for path in DOMAIN.rglob("*.py")}
    assert {module: result for module, result in modules.items() if result} == {}
    assert "training/trainer.py" in modules


def test_imports_inside_functions_count() -> None:
    hidden = (
        "def f():\n    from ray.data import x\nimport importlib\nimportlib.import_module('serve.routes')\nimport ray_jobs.graft"
    )
    assert set(imported(hidden)) == BEYOND | {"importlib"}
