"""Profile the prefill of documents on this CPU with torch's profiler and random weights of a published shape.

python benchmarks/prefill_profile.py [--shape qwen2.5-0.5b] [--documents 4] [--document-tokens 256]
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from kvfusion_rag.benchmark.shapes import SHAPES, WORDS, random_backbone
from kvfusion_rag.fusion.prefill import TOKENS_PER_PASS, prefill

KINDS = {"aten::mm": "products of layers", "aten::addmm": "products of layers",
         "aten::_scaled_dot_product_flash_attention_for_cpu": "attention"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--document-tokens", type=int, default=256)
    args = parser.parse_args()
    backbone = random_backbone(args.shape, "float32", "cpu", seed=0)
    documents = [tuple(ids) for ids in torch.randint(WORDS, (args.documents, args.document_tokens)).tolist()]

    def run() -> None:
        for _ in prefill(backbone, documents, None, tokens_per_pass=TOKENS_PER_PASS["cpu"]):
            pass

    run()  # warm-up
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        spent[KINDS.get(event.key, "everything else")] += event.self_cpu_time_total
    for kind, microseconds in spent.most_common():
        print(f"{kind:20} {microseconds / 1e6:7.3f} s {100 * microseconds / spent.total():5.1f} %")


if __name__ == "__main__":
    main()
