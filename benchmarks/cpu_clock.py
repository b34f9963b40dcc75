"""CPU time of another process."""

import time


def cpu_seconds(pid: int) -> float:
    """CPU seconds of all threads of a process so far, by the clock of clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)
