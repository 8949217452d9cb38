"""Processes that a test starts, and waits for."""

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

DEADLINE = 240  # seconds; a tenth of it is usual


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def finish(started: Sequence[tuple[subprocess.Popen[bytes], Path]]) -> list[str]:
    """Waits until all are done or one has failed; then none is left running."""
    end = time.monotonic() + DEADLINE
    children = [child for child, _ in started]
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children) or time.monotonic() > end:
                break
            time.sleep(0.1)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    logs = [log.read_text(errors="replace") for _, log in started]
    shown = "".join(f"\n--- process {i}\n{log}" for i, log in enumerate(logs))
    assert codes == [0] * len(codes), f"exit codes {codes} (None: killed){shown}"
    return logs
