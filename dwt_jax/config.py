"""All settings of a pre-training run as frozen dataclasses.

config_loader.py turns a config file and a command line into a `Config`, and config_checks.py checks its
values. None of them imports jax, so that `dwt --help` and error messages about a config appear at once.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from dwt_jax.limits import DECAY, OPEN_SHARE, POSITIVE, SEED, SHARE, at_least
from dwt_jax.models import default_model_config
from dwt_jax.models.protocol import ModelConfig
from dwt_jax.remap.methods import GrowthOptions


@dataclass(frozen=True)
class Schedule:
    """A number as a function of the step, with times as fractions of the run from 0 to 1.

    Wherever a config has a schedule, a plain number means a constant.

    Every kind first rises linearly from 0 to `value` over `warmup_fraction`. After that:

    - constant: stays at `value`.
    - linear, cosine: changes from `value` at `decay_start` (or the end of the warmup, if later) to
      `end` at `decay_end`, and stays at `end`.
    - warmup_stable_decay: like linear and cosine, with the shape `decay_type` and usually a late
      `decay_start`.
    - piecewise: `value` before `decay_start`, `end` from `decay_start` on (two stages). With `boundaries`:
      `value` before `boundaries[0]`, `boundary_values[i]` from `boundaries[i]` on.
    - until_matched (only for `distill.alpha_soft`): `value` times a factor that falls from 1 to 0 as
      the student's smoothed hard loss approaches the teacher's (see objectives/schedules.py).
    """

    kind: Literal["constant", "linear", "cosine", "warmup_stable_decay", "piecewise", "until_matched"] = (
        "constant"
    )
    value: Annotated[float, at_least(0)] = 1.0
    end: Annotated[float, at_least(0)] = 0.0
    warmup_fraction: Annotated[float, SHARE] = 0.0
    decay_start: Annotated[float, SHARE] = 0.0
    decay_end: Annotated[float, SHARE] = 1.0
    # warmup_stable_decay: shape of the decay, with the names of transformers' get_wsd_schedule. 1-sqrt: the
    # value falls as 1 − √t, with t the elapsed share of the decay (Hägele et al. 2024, arXiv 2405.18392).
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "linear"
    boundaries: tuple[float, ...] = ()  # piecewise: start of each stage after the first
    boundary_values: tuple[float, ...] = ()  # piecewise: value of each stage after the first

    def stage_values(self) -> tuple[float, ...]:
        """Return the values that the schedule moves between, in order."""
        later_values: tuple[float, ...] = (self.end,)
        if self.kind in ("constant", "until_matched"):
            later_values = ()
        elif self.boundaries:
            later_values = self.boundary_values
        return (*((0.0,) if self.warmup_fraction > 0 else ()), self.value, *later_values)


@dataclass(frozen=True)
class Source:
    """A source of text documents. See docs/data.md."""

    kind: Literal["builtin", "text", "jsonl", "csv", "parquet", "tfds"] = "builtin"
    path: str = ""  # tfds: name/config:version; other kinds: a glob
    documents: Literal["file", "blank_lines", "lines"] = "blank_lines"  # text: separator of documents
    # documents=blank_lines: consecutive empty lines that end a document
    blank_lines: Annotated[int, at_least(1)] = 1
    field: str = "text"  # jsonl, csv, parquet, tfds: the field or column that holds the text
    split: str = "train"  # tfds
    data_dir: str = ""  # tfds; empty: TFDS's default
    weight: Annotated[float, POSITIVE] = 1.0  # how often each row occurs in one epoch of the mixture


@dataclass(frozen=True)
class Tokenizer:
    """An existing tokenizer, or the settings of a WordPiece tokenizer to train."""

    path: str = ""  # a Hugging Face tokenizer directory or a vocab.txt; empty: train WordPiece
    vocab_size: int = 30522
    alphabet_size: int = 0  # number of characters with a token of their own; 0: as many as fit
    lowercase: bool = True
    sample_megabytes: Annotated[float, POSITIVE] = 100.0  # amount of text to train the tokenizer on


RowMode = Literal["wrapped", "packed", "sentence"]
EndToken = Literal["segments", "documents"]


@dataclass(frozen=True)
class Data:
    """The training and validation text, and how it is packed into rows of tokens."""

    path: str = ""  # directory of prepared rows; empty: prepare them in the cache on first use
    sources: tuple[Source, ...] = (Source(),)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    sequence_length: Annotated[int, at_least(8)] = 128
    # Content of a row. wrapped: text that continues in the next row; packed: whole sentences;
    # sentence: one sentence.
    row_mode: RowMode = "wrapped"
    # Position of the end token ([SEP]). segments: after every segment of a row; documents: only at the end
    # of a document, so that a causal model does not learn to end a text at the end of a row.
    end_token: EndToken = "segments"
    # Fraction of the documents, selected by a hash of their text.
    validation_fraction: Annotated[float, OPEN_SHARE] = 0.01
    sentence_stride: Annotated[int, at_least(1)] = 1  # keep one sentence of every n (the paper's corpus: 4)
    # Maximum share of a source's text that the tokenizer may drop; a larger share is an error.
    max_lost_share: Annotated[float, SHARE] = 0.01
    prefetch: Annotated[int, at_least(1)] = 2  # batches read ahead


@dataclass(frozen=True)
class Mlm:
    """Masked language modelling: which tokens are predicted, and what replaces them in the input."""

    # Fraction of a row's tokens that are predicted. Evaluation always predicts 15 %.
    probability: Schedule = field(default_factory=lambda: Schedule(value=0.15))
    mask_token_share: Annotated[float, SHARE] = 0.8  # fraction of those replaced by [MASK]
    # Fraction of those replaced by a random token; the rest stay.
    random_token_share: Annotated[float, SHARE] = 0.1
    whole_word: bool = False  # mask all tokens of a word or none


@dataclass(frozen=True)
class Teacher:
    """The frozen model, or models, that the student is distilled from."""

    path: str = ""  # a model or run directory; empty: no teacher, or the teachers in `paths`
    # Several teachers instead: the student is distilled from the mean of their probabilities.
    paths: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # relative weights of the teachers in `paths`; empty: equal weights
    # Dtype of the teacher's weights on the devices; auto: precision.compute_dtype.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    # A directory that `dwt cache` wrote: the teacher's answers, in place of the teacher.
    cache: str = ""

    @property
    def is_set(self) -> bool:
        """Whether there is a teacher, in memory or as a cache."""
        return bool(self.path or self.paths or self.cache)

    @property
    def model_paths(self) -> tuple[str, ...]:
        """Paths of all teachers; empty if there is none."""
        return (self.path,) if self.path else self.paths

    @property
    def path_key(self) -> str:
        """Config key that names the teachers."""
        return "teacher.path" if self.path else "teacher.paths"


@dataclass(frozen=True)
class Init(GrowthOptions):
    """Initialisation of the student from a smaller model, grown to the student's size (see remap/).

    `split`, `noise`, `new_tokens`, `new_positions` and `new_layers` are inherited from `GrowthOptions`.
    """

    method: str = ""  # a method of remap/methods.py, or 'depth+method'; empty: random weights
    from_: str = ""  # config key `from`: a model or run directory; empty: teacher.path
    # A gate m of a model with gated_layers or weighted_norm has the effective value m + (1 − m)·s, where
    # s rises linearly from 0 to 1 over this fraction of the run. After that all gates are 1.
    gate_warmup: Annotated[float, SHARE] = 0.1
    # Updates of new entries and of duplicates are scaled by a factor that rises from 0 to 1 over this
    # fraction of the run.
    new_param_warmup: Annotated[float, SHARE] = 0.0
    # Step at which the run `from` was grown, set by `dwt remap-run`. `gate_warmup` and `new_param_warmup`
    # are then fractions of the remaining steps. 0: grown before the first step.
    step: Annotated[int, at_least(0)] = 0
    learning_steps: Annotated[int, at_least(1)] = 100  # method=ligo: training steps of the growth operator


@dataclass(frozen=True)
class Distill:
    """The distillation objective L = alpha_hard·H + alpha_soft·S (see objectives/distillation.py)."""

    preset: str = "custom"  # a preset in presets.py; the config may override its values
    alpha_hard: Schedule = field(default_factory=Schedule)
    alpha_soft: Schedule = field(default_factory=Schedule)
    temperature: Schedule = field(default_factory=Schedule)
    # Multiply the soft loss by t² as in Hinton et al. 2015; the paper does not.
    scale_by_temperature_squared: bool = False
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    token_selection: Literal["all", "teacher_better", "entropy"] = "all"
    # token_selection=entropy: fraction dropped, lowest teacher entropy first.
    drop_fraction: Annotated[float, SHARE] = 0.15
    # Rows whose logits are in memory at once; 0: automatic, see fused_lm_loss.py.
    loss_chunk_rows: Annotated[int, at_least(0)] = 0
    # until_matched compares the student's loss (with dropout) with the teacher's loss (without dropout).
    # Nats above the teacher's loss, below which the weight falls.
    match_margin: Annotated[float, POSITIVE] = 0.5
    gap_ema_decay: Annotated[float, DECAY] = 0.99  # decay of the moving average of this loss gap


@dataclass(frozen=True)
class Train:
    """Length of the run, batch size, checkpoints, logging and evaluation."""

    steps: Annotated[int, at_least(0)] = 0  # 0: computed from `epochs`
    epochs: Annotated[float, at_least(0)] = 0.0
    batch_size: Annotated[int, at_least(1)] = 128  # rows per step, over all devices and microbatches
    # Increasing numbers of rows per step for the stages before the full batch. The stages divide the first
    # `batch_ramp_fraction` of the steps equally. Example: [4, 8] and 0.3 give 4 rows up to 15 % of the
    # steps, 8 rows up to 30 %, then batch_size rows. LiGO and `dwt compile` always use batch_size rows.
    batch_ramp: tuple[int, ...] = ()
    batch_ramp_fraction: float = 0.0
    gradient_accumulation_steps: Annotated[int, at_least(1)] = 1  # microbatches per step
    save_every: Annotated[int, at_least(1)] = 1000
    keep_checkpoints: Annotated[int, at_least(1)] = 3
    checkpoint_path: str = ""  # a directory or gs://…; empty: checkpoints/ in the work directory
    log_every: Annotated[int, at_least(1)] = 10
    eval_every: Annotated[int, at_least(0)] = 0  # 0: only at the end
    # Seconds without a step after which the process ends; 0: off.
    watchdog: Annotated[float, at_least(0)] = 1800.0
    # The run stops after this many consecutive non-finite steps; checked when metrics are logged.
    max_consecutive_nonfinite: Annotated[int, at_least(1)] = 20
    tensorboard: bool = True
    wandb_project: str = ""  # empty: off


@dataclass(frozen=True)
class Optimizer:
    """An optimizer with global-norm clipping and decoupled weight decay.

    - adamw: Loshchilov & Hutter 2019.
    - stable_adamw: AdamW whose update is clipped by its root mean square, per tensor (Wortsman et al. 2023).
    - muon: momentum orthogonalised by Newton-Schulz iterations for the kernels of layers and heads (Jordan
      et al. 2024), with updates of AdamW's size (Liu et al. 2025); AdamW for tables, norms, biases and
      classifiers.
    """

    kind: Literal["adamw", "stable_adamw", "muon"] = "adamw"
    learning_rate: Schedule = field(
        default_factory=lambda: Schedule(kind="linear", value=5e-4, warmup_fraction=0.05)
    )
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: Annotated[float, at_least(0)] = 0.01  # of matrices and embedding tables only
    clip_norm: Annotated[float, at_least(0)] = 1.0  # 0: off
    momentum: float = 0.95  # muon: decay of the Nesterov momentum
    ns_steps: Annotated[int, at_least(1)] = 5  # muon: Newton-Schulz iterations per step
    # muon: learning rate of its AdamW part, relative to `learning_rate`.
    adam_lr_ratio: Annotated[float, at_least(0)] = 1.0


@dataclass(frozen=True)
class Mesh:
    """Devices per mesh axis; one axis may be -1 for all remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Precision:
    """Dtype and back end of the computation; parameters and optimizer state are always float32."""

    # auto: float32 on CPUs without bf16 instructions and with JAX_DEFAULT_MATMUL_PRECISION=float32 in the
    # environment, otherwise bfloat16. run.json records the choice.
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Back end of attention, see docs/models.md. auto: splash on TPUs and cudnn on NVIDIA GPUs if they
    # support student and teacher and rows have at least 1,024 tokens, otherwise reference.
    attention: Literal["auto", "reference", "cudnn", "splash"] = "auto"


@dataclass(frozen=True)
class Config:
    """All settings of a pre-training run."""

    seed: Annotated[int, SEED] = 0
    platform: Literal["any", "cpu", "gpu", "tpu"] = "any"  # fail if JAX runs on another platform
    model: ModelConfig = field(default_factory=default_model_config)
    data: Data = field(default_factory=Data)
    mlm: Mlm = field(default_factory=Mlm)
    teacher: Teacher = field(default_factory=Teacher)
    init: Init = field(default_factory=Init)
    distill: Distill = field(default_factory=Distill)
    train: Train = field(default_factory=Train)
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: Mesh = field(default_factory=Mesh)
    precision: Precision = field(default_factory=Precision)
