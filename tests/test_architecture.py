"""The import DAG of the packages: who may know whom."""

import ast
from pathlib import Path

# A module may import exactly these of ours (itself and its own folder aside); longest matching prefix decides.
LEAF: set[str] = set()
ALLOWED = {
    "fw_train.config_reading": LEAF,
    "fw_train.config": {"fw_train.config_reading"},
    "fw_train.config_reference": {"fw_train.config"},
    "fw_train.batch": LEAF,
    "fw_train.geometry": LEAF,
    "fw_train.flow": LEAF,
    "fw_train.precision": LEAF,
    "fw_train.stages": LEAF,
    "fw_train.measure": LEAF,
    "fw_train.drawing": LEAF,
    "fw_train.video_writer": LEAF,
    "fw_train.colours": {"fw_train.drawing"},
    "fw_train.camera_path": {"fw_train.drawing"},
    "fw_train.pictures": {"fw_train.camera_path", "fw_train.colours", "fw_train.drawing"},
    "fw_train.terminal": LEAF,
    "fw_train.background": LEAF,
    "fw_train.step_figures": LEAF,
    "fw_train.metrics_file": {"fw_train.atomic_files"},
    "fw_train.event_files": {"fw_train.drawing", "fw_train.pictures"},
    "fw_train.monitor": {
        "fw_train.background",
        "fw_train.event_files",
        "fw_train.metrics_file",
        "fw_train.pictures",
        "fw_train.step_figures",
        "fw_train.terminal",
    },
    "fw_train.dist": LEAF,
    "fw_train.identity": LEAF,
    "fw_train.run_folder": {"fw_train.atomic_files", "fw_train.identity"},
    "fw_train.heartbeat": {"fw_train.identity"},
    "fw_train.watch": {"fw_train.atomic_files", "fw_train.heartbeat", "fw_train.identity", "fw_train.run_folder"},
    "fw_train.stop": LEAF,
    "fw_train.guards": LEAF,
    "fw_train.engine": {
        "fw_train.dist",
        "fw_train.model",
        "fw_train.optimiser",
        "fw_train.precision",
        "fw_train.stages",
    },
    "fw_train.optimiser": {"fw_train.stages"},
    "fw_train.checkpoint_files": LEAF,
    "fw_train.atomic_files": LEAF,
    "fw_train.data": {"fw_train.atomic_files", "fw_train.batch", "fw_train.geometry"},
    "fw_train.encoders": {"fw_train.batch", "fw_train.checkpoint_files"},
    "fw_train.model": {"fw_train.batch", "fw_train.geometry"},
    "fw_train.losses": {"fw_train.batch", "fw_train.geometry"},
    "fw_train.activation_checkpointing": {"fw_train.model"},
    "fw_train.devices": LEAF,
    "fw_train.flops": {"fw_train.model", "fw_train.batch", "fw_train.devices"},
    "fw_train.plan_memory": {
        "fw_train.activation_checkpointing",
        "fw_train.batch",
        "fw_train.build",
        "fw_train.config",
        "fw_train.model",
        "fw_train.precision",
        "fw_train.run_params",
        "fw_train.stages",
        "fw_train.step",
    },
    "fw_train.plan_shards": {
        "fw_train.checkpoint_fragments",
        "fw_train.config",
        "fw_train.engine",
        "fw_train.model",
        "fw_train.precision",
        "fw_train.stages",
    },
    "fw_train.plan_data": {
        "fw_train.batch",
        "fw_train.build",
        "fw_train.conditioning",
        "fw_train.config",
        "fw_train.data",
    },
    "fw_train.step": {"fw_train.flow", "fw_train.losses", "fw_train.batch"},
    "fw_train.camera_files": {"fw_train.atomic_files", "fw_train.geometry"},
    "fw_train.weights": {"fw_train.checkpoint_files", "fw_train.model"},
    "fw_train.base_hash": {"fw_train.atomic_files", "fw_train.checkpoint_files", "fw_train.weights"},
    "fw_train.safetensors_writing": LEAF,
    "fw_train.stage_weights": {
        "fw_train.atomic_files",
        "fw_train.checkpoint_files",
        "fw_train.safetensors_writing",
        "fw_train.weights",
    },
    "fw_train.inference": {
        "fw_train.atomic_files",
        "fw_train.build",
        "fw_train.config",
        "fw_train.model",
        "fw_train.precision",
        "fw_train.stage_weights",
        "fw_train.weights",
    },
    "fw_train.resume_check": {"fw_train.config"},
    "fw_train.run_state": LEAF,
    "fw_train.checkpoint_layout": {"fw_train.checkpoint_files", "fw_train.data.strict_json", "fw_train.run_state"},
    "fw_train.checkpoint_fragments": {
        "fw_train.checkpoint_files",
        "fw_train.checkpoint_layout",
        "fw_train.data.strict_json",
        "fw_train.engine.base",
        "fw_train.safetensors_writing",
    },
    "fw_train.checkpoint_retention": {"fw_train.atomic_files", "fw_train.checkpoint_layout"},
    "fw_train.checkpoint_schedule": LEAF,
    "fw_train.checkpoint_writing": {
        "fw_train.atomic_files",
        "fw_train.checkpoint_files",
        "fw_train.checkpoint_fragments",
        "fw_train.checkpoint_layout",
        "fw_train.checkpoint_retention",
        "fw_train.engine.base",
        "fw_train.safetensors_writing",
    },
    "fw_train.checkpoint_saver": {
        "fw_train.atomic_files",
        "fw_train.checkpoint_files",
        "fw_train.checkpoint_fragments",
        "fw_train.checkpoint_layout",
        "fw_train.checkpoint_retention",
        "fw_train.checkpoint_schedule",
        "fw_train.checkpoint_writing",
        "fw_train.dist",
        "fw_train.engine.base",
        "fw_train.run_state",
        "fw_train.stage_weights",
    },
    "fw_train.checkpoint": {
        "fw_train.checkpoint_files",
        "fw_train.checkpoint_fragments",
        "fw_train.checkpoint_layout",
        "fw_train.dist",
        "fw_train.engine.base",
        "fw_train.run_state",
    },
    "fw_train.conditioning": {"fw_train.batch", "fw_train.model"},
    "fw_train.validation": {
        "fw_train.batch",
        "fw_train.evaluation.diffusion",
        "fw_train.flow",
        "fw_train.losses",
    },
    "fw_train.evaluation.depth": LEAF,
    "fw_train.evaluation.points": {"fw_train.geometry", "fw_train.losses"},
    "fw_train.evaluation.cameras": {"fw_train.geometry"},
    "fw_train.evaluation.diffusion": {"fw_train.flow"},
    "fw_train.evaluation.consistency": {"fw_train.geometry"},
    "fw_train.evaluation.metrics": {"fw_train.batch", "fw_train.evaluation", "fw_train.geometry", "fw_train.losses"},
    "fw_train.evaluation.constant": {"fw_train.batch", "fw_train.build", "fw_train.config", "fw_train.run_data"},
    "fw_train.evaluation.scenes": {
        "fw_train.batch",
        "fw_train.camera_path",
        "fw_train.geometry",
        "fw_train.losses",
        "fw_train.pictures",
    },
    "fw_train.evaluation.judge": {"fw_train.batch", "fw_train.evaluation", "fw_train.validation"},
    "fw_train.evaluation.report": {"fw_train.evaluation"},
    "fw_train.report.charts": LEAF,
    "fw_train.report.history": {
        "fw_train.config",
        "fw_train.inference",
        "fw_train.metrics_file",
        "fw_train.monitor",
        "fw_train.run_folder",
    },
    "fw_train.sampling.sampler": {"fw_train.flow"},
    "fw_train.sampling.guidance": {"fw_train.batch", "fw_train.flow", "fw_train.sampling.sampler"},
    "fw_train.sampling.trajectories": {"fw_train.camera_files", "fw_train.geometry"},
    "fw_train.sampling.encoders": {"fw_train.config", "fw_train.data", "fw_train.encoders"},
    "fw_train.sampling.conditions": {
        "fw_train.batch",
        "fw_train.conditioning",
        "fw_train.data",
        "fw_train.encoders",
        "fw_train.model",
        "fw_train.sampling.encoders",
        "fw_train.sampling.trajectories",
    },
    "fw_train.sampling.generate": {
        "fw_train.batch",
        "fw_train.encoders",
        "fw_train.flow",
        "fw_train.sampling.guidance",
        "fw_train.sampling.sampler",
    },
    "fw_train.sampling.ply": LEAF,
    "fw_train.sampling.colmap": {"fw_train.geometry", "fw_train.sampling.ply"},
    "fw_train.sampling.contact_sheet": {"fw_train.camera_path", "fw_train.colours", "fw_train.drawing"},
    "fw_train.sampling.outputs": {
        "fw_train.camera_files",
        "fw_train.colours",
        "fw_train.drawing",
        "fw_train.geometry",
        "fw_train.sampling.colmap",
        "fw_train.sampling.ply",
        "fw_train.video_writer",
    },
    "fw_train.step_clock": LEAF,
    "fw_train.step_report": LEAF,
    "fw_train.run_weights": {"fw_train.dist", "fw_train.guards"},
    "fw_train.build": {
        "fw_train.config",
        "fw_train.model",
        "fw_train.stages",
        "fw_train.precision",
        "fw_train.checkpoint_files",
        "fw_train.weights",
        "fw_train.base_hash",
        "fw_train.stage_weights",
    },
    "fw_train.export_names": {
        "fw_train.checkpoint_files",
        "fw_train.model",
        "fw_train.stage_weights",
        "fw_train.weights",
    },
    "fw_train.export": {
        "fw_train.build",
        "fw_train.checkpoint_files",
        "fw_train.config",
        "fw_train.export_names",
        "fw_train.model",
        "fw_train.precision",
        "fw_train.stage_weights",
        "fw_train.weights",
    },
    "fw_train.export_writing": {"fw_train.atomic_files", "fw_train.export", "fw_train.safetensors_writing"},
    "fw_train.inspection": {
        "fw_train.base_hash",
        "fw_train.checkpoint",
        "fw_train.checkpoint_files",
        "fw_train.checkpoint_layout",
        "fw_train.run_folder",
        "fw_train.weights",
    },
}
NEVER_IN_MODEL = ("torch.distributed", "deepspeed", "yaml")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by absolute name"
            yield node.module


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
