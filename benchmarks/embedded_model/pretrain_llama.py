"""Route (b): a small Llama pretrained from scratch on plain text, to be taken on by ``train_base.py --model``.

    python benchmarks/embedded_model/pretrain_llama.py prepare TEXT.txt.xz ... --output runs/llama
    python benchmarks/embedded_model/pretrain_llama.py train --output runs/llama [--resume]

``prepare`` trains a byte-level BPE tokenizer and writes token files of at most 15 MB, small enough to travel to a GPU.
``train`` reads them in windows and learns to predict the next token; part of the windows repeat a segment of
themselves, which teaches copying long before text alone does (LOG.md). The output folder holds ``tokens/``,
``model/`` (weights, tokenizer, ``kvfusion.json``) and ``checkpoint/``, weights in parts of 15 MB everywhere. On two
CPU cores this is a smoke test; it needs a GPU and about 10^9 tokens to be of use.
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from checkpoints import described, load_tensors, making_of, save_tensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvfusion_rag import InvalidInputError, KVFusionError
from kvfusion_rag.settings import FILE_NAME, ModelSettings

logger = logging.getLogger("pretrain_llama")

VOCABULARY = 8192
END, QUESTION, ANSWER, TITLE = "<|end|>", "<|question|>", "<|answer|>", "<|title|>"
TOKENS_PER_FILE = 7_000_000  # of two bytes each: 14 MB
SHARD = "15MB"
MAY_CHANGE = ("command", "output", "save_every", "device", "eager", "resume")  # on resuming
REPEATED = (8, 120)  # tokens of a repeated segment, least and most
SETTINGS = ModelSettings(
    document_template="{text}",
    titled_document_template=f"{{title}}{TITLE}{{text}}",
    question_template=f"{QUESTION}{{question}}{ANSWER}",
    prompt_template=None,
    answer_template="{answer}",
    passage_length=256,
    max_document_tokens=256,
    long_documents="split",
    max_new_tokens=24,
    tuned=True,
)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = parse_arguments()
    if args.command == "prepare":
        prepare(args.texts, args.output)
        return
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output / "model")
    run = Run(build(tokenizer, args.width, args.layers), tokenizer, args)
    if args.resume and (args.output / "checkpoint").is_dir():
        run.load()
    run.train()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="tokenizer and token files")
    one.add_argument("texts", nargs="+", type=Path, help=".txt.xz, one paragraph a line")
    two = commands.add_parser("train", help="next-token training")
    two.add_argument("--width", type=int, default=384)
    two.add_argument("--layers", type=int, default=9)
    two.add_argument("--window", type=int, default=512, help="tokens")
    two.add_argument("--batch", type=int, default=128, help="windows a step")
    two.add_argument("--steps", type=int, default=15_000, help="15,000 x 128 x 512 are 10^9 tokens")
    two.add_argument("--repeat", type=float, default=0.2, help="share of windows with a repeated segment")
    two.add_argument("--learning-rate", type=float, default=2e-3)
    two.add_argument("--warmup", type=int, default=300, help="steps")
    two.add_argument("--save-every", type=int, default=500, help="steps")
    two.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    two.add_argument("--eager", action="store_true", help="do not compile (for short runs)")
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--resume", action="store_true")
    for command in (one, two):
        command.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "train" and (args.output / "checkpoint").exists() and not args.resume:
        parser.error(f"{args.output} holds a run already; name another folder, or --resume it")
    return args


def prepare(texts: Sequence[Path], output: Path) -> None:
    """Write the tokenizer, its settings and the token files.

    Raises:
        InvalidInputError: there are token files already.
    """
    if found := sorted((output / "tokens").glob("*.npy")):
        raise InvalidInputError(
            f"{str(output)!r} holds {len(found)} token files already, which would be trained on with ids of another "
            "vocabulary; name another folder, or remove them."
        )
    tokenizer = train_tokenizer(line for path in texts for line in read_lines(path))
    (output / "tokens").mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output / "model")
    (output / "model" / FILE_NAME).write_text(json.dumps(SETTINGS.to_dict(), indent=2) + "\n", encoding="utf-8")
    count = 0
    for number, tokens in enumerate(token_files(texts, tokenizer)):
        np.save(output / "tokens" / f"{number:04}.npy", tokens)
        count += len(tokens)
        logger.info("%d tokens", count)


def train_tokenizer(lines: Iterator[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, QUESTION, ANSWER, TITLE]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=special[1:])


def read_lines(path: Path) -> Iterator[str]:
    """Paragraphs of a file, headings included."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from filter(None, map(str.strip, lines))


def token_files(texts: Sequence[Path], tokenizer: PreTrainedTokenizerFast) -> Iterator[np.ndarray]:
    """Ids (N,) uint16 of all paragraphs, each followed by the end token, in parts."""
    waiting: list[int] = []
    for path in texts:
        for line in read_lines(path):
            waiting += [*tokenizer(line, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if len(waiting) >= TOKENS_PER_FILE:
                yield np.asarray(waiting, dtype=np.uint16)
                waiting = []
    if waiting:
        yield np.asarray(waiting, dtype=np.uint16)


def build(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Run:
    """Next-token training on windows of the token files; every batch is a function of seed and step."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
        self.args, self.tokenizer, self.step = args, tokenizer, 0
        self.model = model.to(args.device)
        self._compiled = self.model if args.eager else torch.compile(self.model)
        self._made_by = making_of(args, MAY_CHANGE) | {
            "tokens": described(args.output / "tokens"), "tokenizer": described(args.output / "model/tokenizer.json")
        }  # fmt: skip
        self._files = [np.load(path, mmap_mode="r") for path in sorted((args.output / "tokens").glob("*.npy"))]
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def train(self) -> None:
        while self.step < self.args.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate()
            ids = self.batch(self.step).to(self.args.device)
            with torch.autocast(self.model.device.type, dtype=torch.bfloat16):
                loss = self._compiled(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if self.step % self.args.save_every == 0 or self.step == self.args.steps:
                logger.info("step %d: loss %.3f nats a token", self.step, loss.item())
                self.save()

    def batch(self, step: int) -> torch.Tensor:
        """Windows (B, T) of ids, some of which end with a segment that they have held before."""
        rng = np.random.default_rng([self.args.seed, step])
        size, length = self.args.batch, self.args.window
        rows = []
        for _ in range(size):
            tokens = self._files[rng.integers(len(self._files))]
            start = rng.integers(max(len(tokens) - length, 1))
            rows.append(self._repeat(rng, np.resize(tokens[start : start + length], length)))
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _repeat(self, rng: np.random.Generator, window: np.ndarray) -> np.ndarray:
        if rng.random() >= self.args.repeat:
            return window
        length = int(rng.integers(REPEATED[0], min(REPEATED[1], len(window) // 3)))
        first = int(rng.integers(len(window) - 2 * length))
        second = int(rng.integers(first + length, len(window) - length + 1))
        window = window.copy()
        window[second : second + length] = window[first : first + length]
        return window

    def _learning_rate(self) -> float:
        rise = min(1.0, (self.step + 1) / self.args.warmup)
        return self.args.learning_rate * rise * (0.05 + 0.475 * (1 + math.cos(math.pi * self.step / self.args.steps)))

    def save(self) -> None:
        self.model.save_pretrained(self.args.output / "model", max_shard_size=SHARD)
        progress = {"step": self.step}
        save_tensors(self.args.output / "checkpoint", self.model, self.optimizer, progress, self._made_by)

    def load(self) -> None:
        """Go on from the checkpoint in the output folder; InvalidInputError if another run has made it."""
        folder = self.args.output / "checkpoint"
        self.step = load_tensors(folder, self.model, self.optimizer, self._made_by)["step"]


if __name__ == "__main__":
    try:
        main()
    except KVFusionError as error:
        sys.exit(f"error: {error}")
