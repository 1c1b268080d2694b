"""How often generated text has a broken character, in stream and in whole.

Continues the first characters of lines of a text, many times each, and counts what must not be:
U+FFFD (half a character), the tokenizer's own U+2581, and streams that differ from the whole. The
count of tokens that are part of a character says whether the text put it to the test.
"""

import argparse

import tinyllama


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", required=True, help="a .gguf file")
    parser.add_argument("--text", required=True, help="a UTF-8 text whose lines begin the texts")
    parser.add_argument("--lines", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max-new-tokens", type=int, default=60)
    args = parser.parse_args()

    model = tinyllama.load(args.model)
    with open(args.text, encoding="utf-8") as file:
        lines = (line.strip() for line in file)
        beginnings = [line[:4] for line in lines if line][: args.lines]
    options = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    counts = dict.fromkeys(
        ("texts", "characters", "parts of characters", "U+FFFD", "U+2581", "stream differs"), 0
    )
    for beginning in beginnings:
        for seed in range(args.seeds):
            whole = model.complete(beginning, seed=seed, logprobs=0, **options)
            stream = "".join(model.stream(beginning, seed=seed, **options))
            counts["texts"] += 1
            counts["characters"] += len(whole.text)
            counts["parts of characters"] += sum("\ufffd" in t.piece for t in whole.logprobs)
            counts["U+FFFD"] += whole.text.count("\ufffd")
            counts["U+2581"] += whole.text.count("\u2581")
            counts["stream differs"] += whole.text != stream
    for name, count in counts.items():
        print(f"{name}: {count:,}")


if __name__ == "__main__":
    main()
