"""The import DAG of the packages: who may know whom."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

# A module may import exactly these of ours (itself and its own folder aside); longest matching prefix decides.
LEAF: set[str] = set()
ALLOWED = {
    "fw_train.arguments": {"fw_train.config"},
    "fw_train.atomic_files": LEAF,
    "fw_train.batch": LEAF,
    "fw_train.config_reading": LEAF,
    "fw_train.config": {"fw_train.config_reading"},
    "fw_train.config_reference": {"fw_train.config"},
    "fw_train.devices": LEAF,
    "fw_train.dist": LEAF,
    "fw_train.flow": LEAF,
    "fw_train.geometry": LEAF,
    "fw_train.identity": LEAF,
    "fw_train.measure": LEAF,
    "fw_train.precision": LEAF,
    "fw_train.stages": LEAF,
    "fw_train.activation_checkpointing": {"fw_train.model"},
    "fw_train.camera_files": {"fw_train.atomic_files", "fw_train.geometry"},
    "fw_train.conditioning": {"fw_train.batch", "fw_train.model"},
    "fw_train.flops": {"fw_train.batch", "fw_train.devices", "fw_train.model"},
    "fw_train.losses": {"fw_train.batch", "fw_train.geometry"},
    "fw_train.optimiser": {"fw_train.stages"},
    "fw_train.step": {"fw_train.batch", "fw_train.flow", "fw_train.losses"},
    "fw_train.build": {
        "fw_train.config",
        "fw_train.model",
        "fw_train.precision",
        "fw_train.stages",
        "fw_train.weights",
    },
    "fw_train.inference": {
        "fw_train.atomic_files",
        "fw_train.build",
        "fw_train.config",
        "fw_train.model",
        "fw_train.precision",
        "fw_train.weights",
    },
    "fw_train.inspection": {"fw_train.checkpoint", "fw_train.run.folder", "fw_train.weights"},
    "fw_train.checkpoint": {
        "fw_train.atomic_files",
        "fw_train.data.strict_json",
        "fw_train.dist",
        "fw_train.engine.base",
        "fw_train.weights",
    },
    "fw_train.checkpoint.retention": {"fw_train.atomic_files", "fw_train.checkpoint.layout"},
    "fw_train.checkpoint.run_state": LEAF,
    "fw_train.checkpoint.schedule": LEAF,
    "fw_train.data": {"fw_train.atomic_files", "fw_train.batch", "fw_train.geometry"},
    "fw_train.encoders": {"fw_train.batch", "fw_train.weights.files"},
    "fw_train.engine": {
        "fw_train.dist",
        "fw_train.model",
        "fw_train.optimiser",
        "fw_train.precision",
        "fw_train.stages",
    },
    "fw_train.evaluation": {
        "fw_train.batch",
        "fw_train.build",
        "fw_train.config",
        "fw_train.flow",
        "fw_train.geometry",
        "fw_train.losses",
        "fw_train.pictures",
        "fw_train.run.data",
    },
    "fw_train.evaluation.depth": LEAF,
    "fw_train.evaluation.cameras": {"fw_train.geometry"},
    "fw_train.evaluation.consistency": {"fw_train.geometry"},
    "fw_train.evaluation.diffusion": {"fw_train.flow"},
    "fw_train.evaluation.points": {"fw_train.geometry", "fw_train.losses"},
    "fw_train.evaluation.report": {"fw_train.evaluation"},
    "fw_train.export": {
        "fw_train.atomic_files",
        "fw_train.build",
        "fw_train.config",
        "fw_train.model",
        "fw_train.precision",
        "fw_train.weights",
    },
    "fw_train.model": {"fw_train.batch", "fw_train.geometry"},
    "fw_train.monitoring": {"fw_train.atomic_files", "fw_train.pictures"},
    "fw_train.monitoring.background": LEAF,
    "fw_train.monitoring.step_clock": LEAF,
    "fw_train.monitoring.step_figures": LEAF,
    "fw_train.monitoring.step_report": LEAF,
    "fw_train.monitoring.terminal": LEAF,
    "fw_train.monitoring.facts": {
        "fw_train.batch",
        "fw_train.build",
        "fw_train.config",
        "fw_train.dist",
        "fw_train.evaluation",
        "fw_train.flops",
        "fw_train.monitoring",
        "fw_train.pictures",
        "fw_train.run.allowed_changes",
        "fw_train.step",
    },
    "fw_train.pictures": LEAF,
    "fw_train.plan": {
        "fw_train.activation_checkpointing",
        "fw_train.batch",
        "fw_train.build",
        "fw_train.checkpoint",
        "fw_train.conditioning",
        "fw_train.config",
        "fw_train.data",
        "fw_train.devices",
        "fw_train.encoders",
        "fw_train.engine",
        "fw_train.flops",
        "fw_train.model",
        "fw_train.precision",
        "fw_train.run",
        "fw_train.stages",
        "fw_train.step",
        "fw_train.weights",
    },
    "fw_train.report.charts": LEAF,
    "fw_train.report.history": {
        "fw_train.config",
        "fw_train.inference",
        "fw_train.monitoring",
        "fw_train.run.folder",
    },
    "fw_train.run": {
        "fw_train.atomic_files",
        "fw_train.batch",
        "fw_train.checkpoint",
        "fw_train.conditioning",
        "fw_train.config",
        "fw_train.data",
        "fw_train.encoders",
        "fw_train.engine",
        "fw_train.identity",
        "fw_train.losses",
        "fw_train.model",
        "fw_train.precision",
        "fw_train.step",
        "fw_train.weights",
    },
    "fw_train.run.allowed_changes": {"fw_train.config"},
    "fw_train.run.folder": {"fw_train.atomic_files", "fw_train.identity"},
    "fw_train.sampling": {
        "fw_train.batch",
        "fw_train.camera_files",
        "fw_train.conditioning",
        "fw_train.config",
        "fw_train.data",
        "fw_train.encoders",
        "fw_train.flow",
        "fw_train.geometry",
        "fw_train.model",
        "fw_train.pictures",
    },
    "fw_train.sampling.sampler": {"fw_train.flow"},
    "fw_train.sampling.ply": LEAF,
    "fw_train.watch": {"fw_train.atomic_files", "fw_train.dist", "fw_train.identity", "fw_train.run.folder"},
    "fw_train.watch.guards": LEAF,
    "fw_train.watch.heartbeat": {"fw_train.identity"},
    "fw_train.watch.stop": LEAF,
    "fw_train.weights": {"fw_train.atomic_files", "fw_train.model"},
    "fw_train.weights.files": LEAF,
    "fw_train.weights.safetensors_writing": LEAF,
}
NEVER_IN_MODEL = ("torch.distributed", "deepspeed", "yaml")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by absolute name"
            yield from (
                [f"fw_train.{alias.name}" for alias in node.names] if node.module == "fw_train" else [node.module]
            )


def module_name(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def covers(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def test_imports_follow_the_map():
    wrong = []
    for path in [*Path("fw_train").rglob("*.py"), *Path("data_tools").rglob("*.py"), *Path("launch").rglob("*.py")]:
        module = module_name(path)
        rules = [prefix for prefix in ALLOWED if covers(module, prefix)]
        for name in imports(path):
            ours = name.split(".")[0] in ("fw_train", "data_tools", "launch")
            if name.split(".")[0] in ("data_tools", "launch") and module.split(".")[0] == "fw_train":
                if module != "fw_train.cli":
                    wrong.append(f"{module} -> {name}: only the command line may reach the tools")
            elif ours and rules:
                prefix = max(rules, key=len)
                if not any(covers(name, allowed) for allowed in ALLOWED[prefix] | {prefix}):
                    wrong.append(f"{module} -> {name}")
            if covers(module, "fw_train.model") and any(covers(name, banned) for banned in NEVER_IN_MODEL):
                wrong.append(f"{module} -> {name}: the network knows no engine and no configuration")
    assert wrong == []


def test_the_map_names_only_modules_that_exist():
    names = {module_name(path) for path in Path("fw_train").rglob("*.py")}
    assert [prefix for prefix in ALLOWED if prefix not in names] == []


def imports_between_parts():
    """Part -> the parts that it imports; a part is a module or a folder directly in fw_train."""

    def part(name):
        return ".".join(name.split(".")[:2])

    graph = {}
    for path in Path("fw_train").rglob("*.py"):
        module = module_name(path)
        wanted = {part(name) for name in imports(path) if name.startswith("fw_train.")}
        graph.setdefault(part(module), set()).update(wanted - {part(module)})
    return graph


def test_no_two_parts_need_each_other():
    TopologicalSorter(imports_between_parts()).prepare()  # names the circle if there is one
