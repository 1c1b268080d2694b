"""The native engine as a model of lm-evaluation-harness (its name there: ``tinyllama``).

``tinyllama eval MODEL --tasks …`` runs tasks on it; so does Python, as the harness takes models by
object: ``lm_eval.simple_evaluate(model=TinyLlamaLM("model.gguf"), tasks=["blimp_transitive"])``.
Tokens, windows and scores are those of the harness's own ``hf`` model on the same weights.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..errors import ArgumentError, FormatError, MissingExtraError
from ..loading import load
from ..model import Model
from ..sampling import SamplingParams

try:
    import lm_eval
    import yaml
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise MissingExtraError(error.name or "lm_eval", "eval") from error

# Texts that are generated between two movements of the progress bar.
AT_ONCE = 64
# The harness's own: the same questions are drawn, behind the same examples.
RANDOM_SEED, SEED = 0, 1234


@register_model("tinyllama")
class TinyLlamaLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """``pretrained``: a Model, or what :func:`tinyllama.load` takes, with its keywords.

    ``batch_size``, ``max_batch_size`` and ``device`` are the harness's and mean nothing here.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, **options)
        self.name = str(self.model.info()["path"])

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests knows the tokenizer by."""
        return self.name

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; where there is none, the one that begins the next."""
        tokenizer = self.model.tokenizer
        ids = [one for one in (tokenizer.eos_id, tokenizer.bos_id) if one is not None]
        if not ids:
            raise ArgumentError(f"{self.name}: the tokenizer has neither BOS nor EOS")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self.model.config.max_seq_len

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_options: object
    ) -> list[int]:
        """Tokens of a text, after BOS unless that is declined."""
        return self.model.tokenizer.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_options: object,
    ) -> list[tuple[float, bool]]:
        texts, n_given = list[list[int]](), list[int]()
        for (_, text), context_tokens, tokens in requests:
            if len(tokens) > self.max_length:
                raise ArgumentError(
                    f"{len(tokens)} tokens do not fit into the context of {self.max_length}:"
                    f" {text[:60]!r}"
                )
            texts.append((context_tokens + tokens)[-(self.max_length + 1) :])
            n_given.append(len(texts[-1]) - len(tokens))
        with tqdm(total=len(texts), disable=disable_tqdm, desc="scoring") as bar:
            results = _core.score_texts(self.model._core, texts, n_given, bar.update)
        for ((context, text), _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", (context, text), result)
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """ln of the probability of whole texts, in windows of which each sees a full context."""
        windows = []
        owners = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                context_tokens, tokens = make_disjoint_window(window)
                windows.append((("", text), context_tokens, tokens))
                owners.append(i)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (logprob, _) in zip(owners, scored, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on until a stop string, all with the same options at once."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as bar:
            for members in groups.values():
                options: dict[str, Any] = normalize_gen_kwargs(requests[members[0]].args[1])
                params = _sampling(options)
                room = self.max_length - options["max_gen_toks"]
                if room < 1:
                    raise ArgumentError(
                        f"max_gen_toks is {options['max_gen_toks']}; the context has"
                        f" {self.max_length} tokens"
                    )
                for i in range(0, len(members), AT_ONCE):
                    part = members[i : i + AT_ONCE]
                    prompts = [self.tok_encode(requests[k].args[0])[-room:] for k in part]
                    done = self.model.complete(prompts, params=params)
                    for k, completion in zip(part, done, strict=True):
                        texts[k] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[k].args, texts[k])
                    bar.update(len(part))
        return texts


def _sampling(options: dict[str, Any]) -> SamplingParams:
    known = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    chosen = {name: options[name] for name in known if options.get(name) is not None}
    if not options.get("do_sample"):
        chosen["temperature"] = 0.0
    return SamplingParams(
        max_new_tokens=options["max_gen_toks"],
        stop=[stop for stop in options.get("until") or [] if stop] or None,
        seed=0,
        **chosen,
    )


def evaluate(
    model: Model,
    tasks: Iterable[str],
    *,
    folder: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """What the harness finds for ``tasks``, whose YAML files may lie in ``folder``: its dict.

    ``results`` has the metrics by task, ``samples`` every request with its answer, and ``versions``
    the tasks' own. ``num_fewshot`` examples stand before each question (None: as the task says);
    ``limit`` takes the first so many questions. Raises ArgumentError for a task that is not known
    or that the harness cannot load, FormatError for a file in ``folder`` that is not YAML.
    """
    tasks = list(tasks)
    manager = _task_manager(tasks, folder)
    for task in tasks:
        if task not in manager.all_tasks:
            raise ArgumentError(
                f"no task is called {task!r}; `lm-eval ls tasks` lists those of the harness, and"
                " --task-folder names a folder with others"
            )
    # As lm_eval.simple_evaluate does it, which loads torch for a seed, and to tell its version.
    random.seed(RANDOM_SEED)
    np.random.seed(SEED)  # noqa: NPY002  # what tasks may draw from
    with _templates_compiled_once():
        try:
            loaded = manager.load(tasks)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the harness raises all kinds for what a YAML file may say
            raise ArgumentError(
                f"the harness cannot load {', '.join(tasks)}: {error} ({type(error).__name__});"
                " do the YAML file's fields and the columns they name fit the data?"
            ) from error
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own != 0:
                task.set_config("num_fewshot", (own or 0) if num_fewshot is None else num_fewshot)
            task.set_fewshot_seed(SEED)
        results: dict[str, Any] = lm_eval.evaluate(TinyLlamaLM(model), loaded, limit=limit)
    return results


def _task_manager(tasks: list[str], folder: str | None) -> TaskManager:
    """Of the folder alone if all tasks are there: reading the harness's own takes many seconds."""
    if folder is not None:
        alone = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(alone.all_subtasks):  # a group's members may be the harness's
            return alone
        _check_yaml(folder)
    return TaskManager(include_path=folder)


def _check_yaml(folder: str) -> None:
    """Raise FormatError for a file that is not YAML: the harness passes over it without a word."""
    for file in sorted(Path(folder).rglob("*.yaml")):
        try:
            yaml.compose(file.read_bytes(), yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise FormatError(" ".join(f"{file}: not YAML: {error}".split())) from None


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """The harness compiles each template anew for each question: longer than a tiny model reads."""
    environment = getattr(lm_eval.utils, "env", None)  # not documented: it may go
    if environment is None:
        yield
        return
    environment.from_string = lru_cache(1024)(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string  # what is left is the method
