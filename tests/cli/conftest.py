"""A tiny pipeline on disk, and commands that run in this process."""

import pytest
from typer.testing import CliRunner

from diffctrl.cli.app import app
from tests import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder that diffusers loads; drawn at 32 px."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tiny.sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run():
    """Run a command; a bug shows as its own exception."""
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def generate(run, tiny_model, tmp_path):
    """`diffctrl generate` with the tiny model, three steps, into an empty folder."""

    def generate(*arguments, model=tiny_model, out=tmp_path / "out", steps=3):
        return run("generate", *arguments, "--model", model, "--out", out, "--steps", steps)

    return generate


@pytest.fixture
def no_weights(monkeypatch):
    """Fail where weights would be loaded."""
    from diffctrl.drawing.source import ModelSource

    def load(self, dtype):
        raise AssertionError(f"the weights of {self.name} were loaded")

    monkeypatch.setattr(ModelSource, "load", load)
