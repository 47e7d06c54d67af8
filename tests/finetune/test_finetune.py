"""Fine-tuning: initialization, comparison with torch, seeds, resuming, and output files."""

import json
import shutil
import signal
import time
import warnings

import jax
import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.config import Optimizer
from dwt_jax.data.hf_tokenizer import read_tokenizer
from dwt_jax.distributed.shutdown import Preempted, ShutdownFlag, TrainingFailed
from dwt_jax.errors import UserError
from dwt_jax.finetune import collate, outputs, runner
from dwt_jax.finetune import run as runs
from dwt_jax.finetune import step as steps
from dwt_jax.finetune.config import Recipe
from dwt_jax.finetune.datasets import read_examples
from dwt_jax.hf import checkpoint as hf_checkpoint
from dwt_jax.models import bert
from dwt_jax.models.bert import Config as BertConfig
from dwt_jax.models.common.matmul import Policy
from helpers.finetuning import FAMILIES, checkpoint, config_of, write_task
from helpers.glue import GLUE_FILES
from helpers.runs import dwt, start

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
CASES = [
    ("Bert", False),
    ("DistilBert", True),
    ("Roberta", False),
    ("ModernBert", False),
    ("EuroBert", False),
]  # family, regression


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        checkpoint(f"{family}ForMaskedLM", folder / family)
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("data") / "mine")


# Batches


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pairs", [False, True])
def test_encode_examples_matches_transformers(models, tmp_path, family, pairs):
    split = read_examples(config_of(write_task(tmp_path / "t", pairs=pairs)).examples).splits["train"]
    for length in (9, 20):
        encoded = collate.encode_examples(split, read_tokenizer(models / family), length)
        tokenizer = transformers.AutoTokenizer.from_pretrained(models / family)
        texts = (split.texts, split.text_pairs) if pairs else (split.texts,)
        expected = tokenizer(*texts, truncation=True, max_length=length, return_token_type_ids=True)
        for i in range(len(split)):
            tokens = slice(encoded.offsets[i], encoded.offsets[i + 1])
            assert encoded.tokens[tokens].tolist() == expected["input_ids"][i]
            assert encoded.token_type_ids[tokens].tolist() == expected["token_type_ids"][i]
        assert max(encoded.lengths) <= length
    assert len(encoded) == len(split)


def test_collate_examples_pads_to_the_smallest_bucket(models, task):
    encoded = collate.encode_examples(
        read_examples(config_of(task).examples).splits["train"], read_tokenizer(models / "Bert"), 20
    )
    lengths, padded_lengths = (5, 10, 20), set()
    for rows in collate.epoch_batch_indices(len(encoded), 4, (3, 4), 0):
        batch = collate.collate_examples(encoded, rows, lengths, pad_id=77)
        longest = max(encoded.lengths[i] for i in rows.ravel() if i >= 0)
        assert batch.tokens.shape[-1] == min(n for n in lengths if n >= longest)
        padded_lengths.add(batch.tokens.shape[-1])
        for position, i in np.ndenumerate(rows):
            tokens = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]] if i >= 0 else []
            assert batch.tokens[position].tolist() == [
                *tokens,
                *[77] * (batch.tokens.shape[-1] - len(tokens)),
            ]
            assert batch.segment_ids[position].sum() == len(tokens)
            assert batch.weights[position] == (i >= 0)
    assert len(padded_lengths) > 1


def test_epoch_batch_indices_are_permutations_by_seed_and_epoch():
    orders = {}
    for epoch in (0, 1):
        rows = np.concatenate(list(collate.epoch_batch_indices(10, 4, (0, 1), epoch)), axis=1)
        assert rows.shape == (2, 12)
        for seed in (0, 1):
            assert sorted(rows[seed]) == [-1, -1, *range(10)]
            orders[seed, epoch] = tuple(rows[seed])
    assert len(set(orders.values())) == 4
    single_seed = np.concatenate(list(collate.epoch_batch_indices(10, 4, (1,), 1)), axis=1)
    assert tuple(single_seed[0]) == orders[1, 1]


def test_epoch_batch_indices_group_similar_lengths(models):
    """Each epoch is a permutation by seed and epoch, with little more padding than a full sort."""
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    orders = {}
    for epoch in (0, 1):
        batches = list(collate.epoch_batch_indices(1000, 8, (4, 5), epoch, lengths))
        longest = np.array([[lengths[row[row >= 0]].max() for row in rows] for rows in batches])
        ideal = np.sort(lengths)[7::8].mean()
        unsorted = np.mean(
            [lengths[row[row >= 0]].max() for row, _ in collate.epoch_batch_indices(1000, 8, (4, 5), epoch)]
        )
        assert longest.mean() < ideal + 0.2 * (unsorted - ideal)
        assert longest.max(1).mean() < ideal + 0.3 * (unsorted - ideal)  # over the seeds of a step
        assert (
            np.abs(np.corrcoef(np.arange(len(longest)), longest[:, 0])[0, 1]) < 0.3
        )  # batches are in random order
        for i, seed in enumerate((4, 5)):
            rows = np.concatenate(batches, axis=1)[i]
            assert sorted(rows[rows >= 0]) == list(range(1000))
            orders[seed, epoch] = tuple(rows)
    assert len(set(orders.values())) == 4
    single_seed = np.concatenate(list(collate.epoch_batch_indices(1000, 8, (5,), 1, lengths)), axis=1)
    assert tuple(single_seed[0]) == orders[5, 1]


@pytest.mark.slow
def test_group_by_length_reduces_padding(models, task, tmp_path, monkeypatch):
    sizes, collate_examples = {}, collate.collate_examples
    for grouped in (False, True):
        batch_sizes = sizes[grouped] = []

        def record_size(encoded, rows, lengths, pad_id, batch_sizes=batch_sizes):
            batch = collate_examples(encoded, rows, lengths, pad_id)
            if rows.ndim > 1:  # a training batch
                batch_sizes.append(batch.tokens.size)
            return batch

        monkeypatch.setattr(collate, "collate_examples", record_size)
        config = config_of(task, buckets=10, group_by_length=grouped)
        runs.finetune_task(prepare_run(config, models / "Bert", tmp_path / str(grouped)), ShutdownFlag())
    assert len(sizes[True]) == len(sizes[False])
    assert sum(sizes[True]) < 0.9 * sum(sizes[False])


def test_example_cache_reads_and_encodes_once_for_all_models(models, task, tmp_path, monkeypatch):
    reads, encodes = [], []
    for calls, name in ((reads, "read_examples"), (encodes, "encode_examples")):
        function = getattr(collate, name)
        monkeypatch.setattr(
            collate, name, lambda *a, function=function, calls=calls: (calls.append(a), function(*a))[1]
        )
    example_cache = collate.ExampleCache()
    config = config_of(task, epochs=1)
    contexts = []
    for i, family in enumerate(("Bert", "DistilBert", "Roberta", "Roberta")):
        source = runs.load_source_model(str(models / family))
        (tmp_path / str(i)).mkdir()
        contexts.append(runs.prepare_finetuning(config, source, tmp_path / str(i), example_cache))
    # The first two have equal tokenizers; each encoding is of train, dev and test.
    assert (len(reads), len(encodes)) == (1, 6)
    uncached = prepare_run(config, models / "Roberta", tmp_path / "alone")
    for name, encoded in uncached.encoded.items():
        for field in encoded._fields:
            np.testing.assert_array_equal(getattr(contexts[3].encoded[name], field), getattr(encoded, field))
    assert not np.array_equal(contexts[0].encoded["dev"].tokens, contexts[3].encoded["dev"].tokens)


# Transfer


def init_state_of(path, seeds=(0,), labels=3):
    loaded = hf_checkpoint.load_checkpoint(path)
    step_config = steps.finetune_step_config(loaded.model, 0.0, labels, False, Recipe().optimizer, Policy())
    return loaded.params, steps.jit_init_finetune_state(step_config)(loaded.params, np.uint32(seeds))[
        "params"
    ]


@pytest.mark.parametrize(
    ("name", "is_pretrained"),
    [
        ("BertForMaskedLM", False),
        ("BertModel", True),
        ("BertForPreTraining", True),
        ("RobertaModel", False),  # the classifier does not use the encoder's pooler
        ("RobertaForSequenceClassification", True),
        ("DistilBertForMaskedLM", False),
        ("DistilBertForSequenceClassification", True),
    ],
)
def test_init_state_loads_the_pooler_if_transformers_does(tmp_path, name, is_pretrained):
    checkpoint(name, tmp_path / "m")
    params, new = init_state_of(tmp_path / "m", seeds=(0, 1))
    assert set(new) == {"embeddings", "layers", "pooler", "classifier"}
    word_embedding = new["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(word_embedding, np.stack([params["embeddings"]["word"]["embedding"]] * 2))
    pooler = np.asarray(new["pooler"]["kernel"])
    assert (pooler[0] == pooler[1]).all() == is_pretrained
    if is_pretrained:
        np.testing.assert_array_equal(pooler[0], params["pooler"]["kernel"])
    head = np.asarray(new["classifier"]["kernel"])
    assert head.shape == (2, 16, 3)
    assert not (head[0] == head[1]).any()
    assert 0.1 < head.std() < 0.3  # initializer_range 0.2
    # The layers that transformers initializes when it loads the same directory.
    auto = transformers.AutoModelForSequenceClassification
    _, loading = auto.from_pretrained(
        tmp_path / "m", num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    head_layers = {"pooler.dense", "pre_classifier", "classifier.dense"}
    initialized = {key for key in loading["missing_keys"] if any(part in key for part in head_layers)}
    assert bool(initialized) != is_pretrained


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_classifier_input_dropout(family):
    """With identity matrices in pooler and classifier the logits show the dropout masks."""
    size = 64
    model = BertConfig(model_type=family, vocab_size=9, hidden_size=size, hidden_dropout_prob=0.5)
    unit = {"kernel": np.eye(size, dtype=np.float32), "bias": np.zeros(size, np.float32)}
    params = {"pooler": unit, "classifier": unit}
    hidden = np.full((50, 1, size), 0.3, np.float32)
    plain = bert.classifier_logits(params, model, hidden, None)
    np.testing.assert_allclose(plain, np.tanh(0.3), rtol=1e-5)
    dropped = np.asarray(bert.classifier_logits(params, model, hidden, None, key=jax.random.key(0)))
    scaled = 2 * np.tanh(0.6 if family == "roberta" else 0.3)
    assert set(np.unique(np.round(dropped, 4))) == {0.0, np.float32(np.round(scaled, 4))}
    assert abs((dropped > 0).mean() - (0.25 if family == "roberta" else 0.5)) < 0.05


# Training


def prepare_run(config, model, workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    return runs.prepare_finetuning(config, runs.load_source_model(str(model)), workdir)


def train_in_torch(run, path, epochs):
    """Train transformers' model with torch's AdamW from the same initial weights; return the dev logits."""
    recipe, rates = run.config.recipe, run.config.recipe.optimizer
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).train()
    groups = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    decays = (rates.weight_decay, 0.0)
    adam = torch.optim.AdamW(
        [{"params": g, "weight_decay": d} for g, d in zip(groups, decays, strict=True)],
        lr=rates.learning_rate.value,
        betas=(rates.b1, rates.b2),
        eps=rates.eps,
    )
    train = run.encoded["train"]
    total_steps = epochs * -(-len(train) // recipe.batch_size)
    schedule = transformers.get_linear_schedule_with_warmup(adam, round(0.2 * total_steps), total_steps)
    for epoch in range(epochs):
        for rows in collate.epoch_batch_indices(len(train), recipe.batch_size, (0,), epoch):
            loss = model(**_torch_batch(run, "train", rows[0]), labels=_labels(run, rows[0])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), rates.clip_norm)
            adam.step()
            schedule.step()
            adam.zero_grad()
    return torch_logits(run, model, "dev")


def _labels(run, rows):
    labels = torch.tensor(run.encoded["train"].labels[rows[rows >= 0]])
    return labels if run.step_config.regression else labels.long()


def _torch_batch(run, name, rows):
    batch = collate.collate_examples(
        run.encoded[name], rows[rows >= 0], run.config.recipe.lengths(), run.source.pad_id
    )
    fields = {
        "input_ids": batch.tokens,
        "attention_mask": batch.segment_ids,
        "token_type_ids": batch.token_type_ids,
    }
    if run.step_config.model.model_type in ("distilbert", "modernbert", "eurobert"):
        del fields["token_type_ids"]
    return {key: torch.tensor(value) for key, value in fields.items()}


def torch_logits(run, model, name):
    with torch.no_grad():
        return model.eval()(**_torch_batch(run, name, np.arange(len(run.encoded[name])))).logits.numpy()


def load_without_warnings(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, output_loading_info=True
        )
    assert not any(loading.values()), loading
    return model


@pytest.mark.parametrize(("family", "numbers"), CASES)
def test_training_and_saved_model_match_torch(models, tmp_path, family, numbers):
    examples = write_task(tmp_path / "data" / "mine", numbers=numbers, pairs=not numbers)
    run = prepare_run(config_of(examples, dropout=0.0), models / family, tmp_path / "w")
    state = steps.jit_init_finetune_state(run.step_config)(run.source.checkpoint.params, np.uint32([0]))
    outputs.write_model(
        tmp_path / "w",
        jax.tree.map(lambda x: np.asarray(x)[0], state["params"]),
        run.source.checkpoint.model,
        {},
        run.data,
    )
    (tmp_path / "w" / "model").rename(tmp_path / "initial")
    hf_config = json.loads((tmp_path / "initial" / "config.json").read_text())
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if key in hf_config:
            hf_config[key] = 0.0
    hf_config |= {"seq_classif_dropout": 0.0}
    (tmp_path / "initial" / "config.json").write_text(json.dumps(hf_config))
    runs.finetune_task(run, ShutdownFlag())
    result = outputs.read_seed_result(run.workdir, 0)
    np.testing.assert_allclose(
        result.logits["dev"][-1], train_in_torch(run, tmp_path / "initial", 2), atol=2e-4, rtol=1e-3
    )

    model = load_without_warnings(run.workdir / "model")
    np.testing.assert_allclose(
        result.logits["dev"][result.best_epoch()], torch_logits(run, model, "dev"), atol=1e-4
    )
    assert model.config.problem_type == ("regression" if numbers else "single_label_classification")
    if not numbers:
        assert model.config.id2label == {0: "no", 1: "yes"}
        tokenizer = transformers.AutoTokenizer.from_pretrained(run.workdir / "model")
        split = run.data.splits["dev"]
        texts = [split.texts, split.text_pairs] if split.text_pairs else [split.texts]
        assert tokenizer.model_max_length == run.source.checkpoint.model.max_length
        rows = tokenizer(*texts, padding=True, truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            logits = model(**rows).logits.numpy()
        np.testing.assert_allclose(result.logits["dev"][result.best_epoch()], logits, atol=1e-4)
    card = (run.workdir / "model" / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"`{family}` fine-tuned by dwt-jax on the task mine" in card
    assert len((run.workdir / "submission" / "mine.tsv").read_text().splitlines()) == 6


@pytest.mark.parametrize(("pooling", "numbers"), [("bos", False), ("mean", True), ("late", True)])
def test_each_pooling_is_exported(tmp_path, pooling, numbers):
    """transformers pads on the right, and counts no padding in a mean."""
    checkpoint("EuroBertForMaskedLM", tmp_path / "m", classifier_pooling=pooling)
    config = config_of(write_task(tmp_path / "mine", numbers=numbers), epochs=1)
    run = prepare_run(config, tmp_path / "m", tmp_path / "w")
    runs.finetune_task(run, ShutdownFlag())
    model = load_without_warnings(tmp_path / "w" / "model")
    assert type(model).__name__ == "EuroBertForSequenceClassification"
    assert model.config.classifier_pooling == pooling
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "w" / "model")
    texts = run.data.splits["dev"].texts
    rows = tokenizer(texts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    assert not rows["attention_mask"].all()
    with torch.no_grad():
        logits = model(**rows).logits.numpy()
    result = outputs.read_seed_result(tmp_path / "w", 0)
    np.testing.assert_allclose(result.logits["dev"][0], logits, atol=1e-4)


def test_finetuning_learns_the_task(models, task, tmp_path):
    """The label is whether a text contains 'good'; chance is one half."""
    results = runs.finetune_task(
        prepare_run(config_of(task, epochs=12), models / "Bert", tmp_path), ShutdownFlag()
    )
    assert results["best"]["mean"] > 0.9
    losses = [epoch["train_loss"] for epoch in results["seeds"]["0"]["history"]]
    assert losses[-1] < 0.5 * losses[0]


def test_card_names_licence_and_base_model(models, task, tmp_path):
    import yaml

    snapshot = tmp_path / "models--someone--bert" / "snapshots" / "abc"
    shutil.copytree(models / "Bert", snapshot)
    card = "---\nlicense: cc-by-4.0\nlanguage: no\ndatasets: [wiki]\nbase_model: other/base\n---\n# Bert\n"
    (snapshot / "README.md").write_text(card)
    run = prepare_run(config_of(task, epochs=1), snapshot, tmp_path / "run")
    runs.finetune_task(run, ShutdownFlag())
    header = yaml.safe_load((run.workdir / "model" / "README.md").read_text().split("---")[1])
    expected = {"license": "cc-by-4.0", "language": "no", "base_model": "someone/bert"}
    assert {key: header.get(key) for key in expected} == expected
    assert "datasets" not in header  # those of the base model
    assert header["model-index"]


def trace_counts(config, model, workdir):
    """Return the number of traces of a run."""
    for function in (steps.jit_finetune_step, steps.jit_predict):
        function.cache_clear()
    steps.FINETUNE_TRACE_COUNTS.clear()
    runs.finetune_task(prepare_run(config, model, workdir), ShutdownFlag())
    return dict(steps.FINETUNE_TRACE_COUNTS)


@pytest.mark.slow
def test_seeds_in_parallel_match_single_seeds(models, task, tmp_path):
    """With one padded length, on which dropout depends."""
    results = {}
    for seeds_in_parallel in (1, 3):
        config = config_of(task, dropout=0.1, seeds=[5, 6, 7], seeds_in_parallel=seeds_in_parallel)
        # The test file is predicted with the parameters of one seed.
        expected = {"train": 1, "predict": min(seeds_in_parallel, 2)}
        assert trace_counts(config, models / "Bert", tmp_path / str(seeds_in_parallel)) == expected
        results[seeds_in_parallel] = [
            outputs.read_seed_result(tmp_path / str(seeds_in_parallel), seed) for seed in (5, 6, 7)
        ]
    for single, parallel in zip(results[1], results[3], strict=True):
        np.testing.assert_allclose(single.logits["dev"][-1], parallel.logits["dev"][-1], atol=5e-3)
    assert not np.allclose(results[1][0].logits["dev"][-1], results[1][1].logits["dev"][-1], atol=5e-3)


@pytest.mark.parametrize("kind", ["muon", "stable_adamw"])
def test_other_optimizers_match_for_seeds_in_parallel_and_alone(tiny, randomised, kind):
    optimizer = Optimizer(kind, eps=1e-3)
    config = steps.finetune_step_config(tiny, 0.0, 2, False, optimizer, Policy())
    random, shape = np.random.default_rng(0), (2, 6, 9)
    tokens, ones = random.integers(5, 119, shape).astype(np.int32), np.ones(shape, np.int32)
    labels = random.integers(0, 2, shape[:2]).astype(np.int32)
    batch = collate.ExampleBatch(tokens, ones, 0 * ones, labels, np.ones(shape[:2], np.float32))
    seeds, params = np.uint32([5, 6]), randomised(tiny)

    def train(rows):
        state = steps.jit_init_finetune_state(config)(params, seeds[rows])
        before = jax.device_get(state["params"])
        for step in range(2):
            state, losses = steps.jit_finetune_step(config)(
                state, jax.tree.map(lambda x: x[rows], batch), seeds[rows], np.int32(step), np.float32(1e-2)
            )
        return before, jax.device_get((state["params"], losses))

    before, after = train(slice(0, 2))
    for i in range(2):
        alone = train(slice(i, i + 1))[1]
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y[0], atol=2e-5), after, alone)
    for name in ("classifier", "pooler"):
        assert np.abs(after[0][name]["kernel"] - before[name]["kernel"]).max() > 1e-3


def test_one_compilation_per_padded_length(models, task, tmp_path):
    """Independent of seeds and epochs, and none for another learning rate."""
    config = config_of(task, dropout=0.1, seeds=[1, 2], buckets=2)
    assert trace_counts(config, models / "Bert", tmp_path / "a") == {"train": 2, "predict": 2}
    rate = {"learning_rate": {"kind": "constant", "value": 1e-3}, "eps": 1e-6}
    config = config_of(task, dropout=0.1, buckets=2, optimizer=rate)
    steps.FINETUNE_TRACE_COUNTS.clear()
    runs.finetune_task(prepare_run(config, models / "Bert", tmp_path / "b"), ShutdownFlag())
    assert not steps.FINETUNE_TRACE_COUNTS


def test_seeds_that_fit_grows_with_memory():
    model = BertConfig(vocab_size=30522)
    recipe = Recipe(seeds=tuple(range(8)))
    counts = [runs.seeds_that_fit(gigabytes * 10**9, model, recipe) for gigabytes in (1, 16, 40, 80, 10000)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 8)
    assert 1 < counts[2] < 8


# Resuming


class Killed(BaseException):
    pass


def raise_at_call(monkeypatch, module, name, index):
    """Make the function `name` of a module raise Killed at the call number `index`."""
    function, count = getattr(module, name), iter(range(10**6))

    def call(*arguments, **options):
        if next(count) == index:
            raise Killed
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, call)


@pytest.fixture(scope="module")
def finished_run(models, task, tmp_path_factory):
    """A run without interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    config = config_of(task, seeds=[3, 1, 2], dropout=0.1)
    return config, runs.finetune_task(prepare_run(config, models / "Bert", workdir), ShutdownFlag()), workdir


@pytest.mark.parametrize(
    ("module", "name", "index"),
    [
        (collate, "collate_examples", 30),  # in the middle of a seed
        (outputs, "write_seed_result", 1),  # model/ is of a seed whose results are not written
        (outputs, "write_model", 0),
        (outputs, "write_test_predictions", 0),
        (outputs, "summarize_seeds", 0),
    ],
)
def test_killed_run_resumes_with_the_same_numbers(
    models, finished_run, tmp_path, monkeypatch, module, name, index
):
    config, expected, other = finished_run
    with monkeypatch.context() as patch:
        raise_at_call(patch, module, name, index)
        with pytest.raises(Killed):
            runs.finetune_task(prepare_run(config, models / "Bert", tmp_path), ShutdownFlag())
    mtimes = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seeds/*.npz")}
    assert not (tmp_path / "results.json").exists()
    assert runs.finetune_task(prepare_run(config, models / "Bert", tmp_path), ShutdownFlag()) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in mtimes.items())  # never repeated
    for file in (
        "model/model.safetensors",
        "model/README.md",
        "predictions/dev-seed1.tsv",
        "submission/mine.tsv",
    ):
        assert (tmp_path / file).read_bytes() == (other / file).read_bytes(), file
    assert json.loads((tmp_path / "results.json").read_text()) == expected


def test_signal_stops_between_steps_and_finished_run_is_not_repeated(
    models, finished_run, tmp_path, monkeypatch
):
    config, expected, workdir = finished_run
    stopping = ShutdownFlag()
    stopping.arm()
    stopping.handle(15, None)
    with pytest.raises(Preempted, match="Rerun the same command"):
        runs.finetune_task(prepare_run(config, models / "Bert", tmp_path), stopping)
    monkeypatch.setattr(runs, "_train_seeds", None)
    assert runs.finetune_task(prepare_run(config, models / "Bert", workdir), ShutdownFlag()) == expected


def test_interrupted_group_of_parallel_seeds_restarts(models, task, tmp_path, monkeypatch):
    """Killed between the files of one group: the group restarts and ends bitwise the same."""
    config = config_of(task, seeds=[0, 1, 2], seeds_in_parallel=3, dropout=0.1, buckets=2)
    expected = runs.finetune_task(prepare_run(config, models / "Bert", tmp_path / "a"), ShutdownFlag())
    with monkeypatch.context() as patch:
        raise_at_call(patch, outputs, "write_seed_result", 1)
        with pytest.raises(Killed):
            runs.finetune_task(prepare_run(config, models / "Bert", tmp_path / "b"), ShutdownFlag())
    assert (
        runs.finetune_task(prepare_run(config, models / "Bert", tmp_path / "b"), ShutdownFlag()) == expected
    )


def test_directory_of_another_run_is_refused(models, finished_run, tmp_path, task):
    config, _, workdir = finished_run
    for other, model, message in (
        (config_of(task, seeds=[3, 1, 2], epochs=3), "Bert", "recipe.epochs is 2"),
        (config, "DistilBert", "run.model_digest is"),
    ):
        with pytest.raises(UserError) as caught:
            prepare_run(other, models / model, workdir)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files but no run"):
        prepare_run(config, models / "Bert", tmp_path)
    damaged = workdir / "seeds" / "9.npz"
    damaged.write_bytes(b"PK")
    with pytest.raises(UserError, match="remove it to run the seed again"):
        outputs.read_seed_result(workdir, 9)


# Special cases


def test_max_length_is_reduced_to_the_models_positions(models, task, tmp_path, capsys):
    run = prepare_run(config_of(task, max_length=128), models / "Roberta", tmp_path)
    assert run.config.recipe.max_length == 24  # of 26, two are the padding's
    assert "has 24 positions; longer examples are truncated" in capsys.readouterr().err
    assert prepare_run(config_of(task, max_length=128), models / "Roberta", tmp_path).config == run.config


def test_a_dev_file_that_is_the_train_file_is_warned_of(models, task, tmp_path, capsys):
    prepare_run(config_of(task | {"dev": task["train"]}), models / "Bert", tmp_path)
    assert "mine: warning: 100% of the examples in dev are in train too" in capsys.readouterr().err


def test_non_finite_loss_raises_training_failed(models, task, tmp_path):
    config = config_of(task, dropout=0.1, optimizer={"learning_rate": {"value": 1e30}, "eps": 1e-6})
    with pytest.raises(TrainingFailed, match="of seed 0 is not finite in epoch 1; the learning rate"):
        runs.finetune_task(prepare_run(config, models / "Bert", tmp_path), ShutdownFlag())


def test_undefined_metric_counts_as_zero_with_a_warning(models, task, tmp_path, capsys):
    """All dev labels are the same, and the learning rate is 0."""
    rows = (tmp_path / "t").with_suffix(".tsv")
    rows.write_text("sentence\tlabel\na\tno\nb\tno\nc\tno\n")
    examples = {**task, "dev": str(rows), "metrics": ["matthews", "f1"], "labels": ["no", "yes"]}
    config = config_of(
        examples, optimizer={"learning_rate": {"value": 0.0}, "eps": 1e-6}, dropout=0.1, epochs=1
    )
    run = prepare_run(config, models / "Bert", tmp_path / "w")
    runs.finetune_task(run, ShutdownFlag())
    assert "counted as 0, since 0/0" in capsys.readouterr().err

    def no_nan(name):
        raise AssertionError(name)

    results = json.loads((run.workdir / "results.json").read_text(), parse_constant=no_nan)
    assert results["best"]["dev"]["dev"]["matthews"] == 0.0
    assert results["best"]["standard_deviation"] is None


# The command


def test_command_on_glue_files(models, tmp_path, capsys):
    for name, files in GLUE_FILES.items():
        (tmp_path / "glue" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "glue" / name / file).write_bytes(text.encode())
    arguments = [
        "finetune",
        f"--model={models / 'Bert'}",
        f"--workdir={tmp_path / 'w'}",
        "--task=cola,mnli",
        "--config.examples.kind=glue",
        f"--config.examples.path={tmp_path / 'glue'}",
        "--config.recipe.epochs=1",
        "--config.recipe.seeds=[0, 1]",
        "--config.recipe.buckets=1",
        "--config.recipe.batch_size=8",
        "--config.recipe.max_length=20",
    ]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "average over cola, mnli: the mean of the tasks' scores" in output
    summary = json.loads((tmp_path / "w" / "results.json").read_text())
    for epoch in ("best", "last"):
        scores = [summary["tasks"][name][epoch]["by_seed"] for name in ("cola", "mnli")]
        assert summary["average"][epoch]["by_seed"] == pytest.approx(np.mean(scores, axis=0))
        assert summary["average"][epoch]["mean"] == pytest.approx(np.mean(scores))
    files = {file.name: file.read_text().splitlines() for file in (tmp_path / "w" / "submission").iterdir()}
    assert set(files) == {"CoLA.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"}
    assert all(lines[0] == "index\tprediction" for lines in files.values())
    cells = {name: [line.split("\t") for line in lines[1:]] for name, lines in files.items()}
    assert [index for index, _ in cells["CoLA.tsv"]] == ["0", "1"]
    assert {value for _, value in cells["CoLA.tsv"]} <= {"0", "1"}
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"):
        assert {value for _, value in cells[name]} <= {"entailment", "neutral", "contradiction"}
    dev = (tmp_path / "w" / "mnli" / "predictions" / "dev_mismatched-seed1.tsv").read_text().splitlines()
    assert dev[0] == "index\tprediction\tlabel"
    assert [line.split("\t")[2] for line in dev[1:]] == ["neutral", "entailment", "contradiction"]
    assert load_without_warnings(tmp_path / "w" / "cola" / "model").config.id2label == {
        0: "unacceptable",
        1: "acceptable",
    }
    assert main(["export", f"--model={tmp_path / 'w' / 'cola'}", f"--out={tmp_path / 'out'}"]) == 0
    assert load_without_warnings(tmp_path / "out").config.label2id == {"unacceptable": 0, "acceptable": 1}
    assert "on the task cola" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert main(arguments) == 0
    assert "already finished" in capsys.readouterr().err
    assert main([*arguments, "--config.recipe.epochs=2"]) == 2
    assert "recipe.epochs is 1" in capsys.readouterr().err
    # Results of another task in the same directory are added.
    later = [argument.replace("cola,mnli", "rte") for argument in arguments]
    assert main(later) == 0
    joined = json.loads((tmp_path / "w" / "results.json").read_text())
    assert set(joined["tasks"]) == {"cola", "mnli", "rte"}
    assert all(joined["tasks"][name] == summary["tasks"][name] for name in ("cola", "mnli"))
    other = [argument.replace(str(models / "Bert"), str(models / "Roberta")) for argument in later]
    assert main([a.replace("rte", "stsb") for a in other]) == 0
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert set(results["tasks"]) == {"stsb"}
    (tmp_path / "glue" / "RTE" / "dev.tsv").unlink()
    capsys.readouterr()
    assert main([a.replace("=rte", "=cola,rte").replace("/w", "/new") for a in later]) == 2
    assert "dev.tsv: no such file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_submission_is_clipped_to_glues_bounds(tmp_path):
    from dwt_jax.finetune.datasets import ExampleSplit, TaskData

    split = ExampleSplit(["a"] * 3, None, None, ["0", "1", "2"])
    data = TaskData({}, (), ("pearson",), (), {"test": "STS-B.tsv"}, (0, 5))
    outputs.write_test_predictions(
        tmp_path, "stsb", "test", split, data, np.array([[-0.5], [3.14159], [7.0]])
    )
    lines = (tmp_path / "submission" / "STS-B.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", "0\t0.000", "1\t3.142", "2\t5.000"]


def test_own_predictions_have_full_precision(tmp_path):
    """Numbers are small in some units: three decimals are GLUE's rule alone."""
    from dwt_jax.finetune.datasets import ExampleSplit, TaskData

    logits = np.array([[1.2345678e-4], [1.2345679e-4], [-3.5]], np.float32)
    split = ExampleSplit(["a"] * 3, None, None, ["0", "1", "2"])
    outputs.write_test_predictions(
        tmp_path, "mine", "test", split, TaskData({}, (), ("pearson",), ()), logits
    )
    lines = (tmp_path / "submission" / "mine.tsv").read_text().splitlines()[1:]
    assert [np.float32(line.split("\t")[1]) for line in lines] == logits[:, 0].tolist()


def test_submission_has_the_order_of_the_test_file(tmp_path):
    """TFDS has shuffled GLUE's test files. Other files keep their order, whatever their ids."""
    from dwt_jax.finetune.datasets import ExampleSplit, TaskData

    split = ExampleSplit(["a"] * 3, None, None, ["10", "9", "0"])
    logits = np.eye(3)
    for submissions, file, order in (
        ({"test": "MNLI-m.tsv"}, "MNLI-m.tsv", "0c 9b 10a"),
        ({}, "mine.tsv", "10a 9b 0c"),
    ):
        data = TaskData({}, ("a", "b", "c"), ("accuracy",), (), submissions)
        outputs.write_test_predictions(tmp_path, "mine", "test", split, data, logits)
        lines = (tmp_path / "submission" / file).read_text().splitlines()
        assert [line.replace("\t", "") for line in lines[1:]] == order.split()


def test_tabs_in_names_become_spaces(tmp_path):
    """JSON may contain tabs, a TSV cell may not."""
    from dwt_jax.finetune.datasets import ExampleSplit, TaskData

    split = ExampleSplit(["a", "b"], None, np.array([0, 1], np.int32), ["x\ty", "z\nw"])
    result = outputs.SeedResult(0, [{"dev": {"dev": {"score": 1.0}}}], {"dev": [np.eye(2)]})
    outputs.write_dev_predictions(
        tmp_path, TaskData({"dev": split}, ("n\to", "yes"), ("accuracy",)), [result]
    )
    lines = (tmp_path / "predictions" / "dev-seed0.tsv").read_text().splitlines()
    assert lines == ["index\tprediction\tlabel", "x y\tn o\tn o", "z w\tyes\tyes"]


def test_average_of_tasks_with_different_seeds_has_no_deviation():
    result = {"metrics": ["f1"], "model_of_seed": 0, "examples": {}, "seeds": {"0": {}, "1": {}}}
    result |= {epoch: {"by_seed": [0.5, 0.7], "mean": 0.6, "dev": {}} for epoch in ("best", "last")}
    other = {
        **result,
        "seeds": {"0": {}},
        **{epoch: {"by_seed": [0.8], "mean": 0.8} for epoch in ("best", "last")},
    }
    average = runner.summarize_tasks({"a": result, "b": other})["average"]["best"]
    assert (average["mean"], average["standard_deviation"]) == (pytest.approx(0.7), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task=rta"], "no task 'rta'"),
        (["--task=rte"], "tfds 'glue/rte'"),
        (["--model=nowhere"], "nowhere: no such directory"),
        (["--config.recipe.epoch=1"], "unknown key 'recipe.epoch'; did you mean 'recipe.epochs'"),
    ],
)
def test_user_errors_are_one_line(models, tmp_path, capsys, arguments, message, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    options = {"--model": f"--model={models / 'Bert'}", "--workdir": f"--workdir={tmp_path / 'w'}"}
    options |= {argument.partition("=")[0]: argument for argument in arguments}
    assert main(["finetune", *options.values()]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_command_resumes_after_kill_and_sigterm(models, task, tmp_path):
    """kill -9 in the second seed, SIGTERM in the third, then a run to the end."""
    arguments = [
        "finetune",
        "--task=files",
        f"--model={models / 'Bert'}",
        *(f"--config.examples.{key}={task[key]}" for key in ("task", "train", "dev", "test")),
        "--config.recipe.epochs=40",
        "--config.recipe.max_length=20",
        "--config.recipe.buckets=1",
        "--config.recipe.batch_size=1",
    ]
    assert dwt(*arguments, f"--workdir={tmp_path / 'whole'}").returncode == 0
    folder = tmp_path / "stopped"
    for seed, signal_number, status in ((0, signal.SIGKILL, -9), (1, signal.SIGTERM, 75)):
        process = start(*arguments, f"--workdir={folder}")
        while not (folder / "mine" / "seeds" / f"{seed}.npz").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal_number)
        process.communicate()
        assert process.returncode == status
    assert not (folder / "mine" / "results.json").exists()
    completed = dwt(*arguments, f"--workdir={folder}")
    assert completed.returncode == 0, completed.stderr
    for file in ("results.json", "mine/results.json", "mine/model/model.safetensors", "submission/mine.tsv"):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
