"""Run a command that ends with the one who started it, even if that one is killed.

    python -m addressvlm.labels.process_guard command…

Ends the command and everything it started when standard input closes, which happens when whoever holds the other end
closes it or dies.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_S = 15.0  # between being asked to end and being killed


def main() -> None:
    """Run the command of the command line and exit as it does."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_hold, args=(process,), daemon=True).start()
    code = process.wait()
    _signal(process.pid, signal.SIGKILL)  # what the command leaves behind
    sys.exit(code if code >= 0 else 128 - code)


def _hold(process: "subprocess.Popen[bytes]") -> None:
    """Wait for the end of standard input, then end the command's process group."""
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
