"""The model card of an adapter: README.md beside its weights."""

from __future__ import annotations

from .report import AdaptReport


def card(report: AdaptReport) -> str:
    """Markdown text: data, counts, command, figures and limits."""
    dropped = "\n".join(f"| {reason} | {count} |" for reason, count in report.dropped.items())
    figures = "\n".join(f"| {one.system} | {one.right:.1f} | {one.f1:.1f} |" for one in report.verdicts)
    mean, low, high = report.margin
    hardware = report.run["hardware"]
    return f"""# Adapter of {report.model_id} for fused documents

A LoRA adapter of the answering decoder, made by `kvfusion adapt` without labels from {report.passages} passages of
{report.files} files. Documents are read by the frozen base model; the adapter reads their joined keys and values. It
was trained to say over up to {report.documents} fused passages what the base model says over the right one only.

Use it with `kvfusion ask "..." --docs PATH --adapter DIR`, or
`KVFusionGenerator.from_pretrained(MODEL, adapter=DIR)`; its default mode is `fusion`.

## Data

The base model wrote or was given {report.asked} questions and answered them from their passages. {report.trained} were
trained on, {report.judged} of other passages judged. Dropped:

| reason | questions |
| --- | --- |
{dropped}

## Figures

Held-out questions over {report.documents} passages (the right one and negatives) in shuffled order, against the base
model's own answers from the right passage only:

| system | right, % | F1, % |
| --- | --- | --- |
{figures}

An answer is right if it has all words of the base model's answer that are not in the question. Adapted minus untuned
fusion: {mean:+.1f} points right (95 % interval {low:+.1f} to {high:+.1f}).

## Making

`{report.run["command"]}`: {report.steps} steps, {report.losses[0]:.3f} nats a token at the beginning and
{report.losses[1]:.3f} at the end, {report.dtype}, on {hardware["accelerator"] or hardware["processor"]}, commit
{report.run["commit"]}, {report.run["date"]}. `training.json` has all settings.

## Limits

- The adapter learns the base model's answers, its mistakes included; no person has checked them.
- The figures say how well it agrees with the base model on these documents, not how often it is right.
- It was trained on questions about these documents, in the wording of a bare question.
"""
