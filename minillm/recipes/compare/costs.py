"""What a method costs: memory in training, time at inference."""

import contextlib
import multiprocessing
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minillm.peft import CannotMerge, auxiliary_loss, merge
from minillm.recipes.compare.problem import Problem
from minillm.recipes.compare.rows import Row
from minillm.recipes.compare.trial import CHOOSING, train_config, tuned_model
from minillm.training import make_optimizer
from minillm.training.distributed import pick_device
from minillm.training.losses.base import model_inputs
from minillm.training.run_folder import peak_memory

MEMORY_STEPS = 3  # the optimizer's state is there after the first
ROUNDS = 15


def overhead(problem: Problem, row: Row) -> dict[str, float | str | None]:
    """CPU time of a forward pass with the method, as a multiple of that without: as it trains, and merged.

    Medians over rounds in which all take turns, so that what else the machine does falls on all of them.
    """
    base, (tuned, _) = problem.new_model(CHOOSING).eval(), tuned_model(problem, row, CHOOSING)
    inputs, named = model_inputs(next(problem.batches("valid", problem.settings.batch_size)))

    def call(model: nn.Module) -> Callable[[], Any]:
        return lambda: model.eval()(*inputs, **named)

    found: dict[str, float | str | None] = {"unmerged": ratios(call(base), [call(tuned)])[0], "merged": None}
    try:
        merge(tuned)
    except CannotMerge as error:
        return found | {"cannot_merge": str(error).splitlines()[-1].strip()}
    return found | {"merged": ratios(call(base), [call(tuned)])[0]}


@torch.no_grad()
def ratios(base: Callable[[], Any], others: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """The process CPU time of each of `others` as a multiple of that of `base`, medians over rounds."""

    def seconds(function: Callable[[], Any]) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    for function in (base, *others):  # the first call of each also finds its memory
        function()
    times = [[seconds(function) for function in (base, *others)] for _ in range(rounds)]
    return [statistics.median(row[i] / row[0] for row in times) for i in range(1, len(others) + 1)]


def memory_added(problem: Problem, row: Row) -> int | None:
    """Bytes by which training raises the peak of a process that has loaded the model; None on Windows.

    In a process of its own, or the peak would be that of whatever ran before.
    """
    fork = "forkserver" in multiprocessing.get_all_start_methods()  # a server that has imported torch, and used it not
    context = multiprocessing.get_context("forkserver" if fork else "spawn")
    if fork:
        context.set_forkserver_preload([__name__])
    with _no_main(), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, problem, row, torch.get_num_threads()).result()


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Processes that begin now do not run the caller's script again, which may begin a study at its top level.

    So a method of the user's must stand in a module that can be imported, and not in the script itself.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _peak(problem: Problem, row: Row, threads: int) -> int | None:
    torch.set_num_threads(threads)
    config = train_config(problem, row.rates[0], CHOOSING)
    device = pick_device(config.device)
    model = tuned_model(problem, row, CHOOSING)[0].to(device).train()
    loader, optimizer = problem.loader(CHOOSING), make_optimizer(model, config)
    _wake(device)
    before = fresh_peak(device)
    for _ in range(MEMORY_STEPS):
        loss = problem.loss_fn(model, {name: x.to(device) for name, x in next(loader).items()}).value
        extra = auxiliary_loss(model)
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = peak_memory(device)
    return None if before is None or after is None else after - before


def _wake(device: torch.device) -> None:
    """A step of something tiny: what torch itself needs to train, some 20 MB of code and threads, is no method's."""
    layer = nn.Linear(8, 8, device=device)
    layer(torch.ones(1, 8, device=device)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def fresh_peak(device: torch.device) -> int | None:
    """The memory in use now, from which on the peak is measured anew, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # some containers forbid it: then the peak of loading is where it starts
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)
