"""The other side of train_step.py: the same DWT step as a good PyTorch user writes it with
transformers. Reads 'run N', answers seconds for N steps."""

import argparse
import os
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--student", default="4x256")
parser.add_argument("--teacher", default="2x256")
parser.add_argument("--rows", type=int, default=32)
parser.add_argument("--precision", default="float32")
parser.add_argument("--head", choices=["masked", "all"], default="masked")
parser.add_argument("--compile", action="store_true")
options = parser.parse_args()
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints must not get among the answers

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import BertConfig, BertForMaskedLM  # noqa: E402

LENGTH, PREDICTIONS = 128, 20
bf16 = options.precision == "bfloat16"


def model(name: str) -> BertForMaskedLM:
    layers, hidden = map(int, name.split("x"))
    return BertForMaskedLM(
        BertConfig(
            vocab_size=30522,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
    )


torch.manual_seed(0)
student = model(options.student).train()
teacher = model(options.teacher).eval().requires_grad_(False)
if bf16:
    teacher = teacher.to(torch.bfloat16)
tokens = torch.randint(1000, 30000, (options.rows, LENGTH))
positions = torch.stack([torch.randperm(LENGTH)[:PREDICTIONS].sort()[0] for _ in range(options.rows)])
labels = tokens.gather(1, positions).reshape(-1)
segments = (torch.arange(LENGTH)[None] >= torch.randint(40, 100, (options.rows, 1))).int()
mask = (segments[:, :, None] == segments[:, None, :])[:, None]
types = torch.zeros_like(tokens)
matrices = [p for p in student.parameters() if p.ndim > 1]
others = [p for p in student.parameters() if p.ndim <= 1]
groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)


def at_masked(x: torch.Tensor) -> torch.Tensor:
    return x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[-1]))


def logits(net: BertForMaskedLM) -> torch.Tensor:
    hidden = net.bert(input_ids=tokens, attention_mask=mask, token_type_ids=types).last_hidden_state
    out = net.cls(at_masked(hidden)) if options.head == "masked" else at_masked(net.cls(hidden))
    return out.reshape(-1, out.shape[-1]).float()


def loss_of() -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            taught = logits(teacher)
        own = logits(student)
    log_s, log_t = F.log_softmax(own, -1), F.log_softmax(taught, -1)
    return F.nll_loss(log_s, labels) + (log_t.exp() * (log_t - log_s)).sum(-1).mean()


loss_function = torch.compile(loss_of) if options.compile else loss_of


def run(count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        loss = loss_function()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loss.item()
    return time.perf_counter() - start


run(5)  # until the heap has its size
answers.write(f"ready torch {torch.__version__}\n")
for line in sys.stdin:
    answers.write(f"{run(int(line.split()[1])):.6f}\n")
