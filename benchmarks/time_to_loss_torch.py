"""A worker of time_to_loss.py: PyTorch with transformers.

Reads 'run N' and 'loss', answers seconds and nats.
"""

import json
import os
import sys
import time
from pathlib import Path

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints must not get among the answers
variant, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402

STEPS, BATCH, LENGTH, VOCABULARY = (settings[k] for k in ("steps", "batch_size", "length", "vocab_size"))
LAYERS, WIDTH = map(int, settings["student"].split("x"))
PEAK = {"run_mlm": 3e-3, "bert": 3e-3, "modernbert": 1e-2}[variant]
RATE = 0.4 if variant == "modernbert" else 0.15
bf16 = settings["precision"] == "bfloat16" and variant != "run_mlm"
torch.manual_seed(0)
with np.load(settings["rows"]) as arrays:
    train_rows = torch.from_numpy(arrays["train"].astype(np.int64))
    held_out = {
        name: torch.from_numpy(arrays[name].astype(np.float32 if name == "weights" else np.int64))
        for name in ("inputs", "positions", "labels", "weights")
    }
common = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH // 32,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.05,
    "pad_token_id": 0,
}
if variant == "modernbert":
    theta = {"rope_type": "default", "rope_theta": 10_000.0}
    model = transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **common,
            intermediate_size=8 * round(WIDTH / 3),
            global_attn_every_n_layers=1,
            rope_parameters={"full_attention": theta, "sliding_attention": theta},
            eos_token_id=3,
            bos_token_id=2,
            cls_token_id=2,
            sep_token_id=3,
        )
    )
else:
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            **common,
            intermediate_size=4 * WIDTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
parameters = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def learning_rate(step: int) -> float:
    """Linear, with 5 % warm-up, as a share of the peak."""
    warmup = 0.05 * STEPS
    return min((step + 1) / warmup, (STEPS - step) / (STEPS - warmup))


def logits_at(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The head at these positions alone."""
    encoder = model.model if variant == "modernbert" else model.bert
    hidden = encoder(input_ids=tokens).last_hidden_state
    hidden = hidden.gather(1, positions[:, :, None].expand(-1, -1, WIDTH))
    return model.decoder(model.head(hidden)) if variant == "modernbert" else model.cls(hidden)


@torch.no_grad()
def held_out_loss() -> float:
    model.eval()
    total = 0.0
    for start in range(0, len(held_out["inputs"]), 64):
        part = {name: array[start : start + 64] for name, array in held_out.items()}
        loss = F.cross_entropy(
            logits_at(part["inputs"], part["positions"]).flatten(0, 1),
            part["labels"].flatten(),
            reduction="none",
        )
        total += float((loss * part["weights"].flatten()).sum())
    model.train()
    return total / float(held_out["weights"].sum())


def requests():
    """Yield the number of steps to run; answer 'loss' at once."""
    for line in sys.stdin:
        request, _, count = line.partition(" ")
        if request.strip() == "loss":
            answers.write(f"{held_out_loss():.6f}\n")
        else:
            yield int(count)


def run_trainer() -> None:
    """transformers' Trainer, stopped between steps while others have their turn."""
    todo = requests()

    class Turns(transformers.TrainerCallback):
        left, start = 0, 0.0

        def on_step_begin(self, *_, **__):
            if self.left == 0:
                self.left = next(todo)
                self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.left -= 1
            if self.left == 0:
                answers.write(f"{time.perf_counter() - self.start:.6f}\n")

    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(settings["data"]) / "tokenizer")
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(Path(settings["workdir"]) / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=PEAK,
            warmup_steps=round(0.05 * STEPS),
            weight_decay=0.01,
            save_strategy="no",
            report_to="none",
            logging_steps=10**6,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row} for row in train_rows],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE),
        callbacks=[Turns()],
    )
    trainer.train()
    for _ in todo:
        raise RuntimeError("asked for more steps than there are")


def mask(tokens: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(inputs, positions, labels): the same number of positions in every row; 80/10/10."""
    scores = torch.rand(tokens.shape, generator=generator)
    scores[torch.isin(tokens, torch.tensor(settings["special_ids"]))] = 2
    positions = scores.argsort(1)[:, : round(RATE * LENGTH)].sort(1)[0]
    labels = tokens.gather(1, positions)
    kind = torch.rand(labels.shape, generator=generator)
    random = torch.randint(5, VOCABULARY, labels.shape, generator=generator)
    new = torch.where(kind < 0.8, settings["mask_id"], torch.where(kind < 0.9, random, labels))
    return tokens.scatter(1, positions, new), positions, labels


def make_optimizers() -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    is_kernel = lambda name, p: p.ndim == 2 and "embeddings" not in name and "decoder" not in name  # noqa: E731
    if variant == "modernbert":
        kernels = [p for name, p in named if is_kernel(name, p)]
        others = [p for name, p in named if not is_kernel(name, p)]
        muon = torch.optim.Muon(
            kernels, lr=PEAK, weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(others, lr=PEAK, weight_decay=0.01, fused=True)]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW(groups, lr=PEAK, fused=True)]


def run_loop() -> None:
    """The best loop for this model."""
    optimizers, generator = make_optimizers(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(train_rows), generator=generator)

    def loss_of(inputs, positions, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = logits_at(inputs, positions)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    compiled, step = torch.compile(loss_of), 0
    model.train()
    for count in requests():
        start = time.perf_counter()
        for _ in range(count):
            rows = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
            loss = compiled(*mask(train_rows[rows], generator))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = PEAK * learning_rate(step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
        loss.item()
        answers.write(f"{time.perf_counter() - start:.6f}\n")


answers.write(json.dumps({"parameters": parameters, "version": f"torch {torch.__version__}"}) + "\n")
run_trainer() if variant == "run_mlm" else run_loop()
