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
torch.manual_seed(settings["seed"])
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
    "initializer_range": 0.035 if variant == "modernbert" else 0.05,
    "pad_token_id": 0,
}
if variant == "modernbert":
    theta = {"rope_type": "default", "rope_theta": 10_000.0}
    model = transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **common,
            intermediate_size=8 * round(WIDTH / 3),
            global_attn_every_n_layers=1,
            classifier_activation="linear",
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

    special_ids = torch.tensor(settings["special_ids"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(settings["data"]) / "tokenizer")
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(Path(settings["workdir"]) / "trainer"),
            max_steps=STEPS,
            seed=settings["seed"],
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
        train_dataset=[
            {"input_ids": row, "special_tokens_mask": torch.isin(row, special_ids)} for row in train_rows
        ],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=RATE),
        callbacks=[Turns()],
    )
    trainer.train()
    for _ in todo:
        raise RuntimeError("asked for more steps than there are")


SPECIAL = torch.zeros(VOCABULARY).index_fill(0, torch.tensor(settings["special_ids"]), 2.0)
PREDICTIONS = round(RATE * LENGTH)


def mask(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(inputs, positions, labels): the same number of positions in every row; 80/10/10."""
    scores = torch.rand(tokens.shape) + SPECIAL[tokens]
    positions = scores.topk(PREDICTIONS, largest=False, sorted=False).indices
    labels = tokens.gather(1, positions)
    kind = torch.rand(labels.shape)
    random = torch.randint(5, VOCABULARY, labels.shape)
    new = torch.where(kind < 0.8, settings["mask_id"], torch.where(kind < 0.9, random, labels))
    return tokens.scatter(1, positions, new), positions, labels


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Three Newton-Schulz iterations of matrices [N, m, n], m ≤ n, in fp32 or, on CPUs that have it, bf16."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-8)
    x = x.bfloat16() if bf16 else x
    for _ in range(3):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


class Muon:
    """Muon on stacks of matrices of one shape: Q, K, V and both halves of the GLU apart, as in dwt_jax."""

    def __init__(self, kernels: dict[str, torch.nn.Parameter]):
        stacks: dict[tuple[int, int], list[tuple[torch.nn.Parameter, int, int, bool]]] = {}
        for name, p in kernels.items():
            parts = 3 if "Wqkv" in name else 2 if "mlp.Wi" in name else 1
            rows, columns = p.shape[0] // parts, p.shape[1]
            for i in range(parts):
                key = min(rows, columns), max(rows, columns)
                stacks.setdefault(key, []).append((p, i * rows, rows, rows > columns))
        self.stacks = stacks
        self.momentum = {key: torch.zeros(len(x), *key) for key, x in stacks.items()}
        self.update = torch.compile(self._update)

    @staticmethod
    def _update(momentum: torch.Tensor, gradients: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = torch.stack(gradients)
        momentum = 0.95 * momentum + gradient
        update = orthogonalize(gradient + 0.95 * momentum)
        return momentum, update * (0.2 * max(update.shape[1:]) ** 0.5)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for key, parts in self.stacks.items():
            gradients = [
                p.grad[start : start + rows].mT if tall else p.grad[start : start + rows]
                for p, start, rows, tall in parts
            ]
            self.momentum[key], updates = self.update(self.momentum[key], gradients)
            for (p, start, rows, tall), update in zip(parts, updates, strict=True):
                part = p[start : start + rows]
                part.mul_(1 - 0.01 * learning_rate).sub_((update.mT if tall else update) * learning_rate)


def is_kernel(name: str, p: torch.nn.Parameter) -> bool:
    return variant == "modernbert" and p.ndim == 2 and "embeddings" not in name and "decoder" not in name


def run_loop() -> None:
    """The best loop for this model."""
    named = dict(model.named_parameters())
    if variant == "modernbert":  # its own initialization is smaller at the outputs of layers
        for p in named.values():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=0.035)
    kernels = {name: p for name, p in named.items() if is_kernel(name, p)}
    others = [p for name, p in named.items() if name not in kernels]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam, muon = torch.optim.AdamW(groups, lr=PEAK, fused=True), Muon(kernels) if kernels else None

    def loss_of(tokens):
        inputs, positions, labels = mask(tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = logits_at(inputs, positions)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    compiled, step, order = torch.compile(loss_of), 0, torch.empty(0, dtype=torch.int64)
    model.train()
    for count in requests():
        start = time.perf_counter()
        for _ in range(count):
            if len(order) < BATCH:
                order = torch.randperm(len(train_rows))
            rows, order = order[:BATCH], order[BATCH:]
            loss = compiled(train_rows[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = PEAK * learning_rate(step)
            for group in adam.param_groups:
                group["lr"] = rate
            adam.step()
            if muon:
                muon.step(rate)
            model.zero_grad(set_to_none=True)
            step += 1
        loss.item()
        answers.write(f"{time.perf_counter() - start:.6f}\n")


answers.write(json.dumps({"parameters": parameters, "version": f"torch {torch.__version__}"}) + "\n")
run_trainer() if variant == "run_mlm" else run_loop()
