"""The model card of an adapter: README.md beside its weights."""

from __future__ import annotations

from .report import AdaptReport, points


def card(report: AdaptReport) -> str:
    """Return Markdown text with data, counts, command, figures and limits."""
    dropped = "\n".join(f"| {reason} | {count} |" for reason, count in report.dropped.items())
    figures = "\n".join(f"| {one.system} | {one.right:.1f} | {one.f1:.1f} |" for one in report.verdicts)
    use = "all documents" if report.focus is None else f"the best document (`focus` {report.focus})"
    hardware = report.run["hardware"]
    return f"""# Adapter of {report.model_id} for fused documents

A LoRA adapter of the answering decoder, made by `kvfusion adapt` without labels from {report.passages} passages of
{report.files} files. The frozen base model reads the documents, and the adapter reads their fused keys and values. It
was trained to answer over up to {report.documents} fused passages like the base model from the gold passage only.

Use it with `kvfusion ask "..." --docs PATH --adapter DIR`, or
`KVFusionGenerator.from_pretrained(MODEL, adapter=DIR)`. By default it answers over {use}.

## Data

The base model wrote or was given {report.asked} questions and answered them from their passages. The adapter was
trained on {report.trained} of them and judged on {report.judged} about other passages. Dropped questions:

| reason | questions |
| --- | --- |
{dropped}

## Figures

Held-out questions over {report.documents} passages (the gold one and negatives) in shuffled order, compared with the
base model's own answers from the gold passage only:

| system | right, % | F1, % |
| --- | --- | --- |
{figures}

An answer is right if it contains all words of the base model's answer that are not in the question. Adapted minus
untuned over all documents: {points(report.margin)}.
Adapted minus untuned over the document that focus chooses: {points(report.focus_margin)}.
The best system is "{report.best}". Each question was written about one passage, which favours focus.

## Training

`{report.run["command"]}`: {report.steps} steps, {report.losses[0]:.3f} nats per token at the beginning and
{report.losses[1]:.3f} at the end, {report.dtype}, on {hardware["accelerator"] or hardware["processor"]}, commit
{report.run["commit"]}, {report.run["date"]}. `training.json` has all settings.

## Limits

- The adapter learns the base model's answers, including its mistakes. Nobody has checked them.
- The figures show how well it agrees with the base model on these documents, not how often it is right.
- It was trained on questions about these documents, in the wording of a bare question.
"""
