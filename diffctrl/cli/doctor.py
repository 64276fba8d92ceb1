"""`diffctrl doctor`: versions, devices, which kernels work here and why not, the embedded models' state."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from diffctrl.cli.output import complaints, prepare_libraries, printable
from diffctrl.cli.tables import new_table

# Distribution name -> what it is for.
_REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow")
_OPTIONAL = {
    "triton": "compiled attention, QK norm and rotary embedding on GPUs; comes with torch for CUDA",
    "flash-attn-4": "extra 'gpu': the fastest dense and block-sparse kernels on H100 and B200",
    "xformers": "extra 'xformers': an optional dense backend",
    "gradio": "extra 'demo': for the demo to come",
    "ray": "extra 'ray': `diffctrl headhunt --engine ray`, on more than one machine",
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Report what works here and why not. Always exits with 0 when it can report."""
    prepare_libraries()
    with complaints():
        report = _report()
        if as_json:
            import json

            print(json.dumps(report))
        else:
            _print(report)


def _report() -> dict[str, Any]:
    from diffctrl.drawing import environment

    return {
        "versions": environment.versions(),
        "required": {name: environment.package_version(name) for name in _REQUIRED},
        "optional": {
            name: {"version": environment.package_version(name), "for": purpose}
            for name, purpose in _OPTIONAL.items()
        },
        "torch": _torch(),
        "devices": _devices(),
        "ptxas": _ptxas(),
        "kernels": _kernels(),
        "models": _models(),
    }


def _torch() -> dict[str, Any]:
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def _devices() -> list[dict[str, Any]]:
    import os

    import torch

    from diffctrl.drawing import environment

    found = [{"name": "cpu", "hardware": environment.hardware("cpu"), "cores": os.cpu_count()}]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": f"cuda:{index}",
                "hardware": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _ptxas() -> dict[str, str] | None:
    """The assembler that Triton compiles with, or None without Triton."""
    from diffctrl.drawing import environment

    if environment.package_version("triton") is None:
        return None
    try:
        from triton import knobs

        tool = knobs.nvidia.ptxas
        return {"path": str(tool.path), "version": str(tool.version)}
    except Exception as error:  # a broken Triton is what this report is for
        return {"path": "", "version": f"not usable: {_reason(error)}"}


def _kernels() -> dict[str, list[dict[str, Any]]]:
    """Device -> one row per kernel."""
    import torch

    from diffctrl.attention import kernel_report

    found = {}
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        found[device] = [
            {"name": row.name, "works": row.works, "reason": row.reason, "error": row.error}
            for row in kernel_report(device)
        ]
    return found


def _models() -> dict[str, str]:
    """Embedded model -> "whole", or what is wrong with it."""
    from diffctrl.zoo import integrity, registry

    return {name: integrity.problem(name) or "whole" for name in registry.EMBEDDED}


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    for table in (_packages(report), _hardware(report), *_kernel_tables(report), _model_table(report)):
        console.print(table)


def _packages(report: dict[str, Any]) -> Any:
    table = new_table("Packages", "name", "version", "note")
    for name in ("diffctrl", "python"):
        table.add_row(name, report["versions"][name], "")
    for name, version in report["required"].items():
        note = f"CUDA {report['torch']['cuda'] or 'not built in'}" if name == "torch" else ""
        table.add_row(name, version or "missing", note)
    for name, package in report["optional"].items():
        table.add_row(name, package["version"] or "not installed", package["for"])
    if report["ptxas"]:
        table.add_row("ptxas", report["ptxas"]["version"], report["ptxas"]["path"])
    return table


def _hardware(report: dict[str, Any]) -> Any:
    table = new_table("Devices", "name", "hardware", "note")
    for device in report["devices"]:
        if device["name"] == "cpu":
            note = f"{device['cores']} cores, torch uses {report['torch']['threads']} threads"
        else:
            note = f"compute capability {device['capability']}, {device['memory_bytes'] / 2**30:.0f} GiB"
        table.add_row(device["name"], device["hardware"], note)
    return table


def _kernel_tables(report: dict[str, Any]) -> list[Any]:
    tables = []
    for device, rows in report["kernels"].items():
        table = new_table(
            f"Attention kernels on {device}", "name", "works", "why not, or the self-test's error"
        )
        for row in rows:
            error = "" if row["error"] is None else f"{row['error']:.2g}"
            table.add_row(row["name"], "yes" if row["works"] else "no", printable(row["reason"] or error))
        tables.append(table)
    return tables


def _model_table(report: dict[str, Any]) -> Any:
    table = new_table("Embedded models", "name", "files")
    for name, state in report["models"].items():
        table.add_row(name, printable(state))
    return table
