"""A worker: takes jobs, answers with records; here as a process at the end of a pipe, in ray_engine.py as an actor.

torch is imported inside it, never in the parent.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

from ..core.errors import AccessError, IncompleteError, SafeMedError
from ..core.journal import disk_full
from ..core.registry import load_plugin_file
from .artefacts import made_by, slug
from .batching import BatchSizer, is_out_of_memory
from .messages import Done, Failed, Fatal, Job, ModelFailed, Note, Order, Ready, Settings
from .reading import Images

LOG = "workers.log"

FIRST_BATCH = 8
"""Questions in the first batch on a GPU, whose memory is then found out by doubling (batching.py)."""


def main(pipe: Connection, settings: Settings, device: str) -> None:
    """Body of a worker process; returns when the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # with clean-up, unlike the system's default
    threading.Thread(target=_die_with_parent, daemon=True).start()
    up = start(settings, device)
    pipe.send(up)
    if isinstance(up, Fatal):
        return
    worker = Worker(pipe.send, settings, device)
    try:
        while True:
            pipe.send(worker.answer(pipe.recv()))
    except (EOFError, BrokenPipeError):
        return
    finally:
        worker.images.close()


def start(settings: Settings, device: str) -> Ready | Fatal:
    """Make this process a worker's: its output to the log, one thread on a CPU core, the plugins of the run."""
    try:
        _log_to(settings)
        hardware = _prepare(device, settings.dtype)
        for plugin in settings.plugins:
            load_plugin_file(plugin)
    except Exception as error:
        traceback.print_exc()
        return Fatal(f"a worker cannot start: {_words(error)}")
    return Ready(hardware)


def _die_with_parent() -> None:
    """A parent that was killed cannot tell its workers; nobody would read what they compute."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _log_to(settings: Settings) -> None:
    """Whatever libraries print goes to a file in the run folder, not across the progress bar."""
    log = os.open(settings.folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)
    faulthandler.enable()


def _prepare(device: str, dtype: str) -> dict[str, Any]:
    """One thread on a CPU core of its own; what the worker runs on. `attention` is of entries of the run's dtype."""
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    hardware: dict[str, Any] = {"device": device, "torch": str(torch.__version__)}
    if device == "cpu":
        torch.set_num_threads(1)
    elif device.startswith("cuda"):
        from ..models.attention import preferred_attention
        from ..models.loading import torch_dtype

        torch.cuda.set_device(device)
        hardware |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        on = torch.device(device)
        hardware["attention"] = preferred_attention(on, torch_dtype(dtype, on))
    return hardware


class Worker:
    """Keeps the model of the last job, so that jobs in the order of models load each of them once.

    tell: takes what the user should know while a job is at work.
    """

    def __init__(self, tell: Callable[[Note], None], settings: Settings, device: str) -> None:
        self.tell, self.settings, self.device = tell, settings, device
        self.images = Images(settings, _readers(device))
        self._held: tuple[Any, Any] | None = None

    def answer(self, order: Order) -> Done | Failed | ModelFailed | Fatal:
        """The outcome of one job; the images of the job ahead are read meanwhile. Only a dying process raises."""
        job = order.job
        self.images.expect(order.ahead)
        try:
            self._make_images(job)
        except Exception as error:
            if ending := _fatal(error):
                return ending
            traceback.print_exc()
            return Failed(f"no images of {job.source.model.name}: {_words(error)}" if job.source else _words(error))
        try:
            bench = self._bench(job)
        except Exception as error:
            if ending := _fatal(error):
                return ending
            traceback.print_exc()
            return ModelFailed(job.model.name, f"{job.model.name}: {_words(error)}")
        try:
            return Done(job, bench.run(job))
        except Exception as error:
            if ending := _fatal(error):
                return ending
            traceback.print_exc()
            self._forget()
            return Failed("out of memory at batch size 1" if is_out_of_memory(error) else _words(error))

    def _make_images(self, job: Job) -> None:
        """Where a job shows images made against another entry that do not lie in the run folder, make them: by the very
        job that the other entry's own cell has. Its records are that cell's business."""
        if job.source and not (self.settings.folder / made_by(job.source)).is_file():
            self._bench(job.source).run(job.source)

    def _bench(self, job: Job) -> Any:
        if self._held is not None and self._held[0] == job.model:
            return self._held[1]
        from ..models import load_model
        from .conditions import Bench

        self._held = None  # the old model goes before the new one comes
        self._forget()
        side = job.model.resolution or self.settings.resolution
        model = load_model(job.model, side, device=self.device, dtype=self.settings.dtype)
        sizer = BatchSizer(
            self.settings.batch_size,
            self._forget,
            lambda text: self.tell(Note(text)),
            probe=FIRST_BATCH if self.device.startswith("cuda") and self.settings.batch_size is None else None,
            relieve=getattr(model, "save_memory", lambda: False),
        )
        if job.model.smooth is not None:
            model.in_batches = sizer.map  # type: ignore[attr-defined]
        if job.model.api is not None:
            served: Any = getattr(model, "base", model)
            served.keep_calls(self.settings.folder, slug(job.model.name))
        self._held = (job.model, Bench(model, self.settings, sizer, self.images))
        return self._held[1]

    def _forget(self) -> None:
        import torch

        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _readers(device: str) -> int:
    """Threads that read images."""
    import torch

    from ..models.parallel import host_threads

    return host_threads(torch.device(device))


def _fatal(error: Exception) -> Fatal | None:
    """The end of the run, where no other job would fare better; None for an error of this job alone."""
    if isinstance(error, OSError) and disk_full(error):
        return Fatal(_words(error), disk_full=True)
    return Fatal(_words(error), kind=type(error)) if isinstance(error, AccessError | IncompleteError) else None


def _words(error: BaseException) -> str:
    """One line for a record or a message; the traceback is in the log."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SafeMedError) and text else f"{type(error).__name__}: {text}"[:500]
