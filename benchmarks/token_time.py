"""Compare the time per token of this package's decoding loop with transformers' ``generate``, over the same cache.

    python benchmarks/token_time.py MODEL [--slots 3000] [--tokens 64] [--repeats 7] [--json results.json]

Both continue one question over the same random KV with the same weights, in turn, in one process. The first token is
not counted, since it reads the question. ``generate`` uses its own copy of the model, as transformers loads it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvfusion_rag.benchmark.speed import TokenClock
from kvfusion_rag.evaluation.report import run_facts
from kvfusion_rag.fusion.decode import DecodingPlan, decode
from kvfusion_rag.fusion.fused_cache import FusedBuffer
from kvfusion_rag.fusion.growing_answer import GrowingAnswer
from kvfusion_rag.fusion.interface import Question
from kvfusion_rag.fusion.sampling import DecodingOptions
from kvfusion_rag.model.backbone import Backbone
from kvfusion_rag.model.kv import DocumentKV, KVShape
from kvfusion_rag.model.loading import load_backbone
from kvfusion_rag.model.location import locate_model

QUESTION_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("--slots", type=int, default=3000, help="cached tokens before the question (default: 3000)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer (default: 64)")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each after a warm-up (default: 7)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    backbone = load_backbone(locate_model(args.model), device="cpu", dtype="float32")
    backbone.end_ids = frozenset()  # so that all answers have the same length
    theirs: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    torch.manual_seed(0)
    drawn = torch.randint(backbone.config.vocab_size, (args.slots + QUESTION_TOKENS,)).tolist()
    ids, question = tuple(drawn[: args.slots]), drawn[args.slots :]
    config = backbone.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    document = KVShape(config.num_hidden_layers, config.num_key_value_heads, width, torch.float32).empty(ids)
    document.keys.normal_()
    document.values.normal_()

    ours, generate = [], []
    for number in range(-1, args.repeats):
        found, own_tokens = decoded(backbone, document, question, args.tokens)
        expected, their_tokens = generated(theirs, document, question, args.tokens)
        if own_tokens != their_tokens:
            raise SystemExit("the two systems gave different tokens.")
        if number >= 0:
            ours.append(found)
            generate.append(expected)
    ratios = [mine / other for mine, other in zip(ours, generate, strict=True)]
    figures = {name: spread(times) for name, times in (("ours", ours), ("generate", generate))}
    for name, milliseconds in figures.items():
        print("{:8} {median:6.2f} ms per token ({least:.2f} to {most:.2f})".format(name, **milliseconds))
    ratio = statistics.median(ours) / statistics.median(generate)
    print(f"ratio of medians {ratio:.3f}, of single runs {min(ratios):.3f} to {max(ratios):.3f}")
    if args.json:
        facts = {"slots": args.slots, "tokens": args.tokens, "repeats": args.repeats}
        args.json.write_text(
            json.dumps({"options": facts, "milliseconds": figures, "ratio": round(ratio, 4),
                        "run": run_facts()}, indent=2) + "\n"
        )  # fmt: skip


def decoded(
    backbone: Backbone, document: DocumentKV, question: list[int], tokens: int
) -> tuple[float, tuple[int, ...]]:
    """Return seconds per token after the first, and the answer's ids, of this package."""
    buffer = FusedBuffer([document.num_tokens], KVShape.of(document), backbone.device, room=len(question) + tokens)
    document.copy_into(buffer.slots(0, 0, document.token_ids, 0))
    answer = GrowingAnswer(lambda ids: "", limit=tokens)
    steps = decode(
        DecodingPlan(backbone, adapter=False), buffer.context(), [Question(tuple(question), document.num_tokens)],
        [answer], DecodingOptions(max_new_tokens=tokens),
    )  # fmt: skip
    times = [time.perf_counter() for _ in steps]
    return (times[-1] - times[0]) / (tokens - 1), tuple(answer.ids)


def generated(model: Any, document: DocumentKV, question: list[int], tokens: int) -> tuple[float, tuple[int, ...]]:
    """Return seconds per token after the first, and the answer's ids, of ``generate``."""
    cache = DynamicCache(config=model.config)
    for number, (keys, values) in enumerate(zip(document.keys, document.values, strict=True)):
        cache.update(keys[None].clone(), values[None].clone(), number)
    ids = torch.tensor([[*document.token_ids, *question]])
    clock = TokenClock()
    model.generation_config.eos_token_id = None
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens, do_sample=False,
        pad_token_id=0, streamer=clock,
    )  # fmt: skip
    first, *_, last = clock.tokens[1:]
    return (last - first) / (tokens - 1), tuple(output[0, ids.shape[1] :].tolist())


def spread(seconds: list[float]) -> dict[str, float]:
    """Return the median, minimum and maximum in milliseconds."""
    figures = {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    return {name: round(1e3 * figure, 3) for name, figure in figures.items()}


if __name__ == "__main__":
    main()
