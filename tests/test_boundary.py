"""The domain never imports Ray: every module of `addressvlm` loads where Ray can't be imported."""

import subprocess
import sys

SCRIPT = """
import pkgutil, sys
sys.modules["ray"] = None
import addressvlm
for module in pkgutil.walk_packages(addressvlm.__path__, "addressvlm."):
    __import__(module.name)
    print(module.name)
"""


def test_every_module_loads_without_ray() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "addressvlm.training.loop" in done.stdout.split()
