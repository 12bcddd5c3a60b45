"""gunicorn's configuration for metrics of several workers.

``PROMETHEUS_MULTIPROC_DIR`` in the environment names an empty folder for them.
"""

from prometheus_client import multiprocess

worker_class = "aiohttp.GunicornWebWorker"
workers = 2


def child_exit(server, worker):
    multiprocess.mark_process_dead(worker.pid)
