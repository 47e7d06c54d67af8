"""A naive, one-token-at-a-time reading of what masking promises, and statistics over many rows."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dwt_jax.config import Config, Data, Mlm, Schedule, Train
from dwt_jax.data.batch import Batch
from dwt_jax.errors import UserError
from dwt_jax.objectives import mlm as mlm_module
from dwt_jax.objectives.mlm import MaskingVocab, MlmObjective, make_targets, predictions_per_row
from dwt_jax.objectives.schedules import schedule_values
from dwt_jax.objectives.targets import row_keys

V, L = 60, 40
PAD, UNK, CLS, SEP, MASK = SPECIAL = (0, 1, 2, 3, 4)
CONTINUES = np.arange(V) >= 40  # tokens 40 to 59 go on with a word
PLAIN = MaskingVocab(V, MASK, SPECIAL)
WORDS = MaskingVocab(V, MASK, SPECIAL, np.packbits(CONTINUES).tobytes())

pytestmark = pytest.mark.usefixtures("strict_ranks")


@functools.partial(jax.jit, static_argnums=(3, 4))
def masked_of(tokens, segments, keys, mlm, vocabulary):
    return make_targets(Batch(tokens, segments), keys, MlmObjective(mlm, vocabulary))


keys_of = jax.jit(row_keys)


def draw(tokens, segments, mlm=Mlm(), vocabulary=PLAIN, seed=0, step=0, rows=None):
    rows = np.arange(len(tokens)) if rows is None else rows
    masked = masked_of(tokens, segments, keys_of(seed, step, rows), mlm, vocabulary)
    return jax.tree.map(np.asarray, masked)


def make_rows(rows, seed=0, full=False):
    """Rows of one to three documents [CLS] … [SEP], then padding."""
    random = np.random.default_rng(seed)
    tokens, segments = np.zeros((2, rows, L), np.int32)
    for row in range(rows):
        end = L if full else int(random.integers(3, L + 1))
        cuts = sorted({0, end, *random.integers(0, end, random.integers(0, 3)).tolist()})
        for segment, (a, b) in enumerate(itertools.pairwise(cuts), 1):
            tokens[row, a:b] = random.integers(5, V, b - a)
            tokens[row, a] = CLS
            tokens[row, b - 1] = SEP
            segments[row, a:b] = segment
    return tokens, segments


def rows_of(masked):
    return zip(masked.inputs, masked.positions, masked.labels, masked.weights, strict=True)


@pytest.mark.parametrize(
    "mlm", [Mlm(), Mlm(probability=Schedule(value=0.4), whole_word=True)], ids=["tokens", "words"]
)
@pytest.mark.parametrize("seed", range(4))
def test_what_holds_in_every_row(mlm, seed):
    tokens, segments = make_rows(64, seed)
    masked = draw(tokens, segments, mlm, WORDS if mlm.whole_word else PLAIN, seed=seed)
    assert (
        masked.positions.shape
        == masked.labels.shape
        == masked.weights.shape
        == (64, round(mlm.probability.value * L))
    )
    for row, (after, positions, labels, weights) in enumerate(rows_of(masked)):
        before = tokens[row]
        assert len(set(positions)) == len(positions)
        assert ((positions >= 0) & (positions < L)).all()
        assert set(weights) <= {0, 1}
        chosen = positions[weights == 1]
        assert (np.sort(weights)[::-1] == weights).all()  # fillers last
        np.testing.assert_array_equal(labels, before[positions])
        assert not np.isin(before[chosen], SPECIAL).any()
        assert (segments[row][chosen] > 0).all()
        unchosen = np.setdiff1d(np.arange(L), chosen)
        np.testing.assert_array_equal(after[unchosen], before[unchosen])
        candidates = ((segments[row] > 0) & ~np.isin(before, SPECIAL)).sum()
        wanted = min(max(1, round(mlm.probability.value * (segments[row] > 0).sum())), candidates)
        if mlm.whole_word:
            assert len(chosen) <= wanted
        else:
            assert len(chosen) == wanted


@pytest.mark.parametrize(("length", "rate"), [(150, 0.07), (128, 0.15)])
def test_a_full_row_has_exactly_its_share(length, rate):
    """0.07 · 150 is 10.500000000000002 in float64 and 10.5 in float32."""
    mlm = Mlm(probability=Schedule(value=rate))
    tokens = np.full((1, length), 9)
    masked = masked_of(tokens, np.ones_like(tokens), row_keys(0, 0, np.arange(1)), mlm, PLAIN)
    assert predictions_per_row(MlmObjective(mlm, PLAIN), length) == round(rate * length)
    assert masked.weights.shape == (1, round(rate * length))
    assert masked.weights.all()


LENGTHS = [*range(3, L + 1), *range(3, L + 1)]  # two rows of each number of tokens


def counted(config, step):
    """Targets of rows of each length at a step of a run, and the run's number of predictions by length."""
    tokens = np.where(np.arange(L) < np.array(LENGTHS)[:, None], 9, PAD)
    objective = mlm_module.abstract_objective(config, V)
    counts = mlm_module.scheduled_predictions(config)
    keys = keys_of(3, step, np.arange(len(tokens)))
    batch = Batch(tokens, (tokens > 0).astype(np.int32))
    return jit_targets(batch, keys, objective, None if counts is None else counts[step])


jit_targets = jax.jit(make_targets, static_argnums=2)
RUN_LENGTHS = st.sampled_from([1, 10, 333])  # few: each is a compilation
rates = st.floats(0.05, 0.9) | st.sampled_from([0.15, 0.3, 0.4, 0.07, 0.45])


@st.composite
def rate_schedules(draw_from, highest=None):
    """Schedules of any kind; with a highest value if one is given."""
    rate = rates if highest is None else st.just(highest) | st.floats(0.05, highest)
    kind = draw_from(st.sampled_from(["linear", "cosine", "warmup_stable_decay", "piecewise", "stages"]))
    values = draw_from(st.permutations([highest or draw_from(rate), draw_from(rate), draw_from(rate)]))
    start = draw_from(st.floats(0, 0.9))
    if kind == "stages":
        boundaries = (start / 2 + 0.01, start / 2 + 0.4)
        return Schedule("piecewise", values[0], boundaries=boundaries, boundary_values=tuple(values[1:]))
    shape = draw_from(st.sampled_from(["linear", "1-sqrt"])) if kind == "warmup_stable_decay" else "linear"
    ends = values[:2] if highest is None else sorted(values)[1:]
    return Schedule(kind, *draw_from(st.permutations(ends)), decay_start=start, decay_type=shape)


def scheduled(schedule, steps, whole_word=False):
    mlm = Mlm(schedule, whole_word=whole_word)
    return Config(mlm=mlm, data=Data(sequence_length=L), train=Train(steps=steps))


@given(rate_schedules(), RUN_LENGTHS)
@settings(max_examples=40, deadline=None)
def test_numbers_of_predictions_are_pythons_rounding_of_the_rate(schedule, steps):
    found = mlm_module.scheduled_predictions(scheduled(schedule, steps))[:]
    stages = schedule.stage_values()
    values = schedule_values(schedule, steps, np.float64).clip(min(stages), max(stages))
    assert found.max() <= max(1, round(max(stages) * L))
    for step in {0, steps // 2, steps - 1}:
        assert found[step].tolist() == [max(1, round(float(values[step]) * n)) for n in range(L + 1)]


@given(st.data(), st.sampled_from([(0.45, False), (0.4, True)]), RUN_LENGTHS)
@settings(max_examples=30, deadline=None)
def test_a_row_has_exactly_its_predictions_at_every_step_of_a_schedule(data, highest, steps):
    highest_rate, whole_word = highest  # two of them, for the same reason
    schedule = data.draw(rate_schedules(highest_rate))
    step = data.draw(st.integers(0, steps - 1) | st.sampled_from([0, steps - 1]))
    rate = min(float(schedule_values(schedule, steps, np.float64)[step]), highest_rate)
    targets = counted(scheduled(schedule, steps, whole_word), step)
    assert targets.weights.shape == (len(LENGTHS), round(highest_rate * L))
    expected = [max(1, round(rate * n)) for n in LENGTHS]  # words of one token, so whole_word is exact too
    np.testing.assert_array_equal(targets.weights.sum(1), expected)


@pytest.mark.parametrize(("rate", "whole_word"), [(0.15, False), (0.45, False), (0.4, True)])
def test_a_schedule_that_does_not_change_has_the_targets_of_a_number(rate, whole_word):
    number, unchanging = (
        scheduled(schedule, 7, whole_word)
        for schedule in (Schedule(value=rate), Schedule("linear", rate, rate))
    )
    assert mlm_module.scheduled_predictions(number) is None
    assert mlm_module.abstract_objective(number, V) == mlm_module.abstract_objective(unchanging, V)
    for step in range(7):
        jax.tree.map(np.testing.assert_array_equal, counted(number, step), counted(unchanging, step))


def test_a_rounding_error_of_the_interpolation_takes_no_row_beyond_its_room():
    """(0.1125 − 0.04) + 0.04 is 0.11250000000000002: of 40 tokens 4.5 round to 4, more to 5."""
    schedule = Schedule("linear", 0.1125, 0.04)
    assert schedule_values(schedule, 1, np.float64)[0] > 0.1125
    assert mlm_module.scheduled_predictions(scheduled(schedule, 1))[0][L] == round(0.1125 * L) == 4


def test_numbers_of_predictions_of_several_steps():
    config = scheduled(Schedule("piecewise", 0.4, 0.15, decay_start=0.5), 4)
    counts = mlm_module.scheduled_predictions(config)
    table = [[max(1, round(rate * n)) for n in range(L + 1)] for rate in (0.4, 0.4, 0.15, 0.15)]
    np.testing.assert_array_equal(counts[:], table)
    np.testing.assert_array_equal(counts[np.array([3, 0])], [table[3], table[0]])
    np.testing.assert_array_equal(counts[2], table[2])
    assert counts[2].dtype == np.int32


def test_schedules_with_one_highest_rate_share_the_objective_and_evaluation_has_its_own():
    from dwt_jax.data.tokenizer import Vocabulary

    words = tuple("PUCSMabc")
    vocabulary = Vocabulary(words, 0, 1, 2, 3, 4, SPECIAL, np.zeros(8, bool))
    falling, rising, number = (
        mlm_module.make_objective(Config(mlm=Mlm(schedule)), vocabulary)
        for schedule in (Schedule("linear", 0.4, 0.15), Schedule("piecewise", 0.1, 0.4), Schedule(value=0.4))
    )
    assert falling == rising == number
    assert falling.probability == 0.4
    assert mlm_module.make_evaluation_objective(vocabulary).probability == 0.15


def test_a_row_without_candidates_has_no_prediction():
    tokens = np.zeros((64, L), np.int32)
    tokens[1, :2] = CLS, SEP
    tokens[2, :3] = CLS, 9, SEP
    segments = (tokens > 0).astype(np.int32)
    for mlm, vocabulary in ((Mlm(), PLAIN), (Mlm(probability=Schedule(value=0.4), whole_word=True), WORDS)):
        masked = draw(tokens, segments, mlm, vocabulary)
        np.testing.assert_array_equal(masked.weights.sum(1)[:4], [0, 0, 1, 0])
        assert masked.labels[2, 0] == 9
        np.testing.assert_array_equal(masked.inputs[:2], tokens[:2])


@pytest.fixture(scope="module")
def many():
    """(tokens, masked) of 6000 full rows with specials in front and at the end."""
    random = np.random.default_rng(7)
    tokens = random.integers(5, V, (6000, L)).astype(np.int32)
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    return tokens, draw(tokens, np.ones_like(tokens), seed=3)


def test_eighty_ten_ten(many):
    masked = many[1]
    seen = np.take_along_axis(masked.inputs, masked.positions, 1)
    n = seen.size
    assert masked.weights.all()
    for share, found in (
        (0.8, seen == MASK),
        (0.1 * (V - 6) / (V - 5), (seen != MASK) & (seen != masked.labels)),
        (0.1 + 0.1 / (V - 5), seen == masked.labels),  # kept, or replaced by itself
    ):
        assert stats.binomtest(int(found.sum()), n, share).pvalue > 1e-4


@pytest.mark.parametrize(("replace", "random"), [(0.0, 1.0), (0.5, 0.5)])
def test_other_shares(many, replace, random):
    tokens = many[0]
    masked = draw(tokens, np.ones_like(tokens), Mlm(mask_token_share=replace, random_token_share=random))
    seen = np.take_along_axis(masked.inputs, masked.positions, 1)
    assert stats.binomtest(int((seen == MASK).sum()), seen.size, replace).pvalue > 1e-4
    changed = ((seen != MASK) & (seen != masked.labels)).sum()
    assert stats.binomtest(int(changed), seen.size, random * (V - 6) / (V - 5)).pvalue > 1e-4


def test_random_replacements_are_uniform_over_ordinary_tokens(many):
    tokens = many[0]
    masked = draw(tokens, np.ones_like(tokens), Mlm(mask_token_share=0.0, random_token_share=1.0), seed=5)
    counts = np.bincount(np.take_along_axis(masked.inputs, masked.positions, 1).ravel(), minlength=V)
    assert not counts[list(SPECIAL)].any()
    assert stats.chisquare(counts[5:]).pvalue > 1e-4


def test_positions_are_uniform(many):
    counts = np.bincount(many[1].positions.ravel(), minlength=L)
    assert counts[0] == counts[-1] == 0
    # Without replacement in a row the counts vary less than independent ones: the test is a safe bound.
    assert stats.chisquare(counts[1:-1]).pvalue > 1e-4
    # Nor do the positions come in any order within a row (a tile or a share of them is fair too).
    assert stats.chisquare(np.bincount(many[1].positions[:, 0], minlength=L)[1:-1]).pvalue > 1e-4


def test_whether_a_token_is_masked_does_not_depend_on_where_it_stands(many):
    """Action and position are drawn with keys of their own."""
    seen = np.take_along_axis(many[1].inputs, many[1].positions, 1)
    left = many[1].positions < L // 2
    table = [[(seen[side] == MASK).sum(), (seen[side] != MASK).sum()] for side in (left, ~left)]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_only_seed_step_and_row_matter():
    tokens, segments = make_rows(64)
    for mlm, vocabulary in ((Mlm(), PLAIN), (Mlm(probability=Schedule(value=0.4), whole_word=True), WORDS)):
        whole = draw(tokens, segments, mlm, vocabulary, seed=1, step=5)
        rows = np.random.default_rng(0).permutation(64)
        for part in (rows, rows[:8])[: 1 if mlm.whole_word else 2]:
            some = draw(tokens[part], segments[part], mlm, vocabulary, seed=1, step=5, rows=part)
            for a, b in zip(*map(jax.tree.leaves, (some, whole)), strict=True):
                np.testing.assert_array_equal(a, b[part])
        for other in ({"seed": 2, "step": 5}, {"seed": 1, "step": 6}):
            moved = draw(tokens, segments, mlm, vocabulary, **other)
            assert (moved.positions != whole.positions).any(1).mean() > 0.8


def test_rows_that_are_alike_are_masked_differently():
    tokens = np.full((64, L), 9, np.int32)
    masked = draw(tokens, np.ones_like(tokens))
    assert len({tuple(sorted(positions)) for positions in masked.positions}) == 64


def test_the_same_masks_for_ever(golden):
    """A run that is resumed with another version of jax, or of this, must not see other masks."""
    tokens, segments = make_rows(64)
    golden(
        "masks.json", [x[:3].tolist() for x in jax.tree.leaves(draw(tokens, segments, seed=20230518, step=7))]
    )


def words_of(tokens, segments):
    """Lists of positions, the naive way: a continuation joins the token before it."""
    words = []
    for i, token in enumerate(tokens):
        if segments[i] == 0 or token in SPECIAL:
            continue
        joins = CONTINUES[token] and words and words[-1][-1] == i - 1 and segments[i] == segments[i - 1]
        if joins:
            words[-1].append(i)
        else:
            words.append([i])
    return words


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_whole_words(rate):
    tokens, segments = make_rows(64, seed=11)
    # A continuation right after [CLS], or at a segment's beginning, starts a word of its own.
    tokens[:20, 1] = 45
    masked = draw(tokens, segments, Mlm(probability=Schedule(value=rate), whole_word=True), WORDS)
    broken = 0
    for row, (_, positions, _, weights) in enumerate(rows_of(masked)):
        chosen = set(positions[weights == 1].tolist())
        wanted = max(1, round(rate * (segments[row] > 0).sum()))
        words = [
            part
            for word in words_of(tokens[row], segments[row])
            for part in ([word] if len(word) <= min(8, wanted) else [[i] for i in word])
        ]
        taken = [word for word in words if chosen & set(word)]
        assert chosen == {i for word in taken for i in word}
        skipped = [len(word) for word in words if not chosen & set(word)]
        assert len(chosen) <= wanted
        if skipped:  # each of them would have been one too many
            assert wanted - len(chosen) < min(skipped)
        broken += wanted != len(chosen)
    assert broken < 32


def test_words_are_chosen_without_regard_to_place():
    """Words of one to three tokens, all as likely as each other where there is room."""
    lengths = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3]  # 36 tokens
    row = [CLS, *(token for n in lengths for token in [9, 45, 46][:n]), SEP, PAD, PAD]
    tokens = np.tile(np.array(row, np.int32), (5000, 1))
    segments = (tokens != PAD).astype(np.int32)
    masked = draw(tokens, segments, Mlm(probability=Schedule(value=0.5), whole_word=True), WORDS)
    counts = np.zeros(L, int)
    np.add.at(counts, masked.positions[masked.weights == 1], 1)
    starts = np.flatnonzero(np.array(row) == 9)
    for size in (1, 2, 3):
        same = counts[starts[np.array(lengths) == size]]
        assert stats.chisquare(same).pvalue > 1e-4


def test_text_without_spaces_is_masked_a_token_at_a_time():
    """Each row is one long word, as Chinese in byte-level BPE: the masks are as many as without words."""
    random = np.random.default_rng(3)
    tokens = random.integers(40, V, (2000, L)).astype(np.int32)
    tokens[:, 0], tokens[:, -1], tokens[0, 12:] = CLS, SEP, PAD
    masked = draw(tokens, (tokens != PAD).astype(np.int32), Mlm(whole_word=True), WORDS)
    assert masked.weights.sum(1).tolist() == [2, *[6] * 1999]  # 15 % of 12 and of 40
    counts = np.bincount(masked.positions[1:].ravel(), minlength=L)
    assert stats.chisquare(counts[1:-1]).pvalue > 1e-4


def test_whole_words_need_a_vocabulary_that_marks_them():
    from dwt_jax.data.tokenizer import Vocabulary

    words = tuple("PUCSMabc")
    vocabulary = Vocabulary(words, 0, 1, 2, 3, 4, SPECIAL, np.zeros(8, bool), marks_words=False)
    mlm_module.make_objective(Config(), vocabulary)
    with pytest.raises(UserError, match=r"mlm\.whole_word is True, .* expected False"):
        mlm_module.make_objective(Config(mlm=Mlm(whole_word=True)), vocabulary)


def test_no_continuations_means_single_tokens():
    vocabulary = MaskingVocab(V, MASK, SPECIAL, np.packbits(np.zeros(V, bool)).tobytes())
    tokens, segments = make_rows(64, seed=2)
    masked = draw(tokens, segments, Mlm(whole_word=True), vocabulary)
    for row in range(64):
        candidates = ((segments[row] > 0) & ~np.isin(tokens[row], SPECIAL)).sum()
        wanted = min(max(1, round(0.15 * (segments[row] > 0).sum())), candidates)
        assert masked.weights[row].sum() == wanted


def test_tokens_of_a_vocabulary():
    from dwt_jax.data.tokenizer import Vocabulary

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "c")
    continuation = np.array([word.startswith("##") for word in words])
    vocabulary = Vocabulary(words, 0, 1, 2, 3, 4, (0, 1, 2, 3, 4), continuation)
    tokens = MaskingVocab.from_vocabulary(vocabulary, whole_word=True)
    assert tokens[:3] == (8, 4, (0, 1, 2, 3, 4))
    np.testing.assert_array_equal(tokens.continuation(), continuation)
    assert hash(tokens) == hash(MaskingVocab.from_vocabulary(vocabulary, whole_word=True))
    assert MaskingVocab.from_vocabulary(vocabulary, whole_word=False).continuations == b""
