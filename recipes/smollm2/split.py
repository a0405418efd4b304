"""Split questions into three files by blocks of contexts, so that adjacent contexts stay together.

    python recipes/smollm2/split.py train.jsonl.gz part

writes part1.jsonl.gz, part2.jsonl.gz and part5.jsonl.gz: about 30, 25 and 45 % of the blocks, for groups of 1, 2 and 5
passages.
"""

from __future__ import annotations

import gzip
import json
import random
import sys

BLOCK = 60  # contexts
SHARES = {1: 0.30, 2: 0.25, 5: 0.45}


def main(source: str, prefix: str) -> None:
    by_context: dict[str, list[str]] = {}
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        for line in lines:
            by_context.setdefault(json.loads(line)["context"], []).append(line)
    parts: dict[int, list[str]] = {passages: [] for passages in SHARES}
    contexts = list(by_context.values())
    for start in range(0, len(contexts), BLOCK):
        drawn = random.Random(start).choices(list(SHARES), list(SHARES.values()))[0]
        parts[drawn] += [line for lines in contexts[start : start + BLOCK] for line in lines]
    for passages, lines in parts.items():
        with gzip.open(f"{prefix}{passages}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
