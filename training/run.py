"""One training on its way through its stages: what a kill, a resume, several processes, the threads of a CPU
and a time budget need, so that train.py's loop need not show it.

    out/checkpoint.pt    weights, the optimiser's state, where the run stands (several processes: shards-*)
    out/log.jsonl        a line every ten steps, and one for each held-out loss
    out/lock             held while a training writes to this folder
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from files.atomic import copy
from files.checkpoint import check_finite, load_checkpoint, save_checkpoint
from files.fields import check_fields, one_line, short, whole
from training import parallel

LOG_EVERY = 10  # steps
SAVING = 0.05  # share of the time that saving may take
PLAN_EVERY = 5  # seconds, with a time budget


class Stopped(Exception):
    """By SIGTERM or Ctrl-C, with everything saved: (message, number of the signal)."""


def default_precision(device):
    """bfloat16 where the hardware multiplies it faster: GPUs, and CPUs with instructions for it. Never by a
    stopwatch."""
    if torch.device(device).type == "cuda":
        return "bfloat16"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if torch.device(device).type == "cpu" and supported() else "float32"


class Run:
    """A task with its optimiser, in the folder `out`. Raises ValueError or OSError if the folder holds
    another run."""

    def __init__(self, task, stages, out, optimizer, minutes=None, resume=False, seed=1, save_every=60.0):
        self.task, self.stages, self.out, self.optimizer = task, stages, out, optimizer
        self.minutes, self.seed, self.save_every = minutes, seed, save_every
        self.path = os.path.join(out, "checkpoint.pt")
        self.precision = task.precision or default_precision(task.device)
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        # where it stands; num_steps of each stage (None: a time budget will tell)
        self.progress = {"num_steps": [None if minutes else s.steps for s in stages], "stage": 0, "step": 0}
        if os.path.exists(self.path) or parallel.is_distributed() and parallel.newest(out):
            if not resume:
                raise ValueError(f"{out}: holds a run already; --resume goes on with it, "
                                 "--out names another folder")
            try:
                self.restore()
            except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as e:
                reason = f"{type(e).__name__}: {one_line(e, 150)}"
                raise ValueError(f"{out}: its checkpoint is damaged ({reason}); --out names another folder") \
                    from None
        self.threads = None
        if task.device == "cpu" and not parallel.is_distributed():
            cores = torch.get_num_threads()
            n = self.micro_batches = 1 << min(2, cores.bit_length() - 1)  # 1, 2 or 4
            self.threads = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(cores // n,))
            optimizer.map = self.threads.map
        else:
            self.micro_batches = 1
        self.signal, self.bar = None, None
        self.saved_at, self.save_took, self.held_out_took = time.monotonic(), 0.0, 0.0
        if minutes:  # a resumed run takes the part that its unfinished stages have
            self.deadline = time.monotonic() + 60 * minutes * self.steps_left() / sum(s.steps for s in stages)
        if parallel.rank() == 0:
            os.makedirs(out, exist_ok=True)

    # where the run stands

    @property
    def stage(self):
        return self.stages[self.progress["stage"]]

    @property
    def step(self):
        return self.progress["step"]

    @property
    def num_steps(self):
        """Of this stage, or None if a time budget has not told yet."""
        return self.progress["num_steps"][self.progress["stage"]]

    def fraction(self, step=None):
        """How much of the stage is behind it at this step, 0 to 1."""
        return (self.step if step is None else step) / self.num_steps if self.num_steps else 0.0

    def total_steps(self):
        """Of all stages so far."""
        return sum(self.progress["num_steps"][:self.progress["stage"]]) + self.step

    def steps_left(self):
        """Of the table, from here to the end: with a time budget, what the time is shared by."""
        steps = [s.steps for s in self.stages[self.progress["stage"]:]]
        return sum(steps) - steps[0] * self.fraction() if steps else 0

    def unfinished_stages(self):
        """Each stage that is not over; when the loop has done its steps, its held-out loss is printed and it
        is saved."""
        while self.progress["stage"] < len(self.stages):
            name = f"{self.stage.name:16}"
            self.bar = tqdm(total=self.num_steps, initial=self.step, desc=name, unit="step", mininterval=1,
                            disable=parallel.rank() > 0)
            self.begun_at, self.first = time.monotonic(), self.step
            self.logged_at, self.tokens = self.begun_at, 0
            if self.minutes:
                self._share_time()
            yield self.stage
            self.bar.close()
            losses = self.held_out(self.stage) if self.num_steps else {}
            losses = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            if parallel.rank() == 0 and (losses or not self.num_steps):
                print(f"{self.stage.name}: {'held out  ' + losses if losses else 'no time left'}", flush=True)
            went_on, self.progress["step"] = self.step > 0, 0
            self.progress["stage"] += 1
            if went_on or self.progress["stage"] == len(self.stages):
                self.save()

    # batches

    def batches(self, stage):
        """This process's rows of each batch of the stage. On a GPU, workers make them ahead."""
        on_gpu = torch.device(self.task.device).type == "cuda"
        workers = max(1, min(4, (os.cpu_count() or 2) // 2)) if on_gpu else 0
        while self.num_steps is None or self.step < self.num_steps:  # a time budget may lengthen the stage
            loader = DataLoader(_Batches(self, stage), None, sampler=self._steps(), num_workers=workers,
                                multiprocessing_context="fork" if workers else None, pin_memory=on_gpu,
                                worker_init_fn=_leave_signals_to_main, generator=torch.Generator())
            for batch in loader:
                yield batch
                if self.num_steps is not None and self.step >= self.num_steps:
                    break

    def _steps(self):
        step = self.step
        while self.num_steps is None or step < self.num_steps:
            yield step, self.fraction(step)
            step += 1

    def rng(self, step):
        return random.Random(f"{self.seed} {self.progress['stage']} {step}")

    def rows(self, stage):
        """The rows of a batch that this process computes."""
        if stage.batch % parallel.world_size():
            raise ValueError(f"a batch of {stage.batch} rows cannot be shared by "
                             f"{parallel.world_size()} processes")
        return range(parallel.rank(), stage.batch, parallel.world_size())

    def split_batch(self, batch):
        """A batch, a tuple of tensors and lists with a row for each item, as micro-batches: as many rows at a
        time as the stage says, and on a CPU one for each thread."""
        rows = len(batch[0])
        at_once = max(1, min(self.stage.micro_batch or rows, rows // self.micro_batches))
        return [tuple(x[i:i + at_once] for x in batch) for i in range(0, rows, at_once)]

    # gradients

    def totals(self, batch):
        """What the losses are divided by: the targets of each kind in the whole batch, of all processes."""
        return parallel.all_sum(self.task.totals(batch).to(self.params[0].device))

    def backward(self, loss, batch):
        """p.grad = the gradients of the sum of loss(micro-batch) over all micro-batches of all processes.
        Returns the sums of the loss and its parts, and [what loss returned third, for each micro-batch of
        this process]."""
        compute = self._backward_in_threads if self.threads else self._backward_in_turn
        results = compute(loss, self.split_batch(batch))
        parts = self._sum([parts for parts, _ in results])
        self.check_finite("loss", parts["loss"])
        return parts, [kept for _, kept in results]

    def check_finite(self, name, value):
        """Stop before a loss or a gradient that is not finite reaches the weights."""
        value = parallel.gather(value)
        if not torch.isfinite(value):
            raise ValueError(f"the {name} is {value.item()} at step {self.step} of {self.stage.name}; the "
                             f"last good state is in {self.out}; learned from: {self._learned_from()}")

    def forward(self, loss, micro):
        device = torch.device(self.task.device).type
        cached = getattr(self.task, "recompute", None) != "selective"  # which wants the same casts twice
        with torch.autocast(device, torch.bfloat16, enabled=self.uses_autocast(), cache_enabled=cached):
            total, parts, kept = loss(micro)
        return total, {"loss": total.detach(), **{name: x.detach() for name, x in parts.items()}}, kept

    def uses_autocast(self):
        """Not in several processes: FSDP2 gathers the shards in bfloat16, and the residual stream is bfloat16
        too."""
        return self.precision == "bfloat16" and not parallel.is_distributed()

    def _backward_in_turn(self, loss, micro_batches):
        self.optimizer.zero_grad()
        results = []
        for micro in micro_batches:
            total, *rest = self.forward(loss, micro)
            (total * parallel.world_size()).backward()  # FSDP2 averages over the processes: make it a sum
            results.append(rest)
        return results

    def _backward_in_threads(self, loss, micro_batches):
        """On a CPU, threads with a core each do more than one operation after another on all cores (half as
        much again)."""
        def one(micro):
            total, *rest = self.forward(loss, micro)
            return torch.autograd.grad(total, self.params, materialize_grads=True), rest
        gradients, results = zip(*self.threads.map(one, micro_batches))
        for p, *parts in zip(self.params, *gradients):
            p.grad = sum(parts)
        return results

    def _sum(self, parts):
        """[{name: value}] of this process's micro-batches -> {name: sum over them and over all processes}"""
        sums = {name: sum(x[name] for x in parts).float() for name in parts[0]}
        return dict(zip(sums, parallel.all_sum(torch.stack([*sums.values()]))))

    def _learned_from(self):
        names = getattr(self.task, "clips_of", lambda *args: [])
        names = names(self.stage, self.fraction(), self.rng(self.step), self.rows(self.stage))
        return ", ".join(names[:8]) + (", ..." if names[8:] else "") or "unknown"

    @torch.no_grad()
    def held_out(self, stage, batches=4):
        """The losses over the same batches of held-out items every time, logged; {} if the data has none for
        this stage."""
        if not self.task.holds(stage, "seen"):
            return {}
        begun_at = time.monotonic()
        self.task.modules.eval()
        means = {}
        for i in range(batches):
            batch = self.task.batch(stage, 1.0, "seen", random.Random(i), self.rows(stage))
            totals = self.totals(batch)
            loss = lambda micro: self.task.loss(stage, micro, totals)
            parts = [self.forward(loss, micro)[1] for micro in self.split_batch(batch)]
            for name, value in self._sum(parts).items():
                means[name] = means.get(name, 0) + value.item() / batches
        self.task.modules.train()
        means.pop("loss")
        self.held_out_took = time.monotonic() - begun_at
        self._write_log(split="held-out", **{name: round(value, 4) for name, value in means.items()})
        return means

    # after a step

    def end_step(self, batch, parts, lr):
        """Count the step, show and log it, look at the clock, and save if it is time. Stopped if a signal has
        come."""
        self.progress["step"] += 1
        self.bar.update()
        self.tokens += self.task.tokens(batch) * parallel.world_size()
        if self.minutes:
            self._plan_steps()
        if self.step % LOG_EVERY == 1:
            self._log(parts, lr)
        n = self.num_steps
        if n and self.step % math.ceil(n / 4) == 0 and self.step < n and not self._is_short():
            self.held_out(self.stage)
        if parallel.any_of(self.signal is not None):
            self.save()
            self.bar.close()
            text = f"{self.out}: stopped and saved at step {self.step} of {self.stage.name}; --resume goes on"
            raise Stopped(text, self.signal or signal.SIGTERM)
        if parallel.any_of(time.monotonic() - self.saved_at > max(self.save_every, self.save_took / SAVING)):
            self.save()

    def _share_time(self):
        """With a time budget: until when this stage may last, of what is left for it and those after it."""
        now = time.monotonic()
        share = self.stage.steps * (1 - self.fraction()) / (self.steps_left() or 1)
        self.stage_end, self.timed, self.planned_at = now + (self.deadline - now) * share, None, now
        if parallel.any_of(self._seconds_left() <= 0) and self.total_steps():  # the first stage has one step
            self.progress["num_steps"][self.progress["stage"]] = self.step

    def _is_short(self):
        """Whether a held-out loss would take more than a fiftieth of this stage's time budget."""
        spent = self.minutes and 50 * self.held_out_took > self.stage_end - self.begun_at
        return bool(self.minutes) and parallel.any_of(bool(spent))

    def _seconds_left(self):
        """For steps of this stage; its held-out loss and its checkpoint come after them."""
        return self.stage_end - self.held_out_took - self.save_took - time.monotonic()

    def _plan_steps(self):
        """With a time budget: how many steps the stage will have, from how long they have taken so far; this
        was the last one if the time is over."""
        now, left, last = time.monotonic(), self._seconds_left(), self.num_steps
        self.timed = self.timed or (now, self.step)  # the first step reads files, or compiles
        begun_at, begun = self.timed
        due = now > self.planned_at + PLAN_EVERY or last is not None and self.step >= last
        if not parallel.any_of(left <= 0 or due and self.step > begun):
            return
        more = int(left * (self.step - begun) / (now - begun_at)) if left > 0 and self.step > begun else 0
        steps = torch.tensor(self.step + max(0, more) if parallel.rank() == 0 else 0)
        steps = parallel.all_sum(steps.to(self.params[0].device)).item()  # all processes do as the first
        self.bar.total = self.progress["num_steps"][self.progress["stage"]] = steps
        self.planned_at = now

    def _log(self, parts, lr):
        numbers = {name: round(value.item(), 4) for name, value in parts.items()}
        now = time.monotonic()
        speed, self.logged_at, self.tokens = round(self.tokens / (now - self.logged_at)), now, 0
        each = (now - self.begun_at) / (self.step - self.first)  # seconds
        left = round(each * (self.num_steps - self.step)) if self.num_steps else None
        shown = {name: f"{value:.2f}" for name, value in numbers.items()}
        self.bar.set_postfix(shown | {"tok/s": speed}, refresh=False)
        self._write_log(lr=lr, **numbers, tokens_per_second=speed, seconds_left=left)

    def _write_log(self, **numbers):
        if parallel.rank() == 0:
            with open(os.path.join(self.out, "log.jsonl"), "a", encoding="utf-8") as f:
                f.write(json.dumps({"stage": self.stage.name, "step": self.step, **numbers}) + "\n")

    # checkpoints

    def facts(self):
        """What a checkpoint says besides its tensors."""
        return {"data": self.task.fingerprint, "progress": self.progress, "precision": self.precision,
                "seed": self.seed, "stages": [dataclasses.asdict(s) for s in self.stages]}

    def save(self):
        begin = time.monotonic()
        if parallel.is_distributed():
            facts = {"config": dataclasses.asdict(self.task.config), **self.facts()}
            parallel.save(self.out, self.total_steps(), self.sharded_tensors(), facts)
        else:
            save_checkpoint(self.path, self.task.kind, self.task.config, **self.task.state(), **self.facts(),
                            optimizer=self.optimizer.state_dict())
        self.saved_at = time.monotonic()
        self.save_took = self.saved_at - begin

    def restore(self):
        if parallel.is_distributed():
            path = parallel.newest(self.out)
            if not path:
                raise ValueError(f"{self.path}: is of one process; it cannot go on in several")
            saved, files = parallel.read(path)
            parallel.check(path)
        else:
            path, saved = self.path, load_checkpoint(self.path, self.task.kind)
        if not {"progress", "seed", "stages", "data", "precision"} <= saved.keys():
            raise ValueError(f"{path}: was written by an older version; --out names another folder")
        if saved["config"] != dataclasses.asdict(self.task.config) or saved["data"] != self.task.fingerprint:
            raise ValueError(f"{path}: was trained with another config or on other data; "
                             "--out names another folder")
        where = {"stage": whole(0, len(self.stages)), "step": whole()}
        check_fields(saved["progress"], where, what=f"{path}: progress")
        self.check_plan(saved, path)
        if saved["precision"] != self.precision and (self.task.precision or parallel.is_distributed()):
            raise ValueError(f"{path}: was trained in {saved['precision']}; "
                             f"--precision {saved['precision']} goes on with it")
        if "optimizer" not in saved and not parallel.is_distributed():
            raise ValueError(f"{path}: holds no optimiser: it is the result of several processes, which "
                             "go on with torchrun")
        self.progress, self.precision = saved["progress"], saved["precision"]
        if parallel.is_distributed():
            parallel.restore(files, self.sharded_tensors())
        else:
            self.task.load(saved, path)
            self.check_optimizer(saved["optimizer"], path)
            # what belongs to a group, such as its betas, is the code's
            self.optimizer.load_state_dict(saved["optimizer"] | {
                "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.progress["stage"] == len(self.stages) and parallel.rank() == 0:
            print(f"{self.out}: is trained to the end; to train anew, remove it or name another with --out")

    def check_optimizer(self, saved, path):
        """ValueError unless the states are those of this model's parameters."""
        params = [(p, group["muon"]) for group in self.optimizer.param_groups for p in group["params"]]
        for i, state in saved["state"].items():
            p, muon = dict(enumerate(params))[i]
            names = ("exp_avg",) if muon else ("exp_avg", "exp_avg_sq")
            found = {name: tuple(x.shape) for name, x in state.items()}
            if found != {"step": (), **dict.fromkeys(names, tuple(p.shape))}:
                raise ValueError(f"{path}: its optimiser's states are not those of this model (one is "
                                 f"{short(found)}); --out names another folder")
            plain = {name: x for name, x in state.items() if type(x) is torch.Tensor}  # not in 8 bits
            check_finite({f"the optimiser's {name}": x for name, x in plain.items()}, path)

    def check_plan(self, saved, path):
        """ValueError if this run would go on in other stages, with other data, or by another clock."""
        for old, new in itertools.zip_longest(saved["stages"], map(dataclasses.asdict, self.stages)):
            old = old and {**{f.name: f.default for f in dataclasses.fields(self.stages[0])}, **old}
            if old != new:
                same = old and new and old["name"] == new["name"]
                odd = ", ".join(k for k in new if old.get(k) != new[k]) if same else "not in both"
                name = one_line((old or new)["name"], 60)
                raise ValueError(f"{path}: was trained in other stages ({name}: {odd}); "
                                 "--out names another folder")
        if saved["seed"] != self.seed:
            raise ValueError(f"{path}: was trained with --seed {short(saved['seed'])}; give it again")
        unknown = None in saved["progress"]["num_steps"][saved["progress"]["stage"]:]
        if unknown and not self.minutes:
            raise ValueError(f"{path}: was begun with --minutes; give it again")

    def sharded_tensors(self):
        """All that several processes hold in shards: {name: parameter or state of the optimiser}."""
        out = {}
        parallel.reshard(self.task.modules)
        names = {p: name for name, p in self.task.modules.named_parameters()}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                state = self.optimizer.init_state(p, group["muon"])
                out |= {f"model {names[p]}": p, **{f"{k} {names[p]}": x for k, x in state.items()}}
        return out

    def finish(self):
        """The result of several processes as one checkpoint, which chat.py reads. Returns its path."""
        if parallel.is_distributed():
            if parallel.rank() == 0:
                _, files = parallel.read(parallel.newest(self.out))
                weights = dict(parallel.whole(files, "model "))
                if self.task.config.tied:
                    weights["head.weight"] = weights["text.weight"]
                state = self.task.state() | {"model": weights}
                save_checkpoint(self.path, self.task.kind, self.task.config, **state, **self.facts())
            parallel.barrier()
        return self.path

    @contextlib.contextmanager
    def guarded(self):
        """While this lasts, SIGTERM and Ctrl-C stop the run after its step, saved (a second Ctrl-C at once),
        and another training that would write to the same folder is refused."""
        def stop(number, frame):
            if self.signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.signal = self.signal or number  # SIGTERM may come twice: from a batch system, from torchrun
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)
                      if signal.getsignal(s) is not signal.SIG_IGN}
        try:
            with lock(self.out) if parallel.rank() == 0 else contextlib.nullcontext():
                if parallel.rank() == 0:
                    for name, source in self.task.files.items():
                        copy(source, os.path.join(self.out, name))
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Batches(torch.utils.data.Dataset):
    def __init__(self, run, stage):
        self.task, self.stage, self.rng, self.rows = run.task, stage, run.rng, run.rows(stage)

    def __getitem__(self, step_and_fraction):
        step, fraction = step_and_fraction
        return self.task.batch(self.stage, fraction, "train", self.rng(step), self.rows)


def _leave_signals_to_main(worker):
    """A signal may go to all processes of a group; workers end when the main process has saved and ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def lock(folder):
    """Only one process at a time writes to a folder; the system drops the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(os.path.join(folder, "lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another training writes to it; --out names another folder") from None
        yield
