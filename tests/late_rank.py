"""``python -m tests.late_rank CONFIG PARENT``: a worker whose other ranks connect to the router late."""

import time
from typing import Any
from unittest.mock import patch

from clo.gpu_worker.__main__ import main
from clo.gpu_worker.rank import RankProcess
from clo.runtime.machine.process import run_process

LATE_S = 2.0


class LateRank(RankProcess):
    """Its worker is ready by then."""

    def __init__(self, *arguments: Any) -> None:
        time.sleep(LATE_S)
        super().__init__(*arguments)


if __name__ == "__main__":
    with patch("clo.gpu_worker.__main__.RankProcess", LateRank):
        run_process(main)
