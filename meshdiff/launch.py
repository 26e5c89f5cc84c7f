"""Starting ranks from a single process, with the launcher that torchrun itself uses."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

__all__ = ["start_ranks"]


def start_ranks(ranks: int, script: str, arguments: Sequence[str]) -> int:
    """Run `python script arguments` as that many ranks on this machine, and wait.

    Signals sent to this process end the ranks.

    Returns:
        0, or the exit code of the first rank that failed; 128 + N for signal N.
    """
    # torchrun's default as well: without it every rank would use every core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Its report of a failed rank is a page of traceback below the rank's own message.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
                shutdown_timeout=10,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
            )
            elastic_launch(config, sys.executable)("-u", script, *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException as signal:
        return 128 + int(signal.sigval)
    except KeyboardInterrupt:
        return 130
    return 0
