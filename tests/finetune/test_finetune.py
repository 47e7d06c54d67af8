"""Fine-tuning: transfer, steps as torch takes them, seeds, resuming, and what it leaves behind."""

import json
import signal
import time
import warnings

import jax
import numpy as np
import pytest

from dwt_jax.cli import main
from dwt_jax.distributed.shutdown import Preempted, ShutdownFlag
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
from dwt_jax.train.loop import TrainingFailed
from helpers.finetuning import FAMILIES, checkpoint, config_of, write_task
from helpers.glue import GLUE_FILES
from helpers.runs import dwt, start

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
CASES = [("Bert", False), ("DistilBert", True), ("Roberta", False)]  # and whether it is a regression


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
def test_tokens_are_those_of_transformers(models, tmp_path, family, pairs):
    split = read_examples(config_of(write_task(tmp_path / "t", pairs=pairs)).examples).splits["train"]
    for length in (9, 20):
        found = collate.encode_examples(split, models / family, length)
        theirs = transformers.AutoTokenizer.from_pretrained(models / family)
        texts = (split.first, split.second) if pairs else (split.first,)
        said = theirs(*texts, truncation=True, max_length=length, return_token_type_ids=True)
        for i in range(len(split)):
            at = slice(found.offsets[i], found.offsets[i + 1])
            assert found.tokens[at].tolist() == said["input_ids"][i]
            assert found.token_type_ids[at].tolist() == said["token_type_ids"][i]
        assert max(found.lengths) <= length
    assert len(found) == len(split)


def test_batches_are_padded_to_the_smallest_length_that_holds_them(models, task):
    encoded = collate.encode_examples(
        read_examples(config_of(task).examples).splits["train"], models / "Bert", 20
    )
    lengths, seen = (5, 10, 20), set()
    for rows in collate.epoch_batch_indices(len(encoded), 4, (3, 4), 0):
        batch = collate.collate_examples(encoded, rows, lengths, pad_id=77)
        longest = max(encoded.lengths[i] for i in rows.ravel() if i >= 0)
        assert batch.tokens.shape[-1] == min(n for n in lengths if n >= longest)
        seen.add(batch.tokens.shape[-1])
        for place, i in np.ndenumerate(rows):
            own = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]] if i >= 0 else []
            assert batch.tokens[place].tolist() == [*own, *[77] * (batch.tokens.shape[-1] - len(own))]
            assert batch.segment_ids[place].sum() == len(own)
            assert batch.weights[place] == (i >= 0)
    assert len(seen) > 1


def test_an_epoch_is_every_example_once_in_an_order_of_its_seed_and_number():
    orders = {}
    for number in (0, 1):
        rows = np.concatenate(list(collate.epoch_batch_indices(10, 4, (0, 1), number)), axis=1)
        assert rows.shape == (2, 12)
        for seed in (0, 1):
            assert sorted(rows[seed]) == [-1, -1, *range(10)]
            orders[seed, number] = tuple(rows[seed])
    assert len(set(orders.values())) == 4
    alone = np.concatenate(list(collate.epoch_batch_indices(10, 4, (1,), 1)), axis=1)
    assert tuple(alone[0]) == orders[1, 1]


def test_batches_of_like_length(models):
    """Every example once, in an order of seed and number, and hardly longer than if all were sorted."""
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    seen = {}
    for number in (0, 1):
        drawn = list(collate.epoch_batch_indices(1000, 8, (4, 5), number, lengths))
        longest = np.array([[lengths[row[row >= 0]].max() for row in rows] for rows in drawn])
        ideal = np.sort(lengths)[7::8].mean()
        chance = np.mean(
            [lengths[row[row >= 0]].max() for row, _ in collate.epoch_batch_indices(1000, 8, (4, 5), number)]
        )
        assert longest.mean() < ideal + 0.2 * (chance - ideal)
        assert longest.max(1).mean() < ideal + 0.3 * (chance - ideal)  # those that run side by side
        assert np.abs(np.corrcoef(np.arange(len(longest)), longest[:, 0])[0, 1]) < 0.3  # dealt at random
        for i, seed in enumerate((4, 5)):
            rows = np.concatenate(drawn, axis=1)[i]
            assert sorted(rows[rows >= 0]) == list(range(1000))
            seen[seed, number] = tuple(rows)
    assert len(set(seen.values())) == 4
    alone = np.concatenate(list(collate.epoch_batch_indices(1000, 8, (5,), 1, lengths)), axis=1)
    assert tuple(alone[0]) == seen[5, 1]


@pytest.mark.slow
def test_batches_of_like_length_train_with_less_padding(models, task, tmp_path, monkeypatch):
    padded, real = {}, collate.collate_examples
    for grouped in (False, True):
        count = padded[grouped] = []

        def gather(encoded, rows, lengths, pad_id, count=count):
            batch = real(encoded, rows, lengths, pad_id)
            if rows.ndim > 1:  # of training
                count.append(batch.tokens.size)
            return batch

        monkeypatch.setattr(collate, "collate_examples", gather)
        config = config_of(task, buckets=10, group_by_length=grouped)
        runs.finetune_task(run_of(config, models / "Bert", tmp_path / str(grouped)), ShutdownFlag())
    assert len(padded[True]) == len(padded[False])
    assert sum(padded[True]) < 0.9 * sum(padded[False])


def test_examples_are_read_and_encoded_once_for_all_models(models, task, tmp_path, monkeypatch):
    reads, encodes = [], []
    for calls, name in ((reads, "read"), (encodes, "encode")):
        real = getattr(collate, name)
        monkeypatch.setattr(collate, name, lambda *a, real=real, calls=calls: (calls.append(a), real(*a))[1])
    texts = collate.ExampleCache()
    config = config_of(task, epochs=1)
    found = []
    for i, family in enumerate(("Bert", "DistilBert", "Roberta", "Roberta")):
        source = runs.load_source_model(str(models / family))
        (tmp_path / str(i)).mkdir()
        found.append(runs.prepare_finetuning(config, source, tmp_path / str(i), texts))
    # The first two have the same words; every encoding is of train, dev and test.
    assert (len(reads), len(encodes)) == (1, 6)
    alone = run_of(config, models / "Roberta", tmp_path / "alone")
    for name, one in alone.encoded.items():
        for field in one._fields:
            np.testing.assert_array_equal(getattr(found[3].encoded[name], field), getattr(one, field))
    assert not np.array_equal(found[0].encoded["dev"].tokens, found[3].encoded["dev"].tokens)


# Transfer


def begun(path, seeds=(0,), labels=3):
    found = hf_checkpoint.load_checkpoint(path)
    spec = steps.finetune_step_config(found.model, 0.0, labels, False, Recipe().optimizer, Policy())
    return found.params, steps.jit_init_finetune_state(spec)(found.params, np.uint32(seeds))["params"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("BertForMaskedLM", False),
        ("BertModel", True),
        ("BertForPreTraining", True),
        ("RobertaModel", False),  # its encoder's pooler is not what classifies
        ("RobertaForSequenceClassification", True),
        ("DistilBertForMaskedLM", False),
        ("DistilBertForSequenceClassification", True),
    ],
)
def test_the_pooler_is_that_of_the_model_where_transformers_keeps_it(tmp_path, name, kept):
    checkpoint(name, tmp_path / "m")
    params, new = begun(tmp_path / "m", seeds=(0, 1))
    assert set(new) == {"embeddings", "layers", "pooler", "classifier"}
    word = new["embeddings"]["word"]["embedding"]
    np.testing.assert_array_equal(word, np.stack([params["embeddings"]["word"]["embedding"]] * 2))
    pooler = np.asarray(new["pooler"]["kernel"])
    assert (pooler[0] == pooler[1]).all() == kept
    if kept:
        np.testing.assert_array_equal(pooler[0], params["pooler"]["kernel"])
    head = np.asarray(new["classifier"]["kernel"])
    assert head.shape == (2, 16, 3)
    assert not (head[0] == head[1]).any()
    assert 0.1 < head.std() < 0.3  # initializer_range 0.2
    # What transformers says that it makes anew, loading the same directory.
    auto = transformers.AutoModelForSequenceClassification
    _, loading = auto.from_pretrained(
        tmp_path / "m", num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    ours = {"pooler.dense", "pre_classifier", "classifier.dense"}
    anew = {key for key in loading["missing_keys"] if any(part in key for part in ours)}
    assert bool(anew) != kept


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_dropout_of_what_the_classifier_takes(family):
    """With identities for the pooler and the classifier the masks can be seen."""
    size = 64
    model = BertConfig(model_type=family, vocab_size=9, hidden_size=size, hidden_dropout_prob=0.5)
    unit = {"kernel": np.eye(size, dtype=np.float32), "bias": np.zeros(size, np.float32)}
    params = {"pooler": unit, "classifier": unit}
    hidden = np.full((50, 1, size), 0.3, np.float32)
    plain = bert.classifier_logits(params, model, hidden)
    np.testing.assert_allclose(plain, np.tanh(0.3), rtol=1e-5)
    dropped = np.asarray(bert.classifier_logits(params, model, hidden, key=jax.random.key(0)))
    kept = 2 * np.tanh(0.6 if family == "roberta" else 0.3)
    assert set(np.unique(np.round(dropped, 4))) == {0.0, np.float32(np.round(kept, 4))}
    assert abs((dropped > 0).mean() - (0.25 if family == "roberta" else 0.5)) < 0.05


# Training


def run_of(config, model, workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    return runs.prepare_finetuning(config, runs.load_source_model(str(model)), workdir)


def in_torch(run, path, epochs):
    """The same steps with transformers' model and torch's AdamW, from the same beginning. → dev logits"""
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
    steps_ = epochs * -(-len(train) // recipe.batch_size)
    schedule = transformers.get_linear_schedule_with_warmup(adam, round(0.2 * steps_), steps_)
    for number in range(epochs):
        for rows in collate.epoch_batch_indices(len(train), recipe.batch_size, (0,), number):
            loss = model(**_torch_batch(run, "train", rows[0]), labels=_labels(run, rows[0])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), rates.clip_norm)
            adam.step()
            schedule.step()
            adam.zero_grad()
    return torch_logits(run, model, "dev")


def _labels(run, rows):
    found = torch.tensor(run.encoded["train"].labels[rows[rows >= 0]])
    return found if run.step_config.regression else found.long()


def _torch_batch(run, name, rows):
    batch = collate.collate_examples(
        run.encoded[name], rows[rows >= 0], run.config.recipe.lengths(), run.source.pad_id
    )
    fields = {
        "input_ids": batch.tokens,
        "attention_mask": batch.segment_ids,
        "token_type_ids": batch.token_type_ids,
    }
    if run.step_config.model.model_type == "distilbert":
        del fields["token_type_ids"]
    return {key: torch.tensor(value) for key, value in fields.items()}


def torch_logits(run, model, name):
    with torch.no_grad():
        return model.eval()(**_torch_batch(run, name, np.arange(len(run.encoded[name])))).logits.numpy()


def no_warning(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, output_loading_info=True
        )
    assert not any(loading.values()), loading
    return model


@pytest.mark.parametrize(("family", "numbers"), CASES)
def test_as_torch_trains_and_as_torch_loads_it(models, tmp_path, family, numbers):
    examples = write_task(tmp_path / "data" / "mine", numbers=numbers, pairs=family == "Bert")
    run = run_of(config_of(examples, dropout=0.0), models / family, tmp_path / "w")
    begin = steps.jit_init_finetune_state(run.step_config)(run.source.checkpoint.params, np.uint32([0]))
    outputs.write_model(
        tmp_path / "w",
        jax.tree.map(lambda x: np.asarray(x)[0], begin["params"]),
        run.source.checkpoint.model,
        {},
        run.data,
    )
    (tmp_path / "w" / "model").rename(tmp_path / "decay_start")
    change = json.loads((tmp_path / "begin" / "config.json").read_text())
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if key in change:
            change[key] = 0.0
    change |= {"seq_classif_dropout": 0.0}
    (tmp_path / "begin" / "config.json").write_text(json.dumps(change))
    runs.finetune_task(run, ShutdownFlag())
    one = outputs.read_seed_result(run.workdir, 0)
    np.testing.assert_allclose(
        one.logits["dev"][-1], in_torch(run, tmp_path / "decay_start", 2), atol=2e-4, rtol=1e-3
    )

    model = no_warning(run.workdir / "model")
    np.testing.assert_allclose(
        one.logits["dev"][one.best_epoch()], torch_logits(run, model, "dev"), atol=1e-4
    )
    assert model.config.problem_type == ("regression" if numbers else "single_label_classification")
    if not numbers:
        assert model.config.id2label == {0: "no", 1: "yes"}
        tokenizer = transformers.AutoTokenizer.from_pretrained(run.workdir / "model")
        split = run.data.splits["dev"]
        texts = [split.first, split.second] if split.second else [split.first]
        rows = tokenizer(*texts, padding=True, truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            logits = model(**rows).logits.numpy()
        np.testing.assert_allclose(one.logits["dev"][one.best_epoch()], logits, atol=1e-4)
    card = (run.workdir / "model" / "README.md").read_text()
    assert card.startswith("---\n")
    assert f"`{family}` fine-tuned by dwt-jax on the task mine" in card
    assert len((run.workdir / "submission" / "mine.tsv").read_text().splitlines()) == 6


def test_it_learns(models, task, tmp_path):
    """Whether 'good' is in a text: chance is one half."""
    found = runs.finetune_task(run_of(config_of(task, epochs=12), models / "Bert", tmp_path), ShutdownFlag())
    assert found["best"]["mean"] > 0.9
    losses = [epoch["train_loss"] for epoch in found["seeds"]["0"]["history"]]
    assert losses[-1] < 0.5 * losses[0]


def traced(config, model, workdir):
    """What a run traces anew."""
    for function in (steps.jit_finetune_step, steps.jit_predict):
        function.cache_clear()
    steps.FINETUNE_TRACE_COUNTS.clear()
    runs.finetune_task(run_of(config, model, workdir), ShutdownFlag())
    return dict(steps.FINETUNE_TRACE_COUNTS)


@pytest.mark.slow
def test_seeds_side_by_side_give_what_they_give_alone(models, task, tmp_path):
    """As long as batches have one length, which dropout depends on."""
    found = {}
    for seeds_in_parallel in (1, 3):
        config = config_of(task, dropout=0.1, seeds=[5, 6, 7], seeds_in_parallel=seeds_in_parallel)
        # The test file is predicted by one model.
        expected = {"train": 1, "predict": min(seeds_in_parallel, 2)}
        assert traced(config, models / "Bert", tmp_path / str(seeds_in_parallel)) == expected
        found[seeds_in_parallel] = [
            outputs.read_seed_result(tmp_path / str(seeds_in_parallel), seed) for seed in (5, 6, 7)
        ]
    for alone, together in zip(found[1], found[3], strict=True):
        np.testing.assert_allclose(alone.logits["dev"][-1], together.logits["dev"][-1], atol=5e-3)
    assert not np.allclose(found[1][0].logits["dev"][-1], found[1][1].logits["dev"][-1], atol=5e-3)


def test_a_compilation_a_length_and_no_more(models, task, tmp_path):
    """However many seeds and epochs; and none for another learning rate."""
    config = config_of(task, dropout=0.1, seeds=[1, 2], buckets=2)
    assert traced(config, models / "Bert", tmp_path / "a") == {"train": 2, "predict": 2}
    rate = {"learning_rate": {"kind": "constant", "value": 1e-3}, "eps": 1e-6}
    config = config_of(task, dropout=0.1, buckets=2, optimizer=rate)
    steps.FINETUNE_TRACE_COUNTS.clear()
    runs.finetune_task(run_of(config, models / "Bert", tmp_path / "b"), ShutdownFlag())
    assert not steps.FINETUNE_TRACE_COUNTS


def test_how_many_seeds_fit():
    model = BertConfig(vocab_size=30522)
    recipe = Recipe(seeds=tuple(range(8)))
    counts = [runs.seeds_that_fit(gigabytes * 10**9, model, recipe) for gigabytes in (1, 16, 40, 80, 10000)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 8)
    assert 1 < counts[2] < 8


# Resuming


class Killed(BaseException):
    pass


def killing(monkeypatch, where, name, at):
    """`name` of `where` does its work `at` times, then the process is as good as dead."""
    real, count = getattr(where, name), iter(range(10**6))

    def call(*arguments, **options):
        if next(count) == at:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(where, name, call)


@pytest.fixture(scope="module")
def whole(models, task, tmp_path_factory):
    """A run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("whole")
    config = config_of(task, seeds=[3, 1, 2], dropout=0.1)
    return config, runs.finetune_task(run_of(config, models / "Bert", workdir), ShutdownFlag()), workdir


@pytest.mark.parametrize(
    ("where", "name", "at"),
    [
        (collate, "gather", 30),  # in the middle of a seed
        (outputs, "write_seed", 1),  # model/ is that of a seed whose file is not there
        (outputs, "write_model", 0),
        (outputs, "write_test", 0),
        (outputs, "summarise", 0),
    ],
)
def test_a_run_that_was_killed_ends_with_the_same_numbers(
    models, whole, tmp_path, monkeypatch, where, name, at
):
    config, expected, other = whole
    with monkeypatch.context() as patch:
        killing(patch, where, name, at)
        with pytest.raises(Killed):
            runs.finetune_task(run_of(config, models / "Bert", tmp_path), ShutdownFlag())
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seeds/*.npz")}
    assert not (tmp_path / "results.json").exists()
    assert runs.finetune_task(run_of(config, models / "Bert", tmp_path), ShutdownFlag()) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())  # never repeated
    for place in (
        "model/model.safetensors",
        "model/README.md",
        "predictions/dev-seed1.tsv",
        "submission/mine.tsv",
    ):
        assert (tmp_path / place).read_bytes() == (other / place).read_bytes(), place
    assert json.loads((tmp_path / "results.json").read_text()) == expected


def test_a_signal_stops_between_steps_and_a_finished_run_is_not_repeated(
    models, whole, tmp_path, monkeypatch
):
    config, expected, workdir = whole
    stopping = ShutdownFlag()
    stopping.arm()
    stopping.handle(15, None)
    with pytest.raises(Preempted, match="run the same command"):
        runs.finetune_task(run_of(config, models / "Bert", tmp_path), stopping)
    monkeypatch.setattr(runs, "_train_seeds", None)
    assert runs.finetune_task(run_of(config, models / "Bert", workdir), ShutdownFlag()) == expected


def test_side_by_side_groups_are_done_whole(models, task, tmp_path, monkeypatch):
    """Killed between the files of one group: what ran together runs together again, to the bit."""
    config = config_of(task, seeds=[0, 1, 2], seeds_in_parallel=3, dropout=0.1, buckets=2)
    expected = runs.finetune_task(run_of(config, models / "Bert", tmp_path / "a"), ShutdownFlag())
    with monkeypatch.context() as patch:
        killing(patch, outputs, "write_seed", 1)
        with pytest.raises(Killed):
            runs.finetune_task(run_of(config, models / "Bert", tmp_path / "b"), ShutdownFlag())
    assert runs.finetune_task(run_of(config, models / "Bert", tmp_path / "b"), ShutdownFlag()) == expected


def test_another_run_is_refused(models, whole, tmp_path, task):
    config, _, workdir = whole
    for other, model, says in (
        (config_of(task, seeds=[3, 1, 2], epochs=3), "Bert", "recipe.epochs is 2 there, 3 here"),
        (config, "DistilBert", "run.model_digest is"),
    ):
        with pytest.raises(UserError) as caught:
            run_of(other, models / model, workdir)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files but no run"):
        run_of(config, models / "Bert", tmp_path)
    damaged = workdir / "seeds" / "9.npz"
    damaged.write_bytes(b"PK")
    with pytest.raises(UserError, match="remove it, and the seed is done again"):
        outputs.read_seed_result(workdir, 9)


# Odd runs


def test_a_model_with_fewer_positions_cuts_the_examples(models, task, tmp_path, capsys):
    run = run_of(config_of(task, max_length=128), models / "Roberta", tmp_path)
    assert run.config.recipe.max_length == 24  # of 26, two are the padding's
    assert "has 24 positions, longer examples are cut" in capsys.readouterr().out
    assert run_of(config_of(task, max_length=128), models / "Roberta", tmp_path).config == run.config


def test_a_rate_that_is_too_large_fails_by_name(models, task, tmp_path):
    config = config_of(task, dropout=0.1, optimizer={"learning_rate": {"value": 1e30}, "eps": 1e-6})
    with pytest.raises(TrainingFailed, match="of seed 0 is not finite in epoch 1; the learning rate"):
        runs.finetune_task(run_of(config, models / "Bert", tmp_path), ShutdownFlag())


def test_constant_predictions_count_as_zero_with_a_warning(models, task, tmp_path, capsys):
    """All labels but one example are the same: no rate, no learning."""
    rows = (tmp_path / "t").with_suffix(".tsv")
    rows.write_text("sentence\tlabel\na\tno\nb\tno\nc\tno\n")
    examples = {**task, "dev": str(rows), "metrics": ["matthews", "f1"], "labels": ["no", "yes"]}
    config = config_of(
        examples, optimizer={"learning_rate": {"value": 0.0}, "eps": 1e-6}, dropout=0.1, epochs=1
    )
    run = run_of(config, models / "Bert", tmp_path / "w")
    runs.finetune_task(run, ShutdownFlag())
    assert "counted as 0, since 0/0" in capsys.readouterr().out

    def no_nan(name):
        raise AssertionError(name)

    found = json.loads((run.workdir / "results.json").read_text(), parse_constant=no_nan)
    assert found["best"]["dev"]["dev"]["matthews"] == 0.0
    assert found["best"]["standard_deviation"] is None


# The command


def test_the_command_on_glues_own_files(models, tmp_path, capsys):
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
    said = capsys.readouterr().out
    assert "average over cola, mnli: the mean of the tasks' scores" in said
    summary = json.loads((tmp_path / "w" / "results.json").read_text())
    for which in ("best", "last"):
        scores = [summary["tasks"][name][which]["by_seed"] for name in ("cola", "mnli")]
        assert summary["average"][which]["by_seed"] == pytest.approx(np.mean(scores, axis=0))
        assert summary["average"][which]["mean"] == pytest.approx(np.mean(scores))
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
    assert no_warning(tmp_path / "w" / "cola" / "model").config.id2label == {
        0: "unacceptable",
        1: "acceptable",
    }
    assert main(["export", f"--model={tmp_path / 'w' / 'cola'}", f"--out={tmp_path / 'out'}"]) == 0
    assert no_warning(tmp_path / "out").config.label2id == {"unacceptable": 0, "acceptable": 1}
    assert "on the task cola" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert main(arguments) == 0
    assert "already finished" in capsys.readouterr().out
    assert main([*arguments, "--config.recipe.epochs=2"]) == 2
    assert "recipe.epochs is 1 there, 2 here" in capsys.readouterr().err
    # Another task in the same folder: its results join those that are there.
    later = [argument.replace("cola,mnli", "rte") for argument in arguments]
    assert main(later) == 0
    joined = json.loads((tmp_path / "w" / "results.json").read_text())
    assert set(joined["tasks"]) == {"cola", "mnli", "rte"}
    assert all(joined["tasks"][name] == summary["tasks"][name] for name in ("cola", "mnli"))
    other = [argument.replace(str(models / "Bert"), str(models / "Roberta")) for argument in later]
    assert main([a.replace("rte", "stsb") for a in other]) == 0
    of_this_model = json.loads((tmp_path / "w" / "results.json").read_text())
    assert set(of_this_model["tasks"]) == {"stsb"}
    (tmp_path / "glue" / "RTE" / "dev.tsv").unlink()
    capsys.readouterr()
    assert main([a.replace("=rte", "=cola,rte").replace("/w", "/new") for a in later]) == 2
    assert "dev.tsv: no such file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_submitted_numbers_stay_within_glues_bounds(tmp_path):
    from dwt_jax.finetune.datasets import ExampleSplit, TaskData

    split = ExampleSplit(["a"] * 3, None, None, ["0", "1", "2"])
    data = TaskData({}, (), ("pearson",), (), {"test": "STS-B.tsv"}, (0, 5))
    outputs.write_test_predictions(
        tmp_path, "stsb", "test", split, data, np.array([[-0.5], [3.14159], [7.0]])
    )
    lines = (tmp_path / "submission" / "STS-B.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", "0\t0.000", "1\t3.142", "2\t5.000"]


def test_submissions_are_in_the_order_of_the_test_file(tmp_path):
    """TFDS has shuffled it. A file of one's own keeps its order, whatever its names."""
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


def test_names_with_tabs_keep_their_line(tmp_path):
    """JSON may hold them; a file with divided columns cannot."""
    from dwt_jax.finetune.datasets import ExampleSplit, TaskData

    split = ExampleSplit(["a", "b"], None, np.array([0, 1], np.int32), ["x\ty", "z\nw"])
    one = outputs.SeedResult(0, [{"dev": {"dev": {"score": 1.0}}}], {"dev": [np.eye(2)]})
    outputs.write_dev_predictions(tmp_path, TaskData({"dev": split}, ("n\to", "yes"), ("accuracy",)), [one])
    lines = (tmp_path / "predictions" / "dev-seed0.tsv").read_text().splitlines()
    assert lines == ["index\tprediction\tlabel", "x y\tn o\tn o", "z w\tyes\tyes"]


def test_an_average_of_tasks_with_other_seeds_has_no_spread():
    one = {"metrics": ["f1"], "model_of_seed": 0, "examples": {}, "seeds": {"0": {}, "1": {}}}
    one |= {which: {"by_seed": [0.5, 0.7], "mean": 0.6, "dev": {}} for which in ("best", "last")}
    other = {
        **one,
        "seeds": {"0": {}},
        **{which: {"by_seed": [0.8], "mean": 0.8} for which in ("best", "last")},
    }
    found = runner.summarize_tasks({"a": one, "b": other})["average"]["best"]
    assert (found["mean"], found["standard_deviation"]) == (pytest.approx(0.7), None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task=rta"], "no task 'rta'"),
        (["--task=rte"], "tfds 'glue/rte'"),
        (["--model=nowhere"], "nowhere: no such directory"),
        (["--config.recipe.epoch=1"], "unknown key 'recipe.epoch'; did you mean 'recipe.epochs'"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, capsys, arguments, says, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    given = {"--model": f"--model={models / 'Bert'}", "--workdir": f"--workdir={tmp_path / 'w'}"}
    given |= {argument.partition("=")[0]: argument for argument in arguments}
    assert main(["finetune", *given.values()]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_killed_and_stopped_from_outside(models, task, tmp_path):
    """As a user has it: kill -9 in the second seed, SIGTERM in the third, then to the end."""
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
    for seed, number, status in ((0, signal.SIGKILL, -9), (1, signal.SIGTERM, 75)):
        process = start(*arguments, f"--workdir={folder}")
        while not (folder / "mine" / "seeds" / f"{seed}.npz").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == status
    assert not (folder / "mine" / "results.json").exists()
    again = dwt(*arguments, f"--workdir={folder}")
    assert again.returncode == 0, again.stderr
    for file in ("results.json", "mine/results.json", "mine/model/model.safetensors", "submission/mine.tsv"):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
