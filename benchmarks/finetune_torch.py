"""The recipe of `dwt finetune` in plain PyTorch and transformers, on the same examples: the other side
of docs/finetuning.md's comparison. Prints a line an epoch and seed, and mean and deviation last.

    python benchmarks/finetune_torch.py --model=MODEL --task=rte --config.examples.kind=glue \\
        --config.examples.path=GLUE --config.recipe.epochs=3

Examples, config and metrics are dwt_jax's; tokenizer, model, optimiser, order and loop are not.
"""

import argparse
import sys
import time

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from dwt_jax.cli.arguments import split_overrides
from dwt_jax.finetune.config import load_task_configs
from dwt_jax.finetune.datasets import read_examples
from dwt_jax.finetune.metrics import compute_metrics


def batches(data, split, order, size, tokenizer, lengths):
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        texts = [[split.texts[i] for i in rows]]
        if split.text_pairs is not None:
            texts.append([split.text_pairs[i] for i in rows])
        batch = tokenizer(*texts, truncation=True, max_length=lengths[-1], return_tensors="pt", padding=True)
        length = next(n for n in lengths if n >= batch["input_ids"].shape[1])
        batch = tokenizer.pad(batch, padding="max_length", max_length=length, return_tensors="pt")
        labels = torch.tensor(split.labels[rows])
        yield rows, batch, labels if not data.labels else labels.long()


def evaluate(model, data, split, size, tokenizer, lengths):
    model.eval()
    order = np.argsort([len(text) for text in split.texts])
    logits = np.zeros((len(split), len(data.labels) or 1), np.float32)
    with torch.no_grad():
        for rows, batch, _ in batches(data, split, order, size, tokenizer, lengths):
            logits[rows] = model(**batch).logits.numpy()
    chosen = logits.argmax(-1) if data.labels else logits[:, 0]
    return compute_metrics(data.metrics, chosen, split.labels)[0]["score"]


def train(path, config, data, seed):
    """The dev score after every epoch."""
    recipe, optimizer = config.recipe, config.recipe.optimizer
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rates = {"hidden_dropout_prob": recipe.dropout, "attention_probs_dropout_prob": recipe.dropout}
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len(data.labels) or 1, attn_implementation="sdpa", **rates
    )
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    adam = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optimizer.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=optimizer.learning_rate.value,
        betas=(optimizer.b1, optimizer.b2),
        eps=optimizer.eps,
    )
    split, random = data.splits["train"], np.random.default_rng(seed)
    steps = recipe.epochs * -(-len(split) // recipe.batch_size)
    schedule = get_linear_schedule_with_warmup(
        adam, round(optimizer.learning_rate.warmup_fraction * steps), steps
    )
    found = []
    for number in range(recipe.epochs):
        model.train()
        began, losses = time.perf_counter(), []
        order = random.permutation(len(split))
        for _, batch, labels in batches(data, split, order, recipe.batch_size, tokenizer, recipe.lengths()):
            loss = model(**batch, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_norm)
            adam.step()
            schedule.step()
            adam.zero_grad()
            losses.append(loss.item())
        speed = len(split) / (time.perf_counter() - began)
        dev = [name for name in data.splits if name.startswith("dev")]
        found.append(
            np.mean(
                [
                    evaluate(model, data, data.splits[name], recipe.batch_size, tokenizer, recipe.lengths())
                    for name in dev
                ]
            )
        )
        print(
            f"seed {seed}, epoch {number + 1}: train loss {np.mean(losses):.4f}, dev score {found[-1]:.4f}, "
            f"{speed:.1f} examples/s",
            flush=True,
        )
    return found


def main():
    plain, overrides = split_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--config", default="configs/glue.py")
    options = parser.parse_args(plain)
    (config,) = load_task_configs(options.config, options.task, overrides)
    data = read_examples(config.examples)
    found = np.array([train(options.model, config, data, seed) for seed in config.recipe.seeds])
    for name, values in (("best", found.max(1)), ("last", found[:, -1])):
        deviation = f" ± {100 * values.std(ddof=1):.2f}" if len(values) > 1 else ""
        print(f"{options.task}: {name} epoch {100 * values.mean():.2f}{deviation} over {len(values)} seeds")


if __name__ == "__main__":
    main()
