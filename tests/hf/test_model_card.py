import pytest

from dwt_jax.config import Config, Mlm, Schedule, Train
from dwt_jax.hf.model_card import run_card


@pytest.mark.parametrize(
    ("probability", "text"),
    [
        (Schedule(value=0.15), "15% of the tokens predicted"),
        (
            Schedule("linear", 0.4, 0.15),
            "40% to 15% (linear, from 0% to 100% of the steps) of the tokens predicted",
        ),
        (
            Schedule("piecewise", 0.4, boundaries=(0.5, 0.8), boundary_values=(0.3, 0.15)),
            "40%, 30% from 50% of the steps on, 15% from 80% of the steps on of the tokens predicted",
        ),
        (
            Schedule("warmup_stable_decay", 0.4, 0.2, decay_start=0.8, decay_type="1-sqrt"),
            "40% to 20% (warmup_stable_decay by 1-sqrt, from 80% to 100% of the steps)",
        ),
    ],
)
def test_masking_rate_of_run_card(probability, text):
    assert text in run_card(Config(mlm=Mlm(probability)), [], {}, 3)


def test_rows_of_run_card_with_batch_ramp():
    """20 of 100 steps: 15 of 4,000 rows and 5 of 8,000; 100,000 rows of 128 positions."""
    train = Train(steps=100, batch_size=16000, batch_ramp=(4000, 8000), batch_ramp_fraction=0.3)
    card = run_card(Config(train=train), [], {}, 20)
    assert "* 20 of 100 steps of 4000 rows to step 15, 8000 rows to step 30, then 16000 rows of 128" in card
    assert "(12.8M positions)" in card
