"""Training: one loop from token shards to checkpoints, stopped and resumed at any step."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from ..errors import ConfigError, FormatError, MissingExtraError, NonFiniteError
from .batches import UNSCORED, TokenFolder, Windows
from .checkpoint import (
    Saver,
    TrainerState,
    check_files,
    find_checkpoint,
    load_optimizers,
    load_state,
    load_weights,
    start_from,
    take_snapshot,
)
from .recipe import FREE_SETTINGS, Recipe, recipe_from_dict

try:
    import sentencepiece
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch.optim import AdamW, Muon, Optimizer
    from tqdm import tqdm
except ImportError as error:
    raise MissingExtraError(error.name or "torch", "train") from error

from ..formats.sentencepiece import load_sentencepiece
from .device import (
    be_deterministic,
    choose_autocast,
    choose_device,
    keep_freed_memory,
    maybe_compiled,
)
from .distributed import Ranks, whole
from .metrics import Metrics
from .model import Llama
from .page import run_page
from .pairs import PairWindows
from .peak import measure_peak
from .progress import Progress, stop_on_signals
from .validate import tell, validate

EVERY_LOG = 10
# Drawing a page takes a second: while training goes on, there is none for so many.
PAGE_S = 60.0
# The recipe's field with the highest learning rate of an optimizer.
LEARNING_RATES = {"adamw": "learning_rate", "muon": "muon_learning_rate"}


class Trainer:
    """A run of ``recipe`` on the token folder ``data``; everything is written below ``out``.

    A run that ``out`` already holds goes on where it stopped, bitwise as if it never had.
    ``state`` says how far it is, ``model`` holds the weights. In processes that torchrun started
    each is one of the ``ranks`` of one training, and all methods are called by all of them.

    Raises ConfigError (recipe and data contradict each other, or ``out`` holds another run),
    FormatError (damaged files), OSError (cannot read or write).
    """

    def __init__(
        self, recipe: Recipe, data: str | os.PathLike[str], out: str | os.PathLike[str]
    ) -> None:
        self.run = Path(out)
        folder = TokenFolder(data)
        if folder.vocab_size != recipe.model.vocab_size:
            raise ConfigError(
                f"{folder.path}: the tokenizer has {folder.vocab_size} tokens,"
                f" the recipe's model.vocab_size is {recipe.model.vocab_size}"
            )
        train = folder.split("train")
        kind = PairWindows if train.prompt.any() else Windows
        self.windows = kind(train, recipe.seq_len, recipe.seed, recipe.weights)
        self.recipe = recipe = recipe.for_windows(self.windows.windows_per_epoch)
        valid = folder.split("valid") if "valid" in folder.splits else None
        self.valid = valid if valid is not None and len(valid) else None
        self.vocabulary = load_sentencepiece(folder.tokenizer)
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder.tokenizer))
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
        self.network = self.ranks.spread(self.model.to(device), recipe.parallel)
        self.optimizers = make_optimizers(self.model, recipe)
        if previous is not None and self.state.step:  # before the first step they hold nothing
            load_optimizers(previous, self.model, self.optimizers)
        self.autocast = choose_autocast(recipe.dtype, device)
        self.loss = maybe_compiled(recipe.compile, device, self._loss)
        self._meter = None
        if recipe.energy and self.ranks.is_first_here:
            from .energy import EnergyMeter

            self._meter = EnergyMeter(recipe.energy)
        self.metrics = Metrics(
            self.run, self.state.step, self.ranks.is_first, tensorboard=recipe.tensorboard
        )
        self._used_before = self.metrics.last("kwh"), self.metrics.last("kg_co2eq")
        self.rates: dict[str, float] = {}
        self._saver = Saver(self.run, recipe.keep_checkpoints)
        self._saved_step = self.state.step if previous is not None else -1

    def train(self) -> Path:
        """Train to the recipe's last step, or until SIGINT or SIGTERM: the last checkpoint.

        A signal ends the run after the current step, with a checkpoint. Checkpoints are written
        beside the training; one that cannot be written is told of, and the run goes on. Raises
        NonFiniteError, naming the step, when the loss or a gradient is no number (nothing is saved
        then), and OSError when the last checkpoint cannot be written; earlier ones stay.
        """
        recipe = self.recipe
        peak = self.ranks.sum(measure_peak(self.ranks.device, self.autocast))[0]
        self._describe(peak)
        started = time.monotonic() - self.state.seconds
        self._page_at = time.monotonic()
        self.model.train()
        progress = Progress(recipe, self.state.step, peak, shown=self.ranks.is_first)
        meter = self._meter or nullcontext()
        with progress.bar, stop_on_signals() as stop, self._saver, meter:
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
                    self._say(self.evaluate())
                    if time.monotonic() - self._page_at > PAGE_S:
                        self._write_page()
                best = recipe.every_save > 0 and self.state.is_best
                if best or _due(step, recipe.every_save, False):
                    self._finish_saving()
                    self._start_saving()
        if self._saved_step != self.state.step or not self._finish_saving():
            self.save()
        self._write_page()
        if self.state.step < recipe.steps:
            self._say(f"stopped after step {self.state.step}; the same command goes on from there")
        return find_checkpoint(self.run)

    def step(self) -> float:
        """One optimizer step: the mean loss of its targets in nats.

        Its windows, dropout and learning rate follow from the recipe and the step alone.
        """
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
        total = self.ranks.sum(total)[0] / self.ranks.count
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

    def evaluate(self) -> str:
        """Score the validation split, record it, and say it in a line."""
        if self.valid is None:
            return f"step {self.state.step}: no documents to validate on"
        score = validate(self.model, self.valid, self._forward, self.ranks)
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
        """Continue the recipe's prompts, each with random numbers of its own, and keep that."""
        for i, prompt in enumerate(self.recipe.prompts):
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
        if snapshot is not None:
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
        return not any(self.ranks.sum(failed))

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
        self.metrics.log(state.step, tokens=tokens, seconds=round(state.seconds, 3), **values)

    def _log_energy(self) -> None:
        if self.recipe.energy:
            used = self.ranks.sum(*(self._meter.read() if self._meter else (0.0, 0.0)))
            kwh, kg_co2eq = (a + b for a, b in zip(self._used_before, used, strict=True))
            source = self._meter.source if self._meter else ""
            self._log(kwh=kwh, kg_co2eq=kg_co2eq, estimated_by=source)

    def _describe(self, peak: float) -> None:
        """Say what is trained on what, and begin the metrics with it."""
        recipe, windows = self.recipe, self.windows
        n_windows = recipe.steps * recipe.grad_accum * recipe.batch_size
        where = str(self.ranks.device)
        if self.ranks.count > 1:
            where = f"{self.ranks.count} × {self.ranks.device.type} ({recipe.parallel})"
        self._say(
            f"{recipe.model.n_parameters / 1e6:.2f}M parameters on {where},"
            f" {peak / 1e12:.3g} TFLOP/s at most;"
            f" {windows.n_documents:,} documents, {windows.n_tokens:,} tokens;"
            f" {recipe.steps:,} steps of {recipe.tokens_per_step:,} tokens,"
            f" {n_windows / windows.windows_per_epoch:.1f} epochs; from step {self.state.step}"
        )
        self._log(
            recipe=recipe.to_dict(),
            n_parameters=recipe.model.n_parameters,
            n_documents=windows.n_documents,
            n_tokens=windows.n_tokens,
            valid_bytes=self.valid.n_bytes if self.valid else 0,
            device=where,
            peak_flop_per_s=peak,
        )

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


def previous_run(run: Path, recipe: Recipe, data_sha256: str) -> Path | None:
    """The checkpoint to go on from, if ``run`` holds one.

    Raises ConfigError when it is one of another recipe or of other data.
    """
    try:
        folder = find_checkpoint(run)
    except FileNotFoundError:
        return None
    state = load_state(folder)
    if state.data_sha256 != data_sha256:
        raise ConfigError(f"{run} was trained on other data (the manifest differs)")
    try:
        before = recipe_from_dict(state.recipe, str(folder / "trainer.json")).to_dict()
    except ConfigError as error:
        raise FormatError(str(error)) from None
    now = recipe.to_dict()
    for key in now:
        if key not in FREE_SETTINGS and before[key] != now[key]:
            raise ConfigError(
                f"{run} holds a run of another recipe: {key} was {before[key]!r},"
                f" now {now[key]!r}; choose another folder"
            )
    return folder


def make_optimizers(model: Llama, recipe: Recipe) -> dict[str, Optimizer]:
    """The optimizers by kind; weight decay falls on matrices, never on norms.

    Muon (Jordan, 2024; steps scaled to AdamW's size as in arXiv 2502.16982) takes the matrices of
    the layers; embedding, output head and norms are AdamW's. A learning rate is set at each step.
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("layers.")]
    tables = [
        p for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("layers.")
    ]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizers: dict[str, Optimizer] = {}
    if recipe.optimizer == "muon":
        optimizers["muon"] = Muon(
            matrices, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        matrices = []
    optimizers["adamw"] = AdamW(
        [
            {"params": matrices + tables, "weight_decay": recipe.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=(recipe.beta1, recipe.beta2),
        fused=model.tok_embed.device.type in ("cpu", "cuda"),
    )
    return optimizers


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)
