"""Work spread over processes."""
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


def in_processes(function, jobs, processes, method, start, settings, chunksize=1, name=str):
    """function(job) of each job, in their order, in processes of a start method ("fork", "spawn") that begin
    with start(*settings). ValueError, not an endless wait, if one of them dies. name: of a job, for that."""
    done, processes = 0, min(processes, 60)  # as many as Windows can wait for
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(processes, context, begin, (start, settings)) as pool:
        try:
            for result in pool.map(function, jobs, chunksize=chunksize):
                yield result
                done += 1
        except BrokenProcessPool:
            raise ValueError("a process died: it crashed, or memory ran out; that was at "
                             f"{name(jobs[done])}, or at one of the next") from None


def begin(start, settings):
    threading.Thread(target=end_with_parent, daemon=True).start()
    start(*settings)


def end_with_parent():
    """Otherwise those whose parent is killed would wait for ever for more to do."""
    multiprocessing.parent_process().join()
    os._exit(1)
