"""Train a tiny Qwen3-VL on rendered scenes, on a CPU, and save it as a folder that ``from_pretrained`` loads.

    python demos/tiny_vlm/train.py --out out/tiny_vlm --minutes 60 --seed 0 [--resume] [--family qwen2_5_vl]

Two processes of one thread each are faster than one of two threads:

    torchrun --nproc-per-node 2 demos/tiny_vlm/train.py --out out/tiny_vlm ...

An interrupted run goes on with ``--resume``; the schedule follows the time trained, or with ``--steps`` the number of steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from batches import Batches
from model import FAMILIES, build_image_processor, build_model, generation_config
from perception import Head, see
from questions import TYPES
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from scenes import MOST
from tokenizer import build_tokenizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

LENGTH = 112  # tokens in a row
VISION = 0.2  # the first part of the training: the vision tower alone, see perception.py
WARM_UP = 0.03
CURRICULUM = ((0.22, 1), (0.25, 2))  # until this part of the training, at most so many shapes in a scene
SIGHT = 0.2  # weight of the vision task's loss while the whole model is trained
SAVE_EVERY = 120  # seconds
LOG_EVERY = 50  # steps


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up and no decay for the vision tower, then for all linear warm-up and a cosine to a hundredth of the peak.

    ``done`` is the part of the training that is over.
    """
    if done < VISION or done < VISION + WARM_UP:
        since = done if done < VISION else done - VISION
        return peak * min(1.0, since / WARM_UP + 0.01)
    over = min(1.0, (done - VISION - WARM_UP) / (1 - VISION - WARM_UP))
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * over)))


Answers = list[tuple[str, bool]]  # of each question: its type, and whether every token of the answer is right


def answer_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor], head: Head) -> tuple[torch.Tensor, Answers]:
    """Mean cross-entropy of the answers' tokens, plus the vision task's loss; and which answers are right."""
    tokens, seen = see(model, batch)
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: batch[name] for name in names} | {"mm_encoder_outputs": {"image": seen}}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = batch["labels"][:, 1:]
    learnt = labels != -100
    logits = model.lm_head(hidden[learnt])
    wrong = logits.argmax(-1) != labels[learnt]
    columns = learnt.nonzero()[:, 0], batch["turns"][:, 1:][learnt], batch["kinds"][:, 1:][learnt], wrong
    answers: dict[tuple[int, int], tuple[str, bool]] = {}
    for row, turn, kind, bad in zip(*(column.tolist() for column in columns), strict=True):
        _, good = answers.get((row, turn), ("", True))
        answers[row, turn] = TYPES[kind], good and not bad
    loss = cross_entropy(logits, labels[learnt]) + SIGHT * head(tokens, batch["cells"])[0]
    return loss, list(answers.values())


def vision_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor], head: Head) -> tuple[torch.Tensor, Answers]:
    """Loss of the vision task alone, and which image tokens name the shape in their cell rightly."""
    loss, right = head(see(model, batch)[0], batch["cells"])
    return loss, [("vision", good) for good in right.tolist()]


def average_gradients(model: torch.nn.Module) -> None:
    """Replace each gradient by its mean over the processes."""
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the folder: bfloat16 weights, configs, tokenizer and image processor."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build_image_processor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("out/tiny_vlm"), help="folder of the model and of the run's state"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="time to train")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0])
    parser.add_argument("--batch", type=int, default=32, help="pictures in a batch")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2, help="shared by the processes")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, arguments.threads // world))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(arguments.seed)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, arguments.family).train()
    batches = Batches(tokenizer, arguments.batch, LENGTH, arguments.seed, (rank, world))
    head = Head(model.config.text_config.hidden_size)
    whole = torch.nn.ModuleList([model, head])
    decayed = [value for value in whole.parameters() if value.dim() > 1]
    others = [value for value in whole.parameters() if value.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    step, seconds = 0, 0.0
    arguments.out.mkdir(parents=True, exist_ok=True)
    state_file, log_file = arguments.out / "state.pt", arguments.out / "log.jsonl"
    if arguments.resume:
        state = torch.load(state_file, weights_only=True)
        whole.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]

    def keep() -> None:
        if rank:
            return
        state = {"model": whole.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        torch.save(state, state_file.with_suffix(".new"))
        state_file.with_suffix(".new").replace(state_file)

    def done() -> float:
        return step / arguments.steps if arguments.steps else seconds / 60 / arguments.minutes

    def order(number: int) -> Future[dict[str, torch.Tensor]]:
        if done() < VISION:
            return pool.submit(batches.pictures, number)
        return pool.submit(batches, number, next((shapes for until, shapes in CURRICULUM if done() < until), MOST))

    console = Console(highlight=False, quiet=rank > 0)
    count = sum(value.numel() for value in model.parameters())
    console.print(f"{arguments.family}, {count:,} parameters, {len(tokenizer)} tokens; from step {step}")
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    saved, recent = seconds, Answers()  # answers since the last line of the log
    with Progress(*columns, console=console) as bar, ThreadPoolExecutor(1) as pool:
        task = bar.add_task("", total=1.0, completed=done())
        coming = order(step)
        while done() < 1:
            began = time.monotonic()
            batch = coming.result()
            coming = order(step + 1)
            rate = learning_rate(done(), arguments.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, answers = (answer_loss if "labels" in batch else vision_loss)(model, batch, head)
            recent += answers
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if world > 1:
                average_gradients(whole)
            torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
            optimizer.step()
            step += 1
            seconds += min(time.monotonic() - began, 5.0)  # a run that was stopped for a while has not trained then
            if world > 1:
                clock = torch.tensor(seconds, dtype=torch.float64)
                dist.broadcast(clock, 0)  # so that all processes follow one schedule
                seconds = clock.item()
            bar.update(task, completed=done(), description=f"step {step}, loss {loss.item():.3f}")
            if step % LOG_EVERY == 0 and rank == 0:
                entry: dict[str, Any] = {"step": step, "seconds": round(seconds), "loss": round(loss.item(), 4)}
                for kind in ("vision", *TYPES):
                    if own := [good for its_kind, good in recent if its_kind == kind]:
                        entry[kind] = round(sum(own) / len(own), 3)
                recent.clear()
                with log_file.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            if seconds - saved > SAVE_EVERY:
                saved = seconds
                keep()
    keep()
    if rank == 0:
        save(model.eval(), tokenizer, arguments.out / "checkpoint")
    if world > 1:
        dist.destroy_process_group()
    console.print(f"{step} steps in {seconds / 60:.0f} minutes; the model is in {arguments.out / 'checkpoint'}")


if __name__ == "__main__":
    main()
