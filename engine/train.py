"""``python -m engine.train RECIPE``: train one encoder on several tasks.

To follow a training step, read the loop in :func:`train`, then training/step.py (forward, one
backward, surgery, update), models/bert.py, kernels/ and csrc/.
"""

import gc
import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from signal import Signals

import torch
from rich.console import Console

from ._kernels import kernels
from .checkpoints.manifest import Progress
from .cli.common import STOPPED, print_scores, print_warnings, run_cli, terminal
from .cli.completion import bash_script
from .cli.data_progress import reading_of
from .cli.dry_run import show_plan
from .cli.help import print_fields
from .cli.options import overrides, parser
from .cli.progress import (
    ProgressBar,
    describe,
    list_recipes,
    print_idle_settings,
    print_line_on_init,
    print_warmup,
    report_data,
    report_streams,
)
from .cli.series import train_series
from .cli.standard_output import train_without_output
from .config import recipe as recipes
from .data.collate import PackedBatch
from .distributed.ranks import Ranks
from .lint.phase_facts import PhaseFacts
from .metrics.log import MetricsLog
from .metrics.read import read_evaluation_lines
from .runs.experiments import seeds_of
from .runs.folder import claimed, free_folders
from .runs.job import InProcess
from .runs.lock import held, held_first
from .runs.rank_files import deal_files, line_on_other_ranks
from .runs.resume import resume
from .runs.run import Run, begin
from .runs.scoring import METRICS, Scores, read_scores, score_splits, write_memory, write_scores
from .runtime.cpu import set_threads
from .runtime.oom import SMALLER_MODEL, memory_explained
from .runtime.precision import pick_device
from .training.average_best import average_best, discard_average
from .training.batch_sizes import smaller_batches
from .training.build import build_trainer
from .training.divergence import check_skipped, is_worth_saving
from .training.drift import check_ranks, check_ranks_at_start
from .training.memory_parts import MemoryMeter
from .training.rank_sets import read_dealt
from .training.signals import StopRequest
from .training.trainer import Trainer
from .utils.errors import InputError
from .utils.files import resolved

_LEASE = 120.0
"""Seconds after which a file server releases the locks of a lost machine."""


def train(
    trainer: Trainer, console: Console, meter: MemoryMeter, stop_after: int | None = None
) -> Signals | None:
    """Train one phase, from the run's newest checkpoint on.

    Args:
        trainer: of the phase.
        console: for progress.
        meter: of the process's memory.
        stop_after: steps of the run after which it stops with a checkpoint, as a signal stops it;
            None for the phase's end.  What is trained before, the learning rates among it, does not
            depend on it.

    Returns:
        The signal (SIGINT, SIGTERM, SIGHUP) that stopped it, after a checkpoint to resume from was
        written; None when the last phase came to its end, or any of them without a signal, or to
        ``stop_after``.

    Raises:
        DivergedError: loss, weights or outputs of the model are not finite any more.
        DriftError: several ranks do not have the same weights or random state any more.
    """
    recipe, ranks = trainer.recipe, trainer.ranks
    progress, stopping = trainer.restore(), False
    first = trainer.total_steps if trainer.stops_early(progress) else progress.phase_step
    if not trainer.has_ended(progress):
        discard_average(trainer, progress)
    trainer.go_to(first)  # which may take long, and a signal ends it
    with (
        StopRequest() as stop,
        trainer.checkpoint_writer,
        closing(trainer.log(progress.step)) as log,
        closing(trainer.loader(first)) as loader,
        ProgressBar(console, progress.phase_step, trainer.total_steps) as bar,
    ):
        on_device = (micro_batch.to(trainer.device) for micro_batch in loader)
        steps = itertools.count(progress.step)
        for step, *micro_batches in zip(steps, *[on_device] * recipe.micro_batches, strict=False):
            lr = trainer.lr_schedule(progress.phase_step)
            warmed_up = trainer.step.execution.warmup_seconds
            with meter.step(trainer, micro_batches):
                report = trainer.step(micro_batches, step, lr)
            warmup = trainer.step.execution.warmup_seconds - warmed_up
            trainer.rank_check.add(step + 1)
            tokens = sum(each.num_tokens - each.padding for each in micro_batches)
            log.add(step, lr, tokens, report, warmup)
            progress = progress._replace(step=step + 1)
            evaluate = trainer.is_evaluated(progress.phase_step)
            due = recipe.checkpoint_every and progress.step % recipe.checkpoint_every == 0
            if evaluate or due:
                log.flush()
            if log.is_written:
                check_ranks(trainer)
                bar.show(progress.phase_step, log.latest)
                check_skipped(trainer, log, progress, loader)
            if log.is_written or ranks.size == 1:  # ranks wait for each other only now and then
                stopping = ranks.any(bool(stop))
            stopping = stopping or progress.step == stop_after
            if evaluate or due or stopping:
                progress = _evaluate_and_save(
                    trainer,
                    micro_batches,
                    log,
                    bar,
                    progress,
                    meter,
                    evaluate=evaluate,
                    due=bool(due) or trainer.ends_epoch(progress.phase_step) or stopping,
                    stopping=stopping,
                )
            if stopping or trainer.stops_early(progress):
                break
    ended = trainer.has_ended(progress)
    if trainer.stops_early(progress) and progress.phase_step < trainer.total_steps:
        name, count = f"{trainer.name}: " if trainer.name else "", progress.stale
        without = "1 evaluation" if count == 1 else f"{count} evaluations in a row"
        console.print(
            f"{name}stopped early after step {progress.step}: {without} without "
            f"a better score ({recipe.best_of}); patience = {recipe.patience}",
            soft_wrap=True,
        )
    if ended and log.skipped and log.skipped[0] == progress.phase_start:
        console.print(
            "no step was trained: the loss scale for fp16 was still being lowered; train more "
            "steps, or with precision=bf16 or fp32",
            soft_wrap=True,
        )
    if ended:
        average_best(trainer, progress, console)
    if ended:  # a signal in the last step is for the phase that would begin now
        return None if trainer.name == [*trainer.run.recipe.in_phases][-1] else stop.signal
    if progress.step == stop_after and stop.signal is None:
        return None
    return stop.signal or Signals.SIGTERM


def _evaluate_and_save(
    trainer: Trainer,
    micro_batches: Sequence[PackedBatch],
    log: MetricsLog,
    bar: ProgressBar,
    progress: Progress,
    meter: MemoryMeter,
    *,
    evaluate: bool,
    due: bool,
    stopping: bool,
) -> Progress:
    """Score the model, and write a checkpoint if the weights are worth one.

    Args:
        trainer: of the run.
        micro_batches: of the last step.
        log: of the steps.
        bar: what shows the scores.
        progress: after the last step.
        meter: of the process's memory.
        evaluate: whether to score the model.
        due: whether a checkpoint is due; one is written also where scores are the best so far, or
            end the phase.
        stopping: whether the run stops after this step.

    Returns:
        The progress of the run, with the best score.
    """
    log.flush()
    trainer.rank_check.add(progress.step, now=True)  # what is saved is what all ranks have
    check_ranks(trainer)
    scores = {}
    if evaluate:
        recipe = trainer.run.recipe
        with meter.evaluation(), trainer.scored_weights():
            scores = score_splits(
                trainer.model, trainer.dev_sets, recipe, trainer.ranks, choose_thresholds=True
            )
    if scores:
        log.add_scores(progress.step, scores)
        progress = progress.evaluated(trainer.deciding_score(scores), trainer.average_best)
    worth_saving = is_worth_saving(trainer, micro_batches, log, progress, scores, stopping=stopping)
    is_best = bool(scores) and progress.best_step == progress.step
    if scores:
        trainer.save_scored(progress)
    if is_best and trainer.ranks.is_main:
        write_scores(trainer.run.folder, Scores("dev", progress.step, scores))
    if evaluate:
        bar.print_epoch(progress, trainer.epoch_steps, scores)
    if worth_saving and (due or is_best or trainer.has_ended(progress)):
        trainer.save(progress)
    log.restart_clock()
    return progress


def train_run(
    run: Run,
    device: torch.device,
    console: Console,
    ranks: Ranks | None = None,
    *,
    stop_after: int | None = None,
) -> Signals | None:
    """Train the phases of a run that are not done yet.

    Args:
        run: its folder and settings.
        device: of the model.
        console: for progress.
        ranks: the processes that train it together.
        stop_after: as of :func:`train`; trained on later, the run has the weights that it would
            have had without the stop, to the bit.

    Returns:
        As :func:`train`.
    """
    ranks = ranks or Ranks()
    if device.type == "cpu":
        kernels.keep_freed_memory()
        set_threads(run.recipe.threads, ranks.local_size)
    meter = MemoryMeter(device)
    signal = _train_phases(run, device, console, ranks, meter, stop_after)
    # A run that stopped before its first evaluation has no scores yet, which commands then say.
    is_due = not run.recipe.is_scored or (run.folder / METRICS).exists()
    if ranks.is_main and is_due and (memory := meter.report()) is not None:
        write_memory(run.folder, memory)
    return signal


def _train_phases(
    run: Run,
    device: torch.device,
    console: Console,
    ranks: Ranks,
    meter: MemoryMeter,
    stop_after: int | None,
) -> Signals | None:
    """Train the phases of a run, as :func:`train_run` does."""
    done, facts = run.checkpoints.progress(), dict[str, PhaseFacts]()
    known, idle = list[str](), list[str]()
    files = deal_files(run, ranks)
    if line := line_on_other_ranks(run, ranks):
        console.print(line, soft_wrap=True, highlight=False)
    for phase in range(done.phase, len(run.recipe.in_phases)):
        if stop_after is not None and run.checkpoints.progress().step >= stop_after:
            return None
        with memory_explained(SMALLER_MODEL):
            dealt = read_dealt(run, device, ranks, files, phase)
        # The first on each machine fills the cache of tokenized data.
        with ranks.main_first(), memory_explained(SMALLER_MODEL):
            trainer = build_trainer(run, device, ranks, phase=phase, dealt=dealt)
        if phase == done.phase:
            _check_steps(trainer, done)
        if ranks.is_main:
            if done == Progress() and phase == 0:
                print_line_on_init(console, run)
            run.write()  # only now: what cannot be trained leaves no folder behind
        check_ranks_at_start(trainer)
        facts[trainer.name] = PhaseFacts.of(trainer)
        idle = print_idle_settings(console, trainer, facts, idle)
        describe(console, trainer)
        known = report_data(console, [*trainer.train_sets, *trainer.dev_sets.values()], known)
        recipe, execution = trainer.recipe, trainer.step.execution
        with (
            closing(execution),
            memory_explained(smaller_batches(recipe, trainer.samplers)),
        ):
            signal = train(trainer, console, meter, stop_after)
            meter.end_phase(trainer)
        report_streams(console, trainer.train_sets)
        print_warmup(console, execution)
        if signal is not None:
            return signal
        del trainer, execution, dealt  # the next phase is built in the memory that this one took
        gc.collect()  # they refer to each other
    return None


def _check_steps(trainer: Trainer, done: Progress) -> None:
    """Refuse a run that has trained more steps than it is to have, or would end without a score.

    Raises:
        InputError: the run has more steps than recipe and data give now, or exactly as many, but
            was not scored at the last one.
    """
    run = trainer.run
    before = list(run.recipe.in_phases.values())[: done.phase]
    most = sum(recipe.max_steps or math.inf for recipe in before)
    if done.phase_step > trainer.total_steps or done.phase_start > most:
        raise InputError(
            f"--resume: {run.folder} has trained {done.step} steps, more than recipe and data give "
            "now; raise max_steps, or give it the data that it was made with"
        )
    if done.phase_step == trainer.total_steps and done.phase_step % trainer.epoch_steps:
        scored = [line["step"] for line in read_evaluation_lines(run.folder)]
        if trainer.dev_sets and done.step not in scored:
            raise InputError(
                f"--resume: {run.folder} has trained these {done.step} steps, in the middle of an "
                "epoch, where it was not scored; raise max_steps"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)
    if _showed_information(options, terminal()):
        return 0
    if options.recipe is None:
        raise InputError("RECIPE is missing; --list shows all")
    if options.resume and options.out is None:
        raise InputError("--resume: name the run's folder with --out")
    if options.dry_run and options.seeds is not None:
        raise InputError("--dry-run: shows what one run needs; leave --seeds out")
    if not options.dry_run:
        train_without_output()
    ranks = Ranks.from_environment()
    if ranks.size > 1 and (options.out is None or options.seeds is not None):
        raise InputError("several ranks make one run, in the folder that --out names; give it")
    console = terminal(quiet=not ranks.is_main)
    device = ranks.device(pick_device(options.device))
    recipe, renamed = recipes.read(options.recipe, overrides(options))
    print_warnings(renamed if ranks.is_main else ())
    if options.seeds is not None:
        specs = seeds_of("", recipe, options.seeds)
        with _claimed_folder(options, held) as out:
            reading = reading_of(options, console)
            workers = InProcess(lambda run, _: train_run(run, device, console), reading=reading)
            return train_series(out, specs, workers, console)
    with ranks.init(device, recipe.timeout):
        restarted = ranks.any(ranks.restarted)  # of several agents one may not have counted it
        resumes = options.resume or restarted
        wait = min(_LEASE, recipe.timeout / 2) if restarted else 0.0
        claim = partial(claimed, ranks=ranks, resumes=resumes, wait=wait)
        with _claimed_folder(options, claim) as out:
            with ranks.main_first():
                reading = reading_of(options, console)
                run = (
                    resume(recipe, out, reading, ranks.size)
                    if resumes
                    else begin(recipe, out, reading=reading, ranks=ranks.size)
                )
            if options.dry_run:
                meter = MemoryMeter(device)
                dealt = read_dealt(run, device, ranks, deal_files(run, ranks))
                trainer = build_trainer(run, device, ranks, dealt=dealt)
                print_line_on_init(console, run)
                report_data(console, [*trainer.train_sets, *trainer.dev_sets.values()])
                with closing(trainer.step.execution):
                    show_plan(console, trainer, meter)
                print_idle_settings(console, trainer, {trainer.name: PhaseFacts.of(trainer)}, ())
                return 0
            signal = train_run(run, device, console, ranks)
    if signal is not None:
        console.print(f"stopped by {signal.name}; go on with --resume --out {run.folder}")
        return STOPPED + signal
    if not ranks.is_main:
        return 0
    if recipe.is_scored:
        best = read_scores(run.folder, recipe.tasks)
        when = "evaluation" if any(p.eval_every for p in recipe.in_phases.values()) else "epoch"
        of = best.source if best.averaged else f"best {when} (step {best.step})"
        title = f"{best.split} scores, {of}"
        print_scores(console, title, best.scores, recipe)
    else:
        console.print("not scored: no task was trained; the weights are those of the last step")
    console.print(f"wrote {run.folder}", soft_wrap=True, highlight=False)
    return 0


@contextmanager
def _claimed_folder(
    options: Namespace, hold: Callable[[Path], AbstractContextManager[None]]
) -> Iterator[Path]:
    """Hold the run's folder: the one that ``--out`` names, or the next free one."""
    if options.out is not None:
        out = resolved(options.out)
        with nullcontext() if options.dry_run else hold(out):
            yield out
        return
    free = free_folders(Path("runs"), options.recipe)
    with nullcontext(next(free)) if options.dry_run else held_first(free) as out:
        yield out


def _showed_information(options: Namespace, console: Console) -> bool:
    """Show what ``--list``, ``--fields`` or ``--completion`` asks for; return whether one did."""
    if options.list:
        list_recipes(console, [(name, recipes.load(name).description) for name in recipes.names()])
    elif options.fields:
        print_fields(console)
    elif options.completion:
        print(bash_script())
    else:
        return False
    return True


if __name__ == "__main__":
    run_cli(main)
