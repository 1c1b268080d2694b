"""Training: one loop from token shards to checkpoints, stopped and resumed at any step."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from .._core import __version__
from ..errors import ConfigError, MissingExtraError, NonFiniteError
from .batches import UNSCORED, TokenFolder, Windows
from .checkpoint import (
    TrainerState,
    best_checkpoint,
    check_files,
    find_checkpoint,
    load_optimizers,
    load_state,
    load_weights,
    previous_run,
    start_from,
)
from .recipe import PROMPTS, Recipe

try:
    import sentencepiece
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from tqdm import tqdm
except ImportError as error:
    raise MissingExtraError(error.name or "torch", "train") from error

from ..formats.sentencepiece import load_sentencepiece
from .device import (
    be_deterministic,
    choose_autocast,
    choose_device,
    keep_freed_memory,
    pays_to_compile,
)
from .distributed import Ranks, whole
from .metrics import Metrics
from .model import Llama
from .optimizers import LEARNING_RATES, make_optimizers
from .page import run_page
from .pairs import PairWindows
from .peak import measure_peak
from .progress import Progress, stop_on_signals
from .saving import Saver, point_to_best, take_snapshot
from .validate import beginnings, tell, validate

EVERY_LOG = 10
# Drawing a page takes a second: while training goes on, there is none for so many.
PAGE_S = 60.0


class Trainer:
    """A run of ``recipe`` on the token folder ``data``; everything is written below ``out``.

    A run that ``out`` already holds goes on where it stopped, bitwise as if it never had.
    ``state`` says how far it is, ``model`` holds the weights; ``source`` is where the recipe is
    from, for the record. In processes that torchrun started
    each is one of the ``ranks`` of one training, and all methods are called by all of them.

    Raises ConfigError (recipe and data contradict each other, or ``out`` holds another run),
    FormatError (damaged files), OSError (cannot read or write).
    """

    def __init__(
        self,
        recipe: Recipe,
        data: str | os.PathLike[str],
        out: str | os.PathLike[str],
        source: str = "",
    ) -> None:
        self.run, self.source = Path(out), source
        folder = TokenFolder(data)
        if folder.vocab_size != recipe.model.vocab_size:
            raise ConfigError(
                f"{folder.path}: the tokenizer has {folder.vocab_size} tokens,"
                f" the recipe's model.vocab_size is {recipe.model.vocab_size}:"
                f" --set model.vocab_size={folder.vocab_size} fits the model to it, or prepare the"
                f" data with a tokenizer of {recipe.model.vocab_size:,}"
            )
        train = folder.split("train")
        kind = PairWindows if train.prompt.any() else Windows
        self.windows = kind(train, recipe.seq_len, recipe.seed, recipe.weights)
        self.recipe = recipe = recipe.for_windows(self.windows.windows_per_epoch)
        valid = folder.split("valid") if "valid" in folder.splits else None
        self.valid = valid if valid is not None and len(valid) else None
        self.vocabulary = load_sentencepiece(folder.tokenizer)
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder.tokenizer))
        held_out = beginnings(self.valid, self.tokenizer) if self.valid else []
        self.prompts = recipe.prompts or held_out or list(PROMPTS)
        previous = previous_run(self.run, recipe, folder.sha256)

        if recipe.n_threads:
            torch.set_num_threads(recipe.n_threads)
        keep_freed_memory()
        self.ranks = Ranks(choose_device(recipe.device))
        device = self.ranks.device
        self.share = self.ranks.share(recipe.batch_size * recipe.grad_accum)
        be_deterministic()
        torch.manual_seed(recipe.seed)
        self.model = Llama(
            recipe.model,
            recipe.dropout,
            recipe.activation_checkpointing,
            folder.bos_id if recipe.document_mask else None,
        )
        self.state = TrainerState(
            0, recipe.to_dict(), folder.sha256, torch.get_num_threads(), data=folder.counts
        )
        if previous is not None:
            check_files(previous)
            self.state = load_state(previous)
            load_weights(previous, self.model)
            if self.state.n_threads != torch.get_num_threads():
                self._say(f"threads: {self.state.n_threads} before, now {torch.get_num_threads()}:"
                          " sums may round differently than in one go")  # fmt: skip
        elif recipe.init_from:
            start_from(recipe.init_from, self.model, self.vocabulary)
        if self.ranks.is_first_here and self.state.step < recipe.steps:
            self._say("checking the data")
            folder.check_files()
        self.network = self.ranks.spread(self.model.to(device), recipe.parallel)
        self.optimizers = make_optimizers(self.model, recipe)
        if previous is not None and self.state.step:  # before the first step they hold nothing
            load_optimizers(previous, self.model, self.optimizers)
        self.autocast = choose_autocast(recipe.dtype, device)
        self.compiled = pays_to_compile(recipe, device)
        self.loss = torch.compile(self._loss) if self.compiled else self._loss
        self._meter = None
        if recipe.energy and self.ranks.is_first_here:
            from .energy import EnergyMeter

            self._meter = EnergyMeter(recipe.energy)
        self.metrics = Metrics(
            self.run, self.state.step, self.ranks.is_first, tensorboard=recipe.tensorboard
        )
        self._used_before = [self.metrics.last(used, undone=True) for used in ("kwh", "kg_co2eq")]
        self._unmetered = self.state.step - self.metrics.last("metered_steps")
        self._has_told_of_metrics = False
        self.rates: dict[str, float] = {}
        self._saver = Saver(self.run, recipe.keep_checkpoints, self.ranks.writers)
        self._saved_step = self.state.step if previous is not None else -1
        if previous is not None and self.ranks.is_first:
            point_to_best(self.run)  # a save may have been killed before it came to that

    def train(self) -> Path:
        """Train to the recipe's last step, or until SIGINT or SIGTERM: the last checkpoint.

        A signal ends the run after the current step, with a checkpoint. Checkpoints are written
        beside the training; one that cannot be written is told of, and the run goes on. Raises
        NonFiniteError, naming the step, when the loss or a gradient is no number (nothing is saved
        then), and OSError when the last checkpoint cannot be written; earlier ones stay.
        """
        recipe = self.recipe
        if self._saved_step == recipe.steps:
            self._say(f"already finished: all {recipe.steps:,} steps are made")
            self._write_page()
            return find_checkpoint(self.run)
        peak = self.ranks.sum(measure_peak(self.ranks.device, self.autocast))[0]
        self._describe(peak)
        self.model.train()
        with self._saver, self._meter or nullcontext():
            self._compile()
            self._log_beginning(peak)
            self._take_steps(peak)
        if self._saved_step != self.state.step or not self._finish_saving():
            self.save()
        if self.state.step < recipe.steps:
            self._log(stopped="by a signal")
            self._say(f"stopped after step {self.state.step}; the same command goes on from there")
        self._write_page()
        return find_checkpoint(self.run)

    def _take_steps(self, peak: float) -> None:
        recipe = self.recipe
        started = time.monotonic() - self.state.seconds
        self._page_at = time.monotonic()
        progress = Progress(recipe, self.state.step, peak, shown=self.ranks.is_first)
        with progress.bar, stop_on_signals() as stop:
            if recipe.init_from and recipe.every_eval and not self.state.step:
                self._say(self.evaluate())
                # What it began with is on record; the best is what this training makes.
                self.state = dataclasses.replace(
                    self.state, bits_per_byte=None, best_bits_per_byte=None
                )
            while self.state.step < recipe.steps and not any(self.ranks.sum(stop.is_set())):
                began = time.perf_counter()
                nats = self.step()
                progress.add(time.perf_counter() - began, nats, self.rates["learning_rate"])
                step, last = self.state.step, self.state.step == recipe.steps
                self.state = dataclasses.replace(self.state, seconds=time.monotonic() - started)
                if step % EVERY_LOG == 0 or last:
                    seen = {"train_nats": nats, "grad_norm": self.grad_norm}
                    self._log(**seen, **self.rates, **progress.speed())
                if _due(step, recipe.every_sample, last):
                    self.sample()
                if _due(step, recipe.every_eval, last):
                    self._finish_saving()  # what was not saved is no best to be better than
                    self._say(self.evaluate())
                    if time.monotonic() - self._page_at > PAGE_S:
                        self._write_page()
                best = recipe.every_save > 0 and self.state.is_best
                if best or _due(step, recipe.every_save, False):
                    self._finish_saving()
                    self._start_saving()

    def step(self) -> float:
        """One optimizer step: the mean loss of its targets in nats.

        Its windows, dropout and learning rate follow from the recipe and the step alone.
        """
        recipe, step = self.recipe, self.state.step
        total = self._gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.grad_clip)
        self.grad_norm = float(whole(norm))
        for what, value in (("loss", total), ("norm of the gradients", self.grad_norm)):
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the {what} is {value} at step {step + 1}: lower the learning rate"
                    f" (checkpoints in {self.run} are from before)"
                )
        for kind, optimizer in self.optimizers.items():
            rate = getattr(recipe, LEARNING_RATES[kind]) * recipe.lr_fraction(step)
            self.rates[LEARNING_RATES[kind]] = rate
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state = dataclasses.replace(self.state, step=step + 1, bits_per_byte=None)
        return total

    def _gradients(self) -> float:
        """The mean loss of the present step's targets in nats; their gradients are left behind."""
        recipe, step, share = self.recipe, self.state.step, self.share
        torch.manual_seed(self.ranks.seed(recipe.seed, step))
        first = step * recipe.batch_size * recipe.grad_accum
        batches = [
            self.windows.batch(first + begin, min(recipe.batch_size, share.stop - begin))
            for begin in share[:: recipe.batch_size]
        ]
        # Of the whole step: where prompts are masked, its parts do not hold equally many targets.
        mine = sum(int((targets != UNSCORED).sum()) for _, targets in batches)
        n_targets = max(1.0, self.ranks.sum(mine)[0])
        total = 0.0
        for batch in batches:
            tokens, targets = (torch.from_numpy(x).to(self.ranks.device) for x in batch)
            with self.ranks.gradients(self.network, complete=batch is batches[-1]):
                # Gradients become means over the ranks.
                loss = self.loss(tokens, targets) * (self.ranks.count / n_targets)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return self.ranks.sum(total)[0] / self.ranks.count

    def _compile(self) -> None:
        """Compile before the first step: its losses and gradients are computed, and thrown away."""
        if not self.compiled:
            return
        self._say("compiling, a minute or two (--set compile=no does without)")
        try:
            self._gradients()
        except Exception as error:  # torch documents no narrower class for "cannot compile"
            if self.recipe.compile == "yes":
                raise
            line = (str(error).strip() or repr(error)).splitlines()[0]
            self._say(f"torch.compile does not work here, going on without: {line}")
            self.loss, self.compiled = self._loss, False
        self.model.zero_grad(set_to_none=True)

    def evaluate(self) -> str:
        """Score the validation split, record it, and say it in a line."""
        if self.valid is None:
            return f"step {self.state.step}: no documents to validate on"
        room = self.recipe.batch_size * self.recipe.seq_len
        score = validate(self.model, self.valid, self._forward, self.ranks, room)
        best = min(score.bits_per_byte, self.state.best_bits_per_byte or math.inf)
        self.state = dataclasses.replace(
            self.state, bits_per_byte=score.bits_per_byte, best_bits_per_byte=best
        )
        self._log(
            valid_nats=score.nats_per_token,
            standard_error=score.standard_error,
            bits_per_byte=score.bits_per_byte,
        )
        self._log_energy()
        return (
            f"step {self.state.step}: validation {score.nats_per_token:.4f} nats per token,"
            f" {score.bits_per_byte:.4f} bits per byte"
        )

    def sample(self) -> None:
        """Continue the prompts, each with random numbers of its own, and keep that."""
        for i, prompt in enumerate(self.prompts):
            text = tell(self.model, self.tokenizer, prompt, seed=i)
            self._log(prompt=prompt, sample=text)
            if i == 0:
                self._say(f"step {self.state.step}: {text}")

    def save(self) -> Path:
        """Write a checkpoint of the present step. Raises OSError when that cannot be done."""
        self._finish_saving()
        self._start_saving()
        self._saver.wait()
        self.ranks.sum(0)  # the others wait for the first
        return find_checkpoint(self.run)

    def _start_saving(self) -> None:
        self._log_energy()
        snapshot = take_snapshot(
            self.state, self.model, self.optimizers, self.vocabulary, self.ranks.is_first
        )
        if self.ranks.is_first or self.ranks.writers.count > 1:
            self._saver.start(snapshot)
        self._saved_step = self.state.step

    def _finish_saving(self) -> bool:
        """Wait for the checkpoint that is being written: whether it is whole on all ranks."""
        failed = False
        try:
            self._saver.wait()
        except OSError as error:
            failed = True
            self._say(f"step {self._saved_step} could not be saved, others stay: {error}")
        if not any(self.ranks.sum(failed)):
            return True
        best = best_checkpoint(self.run) if self.ranks.is_first else None
        known, score = self.ranks.sum(best is not None, best[0] if best else 0.0)
        self.state = dataclasses.replace(self.state, best_bits_per_byte=score if known else None)
        return False

    def _forward(self, tokens: Tensor) -> Tensor:
        with self.autocast():
            # Only a training pass goes through what gathers the gradients of DDP.
            network = self.network if self.model.training else self.model
            logits: Tensor = network(tokens)
        return logits

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self._forward(tokens).float()
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="sum"
        )

    def _log(self, **values: object) -> None:
        state = self.state
        tokens = state.step * self.recipe.tokens_per_step
        seconds = round(state.seconds, 3)
        error = self.metrics.log(state.step, tokens=tokens, seconds=seconds, **values)
        if error and not self._has_told_of_metrics:
            self._say(f"step {state.step} could not be recorded, which is tried again: {error}")
        self._has_told_of_metrics = error is not None

    def _log_energy(self) -> None:
        if self.recipe.energy:
            used = self.ranks.sum(*(self._meter.read() if self._meter else (0.0, 0.0)))
            kwh, kg_co2eq = (a + b for a, b in zip(self._used_before, used, strict=True))
            source = self._meter.source if self._meter else ""
            metered = int(self.state.step - self._unmetered)
            self._log(kwh=kwh, kg_co2eq=kg_co2eq, estimated_by=source, metered_steps=metered)

    def _describe(self, peak: float) -> None:
        """Say what is trained on what."""
        recipe, windows = self.recipe, self.windows
        n_windows = recipe.steps * recipe.grad_accum * recipe.batch_size
        self._say(
            f"{recipe.model.n_parameters / 1e6:.2f}M parameters on {self._where},"
            f" {peak / 1e12:.3g} TFLOP/s at most;"
            f" {windows.n_documents:,} documents, {windows.n_tokens:,} tokens;"
            f" {recipe.steps:,} steps of {recipe.tokens_per_step:,} tokens,"
            f" {n_windows / windows.windows_per_epoch:.1f} epochs; from step {self.state.step}"
        )
        context = recipe.model.max_seq_len
        if recipe.seq_len < context and not recipe.init_from:
            self._say(
                f"windows of {recipe.seq_len} tokens leave the rest of the context of {context}"
                " untrained"
            )

    def _log_beginning(self, peak: float) -> None:
        self._log(
            recipe=self.recipe.to_dict(),
            source=self.source,
            version=__version__,
            began=time.strftime("%Y-%m-%d %H:%M"),
            n_parameters=self.recipe.model.n_parameters,
            n_documents=self.windows.n_documents,
            n_tokens=self.windows.n_tokens,
            tokens_per_epoch=self.windows.windows_per_epoch * self.recipe.seq_len,
            sources=self.state.data.get("train", {}).get("sources", []),
            valid_bytes=self.valid.n_bytes if self.valid else 0,
            device=self._where,
            dtype="f32" if self.autocast is nullcontext else "bf16",
            compiled=self.compiled,
            peak_flop_per_s=peak,
        )

    @property
    def _where(self) -> str:
        device, count = self.ranks.device, self.ranks.count
        return f"{count} × {device.type} ({self.recipe.parallel})" if count > 1 else str(device)

    def _write_page(self) -> None:
        if self.ranks.is_first:
            try:
                run_page(self.run).write(self.run / "report.html")
            except (OSError, MissingExtraError) as error:
                self._say(f"no report: {error}")
        self._page_at = time.monotonic()

    def _say(self, line: str) -> None:
        if self.ranks.is_first:
            tqdm.write(line, file=sys.stderr)


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)
