"""Write the two texts of the demo from the running Python's own library.

language-reference.txt   every topic of pydoc_data.topics, sorted by name: the new domain the demo tunes on.
stdlib-held-out.txt      source files that train_stdlib_lm.py held out of training: the base model's own domain.

The committed texts come from CPython 3.11.7; another version gives other texts and another held-out choice.
Usage: python3.11 make_texts.py
"""

import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path(__file__).parent
LARGEST = 64 * 1024  # bytes; leaves out three test files that would be half of the sample


def language_reference() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def held_out_sources() -> str:
    """The held-out files up to `LARGEST`, in path order, with the tokenizer's end-of-text token between them."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in root.rglob("*.py")
        if "site-packages" not in path.parts
        and "pydoc_data" not in path.parts
        and "lib2to3/tests" not in str(path)
        and path.stat().st_size < 400_000
    )
    order = list(range(len(files)))
    random.Random(0).shuffle(order)  # the order train_stdlib_lm.py gets from random.seed(0)
    held_out = [files[i] for i in sorted(order[: len(order) // 50])]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in held_out if path.stat().st_size <= LARGEST]
    return "<|endoftext|>".join(texts)


if __name__ == "__main__":
    for name, text in (("language-reference.txt", language_reference()), ("stdlib-held-out.txt", held_out_sources())):
        (HERE / name).write_bytes(text.encode())
        print(f"{name}: {len(text.encode())} bytes")
