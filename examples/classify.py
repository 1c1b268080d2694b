"""Fine-tune a model to classify text, beside two baselines: the majority, and TF-IDF with logistic
regression.

    tinyllama export run --to hf my-model
    python examples/classify.py my-model --train train.xml --test test.xml \\
        --text t h --label entailment
    python examples/classify.py my-model --train ag_news.csv --text 2 3 --label 1

Data is CSV (columns by their names in the first line; by numbers from 1 where there is none) or XML
whose <pair> elements hold texts as children and the label as an attribute, as ASSIN's. Without
--test, a fifth of each class is held out: always the same. Needs the extra finetune.
"""

import argparse
import csv
import json
import statistics
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from tinyllama.train.device import choose_autocast, choose_device

Example = tuple[tuple[str, ...], str]  # the texts and the label
PAD = 0  # the unknown token, which texts do not end with: models of this project have no other


def read(path: str, columns: list[str], label: str) -> list[Example]:
    """The examples of a file. Raises SystemExit, naming the example, where a column is missing."""
    if not Path(path).is_file():
        raise SystemExit(f"{path}: there is no such file")
    if Path(path).suffix == ".xml":
        pairs = ET.parse(path).getroot().iter("pair")
        records = [
            {**pair.attrib, **{part.tag: part.text or "" for part in pair}} for pair in pairs
        ]
    else:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
        if not rows:
            raise SystemExit(f"{path}: there are no examples")
        numbered = all(name.isdecimal() for name in (*columns, label))
        names = [str(i + 1) for i in range(len(rows[0]))] if numbered else rows.pop(0)
        for number, row in enumerate(rows, 1):
            if len(row) != len(names):
                raise SystemExit(
                    f"{path}: example {number} has {len(row)} columns, not {len(names)}"
                )
        records = [dict(zip(names, row, strict=True)) for row in rows]
    if not records:
        raise SystemExit(f"{path}: there are no examples")
    for number, record in enumerate(records, 1):
        for name in (*columns, label):
            if name not in record:
                raise SystemExit(f"{path}: example {number} has no column {name!r}")
    return [(tuple(r[name].strip() for name in columns), r[label]) for r in records]


def baselines(train: list[Example], test: list[Example]) -> dict[str, list[str]]:
    """What the two baselines say of each test example."""
    texts, labels = ["\n".join(t) for t, _ in train], [label for _, label in train]
    # Words that only one example has are left out, where there are enough to choose from.
    least = 2 if len(train) > 100 else 1
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=least, sublinear_tf=True)
    models = {
        "majority class": DummyClassifier(strategy="most_frequent"),
        "TF-IDF, logistic regression": make_pipeline(words, LogisticRegression(max_iter=1000)),
    }
    asked = ["\n".join(t) for t, _ in test]
    return {name: list(model.fit(texts, labels).predict(asked)) for name, model in models.items()}


def encode(tokenizer, examples: list[Example], context: int) -> list[list[int]]:
    """BOS text EOS, for each text one more EOS; the classifier reads the state of the last token.

    What does not fit loses the end of its last text.
    """
    end = tokenizer.eos_token_id
    encoded = []
    for texts, _ in examples:
        tokens = [tokenizer.bos_token_id]
        for text in texts:
            tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
        encoded.append([*tokens[: min(context, len(tokens)) - 1], end])
    return encoded


def pad(rows: list[list[int]], device: torch.device) -> torch.Tensor:
    ids = torch.full((len(rows), max(map(len, rows))), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(device)


def shuffled(rows: list[list[int]], size: int, random: np.random.Generator) -> np.ndarray:
    """The examples of an epoch in batches of about equal lengths, so that little is padded."""
    order = random.permutation(len(rows))[: len(rows) // size * size]
    lengths = np.array([len(row) for row in rows])
    for first in range(0, len(order), 16 * size):
        some = order[first : first + 16 * size]
        some[:] = some[np.argsort(lengths[some], kind="stable")]
    return random.permutation(order.reshape(-1, size))


def fine_tune(args, rows: list[list[int]], labels: list[int], n_labels: int, seed: int):
    """The model of ``args``, all of it trained on these examples."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    device = choose_device("auto")
    autocast = choose_autocast("auto", device)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=n_labels, pad_token_id=PAD, dtype=torch.float32
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    size = min(args.batch_size, len(rows))
    per_epoch = len(rows) // size
    steps = args.epochs * per_epoch
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for step in tqdm(range(steps), f"seed {seed}", mininterval=0.5 if sys.stderr.isatty() else 30):
        if step % per_epoch == 0:
            batches = shuffled(rows, size, random)
        chosen = batches[step % per_epoch]
        targets = torch.tensor([labels[i] for i in chosen], device=device)
        with autocast():
            logits = model(pad([rows[i] for i in chosen], device)).logits
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def predict(model, rows: list[list[int]], batch_size: int) -> list[int]:
    found = [0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with torch.no_grad():
        for first in range(0, len(rows), batch_size):
            chosen = by_length[first : first + batch_size]
            logits = model(pad([rows[i] for i in chosen], model.device)).logits
            for i, label in zip(chosen, logits.argmax(1).tolist(), strict=True):
                found[i] = label
    return found


def score(found: list[str], expected: list[str]) -> dict[str, float]:
    f1 = f1_score(expected, found, average="macro")
    return {"accuracy": accuracy_score(expected, found), "macro_f1": float(f1)}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Means, with the deviation between seeds where there are several, as Markdown."""
    lines = ["| | accuracy | macro-F1 |", "|---|---|---|"]
    for name, runs in results.items():
        cells = []
        for figure in ("accuracy", "macro_f1"):
            values = [100 * run[figure] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hugging Face folder, as `tinyllama export --to hf` writes")
    parser.add_argument("--train", required=True, metavar="FILE")
    parser.add_argument("--test", metavar="FILE", help="default: a fifth of the training file")
    parser.add_argument("--text", nargs="+", required=True, metavar="COLUMN")
    parser.add_argument("--label", required=True, metavar="COLUMN")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=3, help="how many runs; default: 3")
    parser.add_argument("--out", metavar="FILE", help="write all figures as JSON")
    args = parser.parse_args()

    if not (Path(args.model) / "config.json").is_file():
        raise SystemExit(
            f"{args.model}: no Hugging Face folder; `tinyllama export … --to hf DIR` makes one"
        )
    train = read(args.train, args.text, args.label)
    by = [label for _, label in train]
    rarest, n_rarest = Counter(by).most_common()[-1]
    if n_rarest == len(by):
        raise SystemExit(f"{args.train}: all {n_rarest} examples have the label {rarest!r}")
    if args.test:
        test = read(args.test, args.text, args.label)
    elif n_rarest < 5:
        raise SystemExit(
            f"{args.train}: label {rarest!r} has {n_rarest} examples, too few to hold a fifth out;"
            " --test names a file of others"
        )
    else:
        train, test = train_test_split(train, test_size=0.2, random_state=0, stratify=by)
    names = sorted({label for _, label in train})
    expected = [label for _, label in test]
    print(f"{len(train):,} examples to learn, {len(test):,} to be judged by; {', '.join(names)}")
    results = {name: [score(said, expected)] for name, said in baselines(train, test).items()}

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    context = json.loads((Path(args.model) / "config.json").read_text())["max_position_embeddings"]
    rows, asked = (encode(tokenizer, examples, context) for examples in (train, test))
    labels = [names.index(label) for _, label in train]
    started = time.monotonic()
    results[args.model] = []
    for seed in range(args.seeds):
        model = fine_tune(args, rows, labels, len(names), seed)
        said = [names[i] for i in predict(model, asked, args.batch_size)]
        results[args.model].append(score(said, expected))
        print(f"seed {seed}: {results[args.model][-1]}", file=sys.stderr)
    print(table(results))
    if args.out:
        seconds = round(time.monotonic() - started)
        figures = {"arguments": vars(args), "results": results, "seconds": seconds}
        Path(args.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
