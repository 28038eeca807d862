"""Work spread over processes."""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


def in_processes(function, jobs, processes, method, start, settings, chunksize=1, name=str):
    """function(job) of each job, in their order, in processes of a start method ("fork", "spawn") that begin
    with start(*settings). ValueError, not an endless wait, if one of them dies. name: of a job, for that."""
    done, processes = 0, min(processes, 60)  # as many as Windows can wait for
    with ProcessPoolExecutor(processes, multiprocessing.get_context(method), start, settings) as pool:
        try:
            for result in pool.map(function, jobs, chunksize=chunksize):
                yield result
                done += 1
        except BrokenProcessPool:
            raise ValueError("a process died: it crashed, or memory ran out; that was at "
                             f"{name(jobs[done])}, or at one of the next") from None
