"""Watch a model choose: for every token, the candidates it weighed and the one that was drawn.

python examples/see_it_think.py "Once upon a time"
"""

import math
import sys

import tinyllama


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
    model = tinyllama.load()
    completion = model.complete(prompt, max_new_tokens=30, logprobs=4, seed=1)
    assert completion.logprobs is not None
    print(prompt)
    for token, chosen in zip(completion.tokens, completion.logprobs, strict=True):
        weighed = "  ".join(
            f"{model.tokenizer.decode([candidate])!r} {100 * math.exp(logprob):.0f}%"
            for candidate, logprob in chosen.top
        )
        print(f"{model.tokenizer.decode([token])!r:>14}  of  {weighed}")


if __name__ == "__main__":
    main()
