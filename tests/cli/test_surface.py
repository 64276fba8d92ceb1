"""The commands and their options are a contract: a change here needs a line in the CHANGELOG."""

import os
import subprocess
import sys

import typer

from diffctrl.cli.app import app

SURFACE = {
    "generate": {
        "prompt",
        "--model",
        "--method",
        "--set",
        "--seed",
        "--num",
        "--steps",
        "--guidance-scale",
        "--negative",
        "--size",
        "--height",
        "--width",
        "--frames",
        "--lora",
        "--compare",
        "--no-compare",
        "--from",
        "--out",
        "--device",
        "--dtype",
    },
    "text": {
        "prompt",
        "--model",
        "--method",
        "--set",
        "--gen-length",
        "--steps",
        "--block-length",
        "--temperature",
        "--cfg-scale",
        "--threshold",
        "--alg",
        "--top-p",
        "--seed",
        "--from",
        "--out",
        "--device",
        "--dtype",
    },
    "ground": {
        "image",
        "phrase",
        "--phrases",
        "--model",
        "--set",
        "--size",
        "--frames",
        "--out",
        "--device",
        "--dtype",
    },
    "headhunt": {
        "--prompts",
        "--limit",
        "--num",
        "--seed",
        "--objective",
        "--rounds",
        "--top",
        "--model",
        "--set",
        "--steps",
        "--guidance-scale",
        "--size",
        "--batch",
        "--workers",
        "--engine",
        "--address",
        "--scorers",
        "--steady",
        "--no-steady",
        "--full",
        "--stop-early",
        "--no-stop-early",
        "--halving",
        "--no-halving",
        "--out",
        "--log",
        "--report",
        "--device",
        "--dtype",
    },
    "train-length-lora": {
        "--frames",
        "--out",
        "--model",
        "--data",
        "--clips",
        "--size",
        "--method",
        "--set",
        "--rank",
        "--lora-alpha",
        "--start-from",
        "--added",
        "--no-added",
        "--cross",
        "--steps",
        "--learning-rate",
        "--warmup-steps",
        "--batch",
        "--accumulate",
        "--empty-share",
        "--sampling",
        "--checkpointing",
        "--no-checkpointing",
        "--compile",
        "--ulysses-degree",
        "--checkpoint-every",
        "--keep",
        "--seed",
        "--device",
        "--dtype",
    },
    "info": {"file", "--json"},
    "doctor": {"--json"},
}


def test_commands_and_options_are_the_agreed_ones():
    group = typer.main.get_command(app)
    found = {
        name: {text for p in command.params for text in (*p.opts, *p.secondary_opts) if text != "--help"}
        for name, command in group.commands.items()
    }
    assert found == SURFACE
    assert {text for p in group.params for text in p.opts} == {"--version"}


def test_help_is_quick_and_imports_no_torch():
    code = (
        "import sys; from diffctrl.cli.app import app\n"
        "try: app(['generate', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules, file=sys.stderr)\n"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "False\n"
    after = os.times()
    # Processor time, so that a busy machine does not matter.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def test_module_and_command_are_one():
    done = subprocess.run(
        [sys.executable, "-m", "diffctrl", "--version"], capture_output=True, text=True, check=True
    )
    from diffctrl import __version__

    assert done.stdout == f"{__version__}\n"
