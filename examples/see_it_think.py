"""Watch a model choose: for every token, the candidates it weighed and the one that was drawn.

python examples/see_it_think.py "Once upon a time"
"""

import math
import sys

import tinyllama


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
    try:
        model = tinyllama.load()
        completion = model.complete(prompt, max_new_tokens=30, logprobs=4, seed=1)
    except (tinyllama.TinyllamaError, OSError) as error:
        sys.exit(f"see_it_think: {error}")
    begun = model.tokenizer.encode(".")  # a token that begins a text would show without its space

    def piece(token: int) -> str:
        return model.tokenizer.decode([*begun, token]).removeprefix(".")

    print(prompt)
    for chosen in completion.logprobs or ():
        weighed = "  ".join(
            f"{piece(candidate)!r} {100 * math.exp(logprob):.0f}%"
            for candidate, logprob in chosen.top
        )
        print(f"{chosen.piece!r:>14}  of  {weighed}")


if __name__ == "__main__":
    main()
