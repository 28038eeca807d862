"""Work spread over processes."""
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


def in_processes(function, jobs, processes, start_method, initializer, initargs, chunksize=1, name=str):
    """Yields function(job) of each job, in their order, from processes of a start method ("fork", "spawn")
    that begin with initializer(*initargs). An error, Ctrl-C or a caller that wants no more ends them at once.
    ValueError, not an endless wait, if one of them dies; name(job) is what it calls a job."""
    done, others = 0, multiprocessing.active_children()
    chunks = [jobs[i:i + chunksize] for i in range(0, len(jobs), chunksize)]
    if os.name == "nt":
        processes = min(processes, 61)  # all that it can wait for
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(processes, context, begin, (initializer, initargs)) as pool:
        try:
            for future in [pool.submit(each, function, chunk) for chunk in chunks]:
                for result in future.result():
                    yield result
                    done += 1
        except BrokenProcessPool:
            raise ValueError("a process died: it crashed, or memory ran out; that was at "
                             f"{name(jobs[done])}, or at one of the next") from None
        except BaseException:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


def each(function, jobs):
    return [function(job) for job in jobs]


def begin(initializer, initargs):
    threading.Thread(target=end_with_parent, daemon=True).start()
    initializer(*initargs)


def end_with_parent():
    """Otherwise those whose parent is killed would wait for ever for more to do."""
    multiprocessing.parent_process().join()
    os._exit(1)
