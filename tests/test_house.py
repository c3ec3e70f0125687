"""The order of the house: what may import what, read off the code itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The modules of a package, lowest first; one imports only those of lower layers than its own.
LAYERS = {
    "tvae_kernels": (
        ("neighborhood",),
        ("arguments",),
        ("roll",),
        ("reference",),
        ("backends.tables", "backends.operators", "backends.triton.launch", "backends.triton.lanes"),
        ("backends.torch", "backends.torch.plain", "backends.torch.taps", "backends.torch.fourier"),
        ("backends.triton", "backends.triton.taps", "backends.triton.tiles"),
        ("backends.triton.plain", "backends.triton.fourier"),
        ("backends.triton.latents",),
        ("backends",),
        ("function",),
        ("latents", "parallel"),
        ("layer",),
        ("",),
    ),
    "tvae": (
        ("", "files", "settings", "progress"),
        ("data.sequences",),
        ("data.sprites", "data.mnist", "data.rooms", "data.readers"),
        ("data.dsprites", "data.shapes", "data.shapes3d", "data.posed", "data.own"),
        ("data",),
        ("models.layers", "models.potentials", "models.group"),
        ("models.likelihoods",),
        ("models.base",),
        ("models.vae", "models.tvae"),
        ("models.beta_vae", "models.factor_vae", "models.slow_vae", "models.flow_vae"),
        ("models.weak_flow_vae", "models.poflow"),
        ("models.cluster_vae",),
        ("models",),
        ("config", "figures"),
        ("animations",),
        ("play",),
        ("metrics.base",),
        (
            "metrics.equivariance",
            "metrics.likelihood",
            "metrics.fits",
            "metrics.flows",
        ),
        ("metrics.capcorr", "metrics.correlation", "metrics.motion", "metrics.clustering"),
        ("metrics.poses", "metrics.recognition", "metrics.shapes"),
        ("metrics.mixing", "metrics.vp"),
        ("metrics",),
        ("evaluation", "presets", "training.run"),
        ("training.log", "training.processes", "training.steps"),
        ("training.loop",),
        ("training",),
        ("paper.runs",),
        ("paper.tables",),
        ("paper.exhibits",),
        ("paper",),
        ("cli",),
        ("__main__",),
    ),
}
# Functions that import when they are called. Triton is not everywhere, and its interpreter is chosen before; what only
# some data needs may be missing; and the command line can do without what takes seconds for help and errors.
LATE = {
    "tvae_kernels": {"_check_triton", "_import_triton", "fuses_latents"},
    "tvae": {
        "_read_mnist",
        "_opened_hdf5",
        "_image",
        "_video",
        "launch",
        "_made",
        "_train",
        "_report",
        "_draw",
        "_animate",
        "writer",
        "find_nicegui",
        "run",
        "main",
    },
}
packages = pytest.mark.parametrize("package", LAYERS)


def modules(package: str) -> dict[str, ast.Module]:
    """The code of every module of a package, by its name without the package's."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(package: str, name: str, code: ast.Module, known: set[str]) -> list[tuple[str, ast.ImportFrom]]:
    """The modules of its own package that a module imports, with the statements."""
    is_package = any(other.startswith(f"{name}.") for other in known) or not name
    here = [package, *name.split(".")] if name else [package]
    found = []
    for node in ast.walk(code):
        names = []
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [(origin, alias.name) for alias in node.names]
        for origin, imported in names:
            if origin.split(".")[0] == package:
                inner = ".".join(origin.split(".")[1:])
                whole = ".".join(filter(None, (inner, imported)))
                found.append((whole if whole in known else inner, node))
    return found


@packages
def test_every_module_has_its_layer(package):
    listed = [name for layer in LAYERS[package] for name in layer]
    assert sorted(listed) == sorted(modules(package))


@packages
def test_no_import_runs_upwards_or_in_a_circle(package):
    layer = {name: number for number, names in enumerate(LAYERS[package]) for name in names}
    code = modules(package)
    wrong = [
        (name, imported)
        for name in code
        for imported, _ in imports(package, name, code[name], set(code))
        if layer[imported] >= layer[name]
    ]
    assert not wrong


@packages
def test_imports_stand_at_the_top(package):
    """But in the functions of `LATE`."""
    late = {
        function.name
        for code in modules(package).values()
        for function in ast.walk(code)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(function))
    }
    assert late == LATE[package]


def test_whether_a_window_is_plain_is_decided_in_one_function():
    decides, asks = set(), set()
    for name, code in modules("tvae_kernels").items():
        for function in ast.walk(code):
            if isinstance(function, ast.FunctionDef):
                nodes = list(ast.walk(function))
                if any(isinstance(x, ast.Constant) and x.value == "_plain" for x in nodes):
                    decides.add((name, function.name))
                if any(isinstance(x, ast.Attribute) and x.attr == "_plain" for x in nodes):
                    asks.add((name, function.name))
    assert decides == {("neighborhood", "_derive")}
    assert asks == {("neighborhood", "is_plain"), ("neighborhood", "by_phase")}
