"""Run a command that ends with its parent, even if the parent is killed.

    python -m addressvlm.labels.process_guard command…

The command and its children are ended when standard input closes, as it does when the parent closes the pipe or dies.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_S = 15.0  # between SIGTERM and SIGKILL


def main() -> None:
    """Run the command of the command line and exit with its status."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_parent, args=(process,), daemon=True).start()
    code = process.wait()
    _signal(process.pid, signal.SIGKILL)  # children that outlive the command
    sys.exit(code if code >= 0 else 128 - code)


def _end_with_parent(process: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1024):
        pass
    _signal(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _signal(process.pid, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    main()
