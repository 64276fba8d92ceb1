"""The command line. Thin: what a command does lives in the rooms it calls."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `diffctrl` command."""
    from diffctrl.cli.app import app

    app()
