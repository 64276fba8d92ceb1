"""Settings that torch reads when it is imported, before any test imports it."""

import os

# Threads that wait sleep instead of spinning: on shared cores, spinning makes tests many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
