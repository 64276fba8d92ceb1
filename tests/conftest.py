"""Settings that torch reads when it is imported, before any test imports it; a fixture that rooms share."""

import os

import pytest

# Threads that wait sleep instead of spinning: on shared cores, spinning makes tests many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 turns scalars into indices in a way that NumPy 2.4 refuses; ask for the item instead."""
    from triton.runtime import interpreter

    stock = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        stock(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
