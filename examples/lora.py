"""Fine-tune a model by LoRA (Hu et al., arXiv 2106.09685) with peft, and hand it back to tinyllama.

    tinyllama export run --to hf my-model        # or the .gguf that ships
    python examples/lora.py my-model pairs.jsonl --out my-adapter
    tinyllama export my-adapter --out tuned.gguf

Data is what `tinyllama data prepare` reads. Of pairs of prompt and completion only the completions
are learned. Needs the extra finetune.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tqdm import trange
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from tinyllama.data.documents import Documents
from tinyllama.data.encoding import Encoder, choose_encoding

UNSCORED = -100  # transformers' mark of a label that is none


def read(model: str, data: list[str], instruct: bool, context: int) -> list[tuple[list[int], int]]:
    """Each document's tokens, cut at the context, and how many of them are its prompt."""
    encoder = Encoder(choose_encoding(model, 0.0, 0))
    encoded = [encoder.encode(pair) for _, pair in Documents(data, instruct=instruct).pairs()]
    return [(tokens[:context], n_prompt) for tokens, n_prompt in encoded if n_prompt < context]


def batch(documents: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
    """Padded at the end, where nothing looks at it."""
    width = max(len(tokens) for tokens, _ in documents)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    labels = torch.full_like(ids, UNSCORED)
    for row, (tokens, n_prompt) in enumerate(documents):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, n_prompt : len(tokens)] = ids[row, n_prompt : len(tokens)]
    return {"input_ids": ids, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hugging Face folder, as `tinyllama export --to hf` writes")
    parser.add_argument("data", nargs="+", help="text or pairs")
    parser.add_argument(
        "--instruct", action="store_true", help="texts in TinyStories-Instruct's layout"
    )
    parser.add_argument("--out", required=True, help="the folder for the adapter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()

    if not (Path(args.model) / "config.json").is_file():
        raise SystemExit(
            f"{args.model}: no Hugging Face folder; `tinyllama export … --to hf DIR` makes one"
        )
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    # The whole path: the adapter remembers it, and export finds its base again.
    model = AutoModelForCausalLM.from_pretrained(Path(args.model).resolve(), dtype=torch.float32)
    documents = read(args.model, args.data, args.instruct, model.config.max_position_embeddings)
    if not documents:
        raise SystemExit("no document has anything to learn within the model's context")
    settings = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=args.rank, lora_alpha=2 * args.rank
    )
    model = get_peft_model(model, settings)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    per_epoch = -(-len(documents) // args.batch_size)
    steps = args.epochs * per_epoch
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    bar = trange(steps)
    for step in bar:
        if step % per_epoch == 0:
            order = random.permutation(len(documents))
        first = step % per_epoch * args.batch_size
        chosen = [documents[i] for i in order[first : first + args.batch_size]]
        loss = model(**batch(chosen)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(args.out)
    print(f"wrote {args.out}; tinyllama export {args.out} --out tuned.gguf")


if __name__ == "__main__":
    main()
