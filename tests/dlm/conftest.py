"""Tiny models of both layouts, on disk and loaded."""

import pytest

from diffctrl.dlm import Checkpoint
from tests.dlm import layouts


@pytest.fixture(scope="session")
def llada_folder(tmp_path_factory):
    return layouts.write(tmp_path_factory.mktemp("dlm") / "llada", layouts.LLADA, layouts.llada_weights(), 3)


@pytest.fixture(scope="session")
def dream_folder(tmp_path_factory):
    return layouts.write(tmp_path_factory.mktemp("dlm") / "dream", layouts.DREAM, layouts.dream_weights())


@pytest.fixture(scope="session")
def llada(llada_folder):
    return Checkpoint.open(llada_folder).load()


@pytest.fixture(scope="session")
def dream(dream_folder):
    return Checkpoint.open(dream_folder).load()
