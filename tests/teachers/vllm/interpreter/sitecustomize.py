"""Lets vLLM run Triton kernels on a CPU: by Triton's interpreter, slowly.

vLLM's CPU build believes in Triton only where it has a backend named ``cpu``. Processes that have
this folder on their ``PYTHONPATH`` and ``TRITON_INTERPRET`` set are told that there is one.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
