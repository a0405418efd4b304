"""Make the adapter that ships with the package from a training run: lower rank, settings and record.

    python recipes/smollm2/ship.py RUN kvfusion_rag/adapters/smollm2-135m-instruct --rank 24 --focus 1 --focus-weight 3

The weights are those of the last step in the checkpoint, since the dev questions are too few to choose a step.

Each weight's update B A is replaced by the nearest one of lower rank (peft, SVD), which needs less space. Prints the
share of the updates' squared norm that is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvfusion_rag import KVFusionGenerator
from kvfusion_rag.model.location import DEFAULT_MODEL, locate_model

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of kvfusion train")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--focus", type=int, help="documents that mode fusion keeps by default")
    parser.add_argument("--focus-weight", type=float, default=0.0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    kept = reduce_rank(args.run, args.output, args.rank)
    print(f"rank {args.rank} keeps {kept:.2%} of the updates' squared norm")
    settings = json.loads((args.run / "best" / "kvfusion.json").read_text()) | {
        "mode": "fusion",
        "focus": args.focus,
        "focus_weight": args.focus_weight,
    }
    settings.pop("document_attention", None)  # in runs before this field was removed
    (args.output / "kvfusion.json").write_text(json.dumps(settings, indent=2) + "\n")
    record = json.loads((args.run / "checkpoint" / "training.json").read_text())
    record["progress"] = {name: record["progress"][name] for name in ("step", "best") if name in record["progress"]}
    record |= {"base_model": DEFAULT_MODEL, "base_weights": digests(), "same_family": True, "shipped_rank": args.rank}
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def reduce_rank(run: Path, output: Path, rank: int) -> float:
    """Write the adapter of ``rank`` nearest to the trained one, and return the share of the squared norm it keeps."""
    base = AutoModelForCausalLM.from_pretrained(locate_model(None).path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run / "best"))
    state = load_file(run / "checkpoint" / "optimizer.safetensors")
    last = {name.partition("/")[2]: weight for name, weight in state.items() if name.startswith("weight/")}
    own = {f"base_model.model.{name}": weight for name, weight in last.items()}
    missing = set(own) - set(dict(model.named_parameters()))
    if missing or not own:
        raise SystemExit(f"the checkpoint of {str(run)!r} is not one of this adapter.")
    model.load_state_dict(own, strict=False)
    halves = [0.5, 0.5]  # peft copies a single adapter unchanged at any rank
    model.add_weighted_adapter(
        ["default", "default"], halves, "small", combination_type="svd", svd_rank=rank, svd_full_matrices=False
    )
    before = after = 0.0
    for module in model.modules():
        if isinstance(module, LoraLinear):
            before += float(module.get_delta_weight("default").pow(2).sum())
            after += float(module.get_delta_weight("small").pow(2).sum())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["small"])
        saved = Path(folder, "small")
        weights = {name: tensor.bfloat16().contiguous() for name, tensor in load_file(saved / ADAPTER).items()}
        save_file(weights, output / ADAPTER, metadata={"format": "pt"})
        config = json.loads((saved / CONFIG).read_text()) | {"base_model_name_or_path": DEFAULT_MODEL}
        (output / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return after / before


def digests() -> list[str]:
    """Return the digests of the default model's weights in each precision."""
    return [
        KVFusionGenerator.from_pretrained(adapter=None, dtype=dtype, store=None)._engine.model.weights_digest
        for dtype in ("float32", "bfloat16", "float16")
    ]


if __name__ == "__main__":
    main()
