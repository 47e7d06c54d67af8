"""The other side of train_step.py: the same DWT step as a good PyTorch user writes it with
transformers. Reads 'run N', answers seconds for N steps."""

import argparse
import os
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--size", default="4x256")
parser.add_argument("--precision", default="float32")
parser.add_argument("--head", choices=["masked", "all"], default="masked")
parser.add_argument("--compile", action="store_true")
options = parser.parse_args()
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints must not get among the answers

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from shapes import LENGTH, SHAPES, Shape  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM  # noqa: E402

shape = SHAPES[options.size]
is_causal = shape.model_type == "llama"
bf16 = options.precision == "bfloat16"


def model(shape: Shape) -> torch.nn.Module:
    config = AutoConfig.for_model(shape.model_type, **shape.keys(), attn_implementation="sdpa")
    config.use_cache = False
    return (AutoModelForCausalLM if is_causal else AutoModelForMaskedLM).from_config(config)


torch.manual_seed(0)
student = model(shape).train()
teacher = model(shape.of_teacher()).eval().requires_grad_(False)
if bf16:
    teacher = teacher.to(torch.bfloat16)
tokens = torch.randint(1000, 30000, (shape.rows, LENGTH))
segments = (torch.arange(LENGTH)[None] >= torch.randint(40, 100, (shape.rows, 1))).int()
same = segments[:, :, None] == segments[:, None, :]
index = torch.arange(LENGTH)
if is_causal:  # the label of a position is the next token of its segment
    positions = index[None].expand(shape.rows, -1)
    labels = torch.where(segments == segments.roll(-1, 1), tokens.roll(-1, 1), -100)
    labels[:, -1] = -100
    labels = labels.reshape(-1)
else:
    picks = [torch.randperm(LENGTH)[: shape.predictions].sort()[0] for _ in range(shape.rows)]
    positions = torch.stack(picks)
    labels = tokens.gather(1, positions).reshape(-1)
starts = torch.where(segments > 0, (segments == 0).sum(1, keepdim=True), 0)
inputs = {"input_ids": tokens}
if shape.model_type == "bert":
    inputs |= {"attention_mask": same[:, None], "token_type_ids": torch.zeros_like(tokens)}
elif is_causal:
    causal = index[:, None] >= index[None, :]
    inputs |= {"attention_mask": (same & causal)[:, None], "position_ids": index[None] - starts}
else:
    near = (index[:, None] - index[None, :]).abs() <= student.config.local_attention // 2
    masks = {"full_attention": same[:, None], "sliding_attention": (same & near)[:, None]}
    inputs |= {"attention_mask": masks, "position_ids": index[None] - starts}
matrices = [p for p in student.parameters() if p.ndim > 1]
others = [p for p in student.parameters() if p.ndim <= 1]
groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)


def at_masked(x: torch.Tensor) -> torch.Tensor:
    return x if is_causal else x.gather(1, positions[:, :, None].expand(-1, -1, x.shape[-1]))


def lm_head(net: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    if shape.model_type == "bert":
        return net.cls(hidden)
    return net.lm_head(hidden) if is_causal else net.decoder(net.head(hidden))


def logits(net: torch.nn.Module) -> torch.Tensor:
    hidden = net.base_model(**inputs).last_hidden_state
    out = lm_head(net, at_masked(hidden)) if options.head == "masked" else at_masked(lm_head(net, hidden))
    return out.reshape(-1, out.shape[-1]).float()


def loss_of() -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            taught = logits(teacher)
        own = logits(student)
    log_s, log_t = F.log_softmax(own, -1), F.log_softmax(taught, -1)
    divergence = (log_t.exp() * (log_t - log_s)).sum(-1)
    is_label = labels >= 0
    return F.nll_loss(log_s, labels) + (divergence * is_label).sum() / is_label.sum()


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
