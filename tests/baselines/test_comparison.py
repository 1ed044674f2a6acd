import copy

import numpy as np
import pytest
from trl import SFTConfig, SFTTrainer

from wmss_trl.baselines.comparison import compare_with_baselines


def test_baselines_start_from_m1_and_run_as_long_as_wmss(make_model, make_args, tokenizer, dataset):
    model = make_model()
    evaluated = []

    def evaluate(model):
        evaluated.append(model)
        return np.zeros(3, dtype=bool)

    results, sampler = compare_with_baselines(
        lambda: copy.deepcopy(model),
        make_args(num_train_epochs=3, sft_epochs=2, lr_scheduler_type="linear"),
        dataset,
        dataset.select(range(5)),
        tokenizer,
        evaluate,
    )
    rows = {result.name: result for result in results}
    assert list(rows) == ["M0", "M1", "WMSS", "SFT, lr x 0.5", "SFT, lr x 1", "SFT, lr x 2", "temperature only"]
    phase_1, total = 20, 26
    for result in results[2:]:
        assert [step for step, _ in result.loss] == list(range(1, total + 1))
        assert result.loss[:phase_1] == rows["WMSS"].loss[:phase_1]
    assert len({result.loss[phase_1 + 1] for result in results[2:]}) == 5
    assert len(sampler) == round(0.63 * 37)

    # Continued SFT at the same learning rate is SFTTrainer run through, not a restart
    sft = SFTTrainer(
        copy.deepcopy(model),
        make_args(SFTConfig, max_steps=total, lr_scheduler_type="linear"),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(5)),
        processing_class=tokenizer,
    )
    sft.train()
    assert rows["SFT, lr x 1"].loss == [(e["step"], e["loss"]) for e in sft.state.log_history if "loss" in e]
    # The yardstick agrees with the trainer's own evaluation
    assert rows["SFT, lr x 1"].metrics["nll"] == pytest.approx(sft.evaluate()["eval_loss"], rel=1e-5)
    assert rows["M0"].metrics["amplification"] == pytest.approx(1)
